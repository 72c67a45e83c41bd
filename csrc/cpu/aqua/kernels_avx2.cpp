#include "cpu/simd/avx2.h"
//
#include "cpu/aqua/kernels.h"

namespace lrqk {
const AquaKernelTable kAquaAvx2Kernels = {avx2::decode, avx2::append};
}  // namespace lrqk
