#include "decoding/bindings.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common/tensor_view.h"
#include "decoding/packed_weight.h"
#include "decoding/sampling.h"
#include "decoding/step.h"
#include "decoding/task.h"

namespace nb = nanobind;

namespace repo {
namespace {

using Dims = std::initializer_list<int64_t>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

float* floats(nb::handle tensor, const char* name, Dims shape) {
    return static_cast<float*>(contiguous_data(tensor, name, Type::kFloat32, shape));
}

float* floats_or_null(nb::handle tensor, const char* name, Dims shape) {
    return tensor.is_none() ? nullptr : floats(tensor, name, shape);
}

const int32_t* integers(nb::handle tensor, const char* name, int64_t count) {
    return static_cast<const int32_t*>(contiguous_data(tensor, name, Type::kInt32, {count}));
}

// Returns whether a packed weight is in bfloat16.
bool is_half(nb::handle tensor, const char* name) { return view_of(tensor, name).type == Type::kBFloat16; }

// A packed weight: (panels, depth, 16) floats or (panels, depth / 2, 32) elements of bfloat16.
float* packed(nb::handle tensor, const char* name, int64_t outputs, int64_t depth, bool half) {
    const int64_t words = words_of(depth, half), elements = half ? 2 * kPanelColumns : kPanelColumns;
    const Type type = half ? Type::kBFloat16 : Type::kFloat32;
    return static_cast<float*>(contiguous_data(tensor, name, type, {panels_of(outputs), words, elements}));
}

void bind_pack(nb::handle weight, nb::handle to, int threads) {
    const TensorView from = view_of(weight, "weight");
    require(from.type == Type::kFloat32 && from.dimensions == 2 && from.contiguous(),
            "weight must be a contiguous fp32 matrix");
    const int64_t outputs = from.shape[0], depth = from.shape[1];
    const bool half = is_half(to, "to");
    require(!half || depth % kPanelColumns == 0, "weight must have a multiple of 16 columns to be packed in bfloat16");
    float* data = packed(to, "to", outputs, depth, half);
    nb::gil_scoped_release unlocked;
    pack_weight(static_cast<const float*>(from.data), outputs, depth, data, half, threads);
}

void bind_large_pages(nb::handle memory) {
    const TensorView view = view_of(memory, "memory");
    const bool half = view.type == Type::kBFloat16;
    require((half || view.type == Type::kFloat32) && view.contiguous(), "memory must be contiguous fp32 or bfloat16");
    ask_for_large_pages(view.data, view.elements() * (half ? 2 : 4));
}

void bind_multiply(nb::handle x, nb::handle weight, nb::handle bias, nb::handle out, int threads) {
    const TensorView result = view_of(out, "out"), rows = view_of(x, "x");
    require(result.dimensions == 2 && rows.dimensions == 2, "x and out must be matrices");
    const int64_t count = result.shape[0], outputs = result.shape[1], depth = rows.shape[1];
    const bool half = is_half(weight, "weight");
    require(!half || depth % kPanelColumns == 0, "x must have a multiple of 16 columns for a weight in bfloat16");
    const float *from = floats(x, "x", {count, depth}), *panels = packed(weight, "weight", outputs, depth, half);
    const float* added = floats_or_null(bias, "bias", {outputs});
    float* to = floats(out, "out", {count, outputs});
    nb::gil_scoped_release unlocked;
    multiply_packed(from, count, depth, panels, half, outputs, added, to, threads);
}

void bind_sample(nb::handle logits, nb::handle uniforms, float temperature, nb::handle tokens, nb::handle logps,
                 int threads) {
    const TensorView view = view_of(logits, "logits");
    require(view.dimensions == 2 && view.shape[1] > 0, "logits must be (rows, vocabulary)");
    const int64_t rows = view.shape[0], vocabulary = view.shape[1];
    const float* from = floats(logits, "logits", {rows, vocabulary});
    const double* draws = static_cast<const double*>(contiguous_data(uniforms, "uniforms", Type::kFloat64, {rows}));
    int64_t* chosen = static_cast<int64_t*>(contiguous_data(tokens, "tokens", Type::kInt64, {rows}));
    float* of_chosen = floats(logps, "logps", {rows});
    nb::gil_scoped_release unlocked;
    sample_rows(from, rows, vocabulary, draws, temperature, chosen, of_chosen, threads);
}

// A model, and the tensors that its pointers lead to.
class Model {
  public:
    Model(int64_t heads, int64_t key_heads, int64_t columns, int64_t inner, float epsilon, float scale, nb::list layers,
          nb::object norm, nb::object head, int64_t vocabulary)
        : layers_(layers), norm_(norm), head_(head) {
        const int64_t hidden = view_of(norm, "norm").shape[0];
        require(hidden > 0 && heads > 0 && key_heads > 0 && columns > 0 && inner > 0 && vocabulary > 0,
                "every size must be at least 1");
        require(heads % key_heads == 0, "key heads must divide the query heads");
        require(hidden % kPanelColumns == 0 && columns % kPanelColumns == 0 && inner % kPanelColumns == 0,
                "hidden, columns and inner must be multiples of 16");
        const bool half = is_half(head, "head");
        model_ = {half, hidden, heads, key_heads, columns, inner, vocabulary, epsilon, scale, {}, nullptr, nullptr};
        model_.norm = floats(norm, "norm", {hidden});
        model_.head = packed(head, "head", vocabulary, hidden, half);
        for (nb::handle layer : layers) model_.layers.push_back(layer_of(nb::cast<nb::tuple>(layer)));
    }

