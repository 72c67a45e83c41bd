#include "cpu/simd/avx512.h"
//
#include "cpu/kernels.h"

namespace lrqk {
const KernelTable kAvx512Kernels = {avx512::decode, avx512::append, avx512::seal, avx512::prefill, avx512::W};
}  // namespace lrqk
