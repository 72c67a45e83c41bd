// The CUDA operators of torch.ops.vllm_lrqk, on libtorch's stable ABI. Shapes are those of args.h.
// Streams come as integers from Python, so that nothing here links against torch's CUDA libraries.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cuda/lrqk/select.h"

#ifndef LRQK_NAMESPACE
#define LRQK_NAMESPACE vllm_lrqk
#define LRQK_DEVICE CUDA
#endif

namespace {

using namespace lrqk::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t stream_of(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void enter(const Tensor& tensor) {
  if (tensor.is_cuda()) cudaSetDevice(tensor.get_device_index());
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernels of vllm-lrqk: ", cudaGetErrorString(error));
}

void check(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.size(dims - 1) <= 1 || tensor.stride(dims - 1) == 1, name,
                  " must be contiguous in its last dimension");
}

template <class T>
T* contiguous(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) {
  check(tensor, name, dims, dtype);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
      return DType::kFloat32;
  }
}

HostArgs host_pages(const Tensor& host) {
  check(host, "host", 5, host.scalar_type());
  const int64_t d = host.size(4), bytes = host.element_size();
  STD_TORCH_CHECK(host.size(3) == 2 && host.stride(3) == d && host.stride(2) == 2 * d,
                  "the rows of host pages must be contiguous");
  STD_TORCH_CHECK(2 * d * bytes % 16 == 0, "a row of host pages must be a multiple of 16 bytes");
  return {static_cast<uint8_t*>(host.data_ptr()), host.stride(0) * bytes, host.stride(1) * bytes,
          static_cast<int>(2 * d * bytes), static_cast<int>(host.size(2)), static_cast<int>(host.size(0))};
}

void cuda_select(const Tensor query, const Tensor factors, const Tensor block_table, const Tensor seq_lens,
                 double scale, int64_t rank, bool is_int8, int64_t projection_offset, int64_t scale_offset,
                 int64_t page_size, int64_t top_k, int64_t recent_tokens, int64_t sink_tokens, Tensor rows,
                 std::optional<Tensor> residual, std::optional<Tensor> residual_factor, Tensor state, Tensor scratch,
                 int64_t max_requests, int64_t stream) {
  check(query, "query", 3, query.scalar_type());
  check(factors, "factors", 3, ScalarType::Byte);
  check(block_table, "block_table", 2, ScalarType::Int);
  SelectArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.dtype = dtype_of(query);
  a.factors = static_cast<const uint8_t*>(factors.data_ptr());
  a.layout = {factors.stride(0), factors.stride(1), projection_offset, scale_offset, static_cast<int>(rank), is_int8};
  a.block_table = static_cast<const int*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = contiguous<int>(seq_lens, "seq_lens", 1, ScalarType::Int);
  a.rows = contiguous<int>(rows, "rows", 3, ScalarType::Int);
  a.residual = residual ? contiguous<float>(*residual, "residual", 3, ScalarType::Float) : nullptr;
  if (residual_factor) {
    a.residual_factor = contiguous<float>(*residual_factor, "residual_factor", 4, ScalarType::Float);
    a.value_rank = static_cast<int>(residual_factor->size(3));
  }
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
  STD_TORCH_CHECK(a.requests <= max_requests, "more requests than the state has room for");
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests && rows.size(0) == a.requests,
                  "query, block_table, seq_lens and rows must agree on the number of requests");
  STD_TORCH_CHECK(rows.size(1) == a.kv_heads && rows.size(2) == top_k + sink_tokens + recent_tokens + page_size,
                  "rows must be [requests, kv heads, top_k + sink_tokens + recent_tokens + page_size]");
  STD_TORCH_CHECK(!residual || (residual->size(0) == a.requests && residual->size(1) == a.heads &&
                                residual->size(2) == a.pages), "residual must be [requests, heads, pages]");
  STD_TORCH_CHECK(!residual_factor ||
                      (residual && residual_factor->size(0) == a.requests && residual_factor->size(1) == a.heads &&
                       residual_factor->size(2) == a.pages && a.value_rank <= rank && a.value_rank % 4 == 0),
                  "residual_factor must be [requests, heads, pages, columns of the key factor], beside a residual");
  STD_TORCH_CHECK(a.heads % a.kv_heads == 0, "heads must be a multiple of the kv heads");
  STD_TORCH_CHECK(a.head_size % 4 == 0 && a.head_size <= 256 && rank % 4 == 0 && rank <= kMaxRank,
                  "head sizes up to 256 and ranks up to ", kMaxRank, " are supported, multiples of 4");
  STD_TORCH_CHECK(page_size >= 16 && page_size <= 1024 && (page_size & (page_size - 1)) == 0, "unsupported page size");
  STD_TORCH_CHECK(a.pages * page_size < int64_t{1} << kPositionBits, "contexts must be shorter than 2^22 tokens");
  STD_TORCH_CHECK(carve_state(a.scratch, static_cast<uint8_t*>(state.data_ptr()), max_requests, a.heads, a.kv_heads) <=
                      state.numel(), "the state is too small");
  STD_TORCH_CHECK(carve_scratch(a.scratch, static_cast<uint8_t*>(scratch.data_ptr()), a.requests, a.heads, a.kv_heads,
                                a.pages, a.page_size) <= scratch.numel(), "the scratch memory is too small");
  enter(query);
  check_launch(select(a, stream_of(stream)));
}

