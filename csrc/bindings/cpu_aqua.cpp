// AQUA's CPU operators: new tokens and a decode step. Shapes are those of cpu/aqua/args.h.
#include <torch/csrc/stable/library.h>

#include "bindings/cpu.h"

namespace lrqk {
namespace {

AquaBlocks aqua_blocks(const Tensor& blocks, int64_t block_size, int64_t stored, bool is_int8, int64_t value_offset,
                       int64_t key_scale_offset) {
  check_cpu(blocks, "blocks", 3, ScalarType::Byte);
  STD_TORCH_CHECK(stored <= kMaxStored, stored, " dimensions are stored, but at most ", kMaxStored, " can be");
  auto* data = static_cast<uint8_t*>(blocks.data_ptr());
  return {data, blocks.stride(0), blocks.stride(1), value_offset, key_scale_offset, block_size, stored, is_int8};
}

AquaBasis aqua_basis(const Tensor& projection, const Tensor& offset, const Tensor& sigma) {
  return {contiguous<const float>(projection, "projection", 3, ScalarType::Float),
          contiguous<const float>(offset, "offset", 2, ScalarType::Float),
          contiguous<const float>(sigma, "sigma", 2, ScalarType::Float)};
}

void cpu_aqua_decode(const Tensor query, const Tensor blocks, const Tensor projection, const Tensor offset,
                     const Tensor sigma, const Tensor block_table, const Tensor seq_lens, double scale, int64_t keep,
                     bool per_query_head, int64_t block_size, bool is_int8, int64_t value_offset,
                     int64_t key_scale_offset, Tensor output, int64_t instruction_set) {
  check_cpu(query, "query", 3, query.scalar_type());
  check_cpu(block_table, "block_table", 2, ScalarType::Int);
  check_cpu(seq_lens, "seq_lens", 1, ScalarType::Int);
  check_cpu(output, "output", 3, query.scalar_type());
  AquaDecodeArgs a{};
  a.query = query.data_ptr();
  a.query_request_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.blocks = aqua_blocks(blocks, block_size, projection.size(2), is_int8, value_offset, key_scale_offset);
  a.basis = aqua_basis(projection, offset, sigma);
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
  a.dtype = dtype_of<DType>(query);
  STD_TORCH_CHECK(seq_lens.size(0) == a.requests && block_table.size(0) == a.requests,
                  "query, block_table and seq_lens must agree on the number of requests");
  check_heads(a.heads, a.kv_heads, kMaxGroup);
  check_head_size(a.head_size, kernels_of(instruction_set));
  kernels_of(instruction_set).aqua.decode(a, torch_threads());
}

void cpu_aqua_append(const Tensor key, const Tensor value, Tensor blocks, const Tensor projection, const Tensor offset,
                     const Tensor sigma, const Tensor slot_mapping, int64_t block_size, bool is_int8,
                     int64_t value_offset, int64_t key_scale_offset, int64_t instruction_set) {
  check_cpu(key, "key", 3, key.scalar_type());
  check_cpu(value, "value", 3, key.scalar_type());
  check_cpu(slot_mapping, "slot_mapping", 1, ScalarType::Long);
  AquaAppendArgs a{};
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.key_token_stride = key.stride(0);
  a.key_head_stride = key.stride(1);
  a.value_token_stride = value.stride(0);
  a.value_head_stride = value.stride(1);
  a.blocks = aqua_blocks(blocks, block_size, projection.size(2), is_int8, value_offset, key_scale_offset);
  a.basis = aqua_basis(projection, offset, sigma);
  a.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  a.tokens = slot_mapping.size(0);
  a.kv_heads = blocks.size(1);
  a.head_size = key.size(2);
  a.dtype = dtype_of<DType>(key);
  STD_TORCH_CHECK(key.size(0) >= a.tokens && value.size(0) >= a.tokens, "there are more slots than keys or values");
  kernels_of(instruction_set).aqua.append(a, torch_threads());
}

}  // namespace
}  // namespace lrqk

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def(
      "cpu_aqua_decode(Tensor query, Tensor blocks, Tensor projection, Tensor offset, Tensor sigma, Tensor "
      "block_table, "
      "Tensor seq_lens, float scale, int keep, bool per_query_head, int block_size, bool is_int8, int value_offset, "
      "int key_scale_offset, Tensor(a!) output, int instruction_set) -> ()");
  m.def(
      "cpu_aqua_append(Tensor key, Tensor value, Tensor(a!) blocks, Tensor projection, Tensor offset, Tensor sigma, "
      "Tensor slot_mapping, int block_size, bool is_int8, int value_offset, int key_scale_offset, "
      "int instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_aqua_decode", TORCH_BOX(&lrqk::cpu_aqua_decode));
  m.impl("cpu_aqua_append", TORCH_BOX(&lrqk::cpu_aqua_append));
}
