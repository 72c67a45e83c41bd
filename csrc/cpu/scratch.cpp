#include "cpu/scratch.h"

#include <cstdlib>

namespace lrqk {

namespace {

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
    block.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    block.data = std::aligned_alloc(4096, block.size);
    if (!block.data) {
      block.size = 0;
      std::abort();
    }
  }
  return block.data;
}

}  // namespace lrqk
