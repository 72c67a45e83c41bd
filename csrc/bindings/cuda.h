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

inline void enter(const Tensor& tensor) {
  if (tensor.is_cuda()) cudaSetDevice(tensor.get_device_index());
}

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernels of vllm-lrqk: ", cudaGetErrorString(error));
}

}  // namespace lrqk::cuda
