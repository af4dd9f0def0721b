// Which of the compiled instruction sets runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/row_kernels.h"

namespace repo {

// Those this machine has, the best one first.
std::vector<const RowKernels*> available_kernels();

// The best one, unless select_kernels chose another.
const RowKernels& kernels();

// False where there is none of that name.
bool select_kernels(const std::string& name);

}  // namespace repo
