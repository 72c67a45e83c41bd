#include "simd_portable.h"
//
#include "kernels.h"

namespace lrqk {
const KernelTable kPortableKernels = {portable::decode, portable::decode, nullptr, nullptr, nullptr, portable::W};
}  // namespace lrqk
