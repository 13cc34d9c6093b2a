// Several queries for each target: a block per layer and target claims, then a thread per query settles.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "assign_input.h"
#include "cuda/block_team.cuh"
#include "cuda/common.cuh"

namespace ssod {
namespace {

constexpr int kThreads = 256;
// What is left of the shared memory that a block may have without asking for more.
constexpr int64_t kUnasked = (48 << 10) - sizeof(BlockExchange<kThreads>);

// The same if it asks.
int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return std::max<int64_t>(kUnasked, bytes - 1024);  // what the runtime and the exchange of the team take
}

static_assert(sizeof(BlockExchange<kThreads>) <= 1024);

using Team = BlockTeam<kThreads>;

// Where a block keeps its merits and chosen queries: shared memory, or a slice of global memory where they do not fit.
struct Scratch {
  float* global;  // or null
  int64_t queries, capacity;

  int64_t floats() const { return queries + capacity; }

  __device__ AssignWorkspace of(float* shared, int64_t block) const {
    float* merits = global ? global + block * (queries + capacity) : shared;
    return {merits, reinterpret_cast<int32_t*>(merits + queries)};
  }
};

// The image that owns a row, or -1.
__device__ int64_t image_of(const RowRanges& rows, int64_t row) {
  if (!rows.offsets) {
    const int64_t width = rows.rows / rows.batch, image = row / width;
    return image < rows.batch && row - image * width < rows.of(image).size ? image : -1;
  }
  int64_t low = 0, high = rows.batch;  // the last image whose offset is <= row lies in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (rows.offsets[middle] <= row ? low : high) = middle;
  }
  const RowRange range = rows.of(low);
  return row >= range.begin && row < range.begin + range.size ? low : -1;
}

struct AtomicClaim {
  unsigned long long* winner;
  uint32_t* claims;  // or null
  const AssignOptions* options;
  int64_t row;

  __device__ void operator()(int64_t q, const PairValue& v) const {
    atomicMax(winner + q, pack_claim(contest_of(v, *options), row));
    if (claims) {
      atomicAdd(claims + q, 1u);
    }
  }
};

// Sums over the classes of a query, by a warp; marks queries that no target of the image admits.
template <AssignRule rule>
__global__ void __launch_bounds__(kThreads) background_kernel(const AssignInput in, float* __restrict__ background) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (i >= in.layers * in.rows.batch * in.queries) {
    return;  // whole warps
  }
  const int lane = threadIdx.x % 32;
  const int64_t q = i % in.queries, image = i / in.queries % in.rows.batch;
  const QueryView view = in.view(i / in.queries / in.rows.batch, image);
  const Prior prior = load_prior(view, q);
  const RowRange range = in.rows.of(image);
  bool admitted = false;
  for (int64_t row = range.begin + lane; row < range.begin + range.size; row += 32) {
    admitted = admitted || (in.usable(row) && admits<rule>(in.target(row), prior));
  }
  if (!__any_sync(0xffffffffu, admitted)) {
    if (lane == 0) {
      background[i] = no_background();
    }
    return;
  }
  float sum = 0.0f;
  for (int64_t c = lane; c < in.classes; c += 32) {
    sum += class_background<rule>(view.score(q, c), in.options.from_logits);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  if (lane == 0) {
    background[i] = sum;
  }
}

template <AssignRule rule>
__global__ void __launch_bounds__(kThreads, 1)
    claim_kernel(const AssignInput in, const AssignState state, const Scratch scratch) {
  extern __shared__ float shared[];
  __shared__ BlockExchange<kThreads> exchange;
  const int64_t layer = blockIdx.x / in.rows.rows, row = blockIdx.x % in.rows.rows;
  const int64_t image = image_of(in.rows, row);
  if (threadIdx.x == 0) {
    state.count[blockIdx.x] = 0;
    state.most_metric[blockIdx.x] = state.most_iou[blockIdx.x] = 0;
  }
  if (image < 0) {
    return;
  }
  Team team(exchange);
  const int64_t first = (layer * in.rows.batch + image) * in.queries;
  claim_queries<rule>(
      team, in, state, layer, image, row, scratch.of(shared, blockIdx.x),
      AtomicClaim{state.winner + first, state.claims ? state.claims + first : nullptr, &in.options, row});
}

