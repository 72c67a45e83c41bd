#include "cpu/simd/portable.h"
//
#include "cpu/kernels.h"

const lrqk::KernelTable lrqk::kPortableKernels = lrqk::portable::kKernels;
