// The matching cost: a block takes a tile of queries of one layer and image through tiles of its targets
// (csrc/matching_cost_tile.h).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/block_team.cuh"
#include "cuda/boxes.cuh"
#include "matching_cost_tile.h"
#include "predictions.h"

namespace ssod {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
using Task = CostTask<T, PredictionView>;
template <typename T>
using Tile = CostTile<T, 64, 64>;

template <typename T>
__device__ __forceinline__ T warp_maximum(T x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = upper(__shfl_xor_sync(kAll, x, distance), x);
  }
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAll, x, distance);
  }
  return x;
}

// Softmax statistics of the tile's queries, a warp per query.
struct ReadSoftmax {
  template <typename Team, typename T>
  __device__ void operator()(Team& team, const Task<T>& task, const CostPlace& place, Tile<T>& tile) const {
    const PredictionView& logits = task.logits;
    const int lane = team.rank() % kWarp;
    for (int q = team.rank() / kWarp; q < Tile<T>::kQueries && place.query0 + q < task.queries;
         q += team.size() / kWarp) {
      const int64_t row = logits.offset(place.layer, place.image, place.query0 + q);
      T top = minus_infinity<T>();
      for (int64_t c = lane; c < logits.width; c += kWarp) {
        top = upper(logits.load<T>(row + c), top);
      }
      top = warp_maximum(top);
      T sum = T(0);
      for (int64_t c = lane; c < logits.width; c += kWarp) {
        sum += exp_down(logits.load<T>(row + c) - top);
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        tile.maximum[q] = top;
        tile.sum[q] = sum;
      }
    }
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ int warp_minimum(int x) { return __reduce_min_sync(kAll, x); }
#else
__device__ __forceinline__ int warp_minimum(int x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = min(x, __shfl_xor_sync(kAll, x, distance));
  }
  return x;
}
#endif

// Takes the costs of 32 neighbouring queries to the key of their row. An invalid one is lower than every number.
struct OfferKeys {
  __device__ void operator()(float cost, const CostQuery<float>& query, int64_t* key) const {
    const int order = !query.real ? INT32_MAX : (is_valid_cost(cost) ? orderable(cost) : INT32_MIN);
    const int least = warp_minimum(order);
    const unsigned holders = __ballot_sync(kAll, order == least);
    const int lane = threadIdx.x % kWarp;
    if (lane == 0 && least != INT32_MAX) {
      const int64_t found = least == INT32_MIN ? kUnknownKey : row_key(least, query.index + __ffs(holders) - 1);
      atomicMin(reinterpret_cast<long long*>(key), static_cast<long long>(found));
    }
  }

  __device__ void operator()(double, const CostQuery<double>&, int64_t*) const {}  // row_keys_kernel does it
};

// Eight blocks fit a multiprocessor with 64 registers per thread, which is what the kernel needs without spilling.
template <bool zero, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 8 : 4) cost_kernel(const Task<T> task) {
  __shared__ Tile<T> tile;
  __shared__ BlockExchange<kThreads> exchange;
  BlockTeam<kThreads> team(exchange);
  const int64_t batch = task.ranges.batch, problems = task.layers * batch;
  for (int64_t problem = blockIdx.y; problem < problems; problem += gridDim.y) {
    const CostPlace place{problem / batch, problem % batch, int64_t{blockIdx.x} * Tile<T>::kQueries, blockIdx.z,
                          gridDim.z};
    fill_cost_tile<zero>(team, task, place, tile, ReadSoftmax{}, OfferKeys{});
  }
}

__global__ void fill_keys_kernel(int64_t* keys, int64_t count, int64_t value) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    keys[i] = value;
  }
}

// The best of a row so far: its smallest entry and the lowest query that holds it.
template <typename T>
struct Least {
  T value;
  int64_t query;

  __device__ __forceinline__ void offer(T v, int64_t q) {
    if (v < value || (v == value && q < query)) {
      value = v;
      query = q;
    }
  }
};

// Keys of costs whose keys are too wide for one atomic operation: a warp per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_keys_kernel(const T* cost, int64_t rows, int64_t queries, int64_t* keys) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; row < rows;
       row += int64_t{gridDim.x} * kWarps) {
    Least<T> least{-minus_infinity<T>(), INT64_MAX};
    bool valid = true;
    for (int64_t q = lane; q < queries; q += kWarp) {
      const T value = cost[row * queries + q];
      valid = valid && is_valid_cost(value);
      least.offer(value, q);
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const T value = __shfl_xor_sync(kAll, least.value, distance);
      least.offer(value, __shfl_xor_sync(kAll, least.query, distance));
    }
    valid = __all_sync(kAll, valid);
    if (lane == 0) {
      keys[row] = valid ? row_key(orderable(static_cast<float>(least.value)), least.query) : kUnknownKey;
    }
  }
}

