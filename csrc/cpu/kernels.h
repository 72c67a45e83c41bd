// The kernels of one instruction set; included once, by a file that includes its SIMD vocabulary first.
#pragma once

#include "decode.h"
