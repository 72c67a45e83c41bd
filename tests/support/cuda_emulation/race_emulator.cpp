// The emulator under ThreadSanitizer. This file is compiled without it: what happens here orders nothing, but for what
// is said with __tsan_acquire and __tsan_release.
//
// A thread of a block is one of ThreadSanitizer's fibers, a block is a thread of the system, and a token lets one block
// run at a time. It changes hands at random, by a seed, at barriers, fences and atomics; threads run in random order
// between barriers. Waves of blocks follow each other: blocks of different waves are not compared.
#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cuda_emulator.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
}

namespace emulator {
namespace {

constexpr size_t kStackBytes = 32 << 10;
constexpr int kThreadsOfWave = 2048;
constexpr unsigned kNoSync = 1;  // of __tsan_switch_to_fiber: switching orders nothing

struct Fiber {
  ucontext_t context;
  void* clock = nullptr;  // ThreadSanitizer's fiber
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait waiting = Wait::kNone;
  bool is_done = false, has_fenced = false;
  unsigned block_barriers = 0, warp_barriers = 0;  // passed
};

struct Block {
  int place;  // in its wave
  std::mt19937 random;
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t scheduler;
  void* clock = nullptr;  // of the thread that schedules
  int current = 0;
  uint64_t slots[32][32];
  // Addresses alone; of two barriers in turn, as a thread may reach the next one before others have left this one.
  char start, warp_barrier[32][2], block_barrier[2];
  bool is_published = false;  // every thread fenced before the last barrier of the block
  void* last_atomic = nullptr;
  size_t last_size = 0;

  Fiber& fiber() { return *fibers[current]; }
};

thread_local Block* block;
const std::function<void()>* task;
std::vector<std::unique_ptr<Block>> wave;
int live[kThreadsOfWave / 32];  // places in the wave, num_live of them
size_t num_live;
std::atomic<int> turn;
std::mt19937 chance(1);
char end_of_wave;  // an address alone

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s\n", what);
  std::abort();
}

void wait_for_turn() {
  for (int other = turn.load(); other != block->place; other = turn.load()) turn.wait(other);
}

void pass_token() {
  if (num_live == 0) return;
  turn = live[chance() % num_live];
  turn.notify_all();
}

// Called with the token, and returns with it.
void let_others_run() {
  if (num_live < 2 || chance() % 4) return;
  pass_token();
  wait_for_turn();
}

void back_to_scheduler() {
  Fiber& self = block->fiber();
  __tsan_switch_to_fiber(block->clock, kNoSync);
  swapcontext(&self.context, &block->scheduler);
}

void start() {
  __tsan_acquire(&block->start);
  (*task)();
  __tsan_release(&end_of_wave);
  block->fiber().is_done = true;
  back_to_scheduler();
}

void resume(int thread) {
  block->current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  __tsan_switch_to_fiber(block->fiber().clock, kNoSync);
  swapcontext(&block->scheduler, &block->fiber().context);
}

bool release(int first, int end, Wait kind) {
  for (int i = first; i < end; ++i) {
    if (block->fibers[i]->is_done || block->fibers[i]->waiting != kind) return false;
  }
  if (kind == Wait::kBlock) {
    block->is_published = true;
    for (int i = first; i < end; ++i) {
      block->is_published &= block->fibers[i]->has_fenced;
      block->fibers[i]->has_fenced = false;
    }
  }
  for (int i = first; i < end; ++i) block->fibers[i]->waiting = Wait::kNone;
  return true;
}

void run_block(Block* own, uint3 index, dim3 grid, int threads) {
  block = own;
  blockIdx = index;
  gridDim = grid;
  blockDim = dim3(threads);
  own->clock = __tsan_get_current_fiber();
  __tsan_release(&own->start);
  own->is_published = false;
  own->last_atomic = nullptr;
  wait_for_turn();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *own->fibers[i];
    if (!fiber.clock) fiber.clock = __tsan_create_fiber(0);
    fiber.is_done = fiber.has_fenced = false;
    fiber.block_barriers = fiber.warp_barriers = 0;
    fiber.waiting = Wait::kNone;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (int done = 0; done < threads;) {
    bool has_run = false;
    done = 0;
    std::shuffle(order.begin(), order.end(), own->random);
    for (int thread : order) {
      Fiber& fiber = *own->fibers[thread];
      if (!fiber.is_done && fiber.waiting == Wait::kNone) {
        resume(thread);
        has_run = true;
      }
      done += fiber.is_done;
    }
    for (int warp = 0; warp < threads / 32; ++warp) has_run |= release(warp * 32, warp * 32 + 32, Wait::kWarp);
    has_run |= release(0, threads, Wait::kBlock);
    if (!has_run && done < threads) fail("a barrier that not all threads reach");
    if (done < threads) let_others_run();
  }
  size_t i = 0;
  while (live[i] != own->place) ++i;
  live[i] = live[--num_live];
  pass_token();
}

// A barrier of the warp without an order of memory.
void meet() {
  block->fiber().waiting = Wait::kWarp;
  back_to_scheduler();
}

}  // namespace

