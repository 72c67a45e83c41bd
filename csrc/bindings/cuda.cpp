// The CUDA operators of torch.ops.vllm_lrqk that no method owns, on libtorch's stable ABI. Shapes are those of
// cuda/args.h. A method's operators are in a file of their own, such as cuda_lrqk.cpp.
#include "bindings/cuda.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/args.h"

namespace lrqk::cuda {
namespace {

HostArgs host_pages(const Tensor& host) {
  check_host_pages(host, host.scalar_type());
  const int64_t d = host.size(4), bytes = host.element_size();
  STD_TORCH_CHECK(2 * d * bytes % 16 == 0, "a row of host pages must be a multiple of 16 bytes");
  check_aligned(host, 2, 16, "host");
  return {static_cast<uint8_t*>(host.data_ptr()), host.stride(0) * bytes,         host.stride(1) * bytes,
          static_cast<int>(2 * d * bytes),        static_cast<int>(host.size(2)), static_cast<int>(host.size(0))};
}

void cuda_resolve(const Tensor positions, const Tensor block_table, const Tensor seq_lens, const Tensor hot_blocks,
                  Tensor hot, int64_t rows_per_block, int64_t row_bytes, const Tensor generation, const Tensor clock,
                  int64_t page_size, Tensor address, Tensor miss_address, Tensor miss_slot, Tensor miss_count,
                  Tensor counters, Tensor table, Tensor age, Tensor miss_index, int64_t stream) {
  check(block_table, "block_table", 2, ScalarType::Int);
  check(hot_blocks, "hot_blocks", 2, ScalarType::Int);
  check(hot, "hot", 3, ScalarType::Byte);
  ResolveArgs a{};
  a.positions = contiguous<int>(positions, "positions", 3, ScalarType::Int);
  a.block_table = static_cast<const int*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = contiguous<int>(seq_lens, "seq_lens", 1, ScalarType::Int);
  a.hot_blocks = static_cast<const int*>(hot_blocks.data_ptr());
  a.hot_blocks_stride = hot_blocks.stride(0);
  a.hot = {static_cast<uint8_t*>(hot.data_ptr()), hot.stride(0), hot.stride(1), static_cast<int>(rows_per_block),
           static_cast<int>(row_bytes)};
  a.generation = contiguous<int64_t>(generation, "generation", 1, ScalarType::Long);
  a.clock = contiguous<int>(clock, "clock", 1, ScalarType::Int);
  a.address = contiguous<int64_t>(address, "address", 3, ScalarType::Long);
  a.miss_address = contiguous<int64_t>(miss_address, "miss_address", 3, ScalarType::Long);
  a.miss_slot = contiguous<int64_t>(miss_slot, "miss_slot", 3, ScalarType::Long);
  a.miss_count = contiguous<int>(miss_count, "miss_count", 2, ScalarType::Int);
  a.counters = contiguous<unsigned long long>(counters, "counters", 1, ScalarType::Long);
  a.table = contiguous<int>(table, "table", 2, ScalarType::Int);
  a.age = contiguous<int>(age, "age", 2, ScalarType::Int);
  a.miss_index = contiguous<int>(miss_index, "miss_index", 2, ScalarType::Int);
  a.table_size = static_cast<int>(table.size(1));
  a.requests = static_cast<int>(positions.size(0));
  a.kv_heads = static_cast<int>(positions.size(1));
  a.capacity = static_cast<int>(positions.size(2));
  a.page_size = static_cast<int>(page_size);
  a.hot_blocks_per_request = static_cast<int>(hot_blocks.size(1));
  a.num_host_pages = static_cast<int>(generation.size(0));
  const int64_t hot_rows = hot_blocks.size(1) * rows_per_block, items = positions.size(0) * positions.size(1);
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests &&
                      hot_blocks.size(0) == a.requests && hot.size(1) == a.kv_heads,
                  "positions, block_table, seq_lens, hot_blocks and hot must agree on requests and kv heads");
  STD_TORCH_CHECK(hot_rows >= a.capacity, "a request has ", hot_rows, " hot rows, but a step can attend ", a.capacity,
                  " rows");
  STD_TORCH_CHECK((a.table_size & (a.table_size - 1)) == 0 && a.table_size > hot_rows, "unsupported table size");
  STD_TORCH_CHECK(address.numel() >= items * a.capacity && miss_address.numel() >= items * a.capacity &&
                      miss_slot.numel() >= items * a.capacity && miss_count.numel() >= items &&
                      table.size(0) >= items && age.numel() >= items * hot_rows &&
                      miss_index.numel() >= items * a.capacity && counters.numel() >= 2,
                  "the buffers of resolve are too small");
  check_aligned(hot, 2, 16, "hot");
  STD_TORCH_CHECK(row_bytes % 16 == 0, "hot rows must be multiples of 16 bytes");
  STD_TORCH_CHECK(rows_per_block * (row_bytes + 12) <= hot.size(2), "the rows do not fit into a hot block");
  const DeviceGuard guard(positions);
  check_launch(resolve(a, stream_of(stream)));
}

void cuda_fetch(const Tensor host, Tensor hot, const Tensor miss_address, const Tensor miss_slot,
                const Tensor miss_count, const Tensor key, const Tensor value, int64_t stream) {
  check(key, "key", 3, host.scalar_type());
  check(value, "value", 3, host.scalar_type());
  check_aligned(key, 2, 8, "key");
  check_aligned(value, 2, 8, "value");
  const int64_t bytes = host.element_size();
  FetchArgs a{};
  a.host = host_pages(host);
  a.hot = static_cast<uint8_t*>(hot.data_ptr());
  a.miss_address = contiguous<int64_t>(miss_address, "miss_address", 3, ScalarType::Long);
  a.miss_slot = contiguous<int64_t>(miss_slot, "miss_slot", 3, ScalarType::Long);
  a.miss_count = contiguous<int>(miss_count, "miss_count", 2, ScalarType::Int);
  a.key = static_cast<const uint8_t*>(key.data_ptr());
  a.value = static_cast<const uint8_t*>(value.data_ptr());
  a.key_request_stride = key.stride(0) * bytes;
  a.key_head_stride = key.stride(1) * bytes;
  a.value_request_stride = value.stride(0) * bytes;
  a.value_head_stride = value.stride(1) * bytes;
  a.requests = static_cast<int>(miss_address.size(0));
  a.kv_heads = static_cast<int>(miss_address.size(1));
  a.capacity = static_cast<int>(miss_address.size(2));
  STD_TORCH_CHECK(key.size(0) == a.requests && value.size(0) == a.requests && key.size(1) == a.kv_heads &&
                      host.size(1) == a.kv_heads,
                  "key, value, host and misses must agree on requests and kv heads");
  const DeviceGuard guard(miss_address);
  check_launch(fetch(a, stream_of(stream)));
}

void cuda_append(const Tensor key, const Tensor value, Tensor host, const Tensor slot_mapping,
                 std::optional<Tensor> generation, std::optional<Tensor> clock, int64_t stream) {
  check(key, "key", 3, host.scalar_type());
  check(value, "value", 3, host.scalar_type());
  check_aligned(key, 2, 8, "key");
  check_aligned(value, 2, 8, "value");
  const int64_t bytes = host.element_size();
  AppendArgs a{};
  a.host = host_pages(host);
  a.key = static_cast<const uint8_t*>(key.data_ptr());
  a.value = static_cast<const uint8_t*>(value.data_ptr());
  a.key_token_stride = key.stride(0) * bytes;
  a.key_head_stride = key.stride(1) * bytes;
  a.value_token_stride = value.stride(0) * bytes;
  a.value_head_stride = value.stride(1) * bytes;
  a.slot_mapping = contiguous<int64_t>(slot_mapping, "slot_mapping", 1, ScalarType::Long);
  a.generation = generation ? contiguous<int64_t>(*generation, "generation", 1, ScalarType::Long) : nullptr;
  a.clock = clock ? contiguous<int>(*clock, "clock", 1, ScalarType::Int) : nullptr;
  a.tokens = static_cast<int>(slot_mapping.size(0));
  a.kv_heads = static_cast<int>(host.size(1));
  STD_TORCH_CHECK(key.size(0) >= a.tokens && value.size(0) >= a.tokens && key.size(1) == a.kv_heads &&
                      value.size(1) == a.kv_heads && key.size(2) == host.size(4),
                  "key and value must be [T, KV, d]");
  const DeviceGuard guard(key);
  check_launch(append(a, stream_of(stream)));
}

// The same pages of layers whose host pages lie like those of `host`, at `addresses`.
void cuda_gather_layers(const Tensor host, std::vector<int64_t> addresses, const Tensor pages, Tensor output,
                        int64_t stream) {
  GatherArgs a{};
  a.host = host_pages(host);
  a.pages = contiguous<int64_t>(pages, "pages", 1, ScalarType::Long);
  uint8_t* const first = contiguous<uint8_t>(output, "output", 6, host.scalar_type());
  a.num_pages = static_cast<int>(pages.size(0));
  a.kv_heads = static_cast<int>(host.size(1));
  const int64_t layers = static_cast<int64_t>(addresses.size());
  STD_TORCH_CHECK(output.size(0) == layers && output.size(1) == a.num_pages && output.size(2) == host.size(1) &&
                      output.size(3) == host.size(2) && output.size(5) == host.size(4),
                  "output must be [layers, pages, KV, N, 2, d]");
  const DeviceGuard guard(pages);
  for (int64_t layer = 0; layer < layers; layer += kLayersPerGather) {
    a.num_layers = static_cast<int>(std::min<int64_t>(layers - layer, kLayersPerGather));
    for (int i = 0; i < a.num_layers; ++i) a.data[i] = reinterpret_cast<const uint8_t*>(addresses[layer + i]);
    a.output = first + layer * output.stride(0) * host.element_size();
    check_launch(gather_pages(a, stream_of(stream)));
  }
}

void cuda_gather_pages(const Tensor host, const Tensor pages, Tensor output, int64_t stream) {
  GatherArgs a{};
  a.host = host_pages(host);
  a.data[0] = a.host.data;
  a.num_layers = 1;
  a.pages = contiguous<int64_t>(pages, "pages", 1, ScalarType::Long);
  a.output = contiguous<uint8_t>(output, "output", 5, host.scalar_type());
  a.num_pages = static_cast<int>(pages.size(0));
  a.kv_heads = static_cast<int>(host.size(1));
  STD_TORCH_CHECK(output.size(0) >= a.num_pages && output.size(1) == host.size(1) && output.size(2) == host.size(2) &&
                      output.size(4) == host.size(4),
                  "output must be [pages, KV, N, 2, d]");
  const DeviceGuard guard(pages);
  check_launch(gather_pages(a, stream_of(stream)));
}

// Where the device sees registered host memory.
int64_t cuda_device_pointer(int64_t host) {
  void* device = nullptr;
  check_launch(cudaHostGetDevicePointer(&device, reinterpret_cast<void*>(host), 0));
  return reinterpret_cast<int64_t>(device);
}

}  // namespace
}  // namespace lrqk::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(LRQK_NAMESPACE, m) {
  m.def(
      "cuda_resolve(Tensor positions, Tensor block_table, Tensor seq_lens, Tensor hot_blocks, Tensor(a!) hot, "
      "int rows_per_block, int row_bytes, Tensor generation, Tensor clock, int page_size, Tensor(b!) address, "
      "Tensor(c!) miss_address, Tensor(d!) miss_slot, Tensor(e!) miss_count, Tensor(f!) counters, Tensor(g!) table, "
      "Tensor(h!) age, Tensor(i!) miss_index, int stream) -> ()");
  m.def(
      "cuda_fetch(Tensor host, Tensor(a!) hot, Tensor miss_address, Tensor miss_slot, Tensor miss_count, Tensor key, "
      "Tensor value, int stream) -> ()");
  m.def(
      "cuda_append(Tensor key, Tensor value, Tensor(a!) host, Tensor slot_mapping, Tensor(b!)? generation, "
      "Tensor(c!)? clock, int stream) -> ()");
  m.def("cuda_gather_layers(Tensor host, int[] addresses, Tensor pages, Tensor(a!) output, int stream) -> ()");
  m.def("cuda_gather_pages(Tensor host, Tensor pages, Tensor(a!) output, int stream) -> ()");
  m.def("cuda_device_pointer(int host) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(LRQK_NAMESPACE, LRQK_DEVICE, m) {
  m.impl("cuda_resolve", TORCH_BOX(&lrqk::cuda::cuda_resolve));
  m.impl("cuda_fetch", TORCH_BOX(&lrqk::cuda::cuda_fetch));
  m.impl("cuda_append", TORCH_BOX(&lrqk::cuda::cuda_append));
  m.impl("cuda_gather_layers", TORCH_BOX(&lrqk::cuda::cuda_gather_layers));
  m.impl("cuda_gather_pages", TORCH_BOX(&lrqk::cuda::cuda_gather_pages));
}

STABLE_TORCH_LIBRARY_IMPL(LRQK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_pointer", TORCH_BOX(&lrqk::cuda::cuda_device_pointer));
}