    void step(nb::handle x, nb::handle cos, nb::handle sin, nb::handle slots, nb::handle lengths, nb::handle keys,
              nb::handle values, nb::handle logits, int threads) const {
        const DecoderModel& m = model_;
        const TensorView rows = view_of(x, "x"), cache = view_of(keys, "keys");
        require(rows.dimensions == 2 && cache.dimensions == 3, "x must be a matrix, keys must have 3 dimensions");
        const int64_t count = rows.shape[0], capacity = cache.shape[2], per_place = int64_t(m.layers.size()) * m.key_heads;
        require(capacity % kPanelColumns == 0, "the capacity must be a multiple of 16");
        require(per_place > 0 && cache.shape[0] % per_place == 0, "keys must be (layers * places * key heads, ...)");
        const int64_t places = cache.shape[0] / per_place;
        DecodeStep step = {count, places, capacity};
        step.slots = integers(slots, "slots", count), step.lengths = integers(lengths, "lengths", count);
        std::vector<bool> taken(places);
        for (int64_t r = 0; r < count; ++r) {
            require(step.slots[r] >= 0 && step.slots[r] < places && !taken[step.slots[r]],
                    "slots must be different places of the cache");
            require(step.lengths[r] >= 0 && step.lengths[r] < capacity, "lengths must be below the capacity");
            taken[step.slots[r]] = true;
        }
        step.cos = floats(cos, "cos", {count, m.columns}), step.sin = floats(sin, "sin", {count, m.columns});
        step.x = floats(x, "x", {count, m.hidden});
        step.keys = floats(keys, "keys", {cache.shape[0], m.columns, capacity});
        step.values = floats(values, "values", {cache.shape[0], capacity, m.columns});
        step.logits = floats(logits, "logits", {count, m.vocabulary});
        nb::gil_scoped_release unlocked;
        decode_step(model_, step, threads);
    }

  private:
    LayerWeights layer_of(nb::tuple t) const {
        require(t.size() == 11, "a layer must have 11 parts");
        const DecoderModel& m = model_;
        const int64_t queries = m.heads * m.columns, qkv = queries + 2 * m.key_heads * m.columns;
        LayerWeights layer = {};
        layer.input_norm = floats(t[0], "input_norm", {m.hidden});
        layer.qkv = packed(t[1], "qkv", qkv, m.hidden, m.half);
        layer.qkv_bias = floats_or_null(t[2], "qkv_bias", {qkv});
        layer.q_norm = floats_or_null(t[3], "q_norm", {m.columns});
        layer.k_norm = floats_or_null(t[4], "k_norm", {m.columns});
        layer.out = packed(t[5], "out", m.hidden, queries, m.half);
        layer.out_bias = floats_or_null(t[6], "out_bias", {m.hidden});
        layer.post_norm = floats(t[7], "post_norm", {m.hidden});
        layer.gate = packed(t[8], "gate", m.inner, m.hidden, m.half);
        layer.up = packed(t[9], "up", m.inner, m.hidden, m.half);
        layer.down = packed(t[10], "down", m.hidden, m.inner, m.half);
        return layer;
    }

    DecoderModel model_;
    nb::list layers_;
    nb::object norm_, head_;
};

}  // namespace

void bind_decoding(nb::module_& m) {
    using namespace nb::literals;
    m.def("ask_for_large_pages", bind_large_pages, "memory"_a);
    m.def("pack_weight", bind_pack, "weight"_a, "to"_a, "threads"_a);
    m.def("multiply_packed", bind_multiply, "x"_a, "weight"_a, "bias"_a.none(), "out"_a, "threads"_a);
    m.def("sample_rows", bind_sample, "logits"_a, "uniforms"_a, "temperature"_a, "tokens"_a, "logps"_a, "threads"_a);
    nb::class_<Model>(m, "DecoderModel")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, float, float, nb::list, nb::object, nb::object, int64_t>(),
             "heads"_a, "key_heads"_a, "columns"_a, "inner"_a, "epsilon"_a, "scale"_a, "layers"_a, "norm"_a, "head"_a,
             "vocabulary"_a)
        .def("step", &Model::step, "x"_a, "cos"_a, "sin"_a, "slots"_a, "lengths"_a, "keys"_a, "values"_a, "logits"_a,
             "threads"_a);
}

}  // namespace repo
