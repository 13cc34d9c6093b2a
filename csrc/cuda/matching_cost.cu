// The matching cost: a block takes a tile of queries of one layer and image through tiles of its targets. Threads are
// queries, so that rows are stored in order.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "cuda/boxes.cuh"
#include "matching_cost.h"
#include "predictions.h"

namespace ssod {
namespace {

constexpr int kWarp = 32;
constexpr int kQueries = 64;  // per block
constexpr int kThreads = 128;
constexpr int kMaxTargets = 64;  // per tile
constexpr int64_t kMaxGridY = 65535;
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
struct Task {
  CostRule<T> rule;
  PredictionView logits, boxes;
  RowRanges ranges;
  const int64_t* labels;  // [G]
  const T* target_boxes;  // [G, 4]
  const T* image_hw;      // [B, 2] or null
  const T* extra;         // [L, G, Q] or null
  int64_t extra_layer, extra_row;
  int64_t layers, queries;
  int tile;  // targets per tile
  T* cost;
  int64_t* keys;  // null where they are not wanted here
};

// What a block shares: the targets of a tile and the class terms of their distinct labels. A row of `terms` has one
// element more than there are queries, so that neither a column nor a row of it meets one bank twice.
template <typename T>
struct Shared {
  Box<T> box[kMaxTargets];
  L1Box<T> l1[kMaxTargets];
  int64_t label[kMaxTargets];
  int slot[kMaxTargets];          // of its label among the distinct ones
  int64_t distinct[kMaxTargets];  // their labels
  int count;
  T terms[kMaxTargets][kQueries + 1];
  T maximum[kQueries], sum[kQueries];  // of mode "softmax"
};

// One logit in the compute type.
template <typename T>
__device__ __forceinline__ T load_logit(const PredictionView& view, int64_t i) {
  switch (view.dtype) {
    case ScalarType::Half:
      return static_cast<T>(static_cast<float>(static_cast<const c10::Half*>(view.data)[i]));
    case ScalarType::BFloat16:
      return static_cast<T>(static_cast<float>(static_cast<const c10::BFloat16*>(view.data)[i]));
    case ScalarType::Double:
      return static_cast<T>(static_cast<const double*>(view.data)[i]);
    default:
      return static_cast<T>(static_cast<const float*>(view.data)[i]);
  }
}

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

// Softmax statistics of the block's queries, a warp per query.
template <typename T>
__device__ void read_softmax(const Task<T>& task, int64_t first_logit, int queries, Shared<T>& shared) {
  const int lane = threadIdx.x % kWarp;
  for (int q = threadIdx.x / kWarp; q < queries; q += kThreads / kWarp) {
    const int64_t row = first_logit + q * task.logits.query;
    T top = minus_infinity<T>();
    for (int64_t c = lane; c < task.logits.width; c += kWarp) {
      top = upper(load_logit<T>(task.logits, row + c), top);
    }
    top = warp_maximum(top);
    T sum = T(0);
    for (int64_t c = lane; c < task.logits.width; c += kWarp) {
      sum += exp_down(load_logit<T>(task.logits, row + c) - top);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      shared.maximum[q] = top;
      shared.sum[q] = sum;
    }
  }
}

// Loads targets [row, row + count) and numbers their distinct labels in order of appearance.
template <typename T>
__device__ void read_targets(const Task<T>& task, int64_t row, int count, T w, T h, Shared<T>& shared) {
  const int t = threadIdx.x;
  if (t < count) {
    const T* box = task.target_boxes + 4 * (row + t);
    shared.box[t] = make_box(box[0], box[1], box[2], box[3], task.rule.format, task.rule.zero);
    shared.l1[t] = {box[0] / w, box[1] / h, box[2] / w, box[3] / h};
    shared.label[t] = task.labels[row + t];
  }
  if (t == 0) {
    shared.count = 0;
  }
  __syncthreads();
  int first = t;
  if (t < count) {
    for (first = 0; shared.label[first] != shared.label[t];) {
      ++first;
    }
    if (first == t) {
      const int slot = atomicAdd(&shared.count, 1);
      shared.slot[t] = slot;
      shared.distinct[slot] = shared.label[t];
    }
  }
  __syncthreads();
  if (first < t) {
    shared.slot[t] = shared.slot[first];
  }
}

template <typename T>
__device__ __forceinline__ T focal_term(T x, const CostRule<T>& rule) {
  if (rule.class_mode == ClassMode::focal) {
    return rule.square ? focal_cost<ClassMode::focal, true>(x, rule) : focal_cost<ClassMode::focal, false>(x, rule);
  }
  return rule.square ? focal_cost<ClassMode::focal_logits, true>(x, rule)
                     : focal_cost<ClassMode::focal_logits, false>(x, rule);
}

template <typename T>
__device__ __forceinline__ T class_term(T x, const CostRule<T>& rule, T maximum, T sum) {
  switch (rule.class_mode) {
    case ClassMode::softmax:
      return softmax_cost(x, maximum, sum);
    case ClassMode::prob:
      return -x;
    default:
      return focal_term(x, rule);
  }
}

// Weighted class terms of the distinct labels. Neighbouring threads take the labels of one query: its logits are
// fetched together.
template <typename T>
__device__ void compute_terms(const Task<T>& task, int64_t first_logit, int queries, Shared<T>& shared) {
  const int count = shared.count;
  const int step_q = kThreads / count, step_u = kThreads % count;
  for (int q = threadIdx.x / count, u = threadIdx.x % count; q < queries;) {
    const int64_t label = shared.distinct[u];
    const bool inside = label >= 0 && label < task.logits.width;
    const int64_t place = first_logit + q * task.logits.query + label;
    const T x = inside ? load_logit<T>(task.logits, place) : static_cast<T>(NAN);
    shared.terms[u][q] = task.rule.w_class * class_term(x, task.rule, shared.maximum[q], shared.sum[q]);
    q += step_q;
    u += step_u;
    if (u >= count) {
      u -= count;
      ++q;
    }
  }
}

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

// Offers 32 neighbouring costs, the first of them at `query`, to the key of their row. An invalid one is lower than
// every number.
__device__ __forceinline__ void offer(float cost, bool real, int64_t query, int64_t* key) {
  const int order = !real ? INT32_MAX : (is_valid_cost(cost) ? orderable(cost) : INT32_MIN);
  const int least = warp_minimum(order);
  const unsigned holders = __ballot_sync(kAll, order == least);
  if (threadIdx.x % kWarp == 0 && least != INT32_MAX) {
    const int64_t candidate = least == INT32_MIN ? kUnknownKey : row_key(least, query + __ffs(holders) - 1);
    atomicMin(reinterpret_cast<long long*>(key), static_cast<long long>(candidate));
  }
}

// One query, as its thread holds it.
template <typename T>
struct Query {
  int64_t index;
  bool real;  // false behind the last one
  Box<T> box;
  L1Box<T> l1;
};

template <typename T>
__device__ __forceinline__ Query<T> read_query(const Task<T>& task, int64_t layer, int64_t image, int64_t index, T w,
                                               T h) {
  const bool real = index < task.queries;
  const T* box = static_cast<const T*>(task.boxes.data) + task.boxes.offset(layer, image, real ? index : 0);
  return {index,
          real,
          make_box(box[0], box[1], box[2], box[3], task.rule.format, task.rule.zero),
          {box[0] / w, box[1] / h, box[2] / w, box[3] / h}};
}

// Costs of the tile's targets, which are the rows [row, row + count) of the layer.
template <bool zero, typename T>
__device__ void write_tile(const Task<T>& task, int64_t layer, int64_t row, int count, const Query<T>& query,
                           const Shared<T>& shared) {
  const bool classes = task.rule.class_mode != ClassMode::none;
  for (int t = threadIdx.x / kQueries; t < count; t += kThreads / kQueries) {
    const T term = classes ? shared.terms[shared.slot[t]][threadIdx.x % kQueries] : T(0);
    T cost = pair_cost<zero>(query.box, query.l1, shared.box[t], shared.l1[t], term, task.rule);
    const int64_t place = layer * task.ranges.rows + row + t;
    if (query.real) {
      if (task.extra) {
        cost += task.extra[layer * task.extra_layer + (row + t) * task.extra_row + query.index];
      }
      task.cost[place * task.queries + query.index] = cost;
    }
    if constexpr (sizeof(T) == 4) {
      if (task.keys) {
        offer(cost, query.real, query.index - threadIdx.x % kWarp, task.keys + place);
      }
    }
  }
}

// Rows that belong to no image, at the block's queries.
template <typename T>
__device__ void fill_gap(const Task<T>& task, int64_t layer, const RowRange& gap, int64_t query) {
  for (int64_t r = threadIdx.x / kQueries; r < gap.size; r += kThreads / kQueries) {
    const int64_t place = layer * task.ranges.rows + gap.begin + r;
    if (query < task.queries) {
      task.cost[place * task.queries + query] = -minus_infinity<T>();
    }
    if (task.keys && query == 0) {
      task.keys[place] = kUnknownKey;
    }
  }
}

template <bool zero, typename T>
__device__ void solve(const Task<T>& task, int64_t layer, int64_t image, Shared<T>& shared) {
  const int64_t query0 = int64_t{blockIdx.x} * kQueries, index = query0 + threadIdx.x % kQueries;
  const T h = task.image_hw ? task.image_hw[2 * image] : T(1), w = task.image_hw ? task.image_hw[2 * image + 1] : T(1);
  const Query<T> query = read_query(task, layer, image, index, w, h);
  const RowRange range = task.ranges.of(image);
  const int queries = static_cast<int>(task.queries - query0 < kQueries ? task.queries - query0 : kQueries);
  const int64_t logits = task.logits.offset(layer, image, query0);
  if (task.rule.class_mode == ClassMode::softmax && range.size > 0) {
    read_softmax(task, logits, queries, shared);
  }
  for (int64_t t = int64_t{blockIdx.z} * task.tile; t < range.size; t += int64_t{gridDim.z} * task.tile) {
    const int count = static_cast<int>(range.size - t < task.tile ? range.size - t : task.tile);
    read_targets(task, range.begin + t, count, w, h, shared);
    __syncthreads();
    if (task.rule.class_mode != ClassMode::none) {
      compute_terms(task, logits, queries, shared);
      __syncthreads();
    }
    write_tile<zero>(task, layer, range.begin + t, count, query, shared);
    __syncthreads();  // before the next tile
  }
  if (blockIdx.z == 0) {
    fill_gap(task, layer, gap_before(task.ranges, image), index);
    fill_gap(task, layer, gap_behind(task.ranges, image), index);
  }
}

template <bool zero, typename T>
__global__ void __launch_bounds__(kThreads, 1) cost_kernel(const Task<T> task) {
  __shared__ Shared<T> shared;
  const int64_t batch = task.ranges.batch, problems = task.layers * batch;
  for (int64_t problem = blockIdx.y; problem < problems; problem += gridDim.y) {
    solve<zero>(task, problem / batch, problem % batch, shared);
    __syncthreads();
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
int targets_per_tile(int64_t blocks) { return blocks >= 512 ? kMaxTargets : (blocks >= 128 ? 32 : 16); }

template <typename T>
void launch(Task<T> task, cudaStream_t stream) {
  const int64_t problems = task.layers * task.ranges.batch, tiles = ceil_div(task.queries, kQueries);
  task.tile = targets_per_tile(problems * tiles);
  const int64_t mean = ceil_div(task.ranges.rows, task.ranges.batch);
  const int64_t splits = task.tile == kMaxTargets ? 1 : std::clamp<int64_t>(ceil_div(mean, task.tile), 1, 64);
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
                 kMaxTargets,
                 static_cast<T*>(cost.data_ptr()),
                 nullptr};
    run(task, cost, keys, device.stream());
  });
  return {cost, keys};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("matching_cost", TORCH_BOX(&matching_cost)); }

}  // namespace
}  // namespace ssod