__device__ void count_query(const AssignState& state, int64_t t, float metric, float iou, bool weighs) {
  atomicAdd(state.count + t, 1);
  if (weighs) {  // metric and overlap are at least 0, so that their bits are in order
    atomicMax(state.most_metric + t, bits_as<uint32_t>(metric));
    atomicMax(state.most_iou + t, bits_as<uint32_t>(iou));
  }
}

template <AssignRule rule>
__global__ void __launch_bounds__(kThreads, 1) settle_kernel(const AssignInput in, const AssignState state) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= in.layers * in.rows.batch * in.queries) {
    return;
  }
  const int64_t layer = i / in.queries / in.rows.batch;
  const int64_t row = settle_query<rule>(in, state, layer, i / in.queries % in.rows.batch, i % in.queries);
  if (row >= 0 && in.options.final_topk == 0) {
    count_query(state, layer * in.rows.rows + row, state.metric[i], state.iou[i], is_aligned(rule));
  }
}

template <AssignRule rule>
__global__ void __launch_bounds__(kThreads, 1)
    trim_kernel(const AssignInput in, const AssignState state, const Scratch scratch) {
  extern __shared__ float shared[];
  __shared__ BlockExchange<kThreads> exchange;
  const int64_t row = blockIdx.x % in.rows.rows, image = image_of(in.rows, row);
  if (image < 0) {
    return;
  }
  Team team(exchange);
  trim_target<rule>(team, in, state, blockIdx.x / in.rows.rows, image, row, scratch.of(shared, blockIdx.x).merits);
}

template <AssignRule rule>
__global__ void __launch_bounds__(kThreads, 1) rescue_kernel(const AssignInput in, const AssignState state) {
  __shared__ BlockExchange<kThreads> exchange;
  Team team(exchange);
  rescue_targets<rule>(team, in, state, blockIdx.x / in.rows.batch, blockIdx.x % in.rows.batch);
}

template <AssignRule rule>
__global__ void __launch_bounds__(kThreads) weigh_kernel(const AssignInput in, const AssignState state) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < in.layers * in.rows.batch * in.queries) {
    weigh_query<rule>(in, state, i / in.queries / in.rows.batch, i);
  }
}

