// The operators of torch.ops.vllm_lrqk, on libtorch's stable ABI. Shapes are those of cpu/args.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

lrqk::Parallel parallel() { return {static_cast<int>(torch::stable::get_num_threads()), run_parallel}; }

const lrqk::KernelTable& table(int64_t instruction_set) {
  const lrqk::KernelTable* found = lrqk::kernel_table(static_cast<int>(instruction_set));
  STD_TORCH_CHECK(found, "this machine cannot run instruction set ", instruction_set);
  return *found;
}

lrqk::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return lrqk::DType::kFloat32;
    case ScalarType::BFloat16:
      return lrqk::DType::kBFloat16;
    case ScalarType::Half:
      return lrqk::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
      return lrqk::DType::kFloat32;
  }
}

void check(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be in CPU memory");
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.size(dims - 1) <= 1 || tensor.stride(dims - 1) == 1, name,
                  " must be contiguous in its last dimension");
}

lrqk::HostPages host_pages(const Tensor& host, ScalarType dtype) {
  check(host, "host", 5, dtype);
  const int64_t d = host.size(4);
  STD_TORCH_CHECK(host.stride(3) == d && host.stride(2) == 2 * d, "the rows of host pages must be contiguous");
  return {host.data_ptr(), host.stride(0), host.stride(1)};
}

// Offsets in the order of PageLayout.
lrqk::PageLayout page_layout(const Tensor& factors, int64_t rank, int64_t value_rank, bool is_int8,
                             const std::vector<int64_t>& offsets) {
  check(factors, "factors", 3, ScalarType::Byte);
  STD_TORCH_CHECK(offsets.size() == 6, "expected six offsets");
  STD_TORCH_CHECK(rank <= lrqk::kMaxStride && value_rank <= rank, "unsupported rank");
  return {factors.stride(0), factors.stride(1), offsets[0], offsets[1], offsets[2],
          offsets[3],        offsets[4],        offsets[5], static_cast<int>(rank), static_cast<int>(value_rank),
          is_int8};
}

lrqk::DecodeArgs selection_args(const Tensor& query, const Tensor& factors, const Tensor& block_table,
                                const Tensor& seq_lens, double scale, const lrqk::PageLayout& layout,
                                int64_t page_size, int64_t top_k, double top_p, int64_t recent_tokens,
                                int64_t sink_tokens, bool with_residual) {
  check(query, "query", 3, query.scalar_type());
  check(block_table, "block_table", 2, ScalarType::Int);
  check(seq_lens, "seq_lens", 1, ScalarType::Int);
  lrqk::DecodeArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.factors = static_cast<const uint8_t*>(factors.data_ptr());
  a.layout = layout;
  a.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  a.requests = query.size(0);
  a.heads = query.size(1);
  a.kv_heads = factors.size(1);
  a.head_size = query.size(2);
  a.page_size = page_size;
  STD_TORCH_CHECK(page_size >= 16 && page_size <= 1024 && (page_size & (page_size - 1)) == 0, "unsupported page size");
  while (int64_t{1} << a.page_shift < page_size) ++a.page_shift;
  a.top_k = top_k;
  a.top_p = static_cast<float>(top_p);
  a.recent_tokens = recent_tokens;
  a.sink_tokens = sink_tokens;
  a.with_residual = with_residual;
  a.with_moments = with_residual && layout.value_rank > 0;
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(query);
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests,
                  "query, block_table and seq_lens must agree on the number of requests");
  STD_TORCH_CHECK(a.heads % a.kv_heads == 0 && a.heads / a.kv_heads <= 64, "unsupported number of heads");
  return a;
}

