// What the CUDA bindings share. Streams come as integers from Python, so that nothing here links against torch's CUDA
// libraries.
#pragma once

#include <cuda_runtime_api.h>

#include "bindings/checks.h"

// The tests build these sources for an emulator, beside the real library.
#ifndef LRQK_NAMESPACE
#define LRQK_NAMESPACE vllm_lrqk
#define LRQK_DEVICE CUDA
#endif

namespace lrqk::cuda {

inline cudaStream_t stream_of(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Makes a tensor's device current, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) {
    if (!tensor.is_cuda() || cudaGetDevice(&before_) != cudaSuccess) return;
    has_changed_ = before_ != tensor.get_device_index();
    if (has_changed_) cudaSetDevice(tensor.get_device_index());
  }
  ~DeviceGuard() {
    if (has_changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool has_changed_ = false;
};

// Kernels read `bytes` at once from multiples of the strides of the first `dims` dimensions.
inline void check_aligned(const Tensor& tensor, int64_t dims, int64_t bytes, const char* name) {
  bool is_aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
  for (int64_t i = 0; i < dims; ++i) {
    is_aligned &= tensor.size(i) <= 1 || tensor.stride(i) * tensor.element_size() % bytes == 0;
  }
  STD_TORCH_CHECK(is_aligned, name, " must be aligned to ", bytes, " bytes");
}

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernels of vllm-lrqk: ", cudaGetErrorString(error));
}

}  // namespace lrqk::cuda
