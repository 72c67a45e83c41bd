// One decode step of AQUA: an item is one (request, KV head), and its blocks are attended range by range.
//
// Ranges depend on the request alone, so that a request's output does not depend on the others in the batch.
#pragma once

#include <cstring>

#include "cpu/aqua/score.h"

namespace lrqk {
namespace LRQK_ISA {
namespace aqua {

constexpr int64_t kRangeTokens = 2048;

struct Item {
  int64_t request, kv_head, length;
  int64_t first_range, ranges;  // among those of all items
  Dimensions dims;
};

inline int64_t range_blocks(const AquaDecodeArgs& a) { return max<int64_t>(1, kRangeTokens / a.blocks.block_size); }

template <class T>
inline void prepare_item(const AquaDecodeArgs& a, Item& item) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int64_t stored = a.blocks.stored;
  float* projected = static_cast<float*>(scratch(Scratch::kTask, group * stored * sizeof(float)));
  const T* query = static_cast<const T*>(a.query) + item.request * a.query_request_stride +
                   item.kv_head * group * a.query_head_stride;
  const float* projection = projection_of(a.basis, item.kv_head, a.head_size, stored);
  for (int g = 0; g < group; ++g) {
    project(query + g * a.query_head_stride, projection, a.head_size, stored, projected + g * stored);
  }
  choose_dimensions(a, item.kv_head, group, projected, item.dims);
  if (a.blocks.is_int8) quantize_query(group, item.dims);
}

// Scores of the first `count` tokens of a block become weights 2^(score - m), those of its other places 0;
// rescale [G] is what earlier sums have to be multiplied with.
template <class K>
inline void weigh_block(const K* keys, const float* key_scale, const Dimensions& dims, int group, int64_t block_size,
                        int64_t count, float* place_scale, float* scores, float* rescale, const Partial& out) {
  const int64_t places = ceil_div(count, 2 * W) * (2 * W);
  if (key_scale) {
    for (int64_t i = 0; i < places; ++i) place_scale[i] = key_scale[token_at(keys, i)];
  }
  for (int g = 0; g < group; ++g) {
    float* s = scores + g * block_size;
    if (key_scale) {
      const F step = set(dims.step[g]);
      for (int64_t i = 0; i < places; i += W) store(s + i, mul(mul(load(s + i), step), load(place_scale + i)));
    }
    for (int64_t i = count / (2 * W) * (2 * W); i < places; ++i) {
      if (token_at(keys, i) >= count) s[i] = kMasked;
    }
    F top = set(out.m[g]);
    for (int64_t i = 0; i < places; i += W) top = max(top, load(s + i));
    const float m = reduce_max(top);
    F total = zero();
    for (int64_t i = 0; i < places; i += W) {
      const F weight = exp2(sub(load(s + i), set(m)));
      store(s + i, weight);
      total = add(total, weight);
    }
    alignas(64) float ratio[W];
    store(ratio, exp2(set(out.m[g] - m)));
    rescale[g] = ratio[0];
    out.l[g] = out.l[g] * rescale[g] + reduce_sum(total);
    out.m[g] = m;
  }
}

template <class T, class K>
inline void attend_range(const AquaDecodeArgs& a, const Item& item, int64_t range, const Partial& out) {
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int64_t n = a.blocks.block_size, d = a.head_size;
  Carver carver(scratch(Scratch::kTask, (group * (n + kChunkRows) + n + 64 * 4) * sizeof(float)));
  float* scores = carver.take<float>(group * n);
  float* place_scale = carver.take<float>(n);
  float* weights = carver.take<float>(group * kChunkRows);
  float rescale[kMaxGroup], ones[kMaxGroup];
  for (int g = 0; g < group; ++g) ones[g] = 1.0f;
  clear(out, group, d);
  const int32_t* table = a.block_table + item.request * a.block_table_stride;
  const auto block_at = [&](int64_t index) {
    return a.blocks.data + table[index] * a.blocks.block_stride + item.kv_head * a.blocks.head_stride;
  };
  const int64_t first = range * range_blocks(a), num_blocks = ceil_div(item.length, n);
  const int64_t end = min(first + range_blocks(a), num_blocks);
  for (int64_t index = first; index < end; ++index) {
    const uint8_t* block = block_at(index);
    const int64_t count = min(n, item.length - index * n);
    const K* keys = reinterpret_cast<const K*>(block);
    const K* later = index + 1 < num_blocks ? reinterpret_cast<const K*>(block_at(index + 1)) : nullptr;
    score_block(keys, later, n, item.dims, group, count, scores);
    const float* key_scale =
        a.blocks.is_int8 ? reinterpret_cast<const float*>(block + a.blocks.key_scale_offset) : nullptr;
    weigh_block(keys, key_scale, item.dims, group, n, count, place_scale, scores, rescale, out);
    const T* values = reinterpret_cast<const T*>(block + a.blocks.value_offset);
    const int64_t places = ceil_div(count, 2 * W) * (2 * W);
    for (int64_t place = 0; place < places; place += kChunkRows) {
      const int here = static_cast<int>(min<int64_t>(kChunkRows, places - place));
      const T *rows[kChunkRows], *next[kChunkRows];
      for (int i = 0; i < here; ++i) {
        // A place without a token has weight 0, and must not meet what was never written.
        rows[i] = values + min(token_at(keys, place + i), count - 1) * d;
        next[i] = rows[i] + (kChunkRows - 1) * d;  // add_rows fetches what is d elements behind
      }
      for (int g = 0; g < group; ++g) {
        std::memcpy(weights + g * kChunkRows, scores + g * n + place, here * sizeof(float));
      }
      add_rows<T>(rows, place + kChunkRows < places ? next : nullptr, here, weights, place == 0 ? rescale : ones, group,
                  d, out.acc);
    }
  }
  to_natural_order<T>(out.acc, group, d);
}

inline void decode(const AquaDecodeArgs& a, const Parallel& parallel) {
  const int64_t num_items = a.requests * a.kv_heads, group = a.heads / a.kv_heads;
  const int64_t most = max_count(a.blocks.stored);
  int64_t num_ranges = 0;
  const auto ranges_of = [&](int64_t request) {
    return ceil_div(ceil_div(a.seq_lens[request], a.blocks.block_size), range_blocks(a));
  };
  for (int64_t b = 0; b < a.requests; ++b) num_ranges += ranges_of(b) * a.kv_heads;
  Item* items = nullptr;
  Partial* partials = nullptr;
  int64_t* owners = nullptr;
  const auto carve_all = [&](Carver& carver) {
    items = carver.take<Item>(num_items);
    partials = carver.take<Partial>(num_ranges);
    owners = carver.take<int64_t>(num_ranges);
    int64_t range = 0;
    for (int64_t i = 0; i < num_items; ++i) {
      Dimensions dims{carver.take<float>(most * group), carver.take<int32_t>(most),
                      carver.take<int32_t>(most / 2 * group), carver.take<float>(group), 0};
      const int64_t request = i / a.kv_heads, ranges = ranges_of(request);
      if (!carver.is_counting()) {
        items[i] = {request, i % a.kv_heads, a.seq_lens[request], range, ranges, dims};
      }
      for (int64_t end = range + ranges; range < end; ++range) {
        const Partial partial{carver.take<float>(group), carver.take<float>(group),
                              carver.take<float>(group * a.head_size)};
        if (carver.is_counting()) continue;
        partials[range] = partial;
        owners[range] = i;
      }
    }
  };
  Carver counter(nullptr);
  carve_all(counter);
  Carver carver(scratch(Scratch::kCall, counter.used()));
  carve_all(carver);
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each(parallel, num_items, [&](int64_t i) { prepare_item<T>(a, items[i]); });
    for_each(parallel, num_ranges, [&](int64_t i) {
      const Item& item = items[owners[i]];
      const auto attend = a.blocks.is_int8 ? attend_range<T, i8> : attend_range<T, T>;
      attend(a, item, i - item.first_range, partials[i]);
    });
    for_each(parallel, num_items, [&](int64_t i) {
      const Item& item = items[i];
      float* total = static_cast<float*>(scratch(Scratch::kTask, a.head_size * sizeof(float)));
      T* out = static_cast<T*>(a.output) + item.request * a.output_request_stride +
               item.kv_head * group * a.output_head_stride;
      merge_partials(partials + item.first_range, item.ranges, static_cast<int>(group), a.head_size, out,
                     a.output_head_stride, total);
    });
  });
}

}  // namespace aqua
}  // namespace LRQK_ISA
}  // namespace lrqk
