// Select: its kernels, one after the other.
#include "cuda/lrqk/select.h"

namespace lrqk::cuda {

cudaError_t select(const SelectArgs& a, cudaStream_t stream) {
  if (a.requests == 0) return cudaSuccess;
  score(a, stream);
  weigh(a, stream);
  collect(a, stream);
  emit(a, stream);
  if (a.moment) moment(a, stream);
  return cudaGetLastError();
}

}  // namespace lrqk::cuda
