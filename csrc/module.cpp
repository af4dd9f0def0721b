// The extension module repo_kernels._cpu: checks the memory that it is given and computes without the GIL.
//
// The layers' arguments are CPU tensors passed by the array protocol. The callers are repo_kernels/backends/cpu/*.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "decoding/bindings.h"
#include "kernels/dispatch.h"
#include "layers/attention.h"
#include "layers/layers.h"
#include "layers/thin.h"
#include "losses/bindings.h"
#include "layers/transpose.h"

namespace nb = nanobind;
using namespace repo;

namespace {

using Vector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstVector = nb::ndarray<const float, nb::ndim<1>, nb::device::cpu>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstRows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using MutableRows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Flat = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ConstFlat = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
template <class T>
using PerToken = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;
using Bounds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using PerHead = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

template <class M>
void require_shape(const M& matrix, int64_t rows, int64_t columns, const char* message) {
    require(int64_t(matrix.shape(0)) == rows && int64_t(matrix.shape(1)) == columns, message);
}

template <class V>
void require_vector(const V& vector, int64_t count, const char* message) {
    require(int64_t(vector.shape(0)) == count && (count <= 1 || vector.stride(0) == 1), message);
}

void bind_transpose(const ConstRows& from, const Matrix& to, int threads) {
    const int64_t rows = from.shape(0), columns = from.shape(1);
    require(from.stride(1) == 1 || columns == 1, "the columns of a row must be consecutive");
    require_shape(to, columns, rows, "the transposed matrix must be (columns, rows)");
    nb::gil_scoped_release unlocked;
    transpose(from.data(), rows, columns, from.stride(0), to.data(), threads);
}

template <class T, class M>
Rows<T> rows_of(const M& matrix) {
    require(matrix.stride(1) == 1 || matrix.shape(1) <= 1, "the columns of a row must be consecutive");
    require(matrix.stride(0) >= int64_t(matrix.shape(1)) || matrix.shape(0) <= 1, "rows must not overlap");
    return {matrix.data(), int64_t(matrix.shape(0)), int64_t(matrix.shape(1)), matrix.stride(0)};
}

void bind_add_outer(const MutableRows& out, const ConstMatrix& z, const ConstMatrix& b, int threads) {
    const Rows<float> to = rows_of<float>(out);
    const int64_t rank = z.shape(1);
    require_shape(z, to.rows, rank, "z must have a row for each row of out");
    require_shape(b, to.columns, rank, "b must have a row for each column of out, and as many columns as z");
    nb::gil_scoped_release unlocked;
    add_outer(to, z.data(), b.data(), rank, threads);
}

void bind_add_inner(const ConstRows& d, const ConstMatrix& z, const Matrix& out, int threads) {
    const Rows<const float> from = rows_of<const float>(d);
    const int64_t rank = z.shape(1);
    require_shape(z, from.rows, rank, "z must have a row for each row of d");
    require_shape(out, from.columns, rank, "out must have a row for each column of d, and as many columns as z");
    nb::gil_scoped_release unlocked;
    add_inner(from, z.data(), rank, out.data(), threads);
}

void bind_rms_norm(const ConstMatrix& x, const ConstVector& weight, const Matrix& y, const Vector& inverse,
                   float epsilon, int threads) {
    const Shape shape = {int64_t(x.shape(0)), int64_t(x.shape(1))};
    require_shape(y, shape.rows, shape.columns, "y must be like x");
    require_vector(weight, shape.columns, "weight must be (columns,), consecutive");
    require_vector(inverse, shape.rows, "inverse must be (rows,)");
    nb::gil_scoped_release unlocked;
    rms_norm(x.data(), weight.data(), y.data(), inverse.data(), shape, epsilon, threads);
}

void bind_rms_norm_gradient(const ConstMatrix& x, const ConstVector& weight, const ConstVector& inverse,
                            const ConstMatrix& dy, const Matrix& dx, const std::optional<Vector>& dweight,
                            int threads) {
    const Shape shape = {int64_t(x.shape(0)), int64_t(x.shape(1))};
    require_shape(dy, shape.rows, shape.columns, "dy must be like x");
    require_shape(dx, shape.rows, shape.columns, "dx must be like x");
    require_vector(weight, shape.columns, "weight must be (columns,), consecutive");
    require_vector(inverse, shape.rows, "inverse must be (rows,), consecutive");
    if (dweight) require_vector(*dweight, shape.columns, "dweight must be (columns,)");
    nb::gil_scoped_release unlocked;
    rms_norm_gradient(x.data(), weight.data(), inverse.data(), dy.data(), dx.data(),
                      dweight ? dweight->data() : nullptr, shape, threads);
}

void bind_swiglu(const ConstFlat& gate, const ConstFlat& up, const Flat& out, int threads) {
    require(gate.size() == up.size() && gate.size() == out.size(), "gate, up and out must have the same shape");
    nb::gil_scoped_release unlocked;
    swiglu(gate.data(), up.data(), out.data(), int64_t(gate.size()), threads);
}

void bind_swiglu_gradient(const ConstFlat& gate, const ConstFlat& up, const ConstFlat& grad, const Flat& of_gate,
                          const Flat& of_up, int threads) {
    for (const size_t size : {up.size(), grad.size(), of_gate.size(), of_up.size()})
        require(gate.size() == size, "gate, up and the gradients must have the same shape");
    nb::gil_scoped_release unlocked;
    swiglu_gradient(gate.data(), up.data(), grad.data(), of_gate.data(), of_up.data(), int64_t(gate.size()), threads);
}

template <class T>
Heads<T> heads_of(const PerHead<T>& array) {
    require(array.stride(3) == 1 || array.shape(3) == 1 || !array.size(), "the columns of a head must be consecutive");
    return {array.data(),           int64_t(array.shape(0)), int64_t(array.shape(1)), int64_t(array.shape(2)),
            int64_t(array.shape(3)), array.stride(0),         array.stride(1),         array.stride(2)};
}

void bind_rotate(const PerHead<const float>& x, const PerHead<const float>& cos, const PerHead<const float>& sin,
                 const PerHead<float>& y, bool back, int threads) {
    const auto from = heads_of(x), by_cos = heads_of(cos), by_sin = heads_of(sin);
    const auto to = heads_of(y);
    require(from.columns % 2 == 0, "a head must have an even number of columns");
    for (const size_t axis : {0, 1, 2, 3}) require(x.shape(axis) == y.shape(axis), "y must be like x");
    for (const size_t axis : {0, 2, 3})
        require(x.shape(axis) == cos.shape(axis) && x.shape(axis) == sin.shape(axis),
                "cos and sin must be like a head");
    nb::gil_scoped_release unlocked;
    rotate(from, by_cos, by_sin, to, back, threads);
}

template <class T>
TokenHeads<T> token_heads(const PerToken<T>& array, int64_t tokens, int64_t heads, int64_t columns) {
    require(int64_t(array.shape(0)) == tokens && int64_t(array.shape(1)) == heads && int64_t(array.shape(2)) == columns,
            "queries, keys and values and their gradients must have matching shapes");
    require(array.stride(2) == 1, "the columns of a head must be consecutive");
    return {array.data(), array.stride(0), array.stride(1)};
}

void require_bounds(const Bounds& bounds, int64_t count) {
    const size_t last = bounds.shape(0) - 1;
    require(bounds.shape(0) >= 1 && bounds(0) == 0 && bounds(last) == count, "bounds must go from 0 to the length");
    require(std::is_sorted(bounds.data(), bounds.data() + last + 1), "bounds must ascend");
}

AttentionBatch attention_of(const PerToken<const float>& q, const PerToken<const float>& k,
                            const PerToken<const float>& v, const Bounds& query_bounds, const Bounds& key_bounds,
                            float scale, int64_t window, const Matrix& log2_sums) {
    const int64_t tokens = q.shape(0), heads = q.shape(1), columns = q.shape(2), keys = k.shape(0);
    const int64_t key_heads = k.shape(1), segments = int64_t(query_bounds.shape(0)) - 1;
    require(columns % kColumnMultiple == 0 && columns > 0, "a head must have a multiple of 16 columns");
    require(key_heads > 0 && heads % key_heads == 0, "key heads must divide the query heads");
    require(window > 0, "window must be at least 1");
    require_shape(log2_sums, heads, tokens, "log2_sums must be (heads, tokens)");
    require(query_bounds.shape(0) == key_bounds.shape(0), "queries and keys must have equally many segments");
    require_bounds(query_bounds, tokens);
    require_bounds(key_bounds, keys);
    for (int64_t s = 0; s < segments; ++s)
        require(query_bounds(s + 1) - query_bounds(s) <= key_bounds(s + 1) - key_bounds(s),
                "a segment must have at least as many keys as queries");
    AttentionTask of = {};
    of.heads = heads / key_heads, of.columns = columns, of.tokens = tokens, of.window = window, of.scale = scale;
    of.q = token_heads(q, tokens, heads, columns);
    of.k = token_heads(k, keys, key_heads, columns), of.v = token_heads(v, keys, key_heads, columns);
    of.log2_sums = log2_sums.data();
    return {of, segments, key_heads, query_bounds.data(), key_bounds.data()};
}

void bind_attention(const PerToken<const float>& q, const PerToken<const float>& k, const PerToken<const float>& v,
                    const Bounds& query_bounds, const Bounds& key_bounds, float scale, int64_t window,
                    const PerToken<float>& out, const Matrix& log2_sums, int threads) {
    AttentionBatch batch = attention_of(q, k, v, query_bounds, key_bounds, scale, window, log2_sums);
    batch.of.out = token_heads(out, q.shape(0), q.shape(1), q.shape(2));
    nb::gil_scoped_release unlocked;
    attention(batch, threads);
}

void bind_attention_gradient(const PerToken<const float>& q, const PerToken<const float>& k,
                             const PerToken<const float>& v, const Bounds& query_bounds, const Bounds& key_bounds,
                             float scale, int64_t window, const PerToken<const float>& dout, const Matrix& log2_sums,
                             const PerToken<float>& dq, const PerToken<float>& dk, const PerToken<float>& dv,
                             int threads) {
    AttentionBatch batch = attention_of(q, k, v, query_bounds, key_bounds, scale, window, log2_sums);
    batch.of.dout = token_heads(dout, q.shape(0), q.shape(1), q.shape(2));
    batch.of.dq = token_heads(dq, q.shape(0), q.shape(1), q.shape(2));
    batch.of.dk = token_heads(dk, k.shape(0), k.shape(1), q.shape(2));
    batch.of.dv = token_heads(dv, k.shape(0), k.shape(1), q.shape(2));
    nb::gil_scoped_release unlocked;
    attention_gradient(batch, threads);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const RowKernels* set : available_kernels()) names.emplace_back(set->name);
    return names;
}

