// What the CPU bindings share.
#pragma once

#include <optional>

#include "bindings/checks.h"
#include "cpu/dispatch.h"

namespace lrqk {

// Kernels run on torch's threads.
Parallel torch_threads();

inline const KernelTable& kernels_of(int64_t instruction_set) {
  const KernelTable* found = kernel_table(static_cast<int>(instruction_set));
  STD_TORCH_CHECK(found, "this machine cannot run instruction set ", instruction_set);
  return *found;
}

inline void check_head_size(int64_t head_size, const KernelTable& kernels) {
  STD_TORCH_CHECK(head_size % (2 * kernels.vector_elements) == 0 && head_size <= kMaxHeadSize, "the head size is ",
                  head_size, ", but must be a multiple of ", 2 * kernels.vector_elements, ", at most ", kMaxHeadSize);
}

inline void check_cpu(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be in CPU memory");
  check(tensor, name, dims, dtype);
}

inline HostPages host_pages(const Tensor& host, ScalarType dtype) {
  check_host_pages(host, dtype);
  return {host.data_ptr(), host.stride(0), host.stride(1)};
}

inline Logits logits_of(double cap, const std::optional<Tensor>& sinks, int64_t heads) {
  Logits logits{static_cast<float>(cap), nullptr};
  if (sinks) {
    logits.sinks = contiguous<float>(*sinks, "sinks", 1, ScalarType::Float);
    STD_TORCH_CHECK(sinks->size(0) == heads, "there must be one sink per head");
  }
  return logits;
}

}  // namespace lrqk
