#include "cpu/simd/avx512.h"
//
#include "cpu/aqua/kernels.h"

namespace lrqk {
const AquaKernelTable kAquaAvx512Kernels = {avx512::decode, avx512::append};
}  // namespace lrqk
