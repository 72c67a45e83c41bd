#include "cpu/simd/avx512.h"
//
#include "cpu/kernels.h"

const lrqk::KernelTable lrqk::kAvx512Kernels = lrqk::avx512::kKernels;
