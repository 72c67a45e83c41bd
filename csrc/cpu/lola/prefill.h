// A piece of one request's prompt in two passes: first the updates, chunk after chunk, each leaving a snapshot of what
// a query of its span sees; then all spans at once, each with its snapshot.
//
// A span is the tokens between two updates. Nothing is written into ring and cache before the last span has been
// attended: snapshots are pointers, into memory or to the new tokens.
#pragma once

#include "cpu/lola/span.h"
#include "cpu/lola/update.h"

namespace lrqk {
namespace LRQK_ISA {
namespace lola {

constexpr int64_t kSpansPerPass = 64;  // bounds the snapshots of long pieces
constexpr int64_t kHedgehogSpansPerPass = 16;

// What lives through all passes of one head.
template <class T>
struct PrefillHead {
  Candidates<T> candidates;
  HeadMemory<T> memory;
  UpdateMemory<T> update;
};

struct LolaSpans {
  const LolaArgs& a;
  int64_t context_len() const { return a.context_len; }
  int64_t end() const { return a.context_len + a.tokens.count; }
  int64_t first_update() const { return updates_at(a.memory, context_len()); }
  int64_t last_update() const { return updates_at(a.memory, end()); }
  // Positions of the new tokens that come after so many updates.
  int64_t span_begin(int64_t updates) const {
    return max(context_len(), updates == 0 ? 0 : a.memory.window + updates * a.memory.chunk);
  }
  int64_t span_end(int64_t updates) const { return min(end(), a.memory.window + (updates + 1) * a.memory.chunk); }
};

// Key and value of a token in the window: in the ring, or one of the new tokens.
template <class T>
inline void find_row(const LolaArgs& a, int64_t head, const HeadMemory<T>& memory, int64_t position, const T*& key,
                     const T*& value) {
  if (position >= a.context_len) {
    key = token_key<T>(a.tokens, position - a.context_len, head);
    value = token_value<T>(a.tokens, position - a.context_len, head);
  } else {
    key = memory.ring + position % ring_rows(a.memory) * 2 * a.tokens.head_size;
    value = key + a.tokens.head_size;
  }
}

template <class T>
inline void start_head(const LolaArgs& a, int64_t head, PrefillHead<T>& h) {
  h.memory = head_memory<T>(a.memory, a.blocks[0], head);
  const int64_t d = a.tokens.head_size;
  const int64_t cached = cached_after(a.memory, updates_at(a.memory, a.context_len));
  for (int64_t i = 0; i < cached; ++i) {
    h.candidates.rows.keys[i] = h.memory.cache + i * 2 * d;
    h.candidates.rows.values[i] = h.candidates.rows.keys[i] + d;
    h.candidates.positions[i] = h.memory.positions[i];
  }
  load_directions(a, head, h.update);
}

// The update that ends with `updates` of them.
template <class T>
inline void update_head(const LolaArgs& a, int64_t head, int64_t updates, PrefillHead<T>& h) {
  const int64_t before = updates - 1, cached = cached_after(a.memory, before);
  for (int64_t i = 0; i < a.memory.chunk; ++i) {
    const int64_t position = before * a.memory.chunk + i;
    find_row(a, head, h.memory, position, h.candidates.rows.keys[cached + i], h.candidates.rows.values[cached + i]);
    h.candidates.positions[cached + i] = static_cast<int32_t>(position);
  }
  update(a, head, h.memory, before, h.candidates, h.update);
}

// Ring and cache as the last token leaves them.
template <class T>
inline void store_head(const LolaArgs& a, int64_t head, int64_t updates, const PrefillHead<T>& h) {
  const int64_t d = a.tokens.head_size, end = a.context_len + a.tokens.count;
  store_cache(h.candidates, cached_after(a.memory, updates), d, h.memory);
  for (int64_t position = max(a.context_len, updates * a.memory.chunk); position < end; ++position) {
    const int64_t token = position - a.context_len;
    put_row(h.memory.ring + position % ring_rows(a.memory) * 2 * d, token_key<T>(a.tokens, token, head),
            token_value<T>(a.tokens, token, head), d);
  }
}

template <class T>
inline void prefill_tokens(const LolaArgs& a, const Parallel& parallel) {
  const LolaSpans spans{a};
  const int64_t kv_heads = a.tokens.kv_heads, first = spans.first_update(), last = spans.last_update();
  const int64_t most_spans = a.memory.num_features > 0 ? kHedgehogSpansPerPass : kSpansPerPass;
  const int64_t per_pass = min(most_spans, last - first + 1);
  const int64_t block_tokens = kSpanQueries / (a.tokens.heads / kv_heads);
  const auto carve = [&](Carver& carver, PrefillHead<T>*& heads, Snapshot<T>*& snapshots) {
    heads = carver.take<PrefillHead<T>>(kv_heads);
    snapshots = carver.take<Snapshot<T>>(per_pass * kv_heads);
    for (int64_t i = 0; i < kv_heads; ++i) {
      PrefillHead<T> head;
      head.candidates = take_candidates<T>(a.memory, carver);
      head.update = take_update_memory<T>(a, carver);
      if (!carver.is_counting()) heads[i] = head;
    }
    for (int64_t i = 0; i < per_pass * kv_heads; ++i) {
      const Snapshot<T> snapshot = take_snapshot<T>(a, carver);
      if (!carver.is_counting()) snapshots[i] = snapshot;
    }
  };
  PrefillHead<T>* heads;
  Snapshot<T>* snapshots;
  Carver counter(nullptr);
  carve(counter, heads, snapshots);
  Carver carver(scratch(Scratch::kCall, counter.used()));
  carve(carver, heads, snapshots);

  for_each(parallel, kv_heads, [&](int64_t head) { start_head(a, head, heads[head]); });
  for (int64_t pass = first; pass <= last; pass += per_pass) {
    const int64_t count = min(per_pass, last - pass + 1);
    for_each(parallel, kv_heads, [&](int64_t head) {
      for (int64_t i = 0; i < count; ++i) {
        if (pass + i > first) update_head(a, head, pass + i, heads[head]);
        snapshot_head(a, heads[head].memory, heads[head].candidates, pass + i, snapshots[i * kv_heads + head]);
      }
    });
    const int64_t longest = pass == 0 ? ring_rows(a.memory) : a.memory.chunk;
    const int64_t blocks = ceil_div(longest, block_tokens);
    for_each(parallel, count * blocks * kv_heads, [&](int64_t index) {
      const int64_t head = index % kv_heads, block = index / kv_heads % blocks, i = index / kv_heads / blocks;
      const int64_t begin = spans.span_begin(pass + i), end = spans.span_end(pass + i);
      const int64_t parts = ceil_div(end - begin, block_tokens);
      if (begin >= end || block >= parts) return;
      const int64_t size = ceil_div(end - begin, parts);
      const int64_t from = begin + block * size, to = min(end, from + size);
      if (from < to) attend_block(a, head, pass + i, from, to, heads[head].memory, snapshots[i * kv_heads + head]);
    });
  }
  for_each(parallel, kv_heads, [&](int64_t head) { store_head(a, head, last, heads[head]); });
}

inline void prefill(const LolaArgs& a, const Parallel& parallel) {
  with_type(a.tokens.dtype, [&](auto tag) { prefill_tokens<typename decltype(tag)::type>(a, parallel); });
}

}  // namespace lola
}  // namespace LRQK_ISA
}  // namespace lrqk
