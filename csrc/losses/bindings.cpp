#include "losses/bindings.h"

#include <nanobind/stl/string.h>

#include <optional>
#include <sstream>
#include <string>

#include "common/tensor_view.h"
#include "losses/losses.h"
#include "losses/reduction.h"

namespace nb = nanobind;

namespace repo {
namespace {

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

DType dtype_of(const TensorView& view) {
    require(int(view.type) <= int(Type::kFloat16), "logits and gradients must be float32, bfloat16 or float16");
    return view.type == Type::kFloat32 ? kFloat32 : view.type == Type::kBFloat16 ? kBFloat16 : kFloat16;
}

Rows rows_of(nb::handle tensor, const char* name) {
    const TensorView view = view_of(tensor, name);
    const int n = view.dimensions;
    require(n == 2 || n == 3, "logits and gradients must be (T, V) or (B, L, V)");
    const int64_t columns = view.shape[n - 1], length = view.shape[n - 2], batch = n == 3 ? view.shape[0] : 1;
    require(columns >= 1 && (columns == 1 || view.stride[n - 1] == 1 || !view.elements()),
            "the columns of a row must be consecutive");
    const DType dtype = dtype_of(view);
    const int64_t bytes = dtype == kFloat32 ? 4 : 2;
    return {static_cast<char*>(view.data), dtype, batch * length, columns, std::max<int64_t>(length, 1),
            n == 3 ? view.stride[0] * bytes : 0, view.stride[n - 2] * bytes};
}

// The logits, reference and gradient of a call; it owns the rows that Tensors points to.
struct TensorArguments {
    std::optional<Rows> reference, grad;
    Tensors tensors;

    TensorArguments(nb::handle logits, nb::handle ref_logits, nb::handle out, bool zeroed)
        : tensors{rows_of(logits, "logits"), nullptr, nullptr, zeroed} {
        if (!ref_logits.is_none()) tensors.reference = &reference.emplace(alike(ref_logits, "ref_logits"));
        if (!out.is_none()) tensors.grad = &grad.emplace(alike(out, "grad"));
    }

    Rows alike(nb::handle tensor, const char* name) const {
        const Rows rows = rows_of(tensor, name), &logits = tensors.logits;
        require(rows.dtype == logits.dtype && rows.count == logits.count && rows.columns == logits.columns,
                "logits, ref_logits and grad must have the same shape and type");
        return rows;
    }
};

void refuse_bad_id(int64_t bad, int64_t columns) {
    if (bad == kIgnored) return;
    const std::string message = "token_ids of live rows must be in [0, " + std::to_string(columns) +
                                ") or -100; got " + std::to_string(bad);
    throw nb::index_error(message.c_str());
}

void refuse_bad_temperature(std::optional<float> bad) {
    if (!bad) return;
    std::ostringstream message;
    message << "temperature of live rows must be > 0 and a normal number in float32; got " << *bad;
    throw nb::value_error(message.str().c_str());
}

// A number, or what a 0-d tensor holds; the usual tensor is read without an operator of PyTorch.
float scalar_of(nb::handle value, const char* name) {
    PyObject* const object = value.ptr();
    if (!PyFloat_Check(object) && !PyLong_Check(object))
        if (const void* data = data_on_cpu(value, Type::kFloat32)) return *static_cast<const float*>(data);
    const double number = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) {
        nb::python_error error;
        nb::raise_from(error, PyExc_ValueError, "%s must be a number or a 0-d tensor with memory", name);
    }
    return float(number);
}

// Reads the tensors of RowArguments in their order.
class ArgumentReader {
public:
    explicit ArgumentReader(nb::handle tensors) {
        require(PyList_Check(tensors.ptr()) && PyList_GET_SIZE(tensors.ptr()) == 12, "arguments must be a list of 12");
        const auto item = [&](int i) { return nb::handle(PyList_GET_ITEM(tensors.ptr(), i)); };
        read_shape(item(0), item(2));
        of.ids = column<int64_t>(item(0), "token_ids", Type::kInt64);
        of.mask = column<bool>(item(1), "response_mask", Type::kBool);
        Column<float>* const columns[] = {&of.reward_advantages, &of.cost_advantages, &of.costs,
                                          &of.cost_limits,       &of.cost_baselines,  &of.old_logps,
                                          &of.ref_logps,         &of.importance_weights, &of.temperatures};
        const char* const names[] = {"reward_advantages", "cost_advantages", "costs",
                                     "cost_limit",        "cost_baselines",  "old_logps",
                                     "ref_logps",         "importance_weights", "temperature"};
        for (int i = 0; i < 9; ++i) *columns[i] = column<float>(item(3 + i), names[i], Type::kFloat32);
    }

