// Which of the compiled inner loops can run on this processor, and which one is in use; see instruction_set.cpp.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastmae {

// The loops in use: the best ones, until set_instruction_set is called.
const Kernels& kernels();

// For float32 or bfloat16; dots only if attention_dots().
const AttentionKernels& attention_kernels(DType dtype, bool dots);

// Whether the loops in use can multiply bfloat16 by the processor's dot products (AVX512-BF16).
bool attention_dots();

// Names of the instruction sets that this processor has and this build knows, the best one last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not in instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace fastmae
