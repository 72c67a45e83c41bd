// Resolve: which attended rows are among the hot rows already, and which hot rows the others replace.
//
// One block per (request, KV head). Live hot rows go into a hash table by their slot; every attended position looks its
// slot up; what is missing replaces the hot rows that were not used for the longest time, dead ones first, and among
// equals the first. Ages from kOldest on count as equal. A hot row of the current token's slot is emptied: it may be that
// of a token that was drafted and rejected.
#include "cuda/rows.cuh"

namespace lrqk::cuda {
namespace {

constexpr int kResolveThreads = 1024;
constexpr int kDead = kBins - 1;
constexpr int kOldest = kBins - 2;
constexpr int kInUse = -1;

struct Item {
  int request, kv_head;
  int64_t index;
  const int* blocks;
  int* table;
  int* age;
  int num_hot;
};

__device__ inline unsigned hash_of(int slot, int table_size) {
  return (static_cast<unsigned>(slot) * 0x9E3779B1u >> 7) & static_cast<unsigned>(table_size - 1);
}

__device__ inline int slot_of(const ResolveArgs& a, const Item& item, int position) {
  const int page = a.block_table[item.request * a.block_table_stride + position / a.page_size];
  return page * a.page_size + position % a.page_size;
}

// Ages of all hot rows; live ones into the table.
__device__ inline void insert_hot(const ResolveArgs& a, const Item& item, int now) {
  const int current = slot_of(a, item, a.seq_lens[item.request] - 1);
  for (int i = threadIdx.x; i < a.table_size; i += blockDim.x) item.table[i] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < item.num_hot; i += blockDim.x) {
    const HotRow hot = hot_row(a.hot, item.blocks, item.kv_head, i);
    if (*hot.slot == current) *hot.slot = -1;
    const int slot = *hot.slot;
    const bool is_slot = slot >= 0 && slot / a.page_size < a.num_host_pages;
    const bool is_live = is_slot && *hot.tag == tag_of(slot, a.generation[slot / a.page_size]);
    item.age[i] = is_live ? min(max(now - *hot.last_used, 0), kOldest) : kDead;
    if (!is_live) continue;
    unsigned at = hash_of(slot, a.table_size);
    while (atomicCAS(&item.table[at], -1, i) != -1) at = (at + 1) & static_cast<unsigned>(a.table_size - 1);
  }
  __syncthreads();
}

// The hot row that holds the row of `slot`, or -1.
__device__ inline int find_hot(const ResolveArgs& a, const Item& item, int slot) {
  unsigned at = hash_of(slot, a.table_size);
  for (int i = item.table[at]; i >= 0; i = item.table[at]) {
    if (*hot_row(a.hot, item.blocks, item.kv_head, i).slot == slot) return i;
    at = (at + 1) & static_cast<unsigned>(a.table_size - 1);
  }
  return -1;
}

// The slot of a position, or -1: it is none, or its page has no host memory.
__device__ inline int wanted_slot(const ResolveArgs& a, const Item& item, int position) {
  if (position < 0) return -1;
  const int slot = slot_of(a, item, position);
  return slot / a.page_size < a.num_host_pages ? slot : -1;
}

// Addresses of the rows that are there; which positions lack one goes to miss_index, in order. Returns how many.
__device__ inline int look_up(const ResolveArgs& a, const Item& item, int now) {
  const int64_t first = item.index * a.capacity;
  int hits = 0, misses = 0;
  for (int base = 0; base < a.capacity; base += blockDim.x) {
    const int i = base + static_cast<int>(threadIdx.x);
    const int slot = wanted_slot(a, item, i < a.capacity ? a.positions[first + i] : -1);
    const int found = slot >= 0 ? find_hot(a, item, slot) : -1;
    if (i < a.capacity) {
      a.address[first + i] = -1;
      a.miss_address[first + i] = -1;
    }
    if (found >= 0) {
      const HotRow hot = hot_row(a.hot, item.blocks, item.kv_head, found);
      a.address[first + i] = hot.address;
      *hot.last_used = now;
      item.age[found] = kInUse;
      ++hits;
    }
    int total;
    const int turn = misses + block_scan(slot >= 0 && found < 0, total);
    if (slot >= 0 && found < 0) a.miss_index[first + turn] = i;
    misses += total;
  }
  hits = block_sum(hits);
  if (threadIdx.x == 0 && hits) atomicAdd(&a.counters[0], static_cast<unsigned long long>(hits));
  return misses;
}

// Gives the oldest hot rows to what is missing.
__device__ inline void replace(const ResolveArgs& a, const Item& item, int now, int misses) {
  __shared__ unsigned histogram[kBins];
  clear_bins(histogram);
  for (int i = threadIdx.x; i < item.num_hot; i += blockDim.x) {
    if (item.age[i] != kInUse) atomicAdd(&histogram[item.age[i]], 1u);
  }
  __syncthreads();
  const Digit oldest = find_digit(histogram, misses);
  const int64_t first = item.index * a.capacity;
  const int length = a.seq_lens[item.request];
  int older = 0, equal = 0, fetched = 0;
  for (int base = 0; base < item.num_hot; base += blockDim.x) {
    const int i = base + static_cast<int>(threadIdx.x);
    const int age = i < item.num_hot ? item.age[i] : kInUse;
    int num_older, num_equal;
    const int older_turn = older + block_scan(age > oldest.value, num_older);
    const int equal_turn = oldest.above + equal + block_scan(age == oldest.value, num_equal);
    older += num_older;
    equal += num_equal;
    const int turn = age > oldest.value ? older_turn : age == oldest.value ? equal_turn : misses;
    if (turn >= misses) continue;
    const int position = a.positions[first + a.miss_index[first + turn]];
    const int slot = slot_of(a, item, position);
    const HotRow hot = hot_row(a.hot, item.blocks, item.kv_head, i);
    *hot.slot = slot;
    *hot.tag = tag_of(slot, a.generation[slot / a.page_size]);
    *hot.last_used = now;
    a.miss_address[first + turn] = hot.address;
    const bool is_current = position == length - 1;
    a.miss_slot[first + turn] = is_current ? -1 : slot;
    fetched += !is_current;
  }
  fetched = block_sum(fetched);
  if (threadIdx.x == 0 && fetched) atomicAdd(&a.counters[1], static_cast<unsigned long long>(fetched));
}

// Grid: (KV, B).
__global__ void __launch_bounds__(kResolveThreads) resolve_kernel(const ResolveArgs a) {
  const int request = blockIdx.y, kv_head = blockIdx.x;
  const int64_t index = static_cast<int64_t>(request) * a.kv_heads + kv_head;
  if (a.seq_lens[request] == 0) {
    for (int i = threadIdx.x; i < a.capacity; i += blockDim.x) {
      a.address[index * a.capacity + i] = -1;
      a.miss_address[index * a.capacity + i] = -1;
    }
    if (threadIdx.x == 0) a.miss_count[index] = 0;
    return;
  }
  const int num_hot = a.hot_blocks_per_request * a.hot.rows_per_block;
  const Item item{request,
                  kv_head,
                  index,
                  a.hot_blocks + request * a.hot_blocks_stride,
                  a.table + index * a.table_size,
                  a.age + index * num_hot,
                  num_hot};
  const int now = *a.clock;
  insert_hot(a, item, now);
  const int misses = look_up(a, item, now);
  if (misses) replace(a, item, now, misses);
  if (threadIdx.x == 0) a.miss_count[index] = misses;
}

}  // namespace

cudaError_t resolve(const ResolveArgs& a, cudaStream_t stream) {
  if (a.requests == 0) return cudaSuccess;
  launch(resolve_kernel, dim3(a.kv_heads, a.requests), kResolveThreads, stream, a);
  return cudaGetLastError();
}

}  // namespace lrqk::cuda