    ArgumentReader(nb::handle tensors, nb::handle scalars, int64_t code) : ArgumentReader(tensors) {
        of.code = Code::unpack(code);
        of.scalars = scalars_of(scalars);
        require_given();
    }

    Arguments of = {};

private:
    void read_shape(nb::handle ids, nb::handle bounds) {
        const TensorView view = view_of(ids, "token_ids");
        require(view.dimensions == 1 || view.dimensions == 2, "token_ids must be (T,) or (B, L)");
        of.packed = view.dimensions == 1;
        of.count = view.elements();
        of.length = of.packed ? 0 : view.shape[1];
        of.sequences = view.shape[0];
        if (bounds.is_none()) return;
        const TensorView cuts = view_of(bounds, "cu_seqlens");
        require(of.packed && cuts.dimensions == 1 && cuts.shape[0] > 0 && cuts.type == Type::kInt32 &&
                    cuts.contiguous(),
                "cu_seqlens must be contiguous int32 of shape (B + 1,), and is for packed rows");
        of.bounds = static_cast<const int32_t*>(cuts.data);
        of.sequences = cuts.shape[0] - 1;
    }

    template <class T>
    Column<T> column(nb::handle tensor, const char* name, Type type) const {
        if (tensor.is_none()) return {};
        const TensorView view = view_of(tensor, name);
        const int64_t* const shape = view.shape;
        const std::string refusal = std::string(name) + " has a type or shape that the C++ backend does not take";
        require(view.type == type, refusal.c_str());
        const T* data = static_cast<const T*>(view.data);
        if (of.packed && view.dimensions == 1 && shape[0] == of.count) return {data, 0, view.stride[0]};
        if (!of.packed && view.dimensions == 2 && shape[0] == of.sequences && shape[1] == of.length)
            return {data, view.stride[0], view.stride[1]};
        require(view.dimensions == 1 && shape[0] == of.sequences, refusal.c_str());
        return {data, view.stride[0], 0};
    }

    static Scalars scalars_of(nb::handle given) {
        float values[kScalars];
        if (PyTuple_Check(given.ptr())) {
            require(PyTuple_GET_SIZE(given.ptr()) == kScalars, "scalars must be 11");
            for (int i = 0; i < kScalars; ++i) values[i] = scalar_of(PyTuple_GET_ITEM(given.ptr(), i), kScalarNames[i]);
        } else {
            const float* data =
                static_cast<const float*>(contiguous_data(given, "scalars", Type::kFloat32, {kScalars}));
            std::copy_n(data, kScalars, values);
        }
        return {values[0], values[1], values[2], values[3], values[4], values[5],
                values[6], values[7], values[8], values[9], values[10]};
    }

