// Factorising full pages: the LRQK fit of each (page, KV head), quantised and written as a factor page.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lrqk/seal_page.h"
#include "cpu/lrqk/values.h"

namespace lrqk {
namespace LRQK_ISA {

inline void seal(const SealArgs& s, const Parallel& parallel) {
  for_each(parallel, s.num_pages * s.kv_heads, [&](int64_t index) {
    Carver counter(nullptr);
    carve_seal(s, counter);
    void* memory = scratch(Scratch::kTask, counter.used());
    std::memset(memory, 0, counter.used());
    Carver carver(memory);
    SealMemory m = carve_seal(s, carver);
    m.fit.ridge = s.ridge;
    const int64_t page = s.pages[index / s.kv_heads], head = index % s.kv_heads;
    uint8_t* factors = s.factors.data + page * s.factors.page_stride + head * s.factors.head_stride;
    with_type(s.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* rows = static_cast<const T*>(s.host.data) + page * s.host.page_stride + head * s.host.head_stride;
      load_page(s, rows, m);
    });
    load_grams(s, m);
    fit_projections(m.fit, s.iterations, s.lambda_q, s.lambda_k);
    if (s.layout.value_rank && s.layout.value_rank < s.layout.rank) put_values_first(s, m);
    write_page(s, m, factors);
    if (s.layout.value_rank) write_linear_values(s, m, factors);
  });
}

}  // namespace LRQK_ISA
}  // namespace lrqk
