// A scorer of the simplest kind, for the test of the seam: a page's bytes are the scores of its tokens, float32 [N].
#include "cpu/lrqk/decode.h"

namespace lrqk {
namespace portable {

struct StoredScorer {
  struct Memory {};
  using Page = const float*;
  static constexpr int kVectors = 1;

  static void carve(const DecodeArgs&, const Item&, Carver&, Memory&) {}
  static void prepare(const DecodeArgs&, const Item&, Memory&) {}
  static int64_t page_bytes(const PageLayout&) { return 0; }
  template <class Call>
  static void with_kind(const PageLayout&, const Call& call) {
    call(0);
  }
  static Page open(const DecodeArgs&, const Item&, const Memory&, int64_t, const FactorPage& page, int64_t, Fetcher&) {
    return reinterpret_cast<const float*>(page.data);
  }
  template <class Kind, int B, int V>
  static void score(Page page, int, int64_t, int64_t n, const F* offset, Fetcher&, F (*scores)[B]) {
    for (int v = 0; v < V; ++v) {
      for (int g = 0; g < B; ++g) scores[v][g] = add(load(page + n + v * W), offset[g]);
    }
  }

  // Without linear values.
  static int64_t moment_bytes(const PageLayout&, int64_t) { return 0; }
  static void sum_moments(const DecodeArgs&, const Item&, Memory&, int64_t, const FactorPage&, const uint32_t*,
                          const float*, Fetcher&) {}
  static void mean_factor(const DecodeArgs&, const Item&, const Memory&, int64_t, int, float*) {}
  static void add_values(const DecodeArgs&, const Item&, const Memory&, int64_t, int, const float*, float*) {}
};

}  // namespace portable
}  // namespace lrqk

// Positions [1, 1, capacity] of one request of `seq_len` tokens with one head, on two threads in name.
extern "C" void select_stored(const float* query, uint8_t* pages, const int32_t* block_table, int32_t seq_len,
                              int64_t head_size, int64_t page_size, int64_t top_k, int32_t* positions, int64_t capacity,
                              int threads) {
  lrqk::DecodeArgs a{};
  a.query = query;
  a.factors = {pages, page_size * 4, page_size * 4};
  a.block_table = block_table;
  a.seq_lens = &seq_len;
  a.positions = positions;
  a.capacity = capacity;
  a.requests = a.heads = a.kv_heads = 1;
  a.head_size = head_size;
  a.page_size = page_size;
  while (int64_t{1} << a.page_shift < page_size) ++a.page_shift;
  a.top_k = top_k;
  a.recent_tokens = a.sink_tokens = 0;
  a.top_p = 1.0f;
  a.scale = 1.0f;
  a.dtype = lrqk::DType::kFloat32;
  const lrqk::Parallel serial = {threads, [](int64_t n, void (*task)(int64_t, void*), void* context) {
                                   for (int64_t i = n - 1; i >= 0; --i) task(i, context);
                                 }};
  lrqk::portable::decode<lrqk::portable::StoredScorer>(a, serial);
}
