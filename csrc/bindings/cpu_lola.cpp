// LoLA's CPU operators: a decode step and a piece of a prompt. Shapes are those of cpu/lola/args.h.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "bindings/cpu.h"

namespace lrqk {
namespace {

void check_maps(const LolaArgs& a, const Tensor& query_maps, const Tensor& key_maps, const Tensor& bias,
                const Tensor& kappa, const KernelTable& kernels) {
  const LolaTokens& t = a.tokens;
  const int64_t columns = a.memory.num_features / 2;
  STD_TORCH_CHECK(columns % (2 * kernels.vector_elements) == 0, "a feature map has ", columns,
                  " columns, but must have a multiple of ", 2 * kernels.vector_elements);
  check_cpu(query_maps, "query_maps", 3, ScalarType::Float);
  check_cpu(key_maps, "key_maps", 3, ScalarType::Float);
  check_cpu(bias, "bias", 1, ScalarType::Float);
  check_cpu(kappa, "kappa", 2, ScalarType::Float);
  const auto is_map = [&](const Tensor& map, int64_t heads) {
    return map.is_contiguous() && map.size(0) == heads && map.size(1) == t.head_size && map.size(2) == columns;
  };
  STD_TORCH_CHECK(is_map(query_maps, t.heads) && is_map(key_maps, t.kv_heads),
                  "feature maps must be contiguous [heads, head size, columns]");
  STD_TORCH_CHECK(bias.is_contiguous() && bias.size(0) == t.heads, "bias must be contiguous [H]");
  STD_TORCH_CHECK(
      kappa.is_contiguous() && (kappa.size(0) == 0 || kappa.size(0) == t.heads) && kappa.size(1) == t.head_size,
      "kappa must be contiguous [H, head size], or have no rows");
}

LolaArgs lola_args(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& memory,
                   const std::vector<int64_t>& layout, const Tensor& query_directions, const Tensor& key_directions,
                   const Tensor& query_maps, const Tensor& key_maps, const Tensor& bias, const Tensor& kappa,
                   double scale, double ridge, double least_variance, const Tensor& output, int64_t instruction_set) {
  const ScalarType dtype = query.scalar_type();
  check_cpu(query, "query", 3, dtype);
  check_cpu(key, "key", 3, dtype);
  check_cpu(value, "value", 3, dtype);
  check_cpu(output, "output", 3, dtype);
  check_cpu(memory, "memory", 3, ScalarType::Byte);
  STD_TORCH_CHECK(layout.size() == kLolaLayoutSize, "expected ", kLolaLayoutSize, " numbers of the layout");
  LolaArgs a{};
  check_head_size(query.size(2), kernels_of(instruction_set));
  LolaTokens& t = a.tokens;
  t = {query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr(), query.stride(0),       query.stride(1),
       key.stride(0),    key.stride(1),  value.stride(0),  value.stride(1),   output.stride(0),      output.stride(1),
       query.size(0),    query.size(1),  key.size(1),      query.size(2),     dtype_of<DType>(query)};
  check_heads(t.heads, t.kv_heads, kMaxGroup);
  STD_TORCH_CHECK(key.size(0) >= t.count && value.size(0) >= t.count && output.size(0) >= t.count,
                  "query, key, value and output must agree on the number of tokens");
  STD_TORCH_CHECK(memory.size(1) == t.kv_heads, "memory must have as many heads as key");
  static_cast<LolaLayout&>(a.memory) = lola_layout(layout);
  STD_TORCH_CHECK(memory.size(2) == a.memory.block_bytes, "memory has the wrong number of bytes per head");
  a.memory.data = static_cast<uint8_t*>(memory.data_ptr());
  a.memory.block_stride = memory.stride(0);
  a.memory.head_stride = memory.stride(1);
  for (const Tensor* directions : {&query_directions, &key_directions}) {
    check_cpu(*directions, "directions", 3, ScalarType::Float);
    STD_TORCH_CHECK(directions->is_contiguous() && directions->size(0) == t.kv_heads &&
                        directions->size(1) == a.memory.rank && directions->size(2) == t.head_size,
                    "directions must be contiguous [KV, rank, head size]");
  }
  a.query_directions = static_cast<const float*>(query_directions.data_ptr());
  a.key_directions = static_cast<const float*>(key_directions.data_ptr());
  if (a.memory.num_features > 0) {
    check_maps(a, query_maps, key_maps, bias, kappa, kernels_of(instruction_set));
    a.query_maps = static_cast<const float*>(query_maps.data_ptr());
    a.key_maps = static_cast<const float*>(key_maps.data_ptr());
    a.bias = static_cast<const float*>(bias.data_ptr());
    a.kappa = kappa.size(0) > 0 ? static_cast<const float*>(kappa.data_ptr()) : nullptr;
  }
  a.scale = static_cast<float>(scale);
  a.ridge = static_cast<float>(ridge);
  a.least_variance = static_cast<float>(least_variance);
  return a;
}

void cpu_lola_decode(const Tensor query, const Tensor key, const Tensor value, Tensor memory,
                     std::vector<int64_t> layout, const Tensor query_directions, const Tensor key_directions,
                     const Tensor query_maps, const Tensor key_maps, const Tensor bias, const Tensor kappa,
                     double scale, double ridge, double least_variance, const Tensor blocks, const Tensor seq_lens,
                     Tensor output, int64_t instruction_set) {
  auto a = lola_args(query, key, value, memory, layout, query_directions, key_directions, query_maps, key_maps, bias,
                     kappa, scale, ridge, least_variance, output, instruction_set);
  STD_TORCH_CHECK(blocks.dim() == 1 && blocks.scalar_type() == ScalarType::Int, "blocks must be int32 [B]");
  check_cpu(seq_lens, "seq_lens", 1, ScalarType::Int);
  STD_TORCH_CHECK(blocks.size(0) >= a.tokens.count && seq_lens.size(0) >= a.tokens.count,
                  "there are more tokens than blocks or seq_lens");
  a.blocks = static_cast<const int32_t*>(blocks.data_ptr());
  a.blocks_stride = blocks.stride(0);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  kernels_of(instruction_set).lola.decode(a, torch_threads());
}

void cpu_lola_prefill(const Tensor query, const Tensor key, const Tensor value, Tensor memory,
                      std::vector<int64_t> layout, const Tensor query_directions, const Tensor key_directions,
                      const Tensor query_maps, const Tensor key_maps, const Tensor bias, const Tensor kappa,
                      double scale, double ridge, double least_variance, int64_t block, int64_t context_len,
                      Tensor output, int64_t instruction_set) {
  auto a = lola_args(query, key, value, memory, layout, query_directions, key_directions, query_maps, key_maps, bias,
                     kappa, scale, ridge, least_variance, output, instruction_set);
  STD_TORCH_CHECK(block >= 0 && block < memory.size(0), "there is no block ", block);
  const int32_t only = static_cast<int32_t>(block);
  a.blocks = &only;
  a.context_len = context_len;
  if (a.tokens.count > 0) kernels_of(instruction_set).lola.prefill(a, torch_threads());
}

std::string cpu_lola_layout() { return kLolaLayoutNames; }

}  // namespace
}  // namespace lrqk

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_lrqk, m) {
  m.def(
      "cpu_lola_decode(Tensor query, Tensor key, Tensor value, Tensor(a!) memory, int[] layout, "
      "Tensor query_directions, Tensor key_directions, Tensor query_maps, Tensor key_maps, Tensor bias, Tensor kappa, "
      "float scale, float ridge, float least_variance, Tensor blocks, "
      "Tensor seq_lens, Tensor(b!) output, int instruction_set) -> ()");
  m.def(
      "cpu_lola_prefill(Tensor query, Tensor key, Tensor value, Tensor(a!) memory, int[] layout, "
      "Tensor query_directions, Tensor key_directions, Tensor query_maps, Tensor key_maps, Tensor bias, Tensor kappa, "
      "float scale, float ridge, float least_variance, int block, "
      "int context_len, Tensor(b!) output, int instruction_set) -> ()");
  m.def("cpu_lola_layout() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CPU, m) {
  m.impl("cpu_lola_decode", TORCH_BOX(&lrqk::cpu_lola_decode));
  m.impl("cpu_lola_prefill", TORCH_BOX(&lrqk::cpu_lola_prefill));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_lrqk, CompositeExplicitAutograd, m) {
  m.impl("cpu_lola_layout", TORCH_BOX(&lrqk::cpu_lola_layout));
}
