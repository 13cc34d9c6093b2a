// Bags of boxes around boxes: one thread per proposal writes all that is wanted of it.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"
#include "cuda/factors.cuh"
#include "neighborhood.h"

namespace ssod {
namespace {

constexpr int kThreads = 128;

// Null where an output is not wanted.
template <typename T>
struct Outputs {
  T* boxes;
  bool* valid;
  T *rois, *iof, *iou, *targets, *clipped;
};

template <typename T>
struct Problem {
  BoxSet<T> boxes;
  ImageRows<T> images;
  Factors<T> ratios, shakes;
  int64_t bag;
  T threshold;
  AxisScale<T> x_scale, y_scale;
  Outputs<T> out;
};

template <typename T>
__device__ __forceinline__ void store_box(T* out, const Corners<T>& b) {
  store_quad(out, b.x1, b.y1, b.x2, b.y2);
}

template <typename T>
__device__ void write_targets(const Problem<T>& p, const Source<T>& source, const Proposal<T>& proposal, T* out) {
  const AxisPair<T> x = delta_to_source(source.w, proposal.w, proposal.dx, source.poison, p.x_scale);
  const AxisPair<T> y = delta_to_source(source.h, proposal.h, proposal.dy, source.poison, p.y_scale);
  store_quad(out, x.first, y.first, x.second, y.second);
}

template <typename T>
__device__ void write_roi(const Corners<T>& b, int64_t image, T* out) {
  out[0] = static_cast<T>(image);
  out[1] = b.x1, out[2] = b.y1, out[3] = b.x2, out[4] = b.y2;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) bag_kernel(const __grid_constant__ Problem<T> p) {
  __shared__ T ratios[kMaxFactors], shakes[kMaxFactors];
  p.ratios.copy_to(ratios);
  p.shakes.copy_to(shakes);
  __syncthreads();
  const int64_t total = p.boxes.rows.count * p.bag, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t g = i / p.bag;
    T v[4];
    p.boxes.read(g, v);
    const OwnImage<T> image = p.images.of(g);
    const Source<T> source = make_source(v[0], v[1], v[2], v[3]);
    const Proposal<T> proposal =
        propose(source, step_of(i - g * p.bag, ratios, p.ratios.count, shakes, p.shakes.count));
    const T share = share_inside(proposal.box, image.w, image.h);
    store_box(p.out.boxes + 4 * i, proposal.box);
    p.out.valid[i] = share > p.threshold;
    if (p.out.rois) {
      write_roi(proposal.box, image.index, p.out.rois + 5 * i);
    }
    if (p.out.iof) {
      p.out.iof[i] = share;
    }
    if (p.out.iou) {
      p.out.iou[i] = overlap_with_source(proposal.box, make_box(v[0], v[1], v[2], v[3], Format::xyxy, false));
    }
    if (p.out.targets) {
      write_targets(p, source, proposal, p.out.targets + 4 * i);
    }
    if (p.out.clipped) {
      store_box(p.out.clipped + 4 * i, clip_box(proposal.box, image.w, image.h));
    }
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
T* data_or_null(bool wanted, Tensor& t) {
  return wanted ? static_cast<T*>(t.data_ptr()) : nullptr;
}

Results neighborhood_boxes(Tensor boxes, std::optional<Tensor> image_index, std::optional<Tensor> offsets,
                           Tensor image_hw, std::vector<double> ratios, std::vector<double> shakes,
                           double iof_threshold, bool want_rois, bool want_iof, bool want_iou,
                           std::vector<double> targets_std, bool want_clipped) {
  const DeviceScope device(boxes);
  const bool want_targets = !targets_std.empty();
  const int64_t count = boxes.size(0), ratio_count = static_cast<int64_t>(ratios.size());
  const int64_t bag = ratio_count * ratio_count * (1 + 4 * static_cast<int64_t>(shakes.size()));
  const ScalarType dtype = boxes.scalar_type();
  const std::vector<int64_t> box_sizes{count, bag, 4}, sizes{count, bag}, none{0};
  Tensor bags = new_cuda_output(boxes, box_sizes, dtype);
  Tensor valid = new_cuda_output(boxes, sizes, ScalarType::Bool);
  Tensor rois = new_cuda_output(boxes, want_rois ? std::vector<int64_t>{count * bag, 5} : none, dtype);
  Tensor iof = new_cuda_output(boxes, want_iof ? sizes : none, dtype);
  Tensor iou = new_cuda_output(boxes, want_iou ? sizes : none, dtype);
  Tensor targets = new_cuda_output(boxes, want_targets ? box_sizes : none, dtype);
  Tensor clipped = new_cuda_output(boxes, want_clipped ? box_sizes : none, dtype);
  if (count * bag == 0) {
    return {bags, valid, rois, iof, iou, targets, clipped};
  }
  with_compute_type(boxes, [&](auto t) {
    using T = decltype(t);
    const auto scale = [&](int k) { return want_targets ? static_cast<T>(targets_std[k]) : T(1); };
    const Problem<T> p{
        make_box_set<T>(boxes),
        make_image_rows<T>(image_index, offsets, image_hw),
        make_factors<T>(ratios),
        make_factors<T>(shakes),
        bag,
        static_cast<T>(iof_threshold),
        {scale(0), scale(2)},
        {scale(1), scale(3)},
        {static_cast<T*>(bags.data_ptr()), static_cast<bool*>(valid.data_ptr()), data_or_null<T>(want_rois, rois),
         data_or_null<T>(want_iof, iof), data_or_null<T>(want_iou, iou), data_or_null<T>(want_targets, targets),
         data_or_null<T>(want_clipped, clipped)}};
    bag_kernel<<<grid_blocks(count * bag, kThreads), kThreads, 0, device.stream()>>>(p);
  });
  check_launch("neighborhood_boxes");
  return {bags, valid, rois, iof, iou, targets, clipped};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("neighborhood_boxes", TORCH_BOX(&neighborhood_boxes)); }

}  // namespace
}  // namespace ssod
