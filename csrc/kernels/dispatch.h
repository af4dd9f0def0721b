// Chooses among the compiled instruction sets.
#pragma once

#include <string>
#include <vector>

#include "kernels/row_kernels.h"

namespace repo {

// Returns the kernels of the instruction sets that this machine has, the best one first.
std::vector<const RowKernels*> available_kernels();

// Returns the best ones, unless select_kernels chose others.
const RowKernels& kernels();

// Chooses by name; returns false if this machine has no such instruction set.
bool select_kernels(const std::string& name);

}  // namespace repo
