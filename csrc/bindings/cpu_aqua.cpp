// AQUA's operators of torch.ops.vllm_lrqk, on libtorch's stable ABI. Shapes are those of cpu/aqua/args.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/aqua/args.h"

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

const lrqk::AquaKernelTable& table(int64_t instruction_set) {
  const lrqk::AquaKernelTable* found = lrqk::aqua_kernel_table(static_cast<int>(instruction_set));
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

lrqk::AquaBlocks aqua_blocks(const Tensor& blocks, int64_t block_size, int64_t stored, bool is_int8,
                             int64_t value_offset, int64_t key_scale_offset) {
  check(blocks, "blocks", 3, ScalarType::Byte);
  STD_TORCH_CHECK(stored <= 512, "unsupported number of stored dimensions");
  auto* data = static_cast<uint8_t*>(blocks.data_ptr());
  return {data, blocks.stride(0), blocks.stride(1), value_offset, key_scale_offset, block_size, stored, is_int8};
}

lrqk::AquaBasis aqua_basis(const Tensor& projection, const Tensor& sigma) {
  check(projection, "projection", 3, ScalarType::Float);
  check(sigma, "sigma", 2, ScalarType::Float);
  STD_TORCH_CHECK(projection.is_contiguous() && sigma.is_contiguous(), "the basis must be contiguous");
  return {static_cast<const float*>(projection.data_ptr()), static_cast<const float*>(sigma.data_ptr())};
}

void cpu_aqua_decode(const Tensor query, const Tensor blocks, const Tensor projection, const Tensor sigma,
                     const Tensor block_table, const Tensor seq_lens, double scale, int64_t keep, bool per_query_head,
                     int64_t block_size, bool is_int8, int64_t value_offset, int64_t key_scale_offset, Tensor output,
                     int64_t instruction_set) {
  check(query, "query", 3, query.scalar_type());
  check(block_table, "block_table", 2, ScalarType::Int);
  check(seq_lens, "seq_lens", 1, ScalarType::Int);
  check(output, "output", 3, query.scalar_type());
  lrqk::AquaDecodeArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.blocks = aqua_blocks(blocks, block_size, projection.size(2), is_int8, value_offset, key_scale_offset);
  a.basis = aqua_basis(projection, sigma);
  a.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  a.block_table_stride = block_table.stride(0);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  a.output = output.data_ptr();
  a.output_request_stride = output.stride(0);
  a.output_head_stride = output.stride(1);
  a.requests = query.size(0);
  a.heads = query.size(1);
  a.kv_heads = blocks.size(1);
  a.head_size = query.size(2);
  a.keep = keep;
  a.per_query_head = per_query_head;
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(query);
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests,
                  "query, block_table and seq_lens must agree on the number of requests");
  STD_TORCH_CHECK(a.heads % a.kv_heads == 0 && a.heads / a.kv_heads <= 64, "unsupported number of heads");
  table(instruction_set).decode(a, parallel());
}

void cpu_aqua_append(const Tensor key, const Tensor value, Tensor blocks, const Tensor projection, const Tensor sigma,
                     const Tensor slot_mapping, int64_t block_size, bool is_int8, int64_t value_offset,
                     int64_t key_scale_offset, int64_t instruction_set) {
  check(key, "key", 3, key.scalar_type());
  check(value, "value", 3, key.scalar_type());
  check(slot_mapping, "slot_mapping", 1, ScalarType::Long);
  lrqk::AquaAppendArgs a{};
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.key_token_stride = key.stride(0);
  a.key_head_stride = key.stride(1);
  a.value_token_stride = value.stride(0);
  a.value_head_stride = value.stride(1);
  a.blocks = aqua_blocks(blocks, block_size, projection.size(2), is_int8, value_offset, key_scale_offset);
  a.basis = aqua_basis(projection, sigma);
  a.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  a.tokens = slot_mapping.size(0);
  a.kv_heads = blocks.size(1);
  a.head_size = key.size(2);
  a.dtype = dtype_of(key);
  STD_TORCH_CHECK(key.size(0) >= a.tokens && value.size(0) >= a.tokens, "there are more slots than keys or values");
  table(instruction_set).append(a, parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def(
      "cpu_aqua_decode(Tensor query, Tensor blocks, Tensor projection, Tensor sigma, Tensor block_table, "
      "Tensor seq_lens, float scale, int keep, bool per_query_head, int block_size, bool is_int8, int value_offset, "
      "int key_scale_offset, Tensor(a!) output, int instruction_set) -> ()");
  m.def(
      "cpu_aqua_append(Tensor key, Tensor value, Tensor(a!) blocks, Tensor projection, Tensor sigma, "
      "Tensor slot_mapping, int block_size, bool is_int8, int value_offset, int key_scale_offset, "
      "int instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_aqua_decode", TORCH_BOX(&cpu_aqua_decode));
  m.impl("cpu_aqua_append", TORCH_BOX(&cpu_aqua_append));
}
