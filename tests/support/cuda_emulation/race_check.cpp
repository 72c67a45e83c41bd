// Runs every CUDA kernel on small random inputs under ThreadSanitizer, several times with other interleavings, and
// compares the results bit by bit.
//
//   race_check SEEDS PAGE_SIZE LAYOUT...      the layout's values in the order of kPageLayoutNames
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/args.h"
#include "cuda/lrqk/select.h"

namespace emulator {
void set_seed(unsigned);
}

namespace {

using namespace lrqk;
using namespace lrqk::cuda;

constexpr int kRequests = 2, kHeads = 4, kKVHeads = 2, kHeadSize = 32, kPages = 17;
constexpr int kTopK = 60, kRecent = 8, kSinks = 2, kRowsPerBlock = 16, kRowBytes = 2 * kHeadSize * 4;

struct Outputs {
  std::vector<int> positions, miss_count;
  std::vector<float> residual, moment;
  std::vector<int64_t> address, miss_address, miss_slot;
  std::vector<uint8_t> hot, host, gathered;
  std::vector<unsigned long long> counters;

  bool operator==(const Outputs& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return positions == other.positions && miss_count == other.miss_count && same(residual, other.residual) &&
           same(moment, other.moment) && address == other.address && miss_address == other.miss_address &&
           miss_slot == other.miss_slot && hot == other.hot && host == other.host && gathered == other.gathered &&
           counters == other.counters;
  }
};

template <class T>
std::vector<T> random_of(size_t count, std::mt19937& random) {
  std::vector<T> values(count);
  for (T& value : values) {
    value = std::is_floating_point_v<T> ? static_cast<T>(random() % 2001) / 1000 - 1 : static_cast<T>(random());
  }
  return values;
}

Outputs run(int page_size, const PageLayout& layout, int steps) {
  std::mt19937 random(7);
  const int capacity = kTopK + kRecent + kSinks + page_size, num_pages = kRequests * kPages;
  std::vector<float> query = random_of<float>(kRequests * kHeads * kHeadSize, random);
  std::vector<uint8_t> factors = random_of<uint8_t>(num_pages * kKVHeads * layout.page_bytes, random);
  for (int i = 0; i < num_pages * kKVHeads; ++i) {
    const std::vector<float> scale = random_of<float>(layout.rank, random);
    for (int j = 0; j < layout.rank; ++j) {
      const float small = scale[j] * 1e-3f;
      std::memcpy(&factors[i * layout.page_bytes + layout.projection_scale_offset + j * 4], &small, 4);
    }
  }
  std::vector<int> table(num_pages), lens{kPages * page_size - 3, 2 * page_size + 5};
  for (int i = 0; i < num_pages; ++i) table[i] = (i * 37) % num_pages;

  Outputs out;
  out.positions.resize(kRequests * kKVHeads * capacity);
  out.residual.resize(kRequests * kHeads * kPages);
  out.moment.resize(out.residual.size() * layout.value_rank);
  SelectArgs a{};
  a.query = query.data();
  a.query_request_stride = kHeads * kHeadSize;
  a.query_head_stride = kHeadSize;
  a.factors = {factors.data(), kKVHeads * layout.page_bytes, layout.page_bytes};
  a.layout = layout;
  a.block_table = table.data();
  a.block_table_stride = kPages;
  a.seq_lens = lens.data();
  a.positions = out.positions.data();
  a.residual = out.residual.data();
  a.moment = layout.value_rank ? out.moment.data() : nullptr;
  a.requests = kRequests;
  a.heads = kHeads;
  a.kv_heads = kKVHeads;
  a.page_size = page_size;
  a.pages = kPages;
  a.top_k = kTopK;
  a.recent_tokens = kRecent;
  a.sink_tokens = kSinks;
  a.head_size = kHeadSize;
  a.scale = 1.0f;
  a.dtype = DType::kFloat32;
  const int64_t state = carve_state(a.scratch, nullptr, kRequests, kHeads, kKVHeads);
  const int64_t scratch = carve_scratch(a.scratch, nullptr, kRequests, kHeads, kKVHeads, kPages, page_size);
  std::vector<uint8_t> state_memory(state), scratch_memory(scratch);
  carve_state(a.scratch, state_memory.data(), kRequests, kHeads, kKVHeads);
  carve_scratch(a.scratch, scratch_memory.data(), kRequests, kHeads, kKVHeads, kPages, page_size);

  const int blocks = (capacity + kRowsPerBlock) / kRowsPerBlock + 1, hot_rows = blocks * kRowsPerBlock;
  const int64_t block_bytes = kRowsPerBlock * (kRowBytes + 12);
  out.hot.resize(kRequests * blocks * kKVHeads * block_bytes);
  out.host = random_of<uint8_t>(num_pages * kKVHeads * page_size * kRowBytes, random);
  out.counters.resize(2);
  std::vector<int> hot_blocks(kRequests * blocks), clock(1);
  for (size_t i = 0; i < hot_blocks.size(); ++i) hot_blocks[i] = static_cast<int>(i);
  std::vector<int64_t> generation(num_pages), slots(kRequests);
  const int items = kRequests * kKVHeads, table_size = 512;
  for (auto* list : {&out.address, &out.miss_address, &out.miss_slot}) list->resize(items * capacity);
  out.miss_count.resize(items);
  std::vector<int> hash(items * table_size), age(items * hot_rows), miss_index(items * capacity);
  std::vector<float> key = random_of<float>(kRequests * kKVHeads * kHeadSize, random), value = key;

  const HostArgs host{
      out.host.data(), int64_t{kKVHeads} * page_size * kRowBytes, int64_t{page_size} * kRowBytes, kRowBytes, page_size,
      num_pages};
  ResolveArgs r{};
  r.positions = out.positions.data();
  r.block_table = table.data();
  r.block_table_stride = kPages;
  r.seq_lens = lens.data();
  r.hot_blocks = hot_blocks.data();
  r.hot_blocks_stride = blocks;
  r.hot = {out.hot.data(), kKVHeads * block_bytes, block_bytes, kRowsPerBlock, kRowBytes};
  r.generation = generation.data();
  r.clock = clock.data();
  r.address = out.address.data();
  r.miss_address = out.miss_address.data();
  r.miss_slot = out.miss_slot.data();
  r.miss_count = out.miss_count.data();
  r.counters = out.counters.data();
  r.table = hash.data();
  r.age = age.data();
  r.miss_index = miss_index.data();
  r.table_size = table_size;
  r.requests = kRequests;
  r.kv_heads = kKVHeads;
  r.page_size = page_size;
  r.capacity = capacity;
  r.hot_blocks_per_request = blocks;
  r.num_host_pages = num_pages;
  const int64_t row = kHeadSize * 4;
  const auto* k = reinterpret_cast<const uint8_t*>(key.data());
  const auto* v = reinterpret_cast<const uint8_t*>(value.data());
  const FetchArgs fetch_args{
      host, out.hot.data(), r.miss_address, r.miss_slot, r.miss_count, k, v, kKVHeads * row, row, kKVHeads * row,
      row,  kRequests,      kKVHeads,       capacity};
  const AppendArgs append_args{
      host,         k,         v,       kKVHeads * row, row, kKVHeads * row, row, slots.data(), generation.data(),
      clock.data(), kRequests, kKVHeads};
  for (int step = 0; step < steps; ++step) {
    for (int b = 0; b < kRequests; ++b) {
      ++lens[b];
      const int last = lens[b] - 1;
      slots[b] = int64_t{table[b * kPages + last / page_size]} * page_size + last % page_size;
    }
    append(append_args, nullptr);
    select(a, nullptr);
    resolve(r, nullptr);
    fetch(fetch_args, nullptr);
  }
  const std::vector<int64_t> pages{3, 1};
  out.gathered.resize(2 * kKVHeads * page_size * kRowBytes);
  GatherArgs gather{};
  gather.host = host;
  gather.data[0] = host.data;
  gather.pages = pages.data();
  gather.output = out.gathered.data();
  gather.num_layers = 1;
  gather.num_pages = 2;
  gather.kv_heads = kKVHeads;
  gather_pages(gather, nullptr);
  return out;
}

}  // namespace

int main(int count, char** words) {
  std::vector<int64_t> values;
  for (int i = 3; i < count; ++i) values.push_back(std::atoll(words[i]));
  if (values.size() != kPageLayoutSize) return 2;
  const int seeds = std::atoi(words[1]), page_size = std::atoi(words[2]);
  const PageLayout layout = page_layout(values);
  Outputs first;
  for (int seed = 1; seed <= seeds; ++seed) {
    emulator::set_seed(seed);
    Outputs out = run(page_size, layout, 2);
    if (seed == 1) {
      first = std::move(out);
    } else if (!(out == first)) {
      std::printf("the results of interleaving %d differ\n", seed);
      return 3;
    }
  }
  std::printf("%d interleavings agree, %llu rows hit\n", seeds, first.counters[0]);
}
