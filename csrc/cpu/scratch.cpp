#include "cpu/scratch.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>

namespace lrqk {

namespace {

constexpr size_t kPage = 4096, kHugePage = 2 << 20;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block blocks[2];

}  // namespace

void* scratch(Scratch purpose, size_t bytes) {
  Block& block = blocks[static_cast<int>(purpose)];
  if (block.size < bytes) {
    std::free(block.data);
    const size_t wanted = bytes + bytes / 4, unit = wanted < kHugePage ? kPage : kHugePage;
    block.size = (wanted + unit - 1) / unit * unit;
    block.data = std::aligned_alloc(unit, block.size);
    if (!block.data) {
      block.size = 0;
      std::abort();
    }
#ifdef __linux__
    if (unit == kHugePage) madvise(block.data, block.size, MADV_HUGEPAGE);
#endif
  }
  return block.data;
}

}  // namespace lrqk
