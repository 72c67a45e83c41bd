// All kernels, compiled for the instruction set that the including file has chosen.
#pragma once

#include "cpu/append.h"
#include "cpu/aqua/append.h"
#include "cpu/aqua/decode.h"
#include "cpu/dispatch.h"
#include "cpu/lola/decode.h"
#include "cpu/lola/prefill.h"
#include "cpu/lrqk/calibrated_scorer.h"
#include "cpu/lrqk/calibrated_seal.h"
#include "cpu/lrqk/decode.h"
#include "cpu/lrqk/low_rank_scorer.h"
#include "cpu/lrqk/seal.h"
#include "cpu/prefill.h"
#include "cpu/window.h"

namespace lrqk {
namespace LRQK_ISA {

constexpr KernelTable kKernels = {
    .vector_elements = W,
    .append = append,
    .prefill = prefill,
    .window_decode = window_decode,
    .aqua = {.decode = aqua::decode, .append = aqua::append},
    .lola = {.decode = lola::decode, .prefill = lola::prefill},
    .lrqk = {.decode = decode<LowRankScorer>,
             .seal = seal,
             .decode_calibrated = decode<CalibratedScorer>,
             .seal_calibrated = seal_calibrated},
};

}  // namespace LRQK_ISA
}  // namespace lrqk
