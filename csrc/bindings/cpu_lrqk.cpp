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

// Checks the tensors of a calibrated basis, in the order of CalibratedBasis, for factors of `layout`.
CalibratedBasis calibrated_basis(const std::vector<Tensor>& basis, const PageLayout& layout, int64_t kv_heads,
                                 int64_t head_size) {
  STD_TORCH_CHECK(basis.size() == 6, "a calibrated basis has 6 tensors, got ", basis.size());
  CalibratedBasis out{};
  out.query = contiguous<float>(basis[0], "basis query", 4, ScalarType::Float);
  out.key = contiguous<float>(basis[1], "basis key", 4, ScalarType::Float);
  out.value = contiguous<float>(basis[2], "basis value", 3, ScalarType::Float);
  out.pairs = contiguous<int32_t>(basis[3], "basis pairs", 2, ScalarType::Int);
  out.frames = contiguous<float>(basis[4], "basis frames", 3, ScalarType::Float);
  out.turns = contiguous<int32_t>(basis[5], "basis turns", 2, ScalarType::Int);
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(basis[i].size(0) == kv_heads && basis[i].size(1) * 2 == head_size && basis[i].size(2) == 2 &&
                        basis[i].size(3) == layout.rank,
                    "the projections of the basis do not fit the factors");
  }
  STD_TORCH_CHECK(layout.leading_rank > 0 && layout.leading_rank % 8 == 0 && layout.rank % 16 == 0 &&
                      (layout.rank - layout.leading_rank) % 8 == 0,
                  "columns are ", layout.leading_rank, " of ", layout.rank,
                  ", but must be a multiple of 8 of a multiple of 16");
  return out;
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

// With calibrated factors if there is a basis.
void run_decode(const KernelTable& kernels, const std::vector<Tensor>& basis, DecodeArgs& a) {
  if (basis.empty()) return kernels.lrqk.decode(a, torch_threads());
  a.basis = calibrated_basis(basis, a.layout, a.kv_heads, a.head_size);
  kernels.lrqk.decode_calibrated(a, torch_threads());
}

void cpu_decode(const Tensor query, const Tensor host, const Tensor factors, const Tensor block_table,
                const Tensor seq_lens, double scale, double cap, std::optional<Tensor> sinks,
                std::vector<int64_t> page_layout, int64_t top_k, double top_p, int64_t recent_tokens,
                int64_t sink_tokens, bool with_residual, std::vector<Tensor> basis, Tensor output, Tensor attended,
                int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  const HostPages pages = host_pages(host, query.scalar_type());
  auto a = selection_args(query, factors, block_table, seq_lens, scale, page_layout, host.size(2), top_k, top_p,
                          recent_tokens, sink_tokens, with_residual);
  a.logits = logits_of(cap, sinks, a.heads);
  check_head_size(a.head_size, kernels);
  check_cpu(output, "output", 3, query.scalar_type());
  check_cpu(attended, "attended", 1, ScalarType::Long);
  a.host = pages;
  a.output = output.data_ptr();
  a.output_request_stride = output.stride(0);
  a.output_head_stride = output.stride(1);
  a.attended = static_cast<int64_t*>(attended.data_ptr());
  run_decode(kernels, basis, a);
}

void cpu_select(const Tensor query, const Tensor factors, const Tensor block_table, const Tensor seq_lens, double scale,
                double cap, std::vector<int64_t> page_layout, int64_t page_size, int64_t top_k, double top_p,
                int64_t recent_tokens, int64_t sink_tokens, std::vector<Tensor> basis, Tensor positions,
                std::optional<Tensor> residual, std::optional<Tensor> moment, int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  auto a = selection_args(query, factors, block_table, seq_lens, scale, page_layout, page_size, top_k, top_p,
                          recent_tokens, sink_tokens, residual.has_value());
  a.logits = logits_of(cap, std::nullopt, a.heads);
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
  run_decode(kernels, basis, a);
}