// Lets blocks of a kernel have so much shared memory.
void ask_for(const void* kernel, size_t bytes) {
  if (static_cast<int64_t>(bytes) > kUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

// Runs the steps of csrc/one_to_many_team.h, a launch each.
template <AssignRule rule>
void launch(const AssignInput& in, const AssignState& state, const Scratch& scratch, float* background,
            cudaStream_t stream) {
  const int64_t queries = in.layers * in.rows.batch * in.queries;
  const auto targets = static_cast<unsigned>(in.layers * in.rows.rows);
  const auto images = static_cast<unsigned>(in.layers * in.rows.batch);
  const size_t bytes = scratch.global ? 0 : scratch.floats() * sizeof(float);
  if constexpr (is_cost(rule)) {
    background_kernel<rule><<<blocks_for(32 * queries), kThreads, 0, stream>>>(in, background);
  }
  if (targets > 0) {
    ask_for(reinterpret_cast<const void*>(claim_kernel<rule>), bytes);
    claim_kernel<rule><<<targets, kThreads, bytes, stream>>>(in, state, scratch);
  }
  settle_kernel<rule><<<blocks_for(queries), kThreads, 0, stream>>>(in, state);
  if (targets > 0 && in.options.final_topk > 0) {
    ask_for(reinterpret_cast<const void*>(trim_kernel<rule>), bytes);
    trim_kernel<rule><<<targets, kThreads, bytes, stream>>>(in, state, scratch);
  }
  if (targets > 0 && in.options.keep_one) {
    rescue_kernel<rule><<<images, kThreads, 0, stream>>>(in, state);
  }
  weigh_kernel<rule><<<blocks_for(queries), kThreads, 0, stream>>>(in, state);
  check_launch("one_to_many_assign");
}

// Memory that the steps share: 8 bytes per query for the winners and 4 for their claims, starting as 0; then the
// largest metric and overlap of each target, backgrounds, and the teams' scratch.
struct SharedMemory {
  int64_t zeroed, largest, background, scratch;  // bytes

  int64_t total() const { return zeroed + largest + background + scratch; }
};

SharedMemory layout(const AssignInput& in, const Scratch& scratch) {
  const int64_t queries = in.layers * in.rows.batch * in.queries, targets = in.layers * in.rows.rows;
  return {queries * (in.options.any_target ? 12 : 8), targets * 8, is_cost(in.options.rule) ? queries * 4 : 0,
          scratch.floats() * 4 > shared_memory_limit() ? targets * scratch.floats() * 4 : 0};
}

void run(const AssignInput& in, AssignState state, const Tensor& like, cudaStream_t stream) {
  const int64_t queries = in.layers * in.rows.batch * in.queries, targets = in.layers * in.rows.rows;
  Scratch scratch{nullptr, in.queries, chosen_capacity(in.options, in.queries)};
  const SharedMemory memory = layout(in, scratch);
  Tensor holder = new_cuda_output(like, {memory.total()}, ScalarType::Byte);
  auto* bytes = static_cast<char*>(holder.data_ptr());
  cudaMemsetAsync(bytes, 0, memory.zeroed, stream);
  state.winner = reinterpret_cast<unsigned long long*>(bytes);
  state.claims = in.options.any_target ? reinterpret_cast<uint32_t*>(bytes + queries * 8) : nullptr;
  bytes += memory.zeroed;
  state.most_metric = reinterpret_cast<uint32_t*>(bytes);
  state.most_iou = state.most_metric + targets;
  bytes += memory.largest;
  float* background = memory.background ? reinterpret_cast<float*>(bytes) : nullptr;
  state.background = background;
  bytes += memory.background;
  scratch.global = memory.scratch ? reinterpret_cast<float*>(bytes) : nullptr;
  with_assign_rule(in.options.rule,
                   [&](auto rule) { launch<decltype(rule)::value>(in, state, scratch, background, stream); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> one_to_many_assign(
    std::optional<Tensor> scores, Tensor boxes, Tensor labels, Tensor target_boxes, std::optional<Tensor> offsets,
    std::optional<Tensor> counts, std::optional<Tensor> priors, std::optional<Tensor> image_hw,
    std::vector<int64_t> levels, int64_t batch, int64_t rule, bool from_logits, int64_t fmt, int64_t topk,
    int64_t final_topk, double alpha, double beta, double eps, double min_side, bool dynamic_k, int64_t conflict,
    bool keep_one) {
  const DeviceScope device(boxes);
  const auto lead = first_sizes(boxes, 3);
  Tensor target = new_cuda_output(boxes, lead, ScalarType::Long),
         count = new_cuda_output(boxes, {lead[0], labels.size(0)}, ScalarType::Int);
  Tensor metric = new_cuda_output(boxes, lead, ScalarType::Float),
         iou = new_cuda_output(boxes, lead, ScalarType::Float),
         weight = new_cuda_output(boxes, lead, ScalarType::Float);
  const AssignOptions options = make_assign_options(levels, lead[2], rule, from_logits, fmt, topk, final_topk, alpha,
                                                    beta, eps, min_side, dynamic_k, conflict, keep_one);
  const AssignInput in =
      make_assign_input(scores, boxes, labels, target_boxes, offsets, counts, priors, image_hw, batch, options);
  AssignState state{};
  state.target = static_cast<int64_t*>(target.data_ptr());
  state.metric = static_cast<float*>(metric.data_ptr());
  state.iou = static_cast<float*>(iou.data_ptr());
  state.weight = static_cast<float*>(weight.data_ptr());
  state.count = static_cast<int32_t*>(count.data_ptr());
  if (target.numel() > 0) {
    run(in, state, boxes, device.stream());
  } else if (count.numel() > 0) {
    cudaMemsetAsync(state.count, 0, count.numel() * sizeof(int32_t), device.stream());
  }
  return {target, metric, iou, weight, count};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("one_to_many_assign", TORCH_BOX(&one_to_many_assign)); }

}  // namespace
}  // namespace ssod
