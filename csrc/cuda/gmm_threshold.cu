// Thresholds from mixtures of two Gaussians: one team of threads per problem, which iterates until its own fit settles.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/block_team.cuh"
#include "cuda/common.cuh"
#include "gmm.h"

namespace ssod {
namespace {

constexpr int kHeld = 4;  // samples of a thread in registers; more are read again in each pass
constexpr int kSmall = 32, kLarge = 256;

template <int kThreads, typename T>
__global__ void __launch_bounds__(kThreads)
    gmm_kernel(const T* __restrict__ values, const RowRanges ranges, const GmmOptions options, const GmmOutputs out) {
  __shared__ BlockExchange<kThreads> exchange;
  BlockTeam<kThreads> team(exchange);
  for (int64_t problem = blockIdx.x; problem < ranges.batch; problem += gridDim.x) {
    gmm_solve<kHeld>(team, values, ranges, problem, options, out);
    gmm_clear_padding(team, ranges, problem, out.keep);
  }
}

// A warp per problem while the samples of an average problem fit into its registers.
template <typename T>
void launch(const T* values, const RowRanges& ranges, const GmmOptions& options, const GmmOutputs& out,
            cudaStream_t stream) {
  const unsigned blocks = grid_blocks(ranges.batch, 1);
  if (ranges.rows <= ranges.batch * kHeld * kSmall) {
    gmm_kernel<kSmall><<<blocks, kSmall, 0, stream>>>(values, ranges, options, out);
  } else {
    gmm_kernel<kLarge><<<blocks, kLarge, 0, stream>>>(values, ranges, options, out);
  }
  check_launch("gmm_threshold");
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results allocate(const Tensor& values, int64_t batch) {
  return {new_cuda_output(values, {batch}, values.scalar_type()),
          new_cuda_output(values, first_sizes(values, values.dim()), ScalarType::Bool),
          new_cuda_output(values, {7 * batch}, ScalarType::Double),
          new_cuda_output(values, {3, batch}, ScalarType::Int)};
}

GmmOutputs pointers(const Results& r, int64_t batch) {
  return {std::get<0>(r).data_ptr(), static_cast<bool*>(std::get<1>(r).data_ptr()),
          static_cast<double*>(std::get<2>(r).data_ptr()), static_cast<int32_t*>(std::get<3>(r).data_ptr()), batch};
}

const int64_t* index_data(const std::optional<Tensor>& index) {
  return index ? static_cast<const int64_t*>(index->data_ptr()) : nullptr;
}

Results gmm_threshold(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> counts, int64_t batch,
                      double reg_covar, double tol, int64_t max_iter, bool reverse, int64_t rule) {
  const DeviceScope device(values);
  const RowRanges ranges{index_data(offsets), index_data(counts), values.numel(), batch};
  const GmmOptions options{reg_covar, tol, static_cast<int>(max_iter), reverse, static_cast<GmmRule>(rule)};
  Results results = allocate(values, batch);
  const GmmOutputs out = pointers(results, batch);
  if (offsets && ranges.rows > 0) {  // rows that no problem owns
    const cudaError_t error = cudaMemsetAsync(out.keep, 0, static_cast<size_t>(ranges.rows), device.stream());
    STD_TORCH_CHECK(error == cudaSuccess, "gmm_threshold: ", cudaGetErrorString(error));
  }
  if (batch == 0) {
    return results;
  }
  if (values.scalar_type() == ScalarType::Double) {
    launch(data<const double>(values), ranges, options, out, device.stream());
  } else {
    launch(data<const float>(values), ranges, options, out, device.stream());
  }
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("gmm_threshold", TORCH_BOX(&gmm_threshold)); }

}  // namespace
}  // namespace ssod
