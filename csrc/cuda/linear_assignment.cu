// Assignment of all problems of a batch: a block per (layer, group, image), in one launch if the caller knows the
// minima of the rows. The host neither knows how many targets an image has nor waits to learn it.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "assignment.h"
#include "cuda/block_team.cuh"
#include "cuda/common.cuh"
#include "row_ranges.h"

namespace ssod {
namespace {

constexpr int kWarp = 32, kReaders = 256;
constexpr int kThreads = 128;  // of a problem: more take longer to agree on a column
constexpr int64_t kWorkspacePerNode = 48, kWorkspacePerProblem = 64;  // bytes, at least what AssignmentSpace takes

// The lanes of a warp as a team that reads one row.
class WarpTeam {
 public:
  __device__ int rank() const { return static_cast<int>(threadIdx.x % kWarp); }
  __device__ static constexpr int size() { return kWarp; }

  template <typename T, typename Op>
  __device__ T reduce(T value, Op op) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      uint32_t words[sizeof(T) / 4];
      memcpy(words, &value, sizeof(T));
      for (uint32_t& word : words) {
        word = __shfl_xor_sync(0xffffffffu, word, lanes);
      }
      T other;
      memcpy(&other, words, sizeof(T));
      value = op(value, other);
    }
    return value;
  }
};

template <typename T>
struct Batch {
  const T* cost;        // [layers, rows, queries]
  const int64_t* keys;  // [layers, groups, rows]
  RowRanges rows;
  int64_t queries;
  int groups, width, repeats;  // `width` queries per group
  bool interleave, drop_invalid;
  int64_t* query;  // [layers, groups * repeats, rows]
  T* matched;
  uint8_t* status;           // [layers, groups, batch]
  unsigned char* workspace;  // for problems that do not fit into shared memory
  int64_t shared_bytes;

  __device__ bool is_padding(int64_t row) const {
    const int64_t width = rows.rows / rows.batch;
    return rows.counts && row % width >= rows.counts[row / width];
  }
};

// One problem of the batch and where its results go.
template <typename T>
struct Problem {
  AssignmentMatrix<T> matrix;
  const int64_t* keys;
  int64_t first_query, first_out, layer_group;
  RowRange range;

  __device__ Problem(const Batch<T>& b, int64_t index) {
    const int64_t image = index % b.rows.batch;
    layer_group = index / b.rows.batch;
    const int64_t layer = layer_group / b.groups, group = layer_group % b.groups;
    range = b.rows.of(image);
    if (b.workspace && b.rows.overlapped(image)) {
      range.size = 0;  // two problems must not share a place in the workspace
    }
    first_query = group * b.width;
    first_out = layer_group * b.repeats * b.rows.rows;
    const int64_t first_row = layer * b.rows.rows + range.begin;
    matrix = {b.cost + first_row * b.queries + first_query,
              b.queries,
              static_cast<int>(range.size),
              b.width,
              b.repeats,
              b.interleave,
              1.0};
    keys = b.keys + layer_group * b.rows.rows + range.begin;
  }

  // The memory of the problem: shared if it fits.
  __device__ AssignmentSpace space(const Batch<T>& b, int64_t image, void* shared, bool in_memory) const {
    const int rows = matrix.rows(), columns = matrix.columns();
    void* memory = shared;
    if (AssignmentSpace::bytes(rows, columns, in_memory) > b.shared_bytes) {
      const int64_t nodes = b.rows.batch * b.width + b.repeats * b.rows.rows;
      memory = b.workspace + layer_group * (kWorkspacePerNode * nodes + kWorkspacePerProblem * b.rows.batch) +
               kWorkspacePerNode * (image * b.width + b.repeats * range.begin) + kWorkspacePerProblem * image;
    }
    return AssignmentSpace::carve(memory, rows, columns, in_memory);
  }
};

// Keys of all rows, a warp per row: the lowest column of the minimum, or INT64_MIN for a row with an invalid entry.
template <typename T>
__global__ void __launch_bounds__(kReaders) row_keys_kernel(const Batch<T> b, int64_t* keys, int64_t count) {
  const int64_t index = (int64_t{blockIdx.x} * kReaders + threadIdx.x) / kWarp;
  if (index >= count) {
    return;
  }
  const int64_t layer_group = index / b.rows.rows, row = index % b.rows.rows;
  if (b.is_padding(row)) {
    return;
  }
  const int64_t first = (layer_group / b.groups * b.rows.rows + row) * b.queries + layer_group % b.groups * b.width;
  const AssignmentMatrix<T> m{b.cost + first, b.queries, 1, b.width, 1, false, 1.0};
  WarpTeam warp;
  const RowStart start = TeamAssignment<WarpTeam, T>::start_of_target(warp, m, 0);
  if (warp.rank() == 0) {
    keys[index] = start.invalid || start.column < 0 ? INT64_MIN : start.column;
  }
}