void cpu_decode(const Tensor query, const Tensor host, const Tensor factors, const Tensor block_table,
                const Tensor seq_lens, double scale, int64_t rank, int64_t value_rank, bool is_int8,
                std::vector<int64_t> offsets, int64_t top_k, double top_p, int64_t recent_tokens,
                int64_t sink_tokens, bool with_residual, Tensor output, Tensor attended, int64_t instruction_set) {
  const auto layout = page_layout(factors, rank, value_rank, is_int8, offsets);
  auto a = selection_args(query, factors, block_table, seq_lens, scale, layout, host.size(2), top_k, top_p,
                          recent_tokens, sink_tokens, with_residual);
  check(output, "output", 3, query.scalar_type());
  check(attended, "attended", 1, ScalarType::Long);
  a.host = host_pages(host, query.scalar_type());
  a.output = output.data_ptr();
  a.output_request_stride = output.stride(0);
  a.output_head_stride = output.stride(1);
  a.attended = static_cast<int64_t*>(attended.data_ptr());
  table(instruction_set).decode(a, parallel());
}

void cpu_select(const Tensor query, const Tensor factors, const Tensor block_table, const Tensor seq_lens,
                double scale, int64_t rank, int64_t value_rank, bool is_int8,
                std::vector<int64_t> offsets, int64_t page_size,
                int64_t top_k, double top_p, int64_t recent_tokens, int64_t sink_tokens, Tensor rows,
                std::optional<Tensor> residual, std::optional<Tensor> residual_factor, int64_t instruction_set) {
  const auto layout = page_layout(factors, rank, value_rank, is_int8, offsets);
  auto a = selection_args(query, factors, block_table, seq_lens, scale, layout, page_size, top_k, top_p,
                          recent_tokens, sink_tokens, residual.has_value());
  check(rows, "rows", 3, ScalarType::Int);
  a.rows = static_cast<int32_t*>(rows.data_ptr());
  a.row_places = rows.size(2);
  if (residual) {
    check(*residual, "residual", 3, ScalarType::Float);
    a.residual = static_cast<float*>(residual->data_ptr());
    a.residual_pages = residual->size(2);
  }
  if (residual_factor) {
    check(*residual_factor, "residual_factor", 4, ScalarType::Float);
    STD_TORCH_CHECK(a.with_moments && residual_factor->is_contiguous() && residual_factor->size(2) == a.residual_pages &&
                        residual_factor->size(3) == value_rank,
                    "residual_factor must be contiguous, of the value rank, and go with a residual of linear values");
    a.residual_factor = static_cast<float*>(residual_factor->data_ptr());
  }
  table(instruction_set).decode(a, parallel());
}

void cpu_append(const Tensor key, const Tensor value, Tensor host, const Tensor slots, int64_t instruction_set) {
  const ScalarType dtype = host.scalar_type();
  check(key, "key", 3, dtype);
  check(value, "value", 3, dtype);
  check(slots, "slots", 1, ScalarType::Long);
  const lrqk::HostPages pages = host_pages(host, dtype);
  lrqk::AppendArgs a{};
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.key_token_stride = key.stride(0);
  a.key_head_stride = key.stride(1);
  a.value_token_stride = value.stride(0);
  a.value_head_stride = value.stride(1);
  a.host = host.data_ptr();
  a.host_page_stride = pages.page_stride;
  a.host_head_stride = pages.head_stride;
  a.slots = static_cast<const int64_t*>(slots.data_ptr());
  a.tokens = slots.size(0);
  a.kv_heads = host.size(1);
  a.page_size = host.size(2);
  a.head_size = host.size(4);
  a.element_bytes = static_cast<int64_t>(host.element_size());
  STD_TORCH_CHECK(key.size(0) >= a.tokens && value.size(0) >= a.tokens, "there are more slots than keys or values");
  table(instruction_set).append(a, parallel());
}

