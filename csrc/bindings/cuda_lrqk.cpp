// LRQK's CUDA operators: selection. Shapes are those of cuda/lrqk/select.h.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/cuda.h"
#include "cuda/lrqk/select.h"

namespace lrqk::cuda {
namespace {

void cuda_select(const Tensor query, const Tensor factors, const Tensor block_table, const Tensor seq_lens,
                 double scale, std::vector<int64_t> page_layout, int64_t page_size, int64_t top_k,
                 int64_t recent_tokens, int64_t sink_tokens, Tensor positions, std::optional<Tensor> residual,
                 std::optional<Tensor> moment, Tensor state, Tensor scratch, int64_t max_requests, int64_t stream) {
  check(query, "query", 3, query.scalar_type());
  check(block_table, "block_table", 2, ScalarType::Int);
  check_page_size(page_size);
  SelectArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.dtype = dtype_of<DType>(query);
  a.layout = checked_layout(factors, page_layout, kMaxRank);
  a.factors = {static_cast<uint8_t*>(factors.data_ptr()), factors.stride(0), factors.stride(1)};
  a.block_table = static_cast<const int*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = contiguous<int>(seq_lens, "seq_lens", 1, ScalarType::Int);
  a.positions = contiguous<int>(positions, "positions", 3, ScalarType::Int);
  a.residual = residual ? contiguous<float>(*residual, "residual", 3, ScalarType::Float) : nullptr;
  a.moment = moment ? contiguous<float>(*moment, "moment", 4, ScalarType::Float) : nullptr;
  a.requests = static_cast<int>(query.size(0));
  a.heads = static_cast<int>(query.size(1));
  a.kv_heads = static_cast<int>(factors.size(1));
  a.head_size = static_cast<int>(query.size(2));
  a.page_size = static_cast<int>(page_size);
  a.pages = static_cast<int>(block_table.size(1));
  a.top_k = static_cast<int>(top_k);
  a.recent_tokens = static_cast<int>(recent_tokens);
  a.sink_tokens = static_cast<int>(sink_tokens);
  a.scale = static_cast<float>(scale);
  check_aligned(factors, 2, 16, "factors");
  STD_TORCH_CHECK(a.requests <= max_requests, "more requests than the state has room for");
  STD_TORCH_CHECK(
      seq_lens.size(0) == a.requests && block_table.size(0) == a.requests && positions.size(0) == a.requests,
      "query, block_table, seq_lens and positions must agree on the number of requests");
  STD_TORCH_CHECK(
      positions.size(1) == a.kv_heads && positions.size(2) == top_k + sink_tokens + recent_tokens + page_size,
      "positions must be [requests, kv heads, top_k + sink_tokens + recent_tokens + page_size]");
  STD_TORCH_CHECK(
      !residual || (residual->size(0) == a.requests && residual->size(1) == a.heads && residual->size(2) == a.pages),
      "residual must be [requests, heads, pages]");
  STD_TORCH_CHECK(!moment || (residual && moment->size(0) == a.requests && moment->size(1) == a.heads &&
                              moment->size(2) == a.pages && moment->size(3) == a.layout.value_rank),
                  "moment must be [requests, heads, pages, value_rank], beside a residual");
  check_heads(a.heads, a.kv_heads, a.heads);
  STD_TORCH_CHECK(a.head_size % 8 == 0 && a.head_size <= 256, "the head size is ", a.head_size,
                  ", but must be a multiple of 8, at most 256");
  STD_TORCH_CHECK(a.pages * page_size < int64_t{1} << kPositionBits, "contexts must be shorter than 2^22 tokens");
  STD_TORCH_CHECK(carve_state(a.scratch, static_cast<uint8_t*>(state.data_ptr()), max_requests, a.heads, a.kv_heads) <=
                      state.numel(),
                  "the state is too small");
  STD_TORCH_CHECK(carve_scratch(a.scratch, static_cast<uint8_t*>(scratch.data_ptr()), a.requests, a.heads, a.kv_heads,
                                a.pages, a.page_size) <= scratch.numel(),
                  "the scratch memory is too small");
  const DeviceGuard guard(query);
  check_launch(select(a, stream_of(stream)));
}

std::tuple<int64_t, int64_t> cuda_select_bytes(int64_t max_requests, int64_t heads, int64_t kv_heads, int64_t pages,
                                               int64_t page_size) {
  TopKScratch scratch;
  return {carve_state(scratch, nullptr, max_requests, heads, kv_heads),
          carve_scratch(scratch, nullptr, max_requests, heads, kv_heads, pages, page_size)};
}

std::string cuda_page_layout_names() { return kPageLayoutNames; }

}  // namespace
}  // namespace lrqk::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(LRQK_NAMESPACE, m) {
  m.def(
      "cuda_select(Tensor query, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, int[] page_layout, "
      "int page_size, int top_k, int recent_tokens, int sink_tokens, Tensor(a!) positions, Tensor(b!)? residual, "
      "Tensor(c!)? moment, Tensor(d!) state, Tensor(e!) scratch, int max_requests, int stream) -> ()");
  m.def("cuda_select_bytes(int max_requests, int heads, int kv_heads, int pages, int page_size) -> (int, int)");
  m.def("cuda_page_layout_names() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(LRQK_NAMESPACE, LRQK_DEVICE, m) {
  m.impl("cuda_select", TORCH_BOX(&lrqk::cuda::cuda_select));
}

STABLE_TORCH_LIBRARY_IMPL(LRQK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_select_bytes", TORCH_BOX(&lrqk::cuda::cuda_select_bytes));
  m.impl("cuda_page_layout_names", TORCH_BOX(&lrqk::cuda::cuda_page_layout_names));
}
