// Adds decoding to the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace repo {

void bind_decoding(nanobind::module_& m);

}  // namespace repo
