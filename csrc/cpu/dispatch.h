// The kernels of each instruction set that this build has and this machine can run.
#pragma once

#include "cpu/args.h"

namespace lrqk {

constexpr int kNumInstructionSets = 3;  // best first
const char* instruction_set_name(int index);
// Null where the machine, or the build, lacks the instruction set.
const KernelTable* kernel_table(int index);

}  // namespace lrqk