std::tuple<int64_t, int64_t> cuda_select_bytes(int64_t max_requests, int64_t heads, int64_t kv_heads, int64_t pages,
                                               int64_t page_size) {
  SelectScratch scratch;
  return {carve_state(scratch, nullptr, max_requests, heads, kv_heads),
          carve_scratch(scratch, nullptr, max_requests, heads, kv_heads, pages, page_size)};
}

void cuda_resolve(const Tensor rows, const Tensor block_table, const Tensor seq_lens, const Tensor hot_blocks,
                  Tensor hot, int64_t slots_per_block, int64_t row_bytes, const Tensor generation, const Tensor clock,
                  int64_t page_size, Tensor address, Tensor miss_address, Tensor miss_row, Tensor miss_count,
                  Tensor counters, Tensor table, Tensor age, Tensor miss_place, int64_t stream) {
  check(block_table, "block_table", 2, ScalarType::Int);
  check(hot_blocks, "hot_blocks", 2, ScalarType::Int);
  check(hot, "hot", 3, ScalarType::Byte);
  ResolveArgs a{};
  a.rows = contiguous<int>(rows, "rows", 3, ScalarType::Int);
  a.block_table = static_cast<const int*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = contiguous<int>(seq_lens, "seq_lens", 1, ScalarType::Int);
  a.hot_blocks = static_cast<const int*>(hot_blocks.data_ptr());
  a.hot_blocks_stride = hot_blocks.stride(0);
  a.hot = {static_cast<uint8_t*>(hot.data_ptr()), hot.stride(0), hot.stride(1), static_cast<int>(slots_per_block),
           static_cast<int>(row_bytes)};
  a.generation = contiguous<int64_t>(generation, "generation", 1, ScalarType::Long);
  a.clock = contiguous<int>(clock, "clock", 1, ScalarType::Int);
  a.address = contiguous<int64_t>(address, "address", 3, ScalarType::Long);
  a.miss_address = contiguous<int64_t>(miss_address, "miss_address", 3, ScalarType::Long);
  a.miss_row = contiguous<int64_t>(miss_row, "miss_row", 3, ScalarType::Long);
  a.miss_count = contiguous<int>(miss_count, "miss_count", 2, ScalarType::Int);
  a.counters = contiguous<unsigned long long>(counters, "counters", 1, ScalarType::Long);
  a.table = contiguous<int>(table, "table", 2, ScalarType::Int);
  a.age = contiguous<int>(age, "age", 2, ScalarType::Int);
  a.miss_place = contiguous<int>(miss_place, "miss_place", 2, ScalarType::Int);
  a.table_size = static_cast<int>(table.size(1));
  a.requests = static_cast<int>(rows.size(0));
  a.kv_heads = static_cast<int>(rows.size(1));
  a.places = static_cast<int>(rows.size(2));
  a.page_size = static_cast<int>(page_size);
  a.hot_blocks_per_request = static_cast<int>(hot_blocks.size(1));
  a.num_host_pages = static_cast<int>(generation.size(0));
  const int64_t slots = hot_blocks.size(1) * slots_per_block, items = rows.size(0) * rows.size(1);
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests &&
                      hot_blocks.size(0) == a.requests && hot.size(1) == a.kv_heads,
                  "rows, block_table, seq_lens, hot_blocks and hot must agree on requests and kv heads");
  STD_TORCH_CHECK(slots >= a.places, "a request has ", slots, " hot slots, but a step can attend ", a.places, " rows");
  STD_TORCH_CHECK((a.table_size & (a.table_size - 1)) == 0 && a.table_size > slots, "unsupported table size");
  STD_TORCH_CHECK(address.numel() >= items * a.places && miss_address.numel() >= items * a.places &&
                      miss_row.numel() >= items * a.places && miss_count.numel() >= items && table.size(0) >= items &&
                      age.numel() >= items * slots && miss_place.numel() >= items * a.places && counters.numel() >= 2,
                  "the buffers of resolve are too small");
  STD_TORCH_CHECK(row_bytes % 16 == 0 && hot.stride(0) % 16 == 0 && hot.stride(1) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(hot.data_ptr()) % 16 == 0,
                  "hot blocks and their rows must be aligned to 16 bytes");
  STD_TORCH_CHECK(slots_per_block * (row_bytes + 12) <= hot.size(2), "the slots do not fit into a hot block");
  enter(rows);
  check_launch(resolve(a, stream_of(stream)));
}