void set_seed(unsigned seed) { chance.seed(seed); }

void wait(Wait kind) {
  Fiber& self = block->fiber();
  char* barrier = kind == Wait::kBlock ? &block->block_barrier[self.block_barriers++ % 2]
                                       : &block->warp_barrier[threadIdx.x / 32][self.warp_barriers++ % 2];
  __tsan_release(barrier);
  self.waiting = kind;
  back_to_scheduler();
  __tsan_acquire(barrier);
}

uint64_t exchange_bits(uint64_t bits, int from_lane) {
  uint64_t (&of_warp)[32] = block->slots[threadIdx.x / 32];
  of_warp[threadIdx.x % 32] = bits;
  meet();
  bits = of_warp[from_lane];
  meet();
  return bits;
}

unsigned vote(bool is_for) {
  uint64_t (&of_warp)[32] = block->slots[threadIdx.x / 32];
  of_warp[threadIdx.x % 32] = is_for;
  meet();
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(of_warp[lane]) << lane;
  meet();
  return votes;
}

// What the block's last atomic saw happened before whatever follows.
void fence() {
  let_others_run();
  block->fiber().has_fenced = true;
  if (block->last_atomic) __tsan_acquire(block->last_atomic);
}

int begin_atomic(void* at, size_t size) {
  let_others_run();
  block->last_atomic = at;
  block->last_size = size;
  if (!block->is_published && !block->fiber().has_fenced) return __ATOMIC_RELAXED;
  return __ATOMIC_RELEASE;
}

void run(dim3 grid, int threads, const std::function<void()>& kernel) {
  if (threads % 32 || threads > 1024) fail("blocks must be whole warps, 1024 threads at most");
  task = &kernel;
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), chance);
  const size_t most = std::max(2, kThreadsOfWave / threads);
  for (size_t first = 0; first < blocks; first += most) {
    const size_t count = std::min<size_t>(most, blocks - first);
    num_live = count;
    for (size_t i = 0; i < count; ++i) live[i] = static_cast<int>(i);
    while (wave.size() < count) wave.push_back(std::make_unique<Block>());
    turn = -1;
    std::vector<std::thread> systems;
    for (size_t i = 0; i < count; ++i) {
      Block& own = *wave[i];
      while (static_cast<int>(own.fibers.size()) < threads) own.fibers.push_back(std::make_unique<Fiber>());
      own.place = static_cast<int>(i);
      own.random.seed(chance());
      const unsigned b = order[first + i];
      const uint3 index{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
      systems.emplace_back(run_block, &own, index, grid, threads);
    }
    pass_token();
    for (std::thread& system : systems) system.join();
    __tsan_acquire(&end_of_wave);
  }
}

}  // namespace emulator
