#include "simd_avx512.h"
//
#include "kernels.h"

namespace lrqk {
const KernelTable kAvx512Kernels = {avx512::decode, avx512::decode, nullptr, nullptr, nullptr, avx512::W};
}  // namespace lrqk
