// The box codec and its gradients.
#include "box_deltas.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu/box_rows.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

constexpr int64_t kWork = 16;  // per box: a logarithm or an exponential per axis

// Divisors of both axes and the clamp of the log sizes.
template <typename T>
struct Codec {
  AxisScale<T> x, y;
  T clamp;
};

template <bool decode, typename T>
SSOD_CLONES static void code_axis(const T* __restrict p1, const T* __restrict p2, const T* __restrict o1,
                                  const T* __restrict o2, AxisScale<T> scale, T clamp, T* __restrict out1,
                                  T* __restrict out2, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const AxisPair<T> p{p1[i], p2[i]}, o{o1[i], o2[i]};
    const AxisPair<T> r = decode ? decode_axis(p, o, scale, clamp) : encode_axis(p, o, scale);
    out1[i] = r.first;
    out2[i] = r.second;
  }
}

// Gradients of one axis; in1 and in2 hold the two numbers of the proposal, other1 and other2 those of the other input.
template <bool decode, typename T>
SSOD_CLONES static void axis_gradient_rows(const T* __restrict grad1, const T* __restrict grad2,
                                           const T* __restrict in1, const T* __restrict in2, const T* __restrict other1,
                                           const T* __restrict other2, AxisScale<T> scale, T clamp,
                                           T* __restrict to_in1, T* __restrict to_in2, T* __restrict to_other1,
                                           T* __restrict to_other2, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const AxisPair<T> grad{grad1[i], grad2[i]}, p{in1[i], in2[i]}, o{other1[i], other2[i]};
    const AxisGrads<T> r =
        decode ? decode_axis_gradients(grad, p, o, scale, clamp) : encode_axis_gradients(grad, p, o, scale);
    to_in1[i] = r.one.first;
    to_in2[i] = r.one.second;
    to_other1[i] = r.two.first;
    to_other2[i] = r.two.second;
  }
}

// Rows [..., 4] of one input.
template <typename T>
struct Input {
  const T* data;
  Rows rows;

  void load(int64_t first, int64_t n, Quads<T>& out) const { load_quads(data, rows, first, n, out); }
};

template <typename T>
Input<T> make_input(Tensor& t) {
  const Rows rows = make_rows(t, t.dim() - 1);
  return {static_cast<const T*>(t.data_ptr()), rows};
}

// Calls f(first, count) for tiles of all rows.
template <typename F>
void for_each_box_tile(int64_t rows, const F& f) {
  parallel_rows(rows, kWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kBoxTile) {
      f(i, std::min(kBoxTile, end - i));
    }
  });
}

template <bool decode, typename T>
void run(const Input<T>& proposals, const Input<T>& others, const Codec<T>& codec, T* out) {
  for_each_box_tile(proposals.rows.count, [&](int64_t i, int64_t n) {
    Quads<T> p, o, result;
    proposals.load(i, n, p);
    others.load(i, n, o);
    code_axis<decode>(p.a, p.c, o.a, o.c, codec.x, codec.clamp, result.a, result.c, n);
    code_axis<decode>(p.b, p.d, o.b, o.d, codec.y, codec.clamp, result.b, result.d, n);
    join_quads(result, out + 4 * i, n);
  });
}

// out1 and out2 are null where that gradient is not wanted.
template <bool decode, typename T>
void run_backward(const Input<T>& grads, const Input<T>& proposals, const Input<T>& others, const Codec<T>& codec,
                  T* out1, T* out2) {
  for_each_box_tile(proposals.rows.count, [&](int64_t i, int64_t n) {
    Quads<T> g, p, o, to_p, to_o;
    grads.load(i, n, g);
    proposals.load(i, n, p);
    others.load(i, n, o);
    axis_gradient_rows<decode>(g.a, g.c, p.a, p.c, o.a, o.c, codec.x, codec.clamp, to_p.a, to_p.c, to_o.a, to_o.c, n);
    axis_gradient_rows<decode>(g.b, g.d, p.b, p.d, o.b, o.d, codec.y, codec.clamp, to_p.b, to_p.d, to_o.b, to_o.d, n);
    if (out1) {
      join_quads(to_p, out1 + 4 * i, n);
    }
    if (out2) {
      join_quads(to_o, out2 + 4 * i, n);
    }
  });
}

template <typename T>
Codec<T> make_codec(double sx, double sy, double sw, double sh, double clamp) {
  return {{static_cast<T>(sx), static_cast<T>(sw)}, {static_cast<T>(sy), static_cast<T>(sh)}, static_cast<T>(clamp)};
}

template <bool decode>
Tensor code(Tensor& proposals, Tensor& others, double sx, double sy, double sw, double sh, double clamp) {
  Tensor out = new_output(leading_sizes(proposals, proposals.dim()), proposals.scalar_type());
  const auto typed = [&](auto t) {
    using T = decltype(t);
    run<decode>(make_input<T>(proposals), make_input<T>(others), make_codec<T>(sx, sy, sw, sh, clamp),
                static_cast<T*>(out.data_ptr()));
  };
  proposals.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return out;
}

template <bool decode>
std::tuple<Tensor, Tensor> code_backward(Tensor& grad, Tensor& proposals, Tensor& others, double sx, double sy,
                                         double sw, double sh, double clamp, bool need1, bool need2) {
  const std::vector<int64_t> sizes = leading_sizes(proposals, proposals.dim()), none{0};
  Tensor out1 = new_output(need1 ? sizes : none, proposals.scalar_type());
  Tensor out2 = new_output(need2 ? sizes : none, proposals.scalar_type());
  const auto typed = [&](auto t) {
    using T = decltype(t);
    run_backward<decode>(make_input<T>(grad), make_input<T>(proposals), make_input<T>(others),
                         make_codec<T>(sx, sy, sw, sh, clamp), need1 ? static_cast<T*>(out1.data_ptr()) : nullptr,
                         need2 ? static_cast<T*>(out2.data_ptr()) : nullptr);
  };
  proposals.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {out1, out2};
}

Tensor encode_boxes(Tensor proposals, Tensor targets, double sx, double sy, double sw, double sh) {
  return code<false>(proposals, targets, sx, sy, sw, sh, 0);
}

Tensor decode_boxes(Tensor proposals, Tensor deltas, double sx, double sy, double sw, double sh, double clamp) {
  return code<true>(proposals, deltas, sx, sy, sw, sh, clamp);
}

std::tuple<Tensor, Tensor> encode_boxes_backward(Tensor grad, Tensor proposals, Tensor targets, double sx, double sy,
                                                 double sw, double sh, bool need1, bool need2) {
  return code_backward<false>(grad, proposals, targets, sx, sy, sw, sh, 0, need1, need2);
}

std::tuple<Tensor, Tensor> decode_boxes_backward(Tensor grad, Tensor proposals, Tensor deltas, double sx, double sy,
                                                 double sw, double sh, double clamp, bool need1, bool need2) {
  return code_backward<true>(grad, proposals, deltas, sx, sy, sw, sh, clamp, need1, need2);
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) {
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes));
  m.impl("encode_boxes_backward", TORCH_BOX(&encode_boxes_backward));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes));
  m.impl("decode_boxes_backward", TORCH_BOX(&decode_boxes_backward));
}

}  // namespace
}  // namespace ssod
