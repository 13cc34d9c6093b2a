// Class-aware non-maximum suppression: the scores of all images are sorted at once, then one block sweeps each image.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "cuda/block_team.cuh"
#include "cuda/common.cuh"
#include "nms.h"

namespace ssod {
namespace {

constexpr int kThreads = kNmsTile * kNmsParts;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Scores by which to sort: -inf for boxes that take no part, and one zero instead of two.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    keys_kernel(const T* __restrict__ boxes, const T* __restrict__ scores, const int64_t* __restrict__ counts,
                int64_t rows, int64_t n, T score_threshold, T* __restrict__ keys) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows; i += step) {
    const bool real = !counts || i % n < counts[i / n];
    const bool takes_part = real && scores[i] > score_threshold && is_finite_box(boxes + 4 * i);
    keys[i] = takes_part ? scores[i] + T(0) : -static_cast<T>(INFINITY);
  }
}

// Pointers to the first image of a batch, and the number of images.
template <typename T>
struct Batch {
  NmsImage<T> first;
  int64_t* count;
  int64_t images;

  __device__ NmsImage<T> image(int64_t b) const {
    NmsImage<T> image = first;
    image.boxes += 4 * b * image.n;
    image.labels += b * image.n;
    image.scores += b * image.n;
    image.order += b * image.n;
    image.kept += b * image.most;
    image.kept_labels += b * image.most;
    image.index += b * image.most;
    return image;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(const Batch<T> batch) {
  __shared__ NmsTileState<T> tile;
  __shared__ BlockExchange<kThreads> exchange;
  BlockTeam<kThreads> team(exchange);
  for (int64_t b = blockIdx.x; b < batch.images; b += gridDim.x) {
    const int64_t kept = nms_sweep(team, batch.image(b), tile);
    if (team.rank() == 0) {
      batch.count[b] = kept;
    }
    team.sync();
  }
}

// torch.sort(keys, dim=1, descending=True, stable=True)
std::tuple<Tensor, Tensor> sort_descending(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{1}), from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

template <typename T>
void run(const Tensor& boxes, const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& counts,
         double iou_threshold, double score_threshold, const Tensor& index, const Tensor& count,
         const DeviceScope& device) {
  const int64_t images = scores.size(0), n = scores.size(1), most = index.size(1), rows = images * n;
  const Tensor keys = new_cuda_output(scores, {images, n}, scores.scalar_type());
  keys_kernel<<<grid_blocks(rows, kThreads), kThreads, 0, device.stream()>>>(
      data<const T>(boxes), data<const T>(scores), counts ? data<const int64_t>(*counts) : nullptr, rows, n,
      static_cast<T>(score_threshold), data<T>(keys));
  check_launch("batched_nms");
  const auto [sorted, order] = sort_descending(keys);
  const Tensor kept = new_cuda_output(scores, {images, most, 5}, scores.scalar_type());
  const Tensor kept_labels = new_cuda_output(labels, {images, most}, ScalarType::Long);
  const NmsImage<T> first{data<const T>(boxes),
                          data<const int64_t>(labels),
                          data<const T>(sorted),
                          data<const int64_t>(order),
                          n,
                          reinterpret_cast<NmsBox<T>*>(kept.data_ptr()),
                          data<int64_t>(kept_labels),
                          data<int64_t>(index),
                          most,
                          threshold_in<T>(iou_threshold)};
  sweep_kernel<<<grid_blocks(images, 1), kThreads, 0, device.stream()>>>(Batch<T>{first, data<int64_t>(count), images});
  check_launch("batched_nms");
}

std::tuple<Tensor, Tensor> batched_nms(Tensor boxes, Tensor scores, Tensor labels, std::optional<Tensor> counts,
                                       double iou_threshold, double score_threshold, int64_t max_keep) {
  const DeviceScope device(boxes);
  const int64_t images = scores.size(0), n = scores.size(1);
  Tensor index = new_cuda_output(labels, {images, std::min(max_keep, n)}, ScalarType::Long);
  Tensor count = new_cuda_output(labels, {images}, ScalarType::Long);
  if (index.numel() == 0) {
    return {index, torch::stable::zero_(count)};
  }
  const auto go = scores.scalar_type() == ScalarType::Double ? run<double> : run<float>;
  go(boxes, scores, labels, counts, iou_threshold, score_threshold, index, count, device);
  return {index, count};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("batched_nms", TORCH_BOX(&batched_nms)); }

}  // namespace
}  // namespace ssod
