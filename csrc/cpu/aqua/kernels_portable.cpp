#include "cpu/simd/portable.h"
//
#include "cpu/aqua/kernels.h"

namespace lrqk {
const AquaKernelTable kAquaPortableKernels = {portable::decode, portable::append};
}  // namespace lrqk