void cuda_fetch(const Tensor host, Tensor hot, const Tensor miss_address, const Tensor miss_row,
                const Tensor miss_count, const Tensor key, const Tensor value, int64_t stream) {
  check(key, "key", 3, host.scalar_type());
  check(value, "value", 3, host.scalar_type());
  const int64_t bytes = host.element_size();
  FetchArgs a{};
  a.host = host_pages(host);
  a.hot = static_cast<uint8_t*>(hot.data_ptr());
  a.miss_address = contiguous<int64_t>(miss_address, "miss_address", 3, ScalarType::Long);
  a.miss_row = contiguous<int64_t>(miss_row, "miss_row", 3, ScalarType::Long);
  a.miss_count = contiguous<int>(miss_count, "miss_count", 2, ScalarType::Int);
  a.key = static_cast<const uint8_t*>(key.data_ptr());
  a.value = static_cast<const uint8_t*>(value.data_ptr());
  a.key_request_stride = key.stride(0) * bytes;
  a.key_head_stride = key.stride(1) * bytes;
  a.value_request_stride = value.stride(0) * bytes;
  a.value_head_stride = value.stride(1) * bytes;
  a.requests = static_cast<int>(miss_address.size(0));
  a.kv_heads = static_cast<int>(miss_address.size(1));
  a.places = static_cast<int>(miss_address.size(2));
  STD_TORCH_CHECK(key.size(0) == a.requests && value.size(0) == a.requests && key.size(1) == a.kv_heads &&
                      host.size(1) == a.kv_heads, "key, value, host and misses must agree on requests and kv heads");
  enter(miss_address);
  check_launch(fetch(a, stream_of(stream)));
}

void cuda_append(const Tensor key, const Tensor value, Tensor host, const Tensor slots,
                 std::optional<Tensor> generation, std::optional<Tensor> clock, int64_t stream) {
  check(key, "key", 3, host.scalar_type());
  check(value, "value", 3, host.scalar_type());
  const int64_t bytes = host.element_size();
  AppendArgs a{};
  a.host = host_pages(host);
  a.key = static_cast<const uint8_t*>(key.data_ptr());
  a.value = static_cast<const uint8_t*>(value.data_ptr());
  a.key_token_stride = key.stride(0) * bytes;
  a.key_head_stride = key.stride(1) * bytes;
  a.value_token_stride = value.stride(0) * bytes;
  a.value_head_stride = value.stride(1) * bytes;
  a.slots = contiguous<int64_t>(slots, "slots", 1, ScalarType::Long);
  a.generation = generation ? contiguous<int64_t>(*generation, "generation", 1, ScalarType::Long) : nullptr;
  a.clock = clock ? contiguous<int>(*clock, "clock", 1, ScalarType::Int) : nullptr;
  a.tokens = static_cast<int>(slots.size(0));
  a.kv_heads = static_cast<int>(host.size(1));
  STD_TORCH_CHECK(key.size(0) >= a.tokens && value.size(0) >= a.tokens && key.size(1) == a.kv_heads &&
                      value.size(1) == a.kv_heads && key.size(2) == host.size(4), "key and value must be [T, KV, d]");
  enter(key);
  check_launch(append(a, stream_of(stream)));
}

