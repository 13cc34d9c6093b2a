// The box codec and its gradients: one thread per box.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "box_deltas.h"
#include "cuda/boxes.cuh"
#include "cuda/factors.cuh"

namespace ssod {
namespace {

constexpr int kThreads = 128;

// Divisors of both axes and the clamp of the log sizes.
template <typename T>
struct Codec {
  BoxSet<T> proposals, others;
  AxisScale<T> x, y;
  T clamp;
};

template <bool decode, typename T>
__device__ __forceinline__ AxisPair<T> code_axis(AxisPair<T> p, AxisPair<T> o, AxisScale<T> scale, T clamp) {
  if constexpr (decode) {
    return decode_axis(p, o, scale, clamp);
  } else {
    return encode_axis(p, o, scale);
  }
}

template <bool decode, typename T>
__device__ __forceinline__ AxisGrads<T> axis_gradients(AxisPair<T> grad, AxisPair<T> p, AxisPair<T> o,
                                                       AxisScale<T> scale, T clamp) {
  if constexpr (decode) {
    return decode_axis_gradients(grad, p, o, scale, clamp);
  } else {
    return encode_axis_gradients(grad, p, o, scale);
  }
}

template <bool decode, typename T>
__global__ void __launch_bounds__(kThreads) code_kernel(const __grid_constant__ Codec<T> c, T* __restrict__ out) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < c.proposals.rows.count; i += step) {
    T p[4], o[4];
    c.proposals.read(i, p);
    c.others.read(i, o);
    const auto x = code_axis<decode>(AxisPair<T>{p[0], p[2]}, AxisPair<T>{o[0], o[2]}, c.x, c.clamp);
    const auto y = code_axis<decode>(AxisPair<T>{p[1], p[3]}, AxisPair<T>{o[1], o[3]}, c.y, c.clamp);
    store_quad(out + 4 * i, x.first, y.first, x.second, y.second);
  }
}

// out1 and out2 are null where that gradient is not wanted.
template <bool decode, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    code_backward_kernel(const __grid_constant__ Codec<T> c, const __grid_constant__ BoxSet<T> grads,
                         T* __restrict__ out1, T* __restrict__ out2) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < c.proposals.rows.count; i += step) {
    T g[4], p[4], o[4];
    grads.read(i, g);
    c.proposals.read(i, p);
    c.others.read(i, o);
    const auto x =
        axis_gradients<decode>(AxisPair<T>{g[0], g[2]}, AxisPair<T>{p[0], p[2]}, AxisPair<T>{o[0], o[2]}, c.x, c.clamp);
    const auto y =
        axis_gradients<decode>(AxisPair<T>{g[1], g[3]}, AxisPair<T>{p[1], p[3]}, AxisPair<T>{o[1], o[3]}, c.y, c.clamp);
    if (out1) {
      store_quad(out1 + 4 * i, x.one.first, y.one.first, x.one.second, y.one.second);
    }
    if (out2) {
      store_quad(out2 + 4 * i, x.two.first, y.two.first, x.two.second, y.two.second);
    }
  }
}

template <typename T>
Codec<T> make_codec(Tensor& proposals, Tensor& others, double sx, double sy, double sw, double sh, double clamp) {
  return {make_box_set<T>(proposals),
          make_box_set<T>(others),
          {static_cast<T>(sx), static_cast<T>(sw)},
          {static_cast<T>(sy), static_cast<T>(sh)},
          static_cast<T>(clamp)};
}

template <bool decode>
Tensor code(Tensor& proposals, Tensor& others, double sx, double sy, double sw, double sh, double clamp) {
  const DeviceScope device(proposals);
  Tensor out = new_cuda_output(proposals, first_sizes(proposals, proposals.dim()), proposals.scalar_type());
  const int64_t count = out.numel() / 4;
  if (count == 0) {
    return out;
  }
  with_compute_type(proposals, [&](auto t) {
    using T = decltype(t);
    const Codec<T> codec = make_codec<T>(proposals, others, sx, sy, sw, sh, clamp);
    code_kernel<decode, T>
        <<<grid_blocks(count, kThreads), kThreads, 0, device.stream()>>>(codec, static_cast<T*>(out.data_ptr()));
  });
  check_launch(decode ? "decode_boxes" : "encode_boxes");
  return out;
}

template <bool decode>
std::tuple<Tensor, Tensor> code_backward(Tensor& grad, Tensor& proposals, Tensor& others, double sx, double sy,
                                         double sw, double sh, double clamp, bool need1, bool need2) {
  const DeviceScope device(proposals);
  const std::vector<int64_t> sizes = first_sizes(proposals, proposals.dim()), none{0};
  Tensor out1 = new_cuda_output(proposals, need1 ? sizes : none, proposals.scalar_type());
  Tensor out2 = new_cuda_output(proposals, need2 ? sizes : none, proposals.scalar_type());
  const int64_t count = proposals.numel() / 4;
  if (count == 0) {
    return {out1, out2};
  }
  with_compute_type(proposals, [&](auto t) {
    using T = decltype(t);
    const Codec<T> codec = make_codec<T>(proposals, others, sx, sy, sw, sh, clamp);
    const BoxSet<T> grads = make_box_set<T>(grad);
    code_backward_kernel<decode, T><<<grid_blocks(count, kThreads), kThreads, 0, device.stream()>>>(
        codec, grads, need1 ? static_cast<T*>(out1.data_ptr()) : nullptr,
        need2 ? static_cast<T*>(out2.data_ptr()) : nullptr);
  });
  check_launch(decode ? "decode_boxes_backward" : "encode_boxes_backward");
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

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) {
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes));
  m.impl("encode_boxes_backward", TORCH_BOX(&encode_boxes_backward));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes));
  m.impl("decode_boxes_backward", TORCH_BOX(&decode_boxes_backward));
}

}  // namespace
}  // namespace ssod