void fill_keys(Tensor& keys, int64_t value, cudaStream_t stream) {
  const int64_t count = keys.numel();
  if (count > 0) {
    fill_keys_kernel<<<grid_blocks(count, kThreads), kThreads, 0, stream>>>(static_cast<int64_t*>(keys.data_ptr()),
                                                                            count, value);
    check_launch("matching_cost");
  }
}

// Small tiles of targets where there are too few tiles of queries to fill a GPU; large ones share more class terms.
int targets_per_tile(int64_t blocks) { return blocks >= 512 ? Tile<float>::kTargets : (blocks >= 128 ? 32 : 16); }

template <typename T>
void launch(Task<T> task, cudaStream_t stream) {
  const int64_t problems = task.layers * task.ranges.batch, tiles = ceil_div(task.queries, Tile<T>::kQueries);
  task.tile = targets_per_tile(problems * tiles);
  const int64_t mean = ceil_div(task.ranges.rows, task.ranges.batch);
  const int64_t splits = task.tile == Tile<float>::kTargets ? 1 : std::clamp<int64_t>(ceil_div(mean, task.tile), 1, 64);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(problems, kMaxGridY)),
                  static_cast<unsigned>(splits));
  task.rule.zero ? cost_kernel<true><<<grid, kThreads, 0, stream>>>(task)
                 : cost_kernel<false><<<grid, kThreads, 0, stream>>>(task);
  check_launch("matching_cost");
}

template <typename T>
void run(Task<T>& task, Tensor& cost, Tensor& keys, cudaStream_t stream) {
  const int64_t rows = task.layers * task.ranges.rows;
  int64_t* const data = keys.numel() > 0 ? static_cast<int64_t*>(keys.data_ptr()) : nullptr;
  if (cost.numel() == 0 || task.ranges.batch == 0) {
    torch::stable::fill_(cost, static_cast<double>(INFINITY));
    return fill_keys(keys, kUnknownKey, stream);
  }
  if constexpr (sizeof(T) == 4) {
    task.keys = data;
    fill_keys(keys, INT64_MAX, stream);
    launch(task, stream);
  } else {
    launch(task, stream);
    if (data) {
      row_keys_kernel<<<grid_blocks(rows, kThreads / kWarp), kThreads, 0, stream>>>(task.cost, rows, task.queries,
                                                                                    data);
      check_launch("matching_cost");
    }
  }
}

std::tuple<Tensor, Tensor> matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes,
                                         std::optional<Tensor> offsets, std::optional<Tensor> counts,
                                         std::optional<Tensor> image_hw, std::optional<Tensor> extra_cost,
                                         int64_t batch, int64_t class_mode, double alpha, double gamma, double eps,
                                         double w_class, double w_box, double w_giou, int64_t fmt, int64_t eps_mode,
                                         double giou_eps, bool row_min) {
  const DeviceScope device(boxes);
  const int64_t layers = boxes.size(0), queries = boxes.size(2), rows = labels.size(0);
  Tensor cost = new_cuda_output(boxes, {layers, rows, queries}, boxes.scalar_type());
  Tensor keys =
      new_cuda_output(boxes, row_min ? std::vector<int64_t>{layers, rows} : std::vector<int64_t>{0}, ScalarType::Long);
  with_compute_type(boxes, [&](auto t) {
    using T = decltype(t);
    const auto data = [](const std::optional<Tensor>& x) { return x ? static_cast<const T*>(x->data_ptr()) : nullptr; };
    Task<T> task{make_cost_rule<T>(class_mode, alpha, gamma, eps, w_class, w_box, w_giou, fmt, eps_mode, giou_eps),
                 make_prediction_view(logits),
                 make_prediction_view(boxes),
                 make_row_ranges(offsets, counts, batch, rows),
                 static_cast<const int64_t*>(labels.data_ptr()),
                 static_cast<const T*>(target_boxes.data_ptr()),
                 data(image_hw),
                 data(extra_cost),
                 extra_cost ? extra_cost->stride(0) : 0,
                 extra_cost ? extra_cost->stride(1) : 0,
                 layers,
                 queries,
                 Tile<float>::kTargets,
                 static_cast<T*>(cost.data_ptr()),
                 nullptr};
    run(task, cost, keys, device.stream());
  });
  return {cost, keys};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("matching_cost", TORCH_BOX(&matching_cost)); }

}  // namespace
}  // namespace ssod
