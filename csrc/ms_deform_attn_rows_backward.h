// Gradients of one query under one head by a group of lanes; see ms_deform_attn_rows.h.
#pragma once

#include "ms_deform_attn_rows.h"

namespace ssod {

// Where the gradients of a row go. Every element is written once, but for `value`.
template <typename Traits>
struct RowGradients {
  using T = typename Traits::T;
  T* value;                           // [B, S, M, C], added to; or null: not wanted here
  int64_t value_stride;               // from one image to the next
  T* reference;                       // [rows, M, reference_levels, reference_size], or null
  typename Traits::Floats positions;  // [rows, M, K, 2]
  typename Traits::Floats weights;    // [rows, M, K]
};

template <typename Traits>
struct BackwardInput {
  using T = typename Traits::T;
  using V = typename Traits::V;
  InputOf<Traits> samples;
  TokenRows<V> value;
  const V* grad_output;  // [rows, M * C]
  const T* lse;          // [rows, M], of the fused op
  RowGradients<Traits> grads;
};

// Dot products of the incoming gradient with the corners of a sample, 0 for corners that do not count.
template <typename T>
struct CornerDots {
  T of[4];
};

// What one lane needs besides: pointers to its first channel of token 0, and its channels of the incoming gradient.
template <typename Traits>
struct LaneData {
  const typename Traits::V* value;
  typename Traits::T* grad_value;    // or null
  uint32_t value_bytes, grad_bytes;  // from one token to the next
  typename Traits::T grad[Traits::kVector];
};

// The channels of one slab of the incoming gradient of a row, and where its corners are.
template <typename Traits>
SSOD_HD LaneData<Traits> lane_data(const BackwardInput<Traits>& in, const SampleRow& place, int32_t channel,
                                   bool owns) {
  LaneData<Traits> lane;
  const int64_t heads = in.samples.heads, channels = in.value.channels,
                at = place.head * channels + (owns ? channel : 0);
  lane.value = in.value.data + place.image * in.value.image_stride + at;
  lane.value_bytes = in.value.row_bytes;
  lane.grad_bytes = static_cast<uint32_t>(heads * channels * sizeof(typename Traits::T));
  lane.grad_value = in.grads.value ? in.grads.value + place.image * in.grads.value_stride + at : nullptr;
  Traits::Memory::template load_if<Traits::kVector>(owns, in.grad_output + place.row * heads * channels + at,
                                                    lane.grad);
  return lane;
}

// Adds this lane's part of the dot products of one sample, and gives its share of the gradient to the corners.
template <typename Traits>
SSOD_HD void visit_corners(const LaneData<Traits>& lane, const BoardOf<Traits>& board, int slot, bool owns,
                           CornerDots<typename Traits::T>& dots) {
  using T = typename Traits::T;
  const auto rows = board.rows[slot];
  T corner[4][Traits::kVector];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    Traits::Memory::template load_if<Traits::kVector>(owns && rows.row[c] >= 0,
                                                      at_row(lane.value, rows.row[c], lane.value_bytes), corner[c]);
  }
  const auto shares = board.shares[slot];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    T update[Traits::kVector], dot = 0;
#pragma unroll
    for (int i = 0; i < Traits::kVector; ++i) {
      dot = multiply_add(lane.grad[i], corner[c][i], dot);
      update[i] = shares.share[c] * lane.grad[i];
    }
    const bool counts = owns && rows.row[c] >= 0;
    dots.of[c] += counts ? dot : T(0);
    if (counts && lane.grad_value) {
      Traits::Memory::template add<Traits::kVector>(at_row(lane.grad_value, rows.row[c], lane.grad_bytes), update);
    }
  }
}

