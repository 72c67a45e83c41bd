// The kernels of one instruction set; included once, by a file that includes its SIMD vocabulary first.
#pragma once

#include "append.h"
#include "decode.h"
#include "prefill.h"
#include "seal.h"
