// The steps of select, and how its memory is cut.
#pragma once

#include "cuda/args.h"

namespace lrqk::cuda {

// Cut `memory` (null: only count) into the parts of `scratch`; the bytes that they take.
// The state is zero before the first call; its layout must not change between calls.
int64_t carve_state(SelectScratch& scratch, uint8_t* memory, int64_t max_requests, int64_t heads, int64_t kv_heads);
int64_t carve_scratch(SelectScratch& scratch, uint8_t* memory, int64_t requests, int64_t heads, int64_t kv_heads,
                      int64_t pages, int64_t page_size);

void score(const SelectArgs&, cudaStream_t);
void weigh(const SelectArgs&, cudaStream_t);
void collect(const SelectArgs&, cudaStream_t);
void emit(const SelectArgs&, cudaStream_t);
void moment(const SelectArgs&, cudaStream_t);

}  // namespace lrqk::cuda
