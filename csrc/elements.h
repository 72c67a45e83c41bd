// Element types of keys, values, queries and factors, as bytes in memory.
#pragma once

#include <cstdint>

namespace lrqk {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

struct i8 {
  int8_t value;
};

}  // namespace lrqk
