// Select: its kernels, one after the other.
#include "cuda/lrqk/select.h"

namespace lrqk::cuda {

cudaError_t select(const SelectArgs& a, cudaStream_t stream) {
  if (a.requests == 0) return cudaSuccess;
  const bool is_int8 = a.layout.is_int8;
  is_int8 ? score_int8(a, stream) : score_bfloat16(a, stream);
  weigh(a, stream);
  collect(a, stream);
  emit(a, stream);
  if (a.moment) is_int8 ? moment_int8(a, stream) : moment_bfloat16(a, stream);
  return cudaGetLastError();
}

}  // namespace lrqk::cuda