void cpu_seal(const Tensor pages, const Tensor host, Tensor factors, std::optional<Tensor> gram_q, int64_t rank,
              int64_t value_rank, bool is_int8, std::vector<int64_t> offsets, int64_t iterations, double lambda_q,
              double lambda_k, double ridge, double query_share, double value_shift, int64_t value_iterations,
              int64_t instruction_set) {
  check(pages, "pages", 1, ScalarType::Long);
  lrqk::SealArgs s{};
  s.pages = static_cast<const int64_t*>(pages.data_ptr());
  s.host = host_pages(host, host.scalar_type());
  s.factors = static_cast<uint8_t*>(factors.data_ptr());
  s.layout = page_layout(factors, rank, value_rank, is_int8, offsets);
  if (gram_q) {
    check(*gram_q, "gram_q", 4, ScalarType::Float);
    STD_TORCH_CHECK(gram_q->is_contiguous() && gram_q->size(0) == pages.size(0), "gram_q must be contiguous, one per page");
    s.gram_q = static_cast<const float*>(gram_q->data_ptr());
  }
  s.num_pages = pages.size(0);
  s.kv_heads = host.size(1);
  s.page_size = host.size(2);
  s.head_size = host.size(4);
  s.iterations = static_cast<int>(iterations);
  s.lambda_q = static_cast<float>(lambda_q);
  s.lambda_k = static_cast<float>(lambda_k);
  s.ridge = static_cast<float>(ridge);
  s.query_share = static_cast<float>(query_share);
  s.value_shift = static_cast<float>(value_shift);
  s.value_iterations = static_cast<int>(value_iterations);
  s.dtype = dtype_of(host);
  table(instruction_set).seal(s, parallel());
}

void cpu_prefill(const Tensor query, const Tensor key, const Tensor value, const Tensor host, const Tensor pages,
                 int64_t context_len, double scale, Tensor output, int64_t instruction_set) {
  const ScalarType dtype = query.scalar_type();
  check(query, "query", 3, dtype);
  check(key, "key", 3, dtype);
  check(value, "value", 3, dtype);
  check(output, "output", 3, dtype);
  check(pages, "pages", 1, ScalarType::Int);
  lrqk::PrefillArgs p{};
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
  p.scale = static_cast<float>(scale);
  p.dtype = dtype_of(query);
  STD_TORCH_CHECK(p.heads % p.kv_heads == 0 && p.heads / p.kv_heads <= 64, "unsupported number of heads");
  STD_TORCH_CHECK(pages.size(0) * p.page_size >= context_len, "pages do not cover the context");
  table(instruction_set).prefill(p, parallel());
}

// The instruction sets that can run here, best first.
std::string cpu_instruction_sets() {
  std::string names;
  for (int i = 0; i < lrqk::kNumInstructionSets; ++i) {
    names += names.empty() ? "" : ",";
    names += lrqk::kernel_table(i) ? lrqk::instruction_set_name(i) : "";
  }
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def(
      "cpu_decode(Tensor query, Tensor host, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, "
      "int rank, int value_rank, bool is_int8, int[] offsets, int top_k, float top_p, int recent_tokens, "
      "int sink_tokens, bool with_residual, Tensor(a!) output, Tensor(b!) attended, int instruction_set) -> ()");
  m.def(
      "cpu_select(Tensor query, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, int rank, "
      "int value_rank, bool is_int8, int[] offsets, int page_size, int top_k, float top_p, int recent_tokens, "
      "int sink_tokens, Tensor(a!) rows, Tensor(b!)? residual, Tensor(c!)? residual_factor, int instruction_set) -> ()");
  m.def(
      "cpu_append(Tensor key, Tensor value, Tensor(a!) host, Tensor slots, int instruction_set) -> ()");
  m.def(
      "cpu_seal(Tensor pages, Tensor host, Tensor(a!) factors, Tensor? gram_q, int rank, int value_rank, "
      "bool is_int8, int[] offsets, int iterations, float lambda_q, float lambda_k, float ridge, float query_share, "
      "float value_shift, int value_iterations, int instruction_set) -> ()");
  m.def(
      "cpu_prefill(Tensor query, Tensor key, Tensor value, Tensor host, Tensor pages, int context_len, float scale, "
      "Tensor(a!) output, int instruction_set) -> ()");
  m.def("cpu_instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_decode", TORCH_BOX(&cpu_decode));
  m.impl("cpu_select", TORCH_BOX(&cpu_select));
  m.impl("cpu_append", TORCH_BOX(&cpu_append));
  m.impl("cpu_seal", TORCH_BOX(&cpu_seal));
  m.impl("cpu_prefill", TORCH_BOX(&cpu_prefill));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
}
