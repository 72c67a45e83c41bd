#include "cpu/simd/avx2.h"
//
#include "cpu/kernels.h"

namespace lrqk {
const KernelTable kAvx2Kernels = {avx2::decode, avx2::append, avx2::seal, avx2::prefill, avx2::W};
}  // namespace lrqk
