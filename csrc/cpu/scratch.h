// Working memory of the calling thread.
#pragma once

#include <cstddef>

namespace lrqk {

enum class Scratch { kCall, kTask };

// Kept between calls and only ever grown: a fresh mapping per decode step would cost more in page faults than the step
// itself. Aligned to 4096 bytes; valid until the thread's next call for the same purpose.
void* scratch(Scratch purpose, size_t bytes);

}  // namespace lrqk
