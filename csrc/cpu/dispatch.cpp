#include "cpu/dispatch.h"

namespace lrqk {

const char* instruction_set_name(int index) {
  const char* names[kNumInstructionSets] = {"avx512", "avx2", "portable"};
  return names[index];
}

const KernelTable* kernel_table(int index) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (index == 0) {
    const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512vnni");
    return is_supported ? &kAvx512Kernels : nullptr;
  }
  if (index == 1) {
    const bool is_supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return is_supported ? &kAvx2Kernels : nullptr;
  }
#endif
  return index == 2 ? &kPortableKernels : nullptr;
}

}  // namespace lrqk