void cuda_gather_pages(const Tensor host, const Tensor pages, Tensor output, int64_t stream) {
  GatherArgs a{};
  a.host = host_pages(host);
  a.pages = contiguous<int64_t>(pages, "pages", 1, ScalarType::Long);
  a.output = contiguous<uint8_t>(output, "output", 5, host.scalar_type());
  a.num_pages = static_cast<int>(pages.size(0));
  a.kv_heads = static_cast<int>(host.size(1));
  STD_TORCH_CHECK(output.size(0) >= a.num_pages && output.size(1) == host.size(1) && output.size(2) == host.size(2) &&
                      output.size(4) == host.size(4), "output must be [pages, KV, N, 2, d]");
  enter(pages);
  check_launch(gather_pages(a, stream_of(stream)));
}

// Where the device sees registered host memory.
int64_t cuda_device_pointer(int64_t host) {
  void* device = nullptr;
  check_launch(cudaHostGetDevicePointer(&device, reinterpret_cast<void*>(host), 0));
  return reinterpret_cast<int64_t>(device);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LRQK_NAMESPACE, m) {
  m.def(
      "cuda_select(Tensor query, Tensor factors, Tensor block_table, Tensor seq_lens, float scale, int rank, "
      "bool is_int8, int projection_offset, int scale_offset, int page_size, int top_k, int recent_tokens, "
      "int sink_tokens, Tensor(a!) rows, Tensor(b!)? residual, Tensor(c!)? residual_factor, "
      "Tensor(d!) state, Tensor(e!) scratch, int max_requests, int stream) -> ()");
  m.def(
      "cuda_select_bytes(int max_requests, int heads, int kv_heads, int pages, int page_size) -> (int, int)");
  m.def(
      "cuda_resolve(Tensor rows, Tensor block_table, Tensor seq_lens, Tensor hot_blocks, Tensor(a!) hot, "
      "int slots_per_block, int row_bytes, Tensor generation, Tensor clock, int page_size, Tensor(b!) address, "
      "Tensor(c!) miss_address, Tensor(d!) miss_row, Tensor(e!) miss_count, Tensor(f!) counters, Tensor(g!) table, "
      "Tensor(h!) age, Tensor(i!) miss_place, int stream) -> ()");
  m.def(
      "cuda_fetch(Tensor host, Tensor(a!) hot, Tensor miss_address, Tensor miss_row, Tensor miss_count, Tensor key, "
      "Tensor value, int stream) -> ()");
  m.def(
      "cuda_append(Tensor key, Tensor value, Tensor(a!) host, Tensor slots, Tensor(b!)? generation, "
      "Tensor(c!)? clock, int stream) -> ()");
  m.def("cuda_gather_pages(Tensor host, Tensor pages, Tensor(a!) output, int stream) -> ()");
  m.def("cuda_device_pointer(int host) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(LRQK_NAMESPACE, LRQK_DEVICE, m) {
  m.impl("cuda_select", TORCH_BOX(&cuda_select));
  m.impl("cuda_resolve", TORCH_BOX(&cuda_resolve));
  m.impl("cuda_fetch", TORCH_BOX(&cuda_fetch));
  m.impl("cuda_append", TORCH_BOX(&cuda_append));
  m.impl("cuda_gather_pages", TORCH_BOX(&cuda_gather_pages));
}

STABLE_TORCH_LIBRARY_IMPL(LRQK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_select_bytes", TORCH_BOX(&cuda_select_bytes));
  m.impl("cuda_device_pointer", TORCH_BOX(&cuda_device_pointer));
}