SealArgs seal_args(const Tensor& pages, const Tensor& host, const Tensor& factors,
                   const std::vector<int64_t>& page_layout) {
  check_cpu(pages, "pages", 1, ScalarType::Long);
  SealArgs s{};
  s.pages = static_cast<const int64_t*>(pages.data_ptr());
  s.host = host_pages(host, host.scalar_type());
  s.layout = checked_layout(factors, page_layout, kMaxRank);
  s.factors = factor_pages(factors);
  s.num_pages = pages.size(0);
  s.kv_heads = host.size(1);
  s.page_size = host.size(2);
  s.head_size = host.size(4);
  s.dtype = dtype_of<DType>(host);
  return s;
}

void cpu_seal(const Tensor pages, const Tensor host, Tensor factors, std::vector<int64_t> page_layout,
              int64_t iterations, double lambda_q, double lambda_k, double ridge, double key_share, double value_shift,
              int64_t value_iterations, int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  SealArgs s = seal_args(pages, host, factors, page_layout);
  s.iterations = static_cast<int>(iterations);
  s.lambda_q = static_cast<float>(lambda_q);
  s.lambda_k = static_cast<float>(lambda_k);
  s.ridge = static_cast<float>(ridge);
  s.key_share = static_cast<float>(key_share);
  s.value_shift = static_cast<float>(value_shift);
  s.value_iterations = static_cast<int>(value_iterations);
  check_head_size(s.head_size, kernels);
  kernels.lrqk.seal(s, torch_threads());
}

void cpu_seal_calibrated(const Tensor pages, const Tensor page_numbers, const Tensor host, Tensor factors,
                         std::vector<Tensor> basis, std::vector<int64_t> page_layout, double ridge,
                         int64_t instruction_set) {
  const KernelTable& kernels = kernels_of(instruction_set);
  SealArgs s = seal_args(pages, host, factors, page_layout);
  check_head_size(s.head_size, kernels);
  check_cpu(page_numbers, "page_numbers", 1, ScalarType::Long);
  STD_TORCH_CHECK(page_numbers.size(0) == s.num_pages, "page_numbers must have one for each page");
  s.page_numbers = static_cast<const int64_t*>(page_numbers.data_ptr());
  s.basis = calibrated_basis(basis, s.layout, s.kv_heads, s.head_size);
  s.ridge = static_cast<float>(ridge);
  kernels.lrqk.seal_calibrated(s, torch_threads());
}

std::string cpu_page_layout_names() { return kPageLayoutNames; }

}  // namespace
}  // namespace lrqk

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def(
      "cpu_decode(Tensor query, Tensor host, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, "
      "float cap, Tensor? sinks, int[] page_layout, int top_k, float top_p, int recent_tokens, int sink_tokens, bool "
      "with_residual, "
      "Tensor[] basis, Tensor(a!) output, Tensor(b!) attended, int instruction_set) -> ()");
  m.def(
      "cpu_select(Tensor query, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, float cap, int[] "
      "page_layout, "
      "int page_size, int top_k, float top_p, int recent_tokens, int sink_tokens, Tensor[] basis, "
      "Tensor(a!) positions, "
      "Tensor(b!)? residual, Tensor(c!)? moment, int instruction_set) -> ()");
  m.def(
      "cpu_seal(Tensor pages, Tensor host, Tensor(a!) factors, int[] page_layout, int iterations, "
      "float lambda_q, float lambda_k, float ridge, float key_share, float value_shift, int value_iterations, "
      "int instruction_set) -> ()");
  m.def(
      "cpu_seal_calibrated(Tensor pages, Tensor page_numbers, Tensor host, Tensor(a!) factors, Tensor[] basis, "
      "int[] page_layout, float ridge, int instruction_set) -> ()");
  m.def("cpu_page_layout_names() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_decode", TORCH_BOX(&lrqk::cpu_decode));
  m.impl("cpu_select", TORCH_BOX(&lrqk::cpu_select));
  m.impl("cpu_seal", TORCH_BOX(&lrqk::cpu_seal));
  m.impl("cpu_seal_calibrated", TORCH_BOX(&lrqk::cpu_seal_calibrated));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CompositeExplicitAutograd, m) {
  m.impl("cpu_page_layout_names", TORCH_BOX(&lrqk::cpu_page_layout_names));
}
