// The CPU operators of torch.ops.vllm_lrqk that no method owns, on libtorch's stable ABI. Shapes are those of
// cpu/args.h. A method's operators are in a file of their own, such as cpu_lrqk.cpp.
#include "bindings/cpu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

namespace lrqk {
namespace {

void run_parallel(int64_t n, void (*task)(int64_t, void*), void* context) {
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) task(i, context);
  };
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

void cpu_append(const Tensor key, const Tensor value, Tensor host, const Tensor slot_mapping, int64_t instruction_set) {
  const ScalarType dtype = host.scalar_type();
  check_cpu(key, "key", 3, dtype);
  check_cpu(value, "value", 3, dtype);
  check_cpu(slot_mapping, "slot_mapping", 1, ScalarType::Long);
  const HostPages pages = host_pages(host, dtype);
  AppendArgs a{};
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.key_token_stride = key.stride(0);
  a.key_head_stride = key.stride(1);
  a.value_token_stride = value.stride(0);
  a.value_head_stride = value.stride(1);
  a.host = host.data_ptr();
  a.host_page_stride = pages.page_stride;
  a.host_head_stride = pages.head_stride;
  a.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  a.tokens = slot_mapping.size(0);
  a.kv_heads = host.size(1);
  a.page_size = host.size(2);
  a.head_size = host.size(4);
  a.element_bytes = static_cast<int64_t>(host.element_size());
  STD_TORCH_CHECK(key.size(0) >= a.tokens && value.size(0) >= a.tokens, "there are more slots than keys or values");
  kernels_of(instruction_set).append(a, torch_threads());
}

void cpu_prefill(const Tensor query, const Tensor key, const Tensor value, const Tensor host, const Tensor pages,
                 int64_t context_len, int64_t window, double scale, double cap, std::optional<Tensor> sinks,
                 Tensor output, int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  const ScalarType dtype = query.scalar_type();
  check_cpu(query, "query", 3, dtype);
  check_cpu(key, "key", 3, dtype);
  check_cpu(value, "value", 3, dtype);
  check_cpu(output, "output", 3, dtype);
  check_cpu(pages, "pages", 1, ScalarType::Int);
  PrefillArgs p{};
  p.query = query.data_ptr();
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.value_token_stride = value.stride(0);
  p.value_head_stride = value.stride(1);
  p.host = host_pages(host, dtype);
  p.pages = static_cast<const int32_t*>(pages.data_ptr());
  p.output = output.data_ptr();
  p.output_token_stride = output.stride(0);
  p.output_head_stride = output.stride(1);
  p.tokens = query.size(0);
  p.context_len = context_len;
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  p.head_size = query.size(2);
  p.page_size = host.size(2);
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.logits = logits_of(cap, sinks, p.heads);
  p.dtype = dtype_of<DType>(query);
  check_heads(p.heads, p.kv_heads, kMaxGroup);
  check_head_size(p.head_size, kernels);
  STD_TORCH_CHECK(pages.size(0) * p.page_size >= context_len, "pages do not cover the context");
  kernels.prefill(p, torch_threads());
}

void cpu_window_decode(const Tensor query, const Tensor rows, const Tensor block_table, const Tensor seq_lens,
                       int64_t window, double scale, double cap, std::optional<Tensor> sinks, Tensor output,
                       int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  const ScalarType dtype = query.scalar_type();
  check_cpu(query, "query", 3, dtype);
  check_cpu(output, "output", 3, dtype);
  check_cpu(block_table, "block_table", 2, ScalarType::Int);
  check_cpu(seq_lens, "seq_lens", 1, ScalarType::Int);
  WindowArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.rows = host_pages(rows, dtype);
  a.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  a.output = output.data_ptr();
  a.output_request_stride = output.stride(0);
  a.output_head_stride = output.stride(1);
  a.requests = query.size(0);
  a.heads = query.size(1);
  a.kv_heads = rows.size(1);
  a.head_size = query.size(2);
  a.page_size = rows.size(2);
  a.window = window;
  a.scale = static_cast<float>(scale);
  a.logits = logits_of(cap, sinks, a.heads);
  a.dtype = dtype_of<DType>(query);
  check_heads(a.heads, a.kv_heads, kMaxGroup);
  check_head_size(a.head_size, kernels);
  STD_TORCH_CHECK(window > 0 && (a.page_size & (a.page_size - 1)) == 0, "pages must have a power of two of tokens");
  STD_TORCH_CHECK(seq_lens.size(0) >= a.requests && block_table.size(0) >= a.requests && output.size(0) >= a.requests,
                  "there are more queries than requests");
  kernels.window_decode(a, torch_threads());
}

// The instruction sets that can run here, best first.
std::string cpu_instruction_sets() {
  std::string names;
  for (int i = 0; i < kNumInstructionSets; ++i) {
    names += names.empty() ? "" : ",";
    names += kernel_table(i) ? instruction_set_name(i) : "";
  }
  return names;
}

}  // namespace

Parallel torch_threads() { return {static_cast<int>(torch::stable::get_num_threads()), run_parallel}; }

}  // namespace lrqk

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def("cpu_append(Tensor key, Tensor value, Tensor(a!) host, Tensor slot_mapping, int instruction_set) -> ()");
  m.def(
      "cpu_prefill(Tensor query, Tensor key, Tensor value, Tensor host, Tensor pages, int context_len, int window, "
      "float scale, float cap, Tensor? sinks, Tensor(a!) output, int instruction_set) -> ()");
  m.def(
      "cpu_window_decode(Tensor query, Tensor rows, Tensor block_table, Tensor seq_lens, int window, float scale, "
      "float cap, Tensor? sinks, Tensor(a!) output, int instruction_set) -> ()");
  m.def("cpu_instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_append", TORCH_BOX(&lrqk::cpu_append));
  m.impl("cpu_prefill", TORCH_BOX(&lrqk::cpu_prefill));
  m.impl("cpu_window_decode", TORCH_BOX(&lrqk::cpu_window_decode));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", TORCH_BOX(&lrqk::cpu_instruction_sets));
}
