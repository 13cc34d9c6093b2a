// Multi-scale deformable attention, of locations and weights or of offsets and logits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/deform_problem.h"
#include "cpu/deform_rows.h"
#include "cpu/deform_tile.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

// Fills out [B, Q, M * C] and, for the fused op, lse [B, Q, M].
template <typename T, typename I>
class Forward {
 public:
  Forward(const DeformProblem& problem, void* out, void* lse)
      : p_(problem), levels_(make_tile_levels<T, I>(problem)), out_(out), lse_(static_cast<T*>(lse)) {}

  void run() const {
    const int64_t step = tile_queries(p_), tiles = (p_.queries + step - 1) / step;
    parallel_rows(p_.batch * tiles * p_.heads, step * p_.samples * p_.channels, [&](int64_t begin, int64_t end) {
      DeformTile<T, I> tile(p_, levels_);
      std::vector<T> sums(step * (p_.channels + 1));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i % p_.heads, first = i / p_.heads % tiles * step, image = i / p_.heads / tiles;
        fill({image, head, first, std::min(step, p_.queries - first)}, tile, sums.data());
      }
    });
  }

 private:
  void fill(const TileRange& range, DeformTile<T, I>& tile, T* sums) const {
    tile.locate(range);
    tile.read_weights();
    if (p_.fused()) {
      store_lse(range, tile, sums);
    }
    tile.share_weights();
    const SampleView<T> samples = tile.view(p_.value.token_stride);
    with_numbers<T>(p_.value.data, p_.value.dtype, [&](const auto* data) { store_sums(range, data, samples, sums); });
  }

  void store_lse(const TileRange& range, DeformTile<T, I>& tile, T* buffer) const {
    tile.softmax(buffer);
    T* lse = lse_ + (range.image * p_.queries + range.query) * p_.heads + range.head;
    for (int64_t q = 0; q < range.count; ++q) {
      lse[q * p_.heads] = buffer[q];
    }
  }

  template <typename V>
  void store_sums(const TileRange& range, const V* data, const SampleView<T>& samples, T* sums) const {
    const auto& [_, dtype, image_stride, token_stride, head_stride] = p_.value;
    const V* value = data + range.image * image_stride + range.head * head_stride;
    const int64_t row = p_.heads * p_.channels;
    V* out = static_cast<V*>(out_) + (range.image * p_.queries + range.query) * row + range.head * p_.channels;
    if constexpr (std::is_same_v<V, T>) {
      sum_samples(value, token_stride, p_.channels, samples, range.count, p_.samples, out, row);
    } else {
      sum_samples(value, token_stride, p_.channels, samples, range.count, p_.samples, sums, p_.channels);
      for (int64_t q = 0; q < range.count; ++q) {
        narrow_row(sums + q * p_.channels, out + q * row, p_.channels);
      }
    }
  }

  const DeformProblem& p_;
  const TileLevels<T, I> levels_;
  void* out_;
  T* lse_;
};

Tensor run_forward(const DeformProblem& p, void* lse) {
  Tensor out = new_output({p.batch, p.queries, p.heads * p.channels}, p.value.dtype);
  if (p.is_double()) {
    Forward<double, int64_t>(p, out.data_ptr(), lse).run();
  } else if (levels_fit(p)) {
    Forward<float, int32_t>(p, out.data_ptr(), lse).run();
  } else {
    Forward<float, int64_t>(p, out.data_ptr(), lse).run();
  }
  return out;
}

Tensor ms_deform_attn(const Tensor& value, const OptionalTensor& spatial_shapes,
                      const OptionalTensor& level_start_index, const Tensor& sampling_locations,
                      const Tensor& attention_weights, const OptionalInts& shapes_hw, const OptionalInts& num_points,
                      int64_t method) {
  DeformProblem p = make_problem(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                                 shapes_hw, num_points);
  p.discrete = static_cast<SampleMethod>(method) == SampleMethod::discrete;
  return run_forward(p, nullptr);
}

std::tuple<Tensor, Tensor> ms_deform_attn_fused(const Tensor& value, const OptionalTensor& spatial_shapes,
                                                const OptionalTensor& level_start_index, const Tensor& reference_points,
                                                const Tensor& sampling_offsets, const Tensor& attention_logits,
                                                const OptionalInts& shapes_hw, const OptionalInts& num_points,
                                                double offset_scale) {
  DeformProblem p =
      make_problem(value, spatial_shapes, level_start_index, sampling_offsets, attention_logits, shapes_hw, num_points);
  p.reference = reference_view(reference_points);
  p.offset_scale = offset_scale;
  Tensor lse = new_output({p.batch, p.queries, p.heads}, maths_dtype(p));
  return {run_forward(p, lse.data_ptr()), lse};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
}

}  // namespace
}  // namespace ssod