void set_isa(const std::string& name) {
    require(select_kernels(name), "this machine has no such instruction set");
}

void bind_exp2(const ConstVector& from, const Vector& to) { kernels().exp2(from.data(), to.data(), to.shape(0)); }

void bind_soft_cap(const ConstVector& from, const Vector& value, const Vector& slope, float cap) {
    kernels().soft_cap(from.data(), value.data(), slope.data(), value.shape(0), cap);
}

}  // namespace

NB_MODULE(_cpu, m) {
    using namespace nb::literals;
    const auto exact = [](const char* name) { return nb::arg(name).noconvert(); };  // takes no converted copy
    bind_losses(m);
    bind_decoding(m);
    m.def("transpose", bind_transpose, exact("source"), exact("to"), "threads"_a);
    m.def("add_outer", bind_add_outer, exact("out"), exact("z"), exact("b"), "threads"_a);
    m.def("add_inner", bind_add_inner, exact("d"), exact("z"), exact("out"), "threads"_a);
    m.def("rms_norm", bind_rms_norm, exact("x"), exact("weight"), exact("y"), exact("inverse"), "epsilon"_a,
          "threads"_a);
    m.def("rms_norm_gradient", bind_rms_norm_gradient, exact("x"), exact("weight"), exact("inverse"), exact("dy"),
          exact("dx"), exact("dweight").none(), "threads"_a);
    m.def("swiglu", bind_swiglu, exact("gate"), exact("up"), exact("out"), "threads"_a);
    m.def("swiglu_gradient", bind_swiglu_gradient, exact("gate"), exact("up"), exact("grad"), exact("of_gate"),
          exact("of_up"), "threads"_a);
    m.def("rotate", bind_rotate, exact("x"), exact("cos"), exact("sin"), exact("y"), "back"_a, "threads"_a);
    m.def("attention", bind_attention, exact("q"), exact("k"), exact("v"), exact("query_bounds"), exact("key_bounds"),
          "scale"_a, "window"_a, exact("out"), exact("log2_sums"), "threads"_a);
    m.def("attention_gradient", bind_attention_gradient, exact("q"), exact("k"), exact("v"), exact("query_bounds"),
          exact("key_bounds"), "scale"_a, "window"_a, exact("dout"), exact("log2_sums"), exact("dq"), exact("dk"),
          exact("dv"), "threads"_a);
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("_isas", instruction_sets);
    m.def("_set_isa", set_isa, "name"_a);
    m.def("_exp2", bind_exp2, exact("t"), exact("out"));
    m.def("_soft_cap", bind_soft_cap, exact("z"), exact("value"), exact("slope"), "cap"_a);
}
