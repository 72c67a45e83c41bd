// LRQK's CPU operators: a decode step, its selection alone, and sealing pages. Shapes are those of cpu/lrqk/args.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/cpu.h"

namespace lrqk {
namespace {

FactorPages factor_pages(const Tensor& factors) {
  return {static_cast<uint8_t*>(factors.data_ptr()), factors.stride(0), factors.stride(1)};
}

DecodeArgs selection_args(const Tensor& query, const Tensor& factors, const Tensor& block_table, const Tensor& seq_lens,
                          double scale, const std::vector<int64_t>& page_layout, int64_t page_size, int64_t top_k,
                          double top_p, int64_t recent_tokens, int64_t sink_tokens, bool with_residual) {
  check_cpu(query, "query", 3, query.scalar_type());
  check_cpu(block_table, "block_table", 2, ScalarType::Int);
  check_cpu(seq_lens, "seq_lens", 1, ScalarType::Int);
  check_page_size(page_size);
  DecodeArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.layout = checked_layout(factors, page_layout, kMaxRank);
  a.factors = factor_pages(factors);
  a.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  a.requests = query.size(0);
  a.heads = query.size(1);
  a.kv_heads = factors.size(1);
  a.head_size = query.size(2);
  a.page_size = page_size;
  while (int64_t{1} << a.page_shift < page_size) ++a.page_shift;
  a.top_k = top_k;
  a.top_p = static_cast<float>(top_p);
  a.recent_tokens = recent_tokens;
  a.sink_tokens = sink_tokens;
  a.with_residual = with_residual;
  a.with_moments = with_residual && a.layout.value_rank > 0;
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of<DType>(query);
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests,
                  "query, block_table and seq_lens must agree on the number of requests");
  check_heads(a.heads, a.kv_heads, kMaxGroup);
  return a;
}

void cpu_decode(const Tensor query, const Tensor host, const Tensor factors, const Tensor block_table,
                const Tensor seq_lens, double scale, std::vector<int64_t> page_layout, int64_t top_k, double top_p,
                int64_t recent_tokens, int64_t sink_tokens, bool with_residual, Tensor output, Tensor attended,
                int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  const HostPages pages = host_pages(host, query.scalar_type());
  auto a = selection_args(query, factors, block_table, seq_lens, scale, page_layout, host.size(2), top_k, top_p,
                          recent_tokens, sink_tokens, with_residual);
  check_head_size(a.head_size, kernels);
  check_cpu(output, "output", 3, query.scalar_type());
  check_cpu(attended, "attended", 1, ScalarType::Long);
  a.host = pages;
  a.output = output.data_ptr();
  a.output_request_stride = output.stride(0);
  a.output_head_stride = output.stride(1);
  a.attended = static_cast<int64_t*>(attended.data_ptr());
  kernels.lrqk.decode(a, torch_threads());
}

void cpu_select(const Tensor query, const Tensor factors, const Tensor block_table, const Tensor seq_lens, double scale,
                std::vector<int64_t> page_layout, int64_t page_size, int64_t top_k, double top_p, int64_t recent_tokens,
                int64_t sink_tokens, Tensor positions, std::optional<Tensor> residual, std::optional<Tensor> moment,
                int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  auto a = selection_args(query, factors, block_table, seq_lens, scale, page_layout, page_size, top_k, top_p,
                          recent_tokens, sink_tokens, residual.has_value());
  check_head_size(a.head_size, kernels);
  a.positions = contiguous<int32_t>(positions, "positions", 3, ScalarType::Int);
  a.capacity = positions.size(2);
  if (residual) {
    a.residual = contiguous<float>(*residual, "residual", 3, ScalarType::Float);
    a.residual_pages = residual->size(2);
  }
  if (moment) {
    a.moment = contiguous<float>(*moment, "moment", 4, ScalarType::Float);
    STD_TORCH_CHECK(a.with_moments && moment->size(2) == a.residual_pages && moment->size(3) == a.layout.value_rank,
                    "moment must be of the value rank, and go with a residual of linear values");
  }
  kernels.lrqk.decode(a, torch_threads());
}

void cpu_seal(const Tensor pages, const Tensor host, Tensor factors, std::optional<Tensor> gram_q,
              std::vector<int64_t> page_layout, int64_t iterations, double lambda_q, double lambda_k, double ridge,
              double query_share, double value_shift, int64_t value_iterations, int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  check_cpu(pages, "pages", 1, ScalarType::Long);
  SealArgs s{};
  s.pages = static_cast<const int64_t*>(pages.data_ptr());
  s.host = host_pages(host, host.scalar_type());
  s.layout = checked_layout(factors, page_layout, kMaxRank);
  s.factors = factor_pages(factors);
  if (gram_q) {
    s.gram_q = contiguous<float>(*gram_q, "gram_q", 4, ScalarType::Float);
    STD_TORCH_CHECK(gram_q->size(0) == pages.size(0), "gram_q must have one matrix per page");
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
  s.dtype = dtype_of<DType>(host);
  check_head_size(s.head_size, kernels);
  kernels.lrqk.seal(s, torch_threads());
}

std::string cpu_page_layout_names() { return kPageLayoutNames; }

}  // namespace
}  // namespace lrqk

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def(
      "cpu_decode(Tensor query, Tensor host, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, "
      "int[] page_layout, int top_k, float top_p, int recent_tokens, int sink_tokens, bool with_residual, "
      "Tensor(a!) output, Tensor(b!) attended, int instruction_set) -> ()");
  m.def(
      "cpu_select(Tensor query, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, int[] page_layout, "
      "int page_size, int top_k, float top_p, int recent_tokens, int sink_tokens, Tensor(a!) positions, "
      "Tensor(b!)? residual, Tensor(c!)? moment, int instruction_set) -> ()");
  m.def(
      "cpu_seal(Tensor pages, Tensor host, Tensor(a!) factors, Tensor? gram_q, int[] page_layout, int iterations, "
      "float lambda_q, float lambda_k, float ridge, float query_share, float value_shift, int value_iterations, "
      "int instruction_set) -> ()");
  m.def("cpu_page_layout_names() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_decode", TORCH_BOX(&lrqk::cpu_decode));
  m.impl("cpu_select", TORCH_BOX(&lrqk::cpu_select));
  m.impl("cpu_seal", TORCH_BOX(&lrqk::cpu_seal));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CompositeExplicitAutograd, m) {
  m.impl("cpu_page_layout_names", TORCH_BOX(&lrqk::cpu_page_layout_names));
}
