#include "cpu/simd/avx2.h"
//
#include "cpu/kernels.h"

const lrqk::KernelTable lrqk::kAvx2Kernels = lrqk::avx2::kKernels;
