// Which of the compiled inner loops can run on this processor, and which one is in use; see instruction_set.cpp.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastmae {

// The loops in use: the best ones, until set_instruction_set is called.
const Kernels& kernels();

// For float32 or bfloat16; null if this processor, or the loops in use, cannot multiply so.
const AttentionKernels* attention_kernels(DType dtype, Multiply by);

// The names of what attention of bfloat16 can multiply with here. On a processor with AMX it asks the kernel for the
// permission to use tiles, for this process and its children.
std::vector<std::string> attention_products();

// Names of the instruction sets that this processor has and this build knows, the best one last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not in instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace fastmae
