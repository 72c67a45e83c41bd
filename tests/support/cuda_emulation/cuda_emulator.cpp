#include "cuda_emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
}

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t context;  // of the first start; after that jumps are enough, which cost no system call
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait waiting = Wait::kNone;
  bool is_started = false;
  bool is_done = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
uint64_t slots[32][32];
jmp_buf scheduler;
Fiber* current;
const std::function<void()>* task;
bool is_reversed;

void start() {
  (*task)();
  current->is_done = true;
  _longjmp(scheduler, 1);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s\n", what);
  std::abort();
}

void resume(int thread) {
  current = fibers[thread].get();
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(scheduler)) return;
  if (current->is_started) _longjmp(current->place, 1);
  current->is_started = true;
  setcontext(&current->context);
}

// Lets go of threads first ... end - 1 if all of them wait for `kind`.
bool release(int first, int end, Wait kind) {
  for (int i = first; i < end; ++i) {
    if (fibers[i]->is_done || fibers[i]->waiting != kind) return false;
  }
  for (int i = first; i < end; ++i) fibers[i]->waiting = Wait::kNone;
  return true;
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.is_started = fiber.is_done = false;
    fiber.waiting = Wait::kNone;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (int done = 0; done < threads;) {
    bool has_run = false;
    done = 0;
    for (int i = 0; i < threads; ++i) {
      const int thread = is_reversed ? threads - 1 - i : i;
      Fiber& fiber = *fibers[thread];
      if (!fiber.is_done && fiber.waiting == Wait::kNone) {
        resume(thread);
        has_run = true;
      }
      done += fiber.is_done;
    }
    for (int warp = 0; warp < threads / 32; ++warp) has_run |= release(warp * 32, warp * 32 + 32, Wait::kWarp);
    has_run |= release(0, threads, Wait::kBlock);
    if (!has_run && done < threads) fail("a barrier that not all threads reach");
  }
}

}  // namespace

void wait(Wait kind) {
  Fiber* self = current;
  const uint3 index = threadIdx;
  self->waiting = kind;
  if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
  threadIdx = index;
}

uint64_t exchange_bits(uint64_t bits, int from_lane) {
  uint64_t (&of_warp)[32] = slots[threadIdx.x / 32];
  of_warp[threadIdx.x % 32] = bits;
  wait(Wait::kWarp);
  bits = of_warp[from_lane];
  wait(Wait::kWarp);
  return bits;
}

unsigned vote(bool is_for) {
  uint64_t (&of_warp)[32] = slots[threadIdx.x / 32];
  of_warp[threadIdx.x % 32] = is_for;
  wait(Wait::kWarp);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(of_warp[lane]) << lane;
  wait(Wait::kWarp);
  return votes;
}

void run(dim3 grid, int threads, const std::function<void()>& kernel) {
  if (threads % 32 || threads > 1024) fail("blocks must be whole warps, 1024 threads at most");
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  task = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  const unsigned blocks = grid.x * grid.y * grid.z;
  const bool starts_last = is_reversed;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = starts_last ? blocks - 1 - i : i;
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    is_reversed = !is_reversed;
    run_block(threads);
  }
  is_reversed = !starts_last;
}

}  // namespace emulator
