// The losses as functions of the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace repo {

void bind_losses(nanobind::module_& m);

}  // namespace repo
