// Gradients of multi-scale deformable attention. Every sum has one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "cpu/deform_gradients.h"
#include "cpu/deform_problem.h"
#include "cpu/deform_rows.h"
#include "cpu/deform_tile.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

// Where the gradients go.
struct GradientSink {
  const void* grad_output;  // [B, Q, M * C], dtype of value
  const void* lse;          // [B, Q, M], dtype of the maths; of the fused op
  void* value;              // [B, S, M, C], dtype of the maths, zeros
  void* positions;          // [B, Q, M, K, 2]
  void* weights;            // [B, Q, M, K]
  void* reference;          // [B, M, Q, levels, numbers], dtype of the maths, zeros; null where nobody asks
};

// Per-thread arrays.
template <typename T, typename I>
struct GradientSpace {
  GradientSpace(const DeformProblem& p, const TileLevels<T, I>& levels)
      : tile(p, levels), numbers(tile_queries(p) * (8 * p.samples + p.channels)) {
    const int64_t n = tile_queries(p) * p.samples;
    px = numbers.data();
    py = px + n;
    weight = py + n;
    chained = weight + n;
    dots = chained + n;
    grad = dots + 4 * n;
  }

  DeformTile<T, I> tile;
  std::vector<T> numbers;
  T *px, *py, *weight, *chained, *dots, *grad;
};

template <typename T, typename I>
class Backward {
 public:
  Backward(const DeformProblem& problem, const GradientSink& sink)
      : p_(problem), sink_(sink), levels_(make_tile_levels<T, I>(problem)), step_(tile_queries(problem)) {}