// This lane's part of the dot products of one sample, over all slabs of channels.
template <typename Traits, typename Group>
SSOD_HD CornerDots<typename Traits::T> partial_dots(Group& group, const BackwardInput<Traits>& in,
                                                    const SampleRow& place, const LaneData<Traits>& first,
                                                    const BoardOf<Traits>& board, int sample) {
  using Channels = LaneChannels<Traits>;
  const int slot = board.slot(group.index(), sample);
  CornerDots<typename Traits::T> dots{};
  if constexpr (Traits::kExact) {
    visit_corners(first, board, slot, true, dots);
  } else {
    for (int32_t slab = 0; slab < Channels::slabs(in.value.channels); ++slab) {
      const int32_t channel = Channels::first(slab, group.rank());
      const bool owns = Channels::owns(channel, in.value.channels);
      visit_corners(lane_data(in, place, channel, owns), board, slot, owns, dots);
    }
  }
  return dots;
}

// Dot products of kCount samples, of which each lane keeps the sums of its own: halves of the lanes swap halves of the
// samples, so that a sample costs four exchanges instead of four per halving.
template <int kCount, typename Traits, typename Group>
SSOD_HD CornerDots<typename Traits::T> own_dots(Group& group, const BackwardInput<Traits>& in, const SampleRow& place,
                                                const LaneData<Traits>& lane, const BoardOf<Traits>& board,
                                                int sample) {
  if constexpr (kCount == 1) {
    return partial_dots<Traits>(group, in, place, lane, board, sample);
  } else {
    constexpr int kHalf = kCount / 2;
    const auto low = own_dots<kHalf, Traits>(group, in, place, lane, board, sample);
    const auto high = own_dots<kHalf, Traits>(group, in, place, lane, board, sample + kHalf);
    const bool upper = group.rank() & kHalf;
    CornerDots<typename Traits::T> sum;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sum.of[c] = (upper ? high.of[c] : low.of[c]) + group.swap(upper ? low.of[c] : high.of[c], kHalf);
    }
    return sum;
  }
}

// Adds the samples of a chunk to the gradients of the references of this row and head, which start as 0.
template <typename Traits, typename Group>
SSOD_HD void add_reference_gradients(Group& group, const BackwardInput<Traits>& in,
                                     const SampledLevel<typename Traits::T>* levels, const SampleRow& place,
                                     const OwnSample<typename Traits::T>& own,
                                     const SampleGradient<typename Traits::T>& grad, int32_t k0) {
  using T = typename Traits::T;
  const auto& samples = in.samples;
  const T share = own.real ? levels[own.level].share : T(0);
  const T parts[4] = {chained(grad.px, own.width), chained(grad.py, own.height),
                      chained(grad.px, box_side_factor(share, own.offset_x, own.width)),
                      chained(grad.py, box_side_factor(share, own.offset_y, own.height))};
  const int32_t rest = samples.samples - k0, count = rest < Traits::kLanes ? rest : Traits::kLanes;
  const bool shared = samples.reference_levels == 1;
  const int32_t first = shared ? 0 : level_of_sample(samples, levels, k0);
  const int32_t last = shared ? 0 : level_of_sample(samples, levels, k0 + count - 1);
  T* target =
      in.grads.reference + (place.row * samples.heads + place.head) * samples.reference_levels * samples.reference_size;
  for (int32_t level = first; level <= last; ++level) {
    const bool counts = own.real && (shared || own.level == level);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (part < samples.reference_size) {
        const T sum = group_sum<Traits::kLanes>(group, counts ? parts[part] : T(0));
        if (place.active && group.rank() == 0) {  // always the same lane, which sees what it wrote
          target[level * samples.reference_size + part] += sum;
        }
      }
    }
  }
}

template <typename Traits, typename Group>
SSOD_HD void clear_reference_gradients(Group& group, const BackwardInput<Traits>& in, const SampleRow& place) {
  const int64_t size = int64_t{in.samples.reference_levels} * in.samples.reference_size;
  auto* target = in.grads.reference + (place.row * in.samples.heads + place.head) * size;
  if (place.active && group.rank() == 0) {
    for (int64_t i = 0; i < size; ++i) {
      target[i] = 0;
    }
  }
}

// Writes what a lane found for its own sample: gradients of its position and, of the plain op, of its weight.
template <bool fused, typename Traits>
SSOD_HD void store_sample_gradient(const BackwardInput<Traits>& in, int64_t sample,
                                   const OwnSample<typename Traits::T>& own,
                                   const SampleGradient<typename Traits::T>& grad) {
  const auto factor_x = fused ? own.scale_x : own.width, factor_y = fused ? own.scale_y : own.height;
  in.grads.positions.store_pair(2 * sample, chained(grad.px, factor_x), chained(grad.py, factor_y));
  if constexpr (!fused) {
    in.grads.weights.store(sample, grad.weight);
  }
}

