// How kernels start. Without nvcc these sources are C++ that an emulator on the include path runs thread by thread.
#pragma once

#ifdef __CUDACC__
namespace lrqk::cuda {

template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, const Args&... args) {
  kernel<<<grid, threads, 0, stream>>>(args...);
}

}  // namespace lrqk::cuda
#else
#include "cuda_emulator.h"
#endif
