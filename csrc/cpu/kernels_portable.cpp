#include "cpu/simd/portable.h"
//
#include "cpu/kernels.h"

namespace lrqk {
const KernelTable kPortableKernels = {portable::decode, portable::append, portable::seal, portable::prefill, portable::W};
}  // namespace lrqk