template <typename T>
__device__ void write_unmatched(const Batch<T>& b, const Problem<T>& p, int64_t begin, int64_t end) {
  for (int copy = 0; copy < b.repeats; ++copy) {
    for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
      b.query[p.first_out + copy * b.rows.rows + row] = -1;
      b.matched[p.first_out + copy * b.rows.rows + row] = static_cast<T>(INFINITY);
    }
  }
}

// Rows that belong to no target: padding behind the image's own rows, and what offsets leave out at both ends.
template <typename T>
__device__ void write_padding(const Batch<T>& b, const Problem<T>& p, int64_t image) {
  const int64_t end = p.range.begin + p.range.size;
  if (!b.rows.offsets) {
    write_unmatched(b, p, end, (image + 1) * (b.rows.rows / b.rows.batch));
    return;
  }
  if (image == 0) {
    write_unmatched(b, p, 0, p.range.begin);
  }
  if (image == b.rows.batch - 1) {
    write_unmatched(b, p, end, b.rows.rows);
  }
}

// One entry of the result; what it adds to the status.
template <typename T>
__device__ int write_entry(const Batch<T>& b, const Problem<T>& p, int entry, int query) {
  const int target = p.matrix.target_of(entry);
  const T cost = query < 0 ? static_cast<T>(INFINITY) : p.matrix.raw(target, query);
  const bool valid = is_valid_cost(static_cast<double>(cost)), invalid_pair = query >= 0 && !valid;
  if (invalid_pair && b.drop_invalid) {
    query = -1;
  }
  const int64_t out = p.first_out + p.matrix.copy_of(entry) * b.rows.rows + p.range.begin + target;
  b.query[out] = query < 0 ? -1 : query + p.first_query;
  b.matched[out] = valid ? cost : static_cast<T>(INFINITY);
  return (invalid_pair ? kInvalidPairBit : 0) | (query < 0 ? kUnmatchedTargetBit : 0);
}

struct Or {
  __device__ int operator()(int a, int b) const { return a | b; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) assignment_kernel(const Batch<T> b) {
  __shared__ BlockExchange<kThreads> exchange;
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t index = blockIdx.x, image = index % b.rows.batch;
  Problem<T> p(b, index);
  BlockTeam<kThreads> team(exchange);
  write_padding(b, p, image);
  int status = 0;
  const bool empty = p.matrix.entries() == 0 || b.width == 0;
  const bool in_memory = p.matrix.columns() > kBatch * kThreads;
  const AssignmentSpace space = p.space(b, image, shared, in_memory);
  TeamAssignment<BlockTeam<kThreads>, T> assignment(team, p.matrix, space);
  if (!empty) {
    const bool met_invalid = p.matrix.swapped() ? assignment.set_query_starts() : assignment.set_target_starts(p.keys);
    const bool invalid = team.reduce(met_invalid ? 1 : 0, Or{}) != 0;
    status = invalid ? kInvalidEntriesBit : 0;
    in_memory ? assignment.template solve<true>(invalid) : assignment.template solve<false>(invalid);
  }
  for (int entry = team.rank(); entry < p.matrix.entries(); entry += kThreads) {
    status |= write_entry(b, p, entry, empty ? -1 : assignment.query_of(entry));
  }
  status = team.reduce(status, Or{});
  if (team.rank() == 0) {
    b.status[index] = static_cast<uint8_t>(status);
  }
}

template <typename T>
__global__ void unmatched_kernel(int64_t* query, T* matched, int64_t n) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    query[i] = -1;
    matched[i] = static_cast<T>(INFINITY);
  }
}

int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes - 1024;  // what the runtime and the exchange of the team take
}

// Bytes of shared memory for a batch, and whether every problem fits. A ragged image may own all the rows, but that is
// what the workspace is for.
struct Memory {
  int64_t shared_bytes;
  bool enough;

  template <typename T>
  static Memory of(const Batch<T>& b) {
    constexpr int64_t kOnChip = kBatch * kThreads;
    const int64_t targets = b.rows.offsets ? b.rows.rows : b.rows.rows / b.rows.batch;
    const int64_t entries = b.repeats * targets, most = std::max<int64_t>(b.width, entries);
    const int64_t least = std::min<int64_t>(b.width, entries), usual = b.rows.offsets ? b.width : most;
    const int64_t wanted = AssignmentSpace::bytes(least, usual, usual > kOnChip);
    const int64_t bytes = std::min(wanted, shared_memory_limit());
    return {bytes, AssignmentSpace::bytes(least, most, most > kOnChip) <= bytes};
  }
};

