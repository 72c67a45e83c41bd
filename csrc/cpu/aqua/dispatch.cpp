#include "cpu/aqua/args.h"
#include "cpu/dispatch.h"

namespace lrqk {

const AquaKernelTable* aqua_kernel_table(int index) {
  if (!kernel_table(index)) return nullptr;
#if defined(__x86_64__)
  if (index == 0) return &kAquaAvx512Kernels;
  if (index == 1) return &kAquaAvx2Kernels;
#endif
  return &kAquaPortableKernels;
}

}  // namespace lrqk
