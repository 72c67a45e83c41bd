// The kernels of each instruction set that this build has and this machine can run.
//
// kernels_avx512.cpp, kernels_avx2.cpp and kernels_portable.cpp compile the same headers, each with its own SIMD
// vocabulary and compiler flags (setup.py tells them by the end of the file's name), and fill one table each.
#pragma once

#include "cpu/aqua/args.h"
#include "cpu/args.h"
#include "cpu/lola/args.h"
#include "cpu/lrqk/args.h"

namespace lrqk {

// A method adds its entry points here and in kernels.h.
struct KernelTable {
  int vector_elements;  // the head size must be a multiple of twice this
  void (*append)(const AppendArgs&, const Parallel&);
  void (*prefill)(const PrefillArgs&, const Parallel&);
  void (*window_decode)(const WindowArgs&, const Parallel&);
  struct {
    void (*decode)(const AquaDecodeArgs&, const Parallel&);
    void (*append)(const AquaAppendArgs&, const Parallel&);
  } aqua;
  struct {
    void (*decode)(const LolaArgs&, const Parallel&);
    void (*prefill)(const LolaArgs&, const Parallel&);
  } lola;
  struct {
    void (*decode)(const DecodeArgs&, const Parallel&);
    void (*seal)(const SealArgs&, const Parallel&);
    void (*decode_calibrated)(const DecodeArgs&, const Parallel&);
    void (*seal_calibrated)(const SealArgs&, const Parallel&);
  } lrqk;
};

extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kPortableKernels;

constexpr int kNumInstructionSets = 3;  // best first
const char* instruction_set_name(int index);
// Null where the machine, or the build, lacks the instruction set.
const KernelTable* kernel_table(int index);

}  // namespace lrqk