template <typename T>
void launch(const Batch<T>& b, int64_t problems, cudaStream_t stream) {
  constexpr int64_t kDefaultLimit = 48 * 1024 - sizeof(BlockExchange<kThreads>);
  if (b.shared_bytes > kDefaultLimit) {
    cudaFuncSetAttribute(assignment_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(b.shared_bytes));
  }
  assignment_kernel<T><<<static_cast<unsigned>(problems), kThreads, static_cast<size_t>(b.shared_bytes), stream>>>(b);
  check_launch("linear_assignment");
}

template <typename T>
Tensor find_keys(const Batch<T>& b, const Tensor& like, int64_t layer_groups, cudaStream_t stream) {
  const int64_t count = layer_groups * b.rows.rows;
  Tensor keys = new_cuda_output(like, {count}, ScalarType::Long);
  if (count > 0 && b.width > 0) {
    const auto blocks = static_cast<unsigned>(ceil_div(count * kWarp, kReaders));
    row_keys_kernel<<<blocks, kReaders, 0, stream>>>(b, static_cast<int64_t*>(keys.data_ptr()), count);
    check_launch("linear_assignment");
  }
  return keys;
}

template <typename T>
void solve(Batch<T> b, const Tensor& like, int64_t layer_groups, cudaStream_t stream) {
  Tensor keys = like, workspace = like;  // they live until the launches are queued
  if (!b.keys) {
    keys = find_keys(b, like, layer_groups, stream);
    b.keys = static_cast<const int64_t*>(keys.data_ptr());
  }
  const Memory memory = Memory::of(b);
  b.shared_bytes = memory.shared_bytes;
  if (!memory.enough) {
    const int64_t nodes = b.rows.batch * b.width + b.repeats * b.rows.rows;
    const int64_t bytes = layer_groups * (kWorkspacePerNode * nodes + kWorkspacePerProblem * b.rows.batch);
    workspace = new_cuda_output(like, {bytes}, ScalarType::Byte);
    b.workspace = static_cast<unsigned char*>(workspace.data_ptr());
  }
  launch(b, layer_groups * b.rows.batch, stream);
}

const int64_t* integers(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

template <typename T>
void write_all_unmatched(const Tensor& query, const Tensor& matched, cudaStream_t stream) {
  const int64_t n = query.numel();
  if (n > 0) {
    unmatched_kernel<<<grid_blocks(n, 256), 256, 0, stream>>>(static_cast<int64_t*>(query.data_ptr()),
                                                              static_cast<T*>(matched.data_ptr()), n);
    check_launch("linear_assignment");
  }
}

void check_sizes(int64_t problems, int64_t entries, int64_t queries) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(problems <= kMost && entries <= kMost && queries <= kMost,
                  "linear_assignment: more than 2^30 problems, queries or targets");
}

std::tuple<Tensor, Tensor, Tensor> linear_assignment(Tensor cost, std::optional<Tensor> offsets,
                                                     std::optional<Tensor> counts, std::optional<Tensor> keys,
                                                     int64_t batch, int64_t groups, int64_t repeats, bool interleave,
                                                     bool drop_invalid, bool any_ties) {
  const DeviceScope device(cost);
  const int64_t layers = cost.size(0), rows = cost.size(1), queries = cost.size(2);
  Tensor query = new_cuda_output(cost, {layers, groups * repeats, rows}, ScalarType::Long);
  Tensor matched = new_cuda_output(cost, {layers, groups * repeats, rows}, cost.scalar_type());
  Tensor status = new_cuda_output(cost, {layers, groups, batch}, ScalarType::Byte);
  check_sizes(layers * groups * batch, repeats * rows, queries);
  const auto run = [&](auto t) {
    using T = decltype(t);
    if (layers * groups * batch == 0) {
      return write_all_unmatched<T>(query, matched, device.stream());
    }
    const bool use_keys = groups == 1 && sizeof(T) == sizeof(float);
    solve(Batch<T>{static_cast<const T*>(cost.data_ptr()),
                   use_keys ? integers(keys) : nullptr,
                   {integers(offsets), integers(counts), rows, batch},
                   queries,
                   static_cast<int>(groups),
                   static_cast<int>(queries / groups),
                   static_cast<int>(repeats),
                   interleave,
                   drop_invalid,
                   static_cast<int64_t*>(query.data_ptr()),
                   static_cast<T*>(matched.data_ptr()),
                   static_cast<uint8_t*>(status.data_ptr()),
                   nullptr,
                   0},
          cost, layers * groups, device.stream());
  };
  cost.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {query, matched, status};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("linear_assignment", TORCH_BOX(&linear_assignment)); }

}  // namespace
}  // namespace ssod