  // One task per image and head owns all gradients of its head. Where there are more threads than that, samples get
  // theirs tile by tile, and value its own in slices of the channels.
  void run() const {
    const int64_t heads = p_.batch * p_.heads, tiles = (p_.queries + step_ - 1) / step_;
    const int64_t work = 4 * p_.samples * p_.channels;
    if (heads >= static_cast<int64_t>(torch::stable::get_num_threads())) {
      return for_tasks(heads, p_.queries * work, [&](int64_t head, GradientSpace<T, I>& space) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          locate(head, tile, space);
          store_of_samples(space);
          add_to_value(0, p_.channels, space);
        }
      });
    }
    for_tasks(heads * tiles, step_ * work, [&](int64_t task, GradientSpace<T, I>& space) {
      locate(task / tiles, task % tiles, space);
      store_of_samples(space);
    });
    constexpr int64_t kSlice = 16;
    const int64_t slices = (p_.channels + kSlice - 1) / kSlice;
    for_tasks(heads * slices, p_.queries * p_.samples * kSlice, [&](int64_t task, GradientSpace<T, I>& space) {
      const int64_t first = task % slices * kSlice;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        locate(task / slices, tile, space);
        add_to_value(first, std::min(kSlice, p_.channels - first), space);
      }
    });
  }

 private:
  template <typename F>
  void for_tasks(int64_t tasks, int64_t work, const F& f) const {
    parallel_rows(tasks, work, [&](int64_t begin, int64_t end) {
      GradientSpace<T, I> space(p_, levels_);
      for (int64_t task = begin; task < end; ++task) {
        f(task, space);
      }
    });
  }

  int64_t first_row(const TileRange& at) const { return at.image * p_.queries + at.query; }

  // Finds the samples of a tile and the gradient of its results.
  void locate(int64_t head, int64_t tile, GradientSpace<T, I>& space) const {
    const int64_t first = tile * step_;
    space.tile.locate({head / p_.heads, head % p_.heads, first, std::min(step_, p_.queries - first)});
    space.tile.read_weights();
    const TileRange& at = space.tile.range;
    if (p_.fused()) {
      space.tile.softmax_of(static_cast<const T*>(sink_.lse) + first_row(at) * p_.heads + at.head, p_.heads);
    }
    space.tile.share_weights();
    const int64_t row = p_.heads * p_.channels;
    with_numbers<T>(sink_.grad_output, p_.value.dtype, [&](const auto* data) {
      read_rows(data + first_row(at) * row + at.head * p_.channels, row, at.count, p_.channels, space.grad);
    });
  }

  void add_to_value(int64_t first, int64_t channels, GradientSpace<T, I>& space) const {
    const TileRange& at = space.tile.range;
    const int64_t token = p_.heads * p_.channels;
    T* value = static_cast<T*>(sink_.value) + at.image * p_.tokens * token + at.head * p_.channels + first;
    scatter_samples(value, token, channels, space.tile.view(token), at.count, p_.samples, space.grad + first,
                    p_.channels);
  }

  void store_of_samples(GradientSpace<T, I>& space) const {
    DeformTile<T, I>& tile = space.tile;
    const TileRange& at = tile.range;
    with_numbers<T>(p_.value.data, p_.value.dtype, [&](const auto* data) {
      const auto* value = data + at.image * p_.value.image_stride + at.head * p_.value.head_stride;
      dot_samples(value, p_.value.token_stride, p_.channels, tile.view(p_.value.token_stride), at.count, p_.samples,
                  space.grad, p_.channels, space.dots);
    });
    sample_gradients(space.dots, tile.fx, tile.fy, tile.weight, tile.inside, tile.n, space.px, space.py, space.weight);
    if (p_.fused()) {
      store_of_references(space);
      store_of_offsets(space);
      softmax_gradients(tile.weight, at.count, p_.samples, space.weight);
    } else {
      store_of_locations(space);
    }
    const int64_t row = p_.heads * p_.samples;
    with_numbers<T>(sink_.weights, p_.weights.dtype, [&](const auto* data) {
      store_rows(space.weight, at.count, p_.samples, writable(data) + first_row(at) * row + at.head * p_.samples, row);
    });
  }

  template <typename G>
  static G* writable(const G* data) {
    return const_cast<G*>(data);
  }

  void store_of_locations(GradientSpace<T, I>& space) const {
    if (p_.discrete) {
      std::fill_n(space.px, space.tile.n, T(0));
      std::fill_n(space.py, space.tile.n, T(0));
    }
    chain_positions(levels_.width.data(), levels_.height.data(), space);
    store_positions(space);
  }

  void store_of_offsets(GradientSpace<T, I>& space) const {
    if (p_.reference.numbers == 4) {
      chain_positions(space.tile.scale_x, space.tile.scale_y, space);
    }
    store_positions(space);
  }

  template <typename F>
  static void chain_positions(const F* x, const F* y, GradientSpace<T, I>& space) {
    chain_row(space.px, x, space.tile.n);
    chain_row(space.py, y, space.tile.n);
  }

  void store_positions(const GradientSpace<T, I>& space) const {
    const TileRange& at = space.tile.range;
    const int64_t row = p_.heads * p_.samples * 2;
    with_numbers<T>(sink_.positions, p_.positions.dtype, [&](const auto* data) {
      store_pairs(space.px, space.py, at.count, p_.samples,
                  writable(data) + first_row(at) * row + at.head * p_.samples * 2, row);
    });
  }

  // Before px and py are chained to offsets.
  void store_of_references(GradientSpace<T, I>& space) const {
    if (sink_.reference == nullptr) {
      return;
    }
    const DeformTile<T, I>& tile = space.tile;
    const I *width = levels_.width.data(), *height = levels_.height.data();
    chain_row(space.px, width, tile.n, space.chained);
    add_to_reference(0, space);
    chain_row(space.py, height, tile.n, space.chained);
    add_to_reference(1, space);
    if (p_.reference.numbers == 4) {
      chain_side(space.px, levels_.share.data(), tile.x, width, tile.n, space.chained);
      add_to_reference(2, space);
      chain_side(space.py, levels_.share.data(), tile.y, height, tile.n, space.chained);
      add_to_reference(3, space);
    }
  }

  void add_to_reference(int64_t number, GradientSpace<T, I>& space) const {
    const TileRange& at = space.tile.range;
    const int64_t row = p_.reference.levels * p_.reference.numbers;
    const int64_t first = (at.image * p_.heads + at.head) * p_.queries + at.query;
    add_to_references(space.chained, at.count, p_.samples, levels_.column.data(), p_.reference.numbers, row,
                      static_cast<T*>(sink_.reference) + first * row + number);
  }

  const DeformProblem& p_;
  const GradientSink& sink_;
  const TileLevels<T, I> levels_;
  const int64_t step_;
};

