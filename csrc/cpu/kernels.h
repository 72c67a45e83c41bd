// The kernels of one instruction set; included once, by a file that includes its SIMD vocabulary first.
#pragma once

#include "cpu/append.h"
#include "cpu/lrqk/decode.h"
#include "cpu/prefill.h"
#include "cpu/lrqk/seal.h"
