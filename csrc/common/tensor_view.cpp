#include "common/tensor_view.h"

namespace nb = nanobind;

namespace repo {
namespace {

const char* const kTypeNames[] = {"float32", "bfloat16", "float16", "int64", "int32", "bool", "float64"};
const int kTypeSizes[] = {4, 2, 2, 8, 4, 1, 8};  // bytes

// Objects of Python that every call needs; they live as long as the process.
struct Names {
    nb::object dtype, shape, stride, data_ptr, is_cpu, untyped_storage, nbytes, storage_offset;
    nb::object types[int(Type::kTypes)];

    Names() {
        const auto intern = [](const char* text) { return nb::steal(PyUnicode_InternFromString(text)); };
        dtype = intern("dtype"), shape = intern("shape"), stride = intern("stride"), data_ptr = intern("data_ptr");
        is_cpu = intern("is_cpu"), untyped_storage = intern("untyped_storage"), nbytes = intern("nbytes");
        storage_offset = intern("storage_offset");
        const nb::module_ torch = nb::module_::import_("torch");
        for (int i = 0; i < int(Type::kTypes); ++i) types[i] = torch.attr(kTypeNames[i]);
    }

    static const Names& get() {
        static const Names* names = new Names;
        return *names;
    }
};

[[noreturn]] void refuse(const char* name, const std::string& takes) {
    throw nb::value_error((std::string(name) + " must be " + takes).c_str());
}

nb::object attribute(nb::handle object, const nb::object& name) {
    PyObject* value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (!value) throw nb::python_error();
    return nb::steal(value);
}

nb::object call(nb::handle object, const nb::object& method) {
    PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), method.ptr());
    if (!value) throw nb::python_error();
    return nb::steal(value);
}

Type type_of(nb::handle tensor, const char* name) {
    const Names& names = Names::get();
    const nb::object dtype = attribute(tensor, names.dtype);
    for (int i = 0; i < int(Type::kTypes); ++i)
        if (dtype.is(names.types[i])) return Type(i);
    refuse(name, "of a type that the C++ backend reads: float32, bfloat16, float16, int64, int32, bool or float64");
}

void read_integers(nb::handle tuple, int count, int64_t* to) {
    for (int i = 0; i < count; ++i) {
        to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
        if (to[i] == -1 && PyErr_Occurred()) throw nb::python_error();
    }
}

int64_t integer(const nb::object& value) {
    const int64_t number = PyLong_AsLongLong(value.ptr());
    if (number == -1 && PyErr_Occurred()) throw nb::python_error();
    return number;
}

// Refuses a tensor whose storage was freed or shrunk after the view on it was made.
void require_memory(nb::handle tensor, const TensorView& view) {
    if (!view.elements()) return;
    const Names& names = Names::get();
    int64_t last = integer(call(tensor, names.storage_offset));
    for (int i = 0; i < view.dimensions; ++i) last += (view.shape[i] - 1) * view.stride[i];
    const int64_t bytes = integer(call(call(tensor, names.untyped_storage), names.nbytes));
    if (!view.data || bytes < (last + 1) * int64_t(kTypeSizes[int(view.type)]))
        refuse(view.name, "a tensor with memory; the storage of this one was freed or shrunk");
}

}  // namespace

int64_t TensorView::elements() const {
    int64_t total = 1;
    for (int i = 0; i < dimensions; ++i) total *= shape[i];
    return total;
}

bool TensorView::contiguous() const {
    if (!elements()) return true;
    int64_t step = 1;
    for (int i = dimensions - 1; i >= 0; --i) {
        if (shape[i] > 1 && stride[i] != step) return false;
        step *= shape[i];
    }
    return true;
}

TensorView view_of(nb::handle tensor, const char* name) {
    const Names& names = Names::get();
    if (!attribute(tensor, names.is_cpu).is(Py_True)) refuse(name, "on the CPU");
    TensorView view = {name, nullptr, type_of(tensor, name), 0, {}, {}};
    const nb::object shape = attribute(tensor, names.shape), stride = call(tensor, names.stride);
    view.dimensions = int(PyTuple_Size(shape.ptr()));
    if (view.dimensions < 0) throw nb::python_error();
    if (view.dimensions > 3) refuse(name, "a tensor of at most three dimensions");
    read_integers(shape, view.dimensions, view.shape);
    read_integers(stride, view.dimensions, view.stride);
    view.data = PyLong_AsVoidPtr(call(tensor, names.data_ptr).ptr());
    if (PyErr_Occurred()) throw nb::python_error();
    require_memory(tensor, view);
    return view;
}

const void* data_on_cpu(nb::handle tensor, Type type) {
    const Names& names = Names::get();
    if (!attribute(tensor, names.is_cpu).is(Py_True)) return nullptr;
    if (!attribute(tensor, names.dtype).is(names.types[int(type)])) return nullptr;
    const void* data = PyLong_AsVoidPtr(call(tensor, names.data_ptr).ptr());
    if (PyErr_Occurred()) throw nb::python_error();
    return data;
}

void* contiguous_data(nb::handle tensor, const char* name, Type type, std::initializer_list<int64_t> shape) {
    const TensorView view = view_of(tensor, name);
    bool fits = view.type == type && view.contiguous() && view.dimensions == int(shape.size());
    std::string takes = std::string("contiguous ") + kTypeNames[int(type)] + " of shape (";
    int i = 0;
    for (const int64_t size : shape) {
        fits = fits && view.shape[i] == size;
        takes += (i++ ? ", " : "") + std::to_string(size);
    }
    if (!fits) refuse(name, takes + ")");
    return view.data;
}

}  // namespace repo