void run_backward(const DeformProblem& p, const GradientSink& sink) {
  if (p.is_double()) {
    Backward<double, int64_t>(p, sink).run();
  } else if (levels_fit(p)) {
    Backward<float, int32_t>(p, sink).run();
  } else {
    Backward<float, int64_t>(p, sink).run();
  }
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

Tensor new_zeros(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out = new_output(sizes, dtype);
  char* data = static_cast<char*>(out.data_ptr());
  parallel_rows(bytes_of(out), 1, [=](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
  return out;
}

// float numbers rounded to float16 or bfloat16.
Tensor narrowed(const Tensor& wide, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out = new_output(sizes, dtype);
  const float* from = static_cast<const float*>(wide.data_ptr());
  with_floats(out.data_ptr(), dtype, [&](const auto* data) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(data);
    parallel_rows(out.numel(), 1,
                  [=](int64_t begin, int64_t end) { narrow_row(from + begin, to + begin, end - begin); });
  });
  return out;
}

// Sum over the heads of partial [B, M, Q, levels, numbers].
template <typename T>
void sum_over_heads(const DeformProblem& p, const Tensor& partial, Tensor& total) {
  const int64_t n = p.queries * p.reference.levels * p.reference.numbers;
  const T* from = static_cast<const T*>(partial.data_ptr());
  T* to = static_cast<T*>(total.data_ptr());
  for (int64_t image = 0; image < p.batch; ++image) {
    sum_parts(from + image * p.heads * n, p.heads, n, n, to + image * n);
  }
}

struct Gradients {
  Tensor value, positions, weights;
};

Gradients find_gradients(const DeformProblem& p, const Tensor& grad_output, const void* lse, void* reference) {
  const std::vector<int64_t> sizes{p.batch, p.tokens, p.heads, p.channels};
  Tensor value = new_zeros(sizes, maths_dtype(p));
  Tensor positions = new_output({p.batch, p.queries, p.heads, p.samples, 2}, p.positions.dtype);
  Tensor weights = new_output({p.batch, p.queries, p.heads, p.samples}, p.weights.dtype);
  run_backward(p, {grad_output.data_ptr(), lse, value.data_ptr(), positions.data_ptr(), weights.data_ptr(), reference});
  return {p.value.dtype == maths_dtype(p) ? value : narrowed(value, sizes, p.value.dtype), positions, weights};
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, const OptionalTensor& spatial_shapes,
    const OptionalTensor& level_start_index, const Tensor& sampling_locations, const Tensor& attention_weights,
    const OptionalInts& shapes_hw, const OptionalInts& num_points, int64_t method,
    bool /*deterministic: it always is*/) {
  DeformProblem p = make_problem(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                                 shapes_hw, num_points);
  p.discrete = static_cast<SampleMethod>(method) == SampleMethod::discrete;
  const Gradients grads = find_gradients(p, grad_output, nullptr, nullptr);
  return {grads.value, grads.positions, grads.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& value, const OptionalTensor& spatial_shapes,
    const OptionalTensor& level_start_index, const Tensor& reference_points, const Tensor& sampling_offsets,
    const Tensor& attention_logits, const OptionalInts& shapes_hw, const OptionalInts& num_points, double offset_scale,
    const Tensor& lse, bool need_reference_grad, bool /*deterministic: it always is*/) {
  DeformProblem p =
      make_problem(value, spatial_shapes, level_start_index, sampling_offsets, attention_logits, shapes_hw, num_points);
  p.reference = reference_view(reference_points);
  p.offset_scale = offset_scale;
  const ScalarType dtype = maths_dtype(p);
  if (!need_reference_grad) {
    const Gradients grads = find_gradients(p, grad_output, lse.data_ptr(), nullptr);
    return {grads.value, new_output({0}, dtype), grads.positions, grads.weights};
  }
  const auto [_, levels, numbers] = p.reference;
  Tensor partial = new_zeros({p.batch, p.heads, p.queries, levels, numbers}, dtype);
  Tensor reference = new_output({p.batch, p.queries, levels, numbers}, dtype);
  const Gradients grads = find_gradients(p, grad_output, lse.data_ptr(), partial.data_ptr());
  p.is_double() ? sum_over_heads<double>(p, partial, reference) : sum_over_heads<float>(p, partial, reference);
  return {grads.value, reference, grads.positions, grads.weights};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) {
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
}

}  // namespace
}  // namespace ssod
