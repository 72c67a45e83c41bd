// AQUA's kernels of one instruction set; included once, by a file that includes its SIMD vocabulary first.
#pragma once

#include "cpu/aqua/append.h"
#include "cpu/aqua/decode.h"
