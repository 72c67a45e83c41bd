// What the bindings of both devices check of their tensors, and how they call kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "layout.h"

namespace lrqk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) {
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

// [num_pages, KV, N, 2, d]
inline void check_host_pages(const Tensor& host, ScalarType dtype) {
  check(host, "host", 5, dtype);
  STD_TORCH_CHECK(host.size(3) == 2 && host.stride(3) == host.size(4) && host.stride(2) == 2 * host.size(4),
                  "the rows of host pages must be contiguous");
}

inline void check_page_size(int64_t page_size) {
  STD_TORCH_CHECK(page_size >= 16 && page_size <= 1024 && (page_size & (page_size - 1)) == 0, "page_size is ",
                  page_size, ", but must be a power of two from 16 to 1024");
}

inline void check_heads(int64_t heads, int64_t kv_heads, int64_t max_group) {
  STD_TORCH_CHECK(heads % kv_heads == 0 && heads / kv_heads <= max_group, heads, " query heads for ", kv_heads,
                  " KV heads: they must be a multiple, at most ", max_group, " for each");
}

// The layout of `factors`, uint8 [num_pages, KV, page_bytes], from values in the order of kPageLayoutNames.
inline PageLayout checked_layout(const Tensor& factors, const std::vector<int64_t>& values, int64_t max_rank) {
  check(factors, "factors", 3, ScalarType::Byte);
  STD_TORCH_CHECK(values.size() == kPageLayoutSize, "page_layout must have ", kPageLayoutSize,
                  " values: ", kPageLayoutNames);
  const PageLayout layout = page_layout(values);
  STD_TORCH_CHECK(layout.page_bytes == factors.size(2), "page_bytes is ", layout.page_bytes, ", but factors have ",
                  factors.size(2));
  STD_TORCH_CHECK(layout.rank % 4 == 0 && layout.rank <= max_rank, "rank is ", layout.rank,
                  ", but must be a multiple of 4, at most ", max_rank);
  STD_TORCH_CHECK(layout.value_rank % 4 == 0 && layout.value_rank <= layout.rank, "value_rank is ", layout.value_rank,
                  ", but must be a multiple of 4, at most the rank, ", layout.rank);
  return layout;
}

template <class DType>
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

}  // namespace lrqk