// Gradient of the own sample of a lane, from a chunk on the board.
template <bool fused, typename Traits, typename Group>
SSOD_HD SampleGradient<typename Traits::T> own_gradient(Group& group, const BackwardInput<Traits>& in,
                                                        const SampleRow& place, const LaneData<Traits>& lane,
                                                        const BoardOf<Traits>& board,
                                                        const OwnSample<typename Traits::T>& own) {
  const auto dots = own_dots<Traits::kLanes, Traits>(group, in, place, lane, board, 0);
  auto grad = sample_gradient(dots.of[0], dots.of[1], dots.of[2], dots.of[3], own.at.fx, own.at.fy, own.weight,
                              own.at.inside != 0);
  if (!fused && in.samples.method != SampleMethod::bilinear) {
    grad.px = grad.py = typename Traits::T(0);
  }
  return grad;
}

// Gradients of all samples of a row. Of the fused op, `products` receives those of the weights, and the result is this
// lane's part of their sum, each times its weight.
template <bool fused, typename Traits, typename Group>
SSOD_HD typename Traits::T sample_gradients(Group& group, const BackwardInput<Traits>& in, const RowOf<Traits>& row,
                                            const SampledLevel<typename Traits::T>* levels, const SampleRow& place,
                                            const SoftmaxRow<typename Traits::T>& softmax, BoardOf<Traits>& board,
                                            typename Traits::T* products) {
  const int64_t first = (place.row * in.samples.heads + place.head) * in.samples.samples;
  typename Traits::T total = 0;
  LaneData<Traits> lane{};
  if constexpr (Traits::kExact) {
    lane = lane_data(in, place, LaneChannels<Traits>::first(0, group.rank()), true);
  }
  for (int32_t k0 = 0; k0 < in.samples.samples; k0 += Traits::kLanes) {
    const int32_t k = k0 + group.rank();
    const auto own =
        show_chunk<fused, Traits>(group, in.samples, row, place.active, levels, in.value.tokens, softmax, k0, board);
    const auto grad = own_gradient<fused>(group, in, place, lane, board, own);
    if constexpr (fused) {
      if (in.grads.reference) {
        add_reference_gradients(group, in, levels, place, own, grad, k0);
      }
    }
    if (own.real) {
      store_sample_gradient<fused>(in, first + k, own, grad);
      if constexpr (fused) {
        products[k] = grad.weight;
        total += own.weight * grad.weight;
      }
    }
    group.sync();  // before the next chunk overwrites the board
  }
  return total;
}

// All gradients of one query under one head. `products` has a place for each sample, of the fused op only.
template <bool fused, typename Traits, typename Group>
SSOD_HD void attend_row_backward(Group& group, const BackwardInput<Traits>& in,
                                 const SampledLevel<typename Traits::T>* levels, const SampleRow& place,
                                 BoardOf<Traits>& board, typename Traits::T* products) {
  using T = typename Traits::T;
  const RowOf<Traits> row = row_input(in.samples, place);
  if constexpr (!fused) {
    sample_gradients<fused>(group, in, row, levels, place, SoftmaxRow<T>{}, board, products);
  } else {
    const int64_t row_head = place.row * in.samples.heads + place.head;
    const SoftmaxRow<T> softmax{in.lse[row_head], T(1), T(0)};
    if (in.grads.reference) {
      clear_reference_gradients(group, in, place);
    }
    T total = sample_gradients<fused>(group, in, row, levels, place, softmax, board, products);
    total = group_sum<Traits::kLanes>(group, total);
    for (int32_t k = group.rank(); place.active && k < in.samples.samples; k += Traits::kLanes) {
      const T weight = std::exp(row.weights.template load<T>(k) - softmax.shift);
      in.grads.weights.store(row_head * in.samples.samples + k, weight * (products[k] - total));
    }
  }
}

}  // namespace ssod
