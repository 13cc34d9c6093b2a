// Overlaps of matched pairs and their gradient: one thread per pair.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"

namespace ssod {
namespace {

constexpr int kThreads = 128;

template <typename T>
struct Pairs {
  BoxSet<T> set1, set2;
  BoxRule<T> rule;
};

template <Mode mode, bool zero, typename T>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const Pairs<T> p, T* __restrict__ out) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.set1.rows.count; i += step) {
    const Box<T> a = p.set1.template load<mode>(i, p.rule), b = p.set2.template load<mode>(i, p.rule);
    const T value = overlap<mode, zero>(a, b, p.rule.eps);
    out[i] = p.rule.nan_zero && value != value ? T(0) : value;
  }
}

// out1 and out2 are null where that gradient is not wanted.
template <Mode mode, bool zero, bool nan_zero, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const Pairs<T> p, const T* __restrict__ grad, const Rows grad_rows, T* __restrict__ out1,
                    T* __restrict__ out2) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.set1.rows.count; i += step) {
    const Box<T> a = p.set1.template load<mode>(i, p.rule), b = p.set2.template load<mode>(i, p.rule);
    CornerGrads<T> ga, gb;
    overlap_gradients<mode, zero, nan_zero>(a, b, p.rule.eps, grad[grad_rows.offset(i)], ga, gb);
    if (out1) {
      store_grads(out1 + 4 * i, ga, p.rule.format);
    }
    if (out2) {
      store_grads(out2 + 4 * i, gb, p.rule.format);
    }
  }
}

Tensor paired_box_iou(Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps,
                      bool nan_zero) {
  const DeviceScope device(boxes1);
  Tensor out = new_cuda_output(boxes1, first_sizes(boxes1, boxes1.dim() - 1), boxes1.scalar_type());
  const int64_t count = out.numel();
  if (count == 0) {
    return out;
  }
  with_compute_type(boxes1, [&](auto t) {
    using T = decltype(t);
    const Pairs<T> p{make_box_set<T>(boxes1), make_box_set<T>(boxes2), make_box_rule<T>(fmt, eps_mode, eps, nan_zero)};
    with_rule(static_cast<Mode>(mode), p.rule.zero, [&](auto mode_c, auto zero_c) {
      forward_kernel<decltype(mode_c)::value, decltype(zero_c)::value>
          <<<grid_blocks(count, kThreads), kThreads, 0, device.stream()>>>(p, static_cast<T*>(out.data_ptr()));
    });
  });
  check_launch("paired_box_iou");
  return out;
}

std::tuple<Tensor, Tensor> paired_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt,
                                                   int64_t eps_mode, double eps, bool nan_zero, bool need1,
                                                   bool need2) {
  const DeviceScope device(boxes1);
  const std::vector<int64_t> sizes = first_sizes(boxes1, boxes1.dim()), none{0};
  Tensor out1 = new_cuda_output(boxes1, need1 ? sizes : none, boxes1.scalar_type());
  Tensor out2 = new_cuda_output(boxes2, need2 ? sizes : none, boxes2.scalar_type());
  const int64_t count = boxes1.numel() / 4;
  if (count == 0) {
    return {out1, out2};
  }
  const Rows grad_rows = make_rows(grad, grad.dim());
  with_compute_type(boxes1, [&](auto t) {
    using T = decltype(t);
    const Pairs<T> p{make_box_set<T>(boxes1), make_box_set<T>(boxes2), make_box_rule<T>(fmt, eps_mode, eps, nan_zero)};
    T* const data1 = need1 ? static_cast<T*>(out1.data_ptr()) : nullptr;
    T* const data2 = need2 ? static_cast<T*>(out2.data_ptr()) : nullptr;
    with_rule(static_cast<Mode>(mode), p.rule.zero, [&](auto mode_c, auto zero_c) {
      with_flag(nan_zero, [&](auto nan_zero_c) {
        backward_kernel<decltype(mode_c)::value, decltype(zero_c)::value, decltype(nan_zero_c)::value>
            <<<grid_blocks(count, kThreads), kThreads, 0, device.stream()>>>(p, static_cast<const T*>(grad.data_ptr()),
                                                                             grad_rows, data1, data2);
      });
    });
  });
  check_launch("paired_box_iou_backward");
  return {out1, out2};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) {
  m.impl("paired_box_iou", TORCH_BOX(&paired_box_iou));
  m.impl("paired_box_iou_backward", TORCH_BOX(&paired_box_iou_backward));
}

}  // namespace
}  // namespace ssod
