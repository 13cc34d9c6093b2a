// Whether every overlap of a box with a set of others is below a threshold: one warp per box, which stops at its first
// hit.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"

namespace ssod {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;

template <typename T>
struct Problem {
  BoxSet<T> boxes, others;
  Partners partners;
  BoxRule<T> rule;
  T threshold;
  bool* below;
  T* maxima;  // null where they are not wanted
};

template <Mode mode, bool zero, typename T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) below_kernel(const Problem<T> p) {
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
  if (row >= p.boxes.rows.count) {
    return;
  }
  const Box<T> a = p.boxes.template load<mode>(row, p.rule);
  const Range range = p.partners.of(row);
  bool below = true;
  T largest = minus_infinity<T>();
  for (int64_t start = 0; start < range.size && (below || p.maxima); start += kWarp) {
    const int64_t j = start + threadIdx.x;
    bool hit = false;
    if (j < range.size) {
      const T value = overlap<mode, zero>(a, p.others.template load<mode>(range.begin + j, p.rule), p.rule.eps);
      hit = !(value < p.threshold);  // NaN is not below
      largest = upper(value, largest);
    }
    below = below && !__any_sync(0xffffffffu, hit);
  }
  for (int distance = kWarp / 2; p.maxima && distance > 0; distance /= 2) {
    largest = upper(largest, __shfl_down_sync(0xffffffffu, largest, distance));
  }
  if (threadIdx.x == 0) {
    p.below[row] = below;
    if (p.maxima) {
      p.maxima[row] = largest == minus_infinity<T>() ? T(0) : largest;
    }
  }
}

std::tuple<Tensor, Tensor> box_iou_below(Tensor boxes, Tensor others, std::optional<Tensor> offsets1,
                                         std::optional<Tensor> offsets2, double threshold, int64_t mode, int64_t fmt,
                                         int64_t eps_mode, double eps, bool return_max) {
  const DeviceScope device(boxes);
  const std::vector<int64_t> sizes = first_sizes(boxes, boxes.dim() - 1), none{0};
  Tensor below = new_cuda_output(boxes, sizes, ScalarType::Bool);
  Tensor maxima = new_cuda_output(boxes, return_max ? sizes : none, boxes.scalar_type());
  const int64_t rows = below.numel();
  if (rows == 0) {
    return {below, maxima};
  }
  const Partners partners = make_partners(boxes, others, offsets1, offsets2);
  with_compute_type(boxes, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p{make_box_set<T>(boxes),
                       make_box_set<T>(others),
                       partners,
                       make_box_rule<T>(fmt, eps_mode, eps, false),
                       static_cast<T>(threshold),
                       static_cast<bool*>(below.data_ptr()),
                       return_max ? static_cast<T*>(maxima.data_ptr()) : nullptr};
    with_rule(static_cast<Mode>(mode), p.rule.zero, [&](auto mode_c, auto zero_c) {
      below_kernel<decltype(mode_c)::value, decltype(zero_c)::value>
          <<<static_cast<unsigned>(ceil_div(rows, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), 0, device.stream()>>>(p);
    });
  });
  check_launch("box_iou_below");
  return {below, maxima};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("box_iou_below", TORCH_BOX(&box_iou_below)); }

}  // namespace
}  // namespace ssod