    // What the code says to read must be there, unless there are no rows to read it for.
    void require_given() const {
        if (!of.count || !of.sequences) return;
        const Code& code = of.code;
        require(bool(of.reward_advantages), "reward_advantages must be given");
        require(code.on_policy || of.old_logps, "old_logps must be given");
        require((code.cost != kCostGiven && code.cost != kCostGated) || of.cost_advantages,
                "cost_advantages must be given");
        require(code.kl == kNoKl || code.kl == kFullKl || of.ref_logps, "ref_logps must be given");
    }
};

Results results_of(const Arguments& of, nb::handle rows, nb::handle flags) {
    return {static_cast<float*>(contiguous_data(rows, "rows", Type::kFloat32, {kRows, of.count})),
            static_cast<int32_t*>(contiguous_data(flags, "flags", Type::kInt32, {of.count}))};
}

void sum_up(const Arguments& of, const Results& results, nb::handle loss, nb::handle stats) {
    float* const total = static_cast<float*>(contiguous_data(loss, "loss", Type::kFloat32, {}));
    float* const sums = static_cast<float*>(contiguous_data(stats, "stats", Type::kFloat32, {kStats}));
    nb::gil_scoped_release unlocked;
    reduce(of, results.rows, results.flags, total, sums);
}

RowRange range_of(const Arguments& of, int64_t rows, int64_t first, nb::handle index) {
    if (index.is_none()) {
        require(first >= 0 && first + rows <= of.count, "the rows of the logits must be rows of the loss");
        return {first, nullptr};
    }
    const int64_t* at = static_cast<const int64_t*>(contiguous_data(index, "index", Type::kInt64, {rows}));
    require(std::all_of(at, at + rows, [&](int64_t row) { return row >= 0 && row < of.count; }),
            "index must hold rows of the loss");
    return {0, at};
}

void bind_fused(nb::handle logits, nb::handle ref_logits, nb::handle grad, bool zeroed, nb::handle arguments,
                nb::handle scalars, int64_t code, float softcap, bool with_entropy, int64_t first, nb::handle index,
                nb::handle upstream, nb::handle rows, nb::handle flags, nb::handle loss, nb::handle stats,
                int threads) {
    const TensorArguments tensors(logits, ref_logits, grad, zeroed);
    const Rows& of_logits = tensors.tensors.logits;
    const Arguments of = ArgumentReader(arguments, scalars, code).of;
    require((of.code.kl == kFullKl) == bool(tensors.tensors.reference), "ref_logits are for the full KL");
    const LossTask task = {of,
                           range_of(of, of_logits.count, first, index),
                           upstream.is_none() ? nullptr
                                              : static_cast<const float*>(contiguous_data(
                                                    upstream, "upstream", Type::kFloat32, {of.count})),
                           softcap, with_entropy};
    const Results results = results_of(of, rows, flags);
    refuse_bad_id(find_bad_id(task, of_logits.count, of_logits.columns), of_logits.columns);
    refuse_bad_temperature(find_bad_temperature(task, of_logits.count));
    {
        nb::gil_scoped_release unlocked;
        fused(tensors.tensors, task, results, threads);
    }
    if (!loss.is_none()) sum_up(of, results, loss, stats);
}

void bind_reduce(nb::handle arguments, nb::handle scalars, int64_t code, nb::handle rows, nb::handle flags,
                 nb::handle loss, nb::handle stats) {
    const Arguments of = ArgumentReader(arguments, scalars, code).of;
    sum_up(of, results_of(of, rows, flags), loss, stats);
}

int64_t bind_count_dead(nb::handle arguments) {
    const Arguments of = ArgumentReader(arguments).of;
    int64_t dead = 0;
    for (int64_t row = 0; row < of.count; ++row) dead += !of.live(of.place(row));
    return dead;
}

// Reads float32 values, one for each row or, 0-d, one for all.
TensorView by_row_or_one(nb::handle tensor, const char* name, int64_t rows) {
    const TensorView view = view_of(tensor, name);
    const bool fits = !view.dimensions || (view.dimensions == 1 && view.shape[0] == rows);
    const std::string refusal = std::string(name) + " must be float32 and 0-d or one value per row";
    require(view.type == Type::kFloat32 && fits, refusal.c_str());
    return view;
}

Temperatures temperatures_of(nb::handle tensor, int64_t rows) {
    const TensorView view = by_row_or_one(tensor, "temperature", rows);
    return {static_cast<const float*>(view.data), view.dimensions ? view.stride[0] : 0, view.dimensions > 0};
}

void bind_statistics(nb::handle logits, nb::handle ids, nb::handle temperature, float softcap, bool with_entropy,
                     nb::handle state, int threads) {
    const TensorArguments arguments(logits, nb::none(), nb::none(), false);
    const Rows& rows = arguments.tensors.logits;
    const auto* tokens = static_cast<const int64_t*>(contiguous_data(ids, "ids", Type::kInt64, {rows.count}));
    auto* out = static_cast<float*>(contiguous_data(state, "state", Type::kFloat32, {kStates, rows.count}));
    const Temperatures temperatures = temperatures_of(temperature, rows.count);
    refuse_bad_id(find_bad_id(tokens, rows.count, rows.columns), rows.columns);
    if (temperatures.by_row) refuse_bad_temperature(find_bad_temperature(temperatures, tokens, rows.count));
    nb::gil_scoped_release unlocked;
    statistics(arguments.tensors, tokens, temperatures, softcap, with_entropy, out, threads);
}

void bind_apply(nb::handle logits, nb::handle grad, nb::handle ids, nb::handle state, nb::handle slopes,
                nb::handle temperature, float softcap, int threads) {
    const TensorArguments arguments(logits, nb::none(), grad, false);
    const Rows& rows = arguments.tensors.logits;
    const auto* tokens = static_cast<const int64_t*>(contiguous_data(ids, "ids", Type::kInt64, {rows.count}));
    const auto* states = static_cast<float*>(contiguous_data(state, "state", Type::kFloat32, {kStates, rows.count}));
    const auto* factors = static_cast<float*>(contiguous_data(slopes, "slopes", Type::kFloat32, {3, rows.count}));
    const Temperatures temperatures = temperatures_of(temperature, rows.count);
    refuse_bad_id(find_bad_id(tokens, rows.count, rows.columns), rows.columns);
    nb::gil_scoped_release unlocked;
    apply(arguments.tensors, tokens, states, factors, temperatures, softcap, threads);
}

void bind_scale_rows(nb::handle grad, nb::handle upstream, nb::handle flags, int threads) {
    const Rows rows = rows_of(grad, "grad");
    const TensorView factors = by_row_or_one(upstream, "upstream", rows.count);
    const int32_t* live = flags.is_none() ? nullptr
                                          : static_cast<const int32_t*>(contiguous_data(
                                                flags, "flags", Type::kInt32, {rows.count}));
    nb::gil_scoped_release unlocked;
    scale_rows(rows, static_cast<const float*>(factors.data), factors.dimensions ? factors.stride[0] : 0, live,
               threads);
}

}  // namespace

void bind_losses(nb::module_& m) {
    using namespace nb::literals;
    const auto optional = [](const char* name) { return nb::arg(name).none(); };
    m.def("fused", bind_fused, "logits"_a, optional("ref_logits"), optional("grad"), "zeroed"_a, "arguments"_a,
          "scalars"_a, "code"_a, "softcap"_a, "with_entropy"_a, "first"_a, optional("index"), optional("upstream"),
          "rows"_a, "flags"_a, optional("loss"), optional("stats"), "threads"_a);
    m.def("reduce", bind_reduce, "arguments"_a, "scalars"_a, "code"_a, "rows"_a, "flags"_a, "loss"_a, "stats"_a);
    m.def("count_dead", bind_count_dead, "arguments"_a);
    m.def("statistics", bind_statistics, "logits"_a, "ids"_a, "temperature"_a, "softcap"_a, "with_entropy"_a,
          "state"_a, "threads"_a);
    m.def("apply", bind_apply, "logits"_a, "grad"_a, "ids"_a, "state"_a, "slopes"_a, "temperature"_a, "softcap"_a,
          "threads"_a);
    m.def("scale_rows", bind_scale_rows, "grad"_a, "upstream"_a, optional("flags"), "threads"_a);
}

}  // namespace repo
