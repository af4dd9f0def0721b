// Reads PyTorch's tensors through their Python attributes: a quarter of the time that an array protocol takes, and
// without linking PyTorch.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

namespace repo {

enum class Type { kFloat32, kBFloat16, kFloat16, kInt64, kInt32, kBool, kFloat64, kTypes };

// Memory on the CPU, its type, and up to three dimensions with strides in elements.
struct TensorView {
    const char* name;
    void* data;
    Type type;
    int dimensions;
    int64_t shape[3], stride[3];

    int64_t elements() const;
    bool contiguous() const;
};

// Throws ValueError, with `name`, for a tensor that is not on the CPU, has another type or more dimensions, or has
// elements but no memory.
TensorView view_of(nanobind::handle tensor, const char* name);

// Returns the data of a tensor with elements, or null if it is not on the CPU or has another type.
const void* data_on_cpu(nanobind::handle tensor, Type type);

// Returns the data of a tensor of this type and exactly these dimensions, contiguous in memory.
void* contiguous_data(nanobind::handle tensor, const char* name, Type type, std::initializer_list<int64_t> shape);

}  // namespace repo
