// What a group of lanes does for one query under one head: templates over the group, so that tests/cpp runs with
// threads of the CPU what lanes of a warp run on a GPU.
//
// A chunk of samples, one per lane, is located by the lanes that own them and put on a board; then every lane reads the
// corners of all of them, for channels of its own. Sums over samples have one order whatever the launch.
//
// A group has
//   int rank() const            which lane of the group this is;
//   int index() const           which group of its warp this is;
//   void sync()                 a barrier of the group: what a lane wrote before it, every lane of the group sees;
//   T swap(T value, distance)   the value of the lane rank() ^ distance.
// All groups of a warp call them alike. `Traits` has
//   T, V                        compute type and type of value;
//   kLanes, kVector, kExact     lanes of a group; channels per lane and load; whether they are all channels there are;
//   Floats                      see SampleInput; for gradients also store(i, T) and store_pair(i, x, y);
//   Memory                      load_if<kVector>(bool, V*, T*), store<kVector>(V*, T*), add<kVector>(T*, T*), the last
//   atomic.
#pragma once

#include "ms_deform_attn_samples.h"

namespace ssod {

SSOD_HD float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

SSOD_HD double multiply_add(double a, double b, double c) { return a * b + c; }

template <typename Traits>
using BoardOf = SampleBoard<typename Traits::T, Traits::kLanes>;

template <typename Traits>
using InputOf = SampleInput<typename Traits::T, typename Traits::Floats>;

template <typename Traits>
using RowOf = RowInput<typename Traits::T, typename Traits::Floats>;

// value [B, S, M, C] with dense heads.
template <typename V>
struct TokenRows {
  const V* data;
  int64_t image_stride;  // elements
  uint32_t row_bytes;    // from one token to the next: 32 bits, so that an address is one multiply-add
  int32_t tokens, channels;
};

template <typename X>
SSOD_HD X* at_row(X* first, int32_t row, uint32_t row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<X>, const char, char>;
  const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes;
  return reinterpret_cast<X*>(reinterpret_cast<Byte*>(first) + offset);
}

// The channels of one lane: first, first + 1, ..., of `kVector`; in further slabs where a group does not hold them all.
template <typename Traits>
struct LaneChannels {
  static constexpr int kWidth = Traits::kLanes * Traits::kVector;

  SSOD_HD static int32_t slabs(int32_t channels) { return Traits::kExact ? 1 : (channels + kWidth - 1) / kWidth; }
  SSOD_HD static int32_t first(int32_t slab, int rank) {
    return (Traits::kExact ? 0 : slab * kWidth) + rank * Traits::kVector;
  }
  SSOD_HD static bool owns(int32_t channel, int32_t channels) { return Traits::kExact || channel < channels; }
};

// Sum over the lanes of a group, the same in each of them.
template <int kLanes, typename T, typename Group>
SSOD_HD T group_sum(Group& group, T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += group.swap(value, distance);
  }
  return value;
}

// Softmax of the logits of a row: a weight is exp(logit - shift) * scale.
template <typename T>
struct SoftmaxRow {
  T shift, scale, log_sum_exp;
};

template <typename Traits, typename Group>
SSOD_HD SoftmaxRow<typename Traits::T> softmax_row(Group& group, const RowOf<Traits>& row, int32_t samples) {
  using T = typename Traits::T;
  T maximum = minus_infinity<T>();
  for (int32_t k = group.rank(); k < samples; k += Traits::kLanes) {
    maximum = logit_maximum(maximum, row.weights.template load<T>(k));
  }
#pragma unroll
  for (int distance = Traits::kLanes / 2; distance > 0; distance /= 2) {
    maximum = logit_maximum(maximum, group.swap(maximum, distance));
  }
  const T shift = softmax_shift(maximum);
  T sum = 0;
  for (int32_t k = group.rank(); k < samples; k += Traits::kLanes) {
    sum += std::exp(row.weights.template load<T>(k) - shift);
  }
  sum = group_sum<Traits::kLanes>(group, sum);
  return {shift, T(1) / sum, log_sum_exp(maximum, std::log(sum))};
}

// Adds one sample of the board to the sums of a lane. `value` is the lane's first channel of token 0.
template <typename Traits>
SSOD_HD void add_sample(const BoardOf<Traits>& board, int slot, const typename Traits::V* value, uint32_t row_bytes,
                        bool owns, typename Traits::T* sum) {
  using T = typename Traits::T;
  const auto rows = board.rows[slot];
  const auto shares = board.shares[slot];
  T corner[4][Traits::kVector];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    Traits::Memory::template load_if<Traits::kVector>(owns && rows.row[c] >= 0, at_row(value, rows.row[c], row_bytes),
                                                      corner[c]);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int i = 0; i < Traits::kVector; ++i) {
      sum[i] = multiply_add(shares.share[c], corner[c][i], sum[i]);
    }
  }
}

// Locates the samples k0, k0 + 1, ... of a row, one per lane, and shows them. Returns the lane's own.
template <bool fused, typename Traits, typename Group>
SSOD_HD OwnSample<typename Traits::T> show_chunk(Group& group, const InputOf<Traits>& in, const RowOf<Traits>& row,
                                                 bool active, const SampledLevel<typename Traits::T>* levels,
                                                 int32_t tokens, const SoftmaxRow<typename Traits::T>& softmax,
                                                 int32_t k0, BoardOf<Traits>& board) {
  const int32_t k = k0 + group.rank();
  OwnSample<typename Traits::T> own{};
  if (active && k < in.samples) {
    const auto weight = row.weights.template load<typename Traits::T>(k);  // on its way while the sample is located
    own = locate_sample<fused>(in, row, levels, tokens, k);
    own.weight = weight;
    if constexpr (fused) {
      own.weight = std::exp(own.weight - softmax.shift) * softmax.scale;
    }
  }
  board.put(group.index(), group.rank(), own);
  group.sync();
  return own;
}

// out[row, head, :] for one slab of channels.
template <bool fused, typename Traits, typename Group>
SSOD_HD void attend_slab(Group& group, const InputOf<Traits>& in, const RowOf<Traits>& row,
                         const SampledLevel<typename Traits::T>* levels, const TokenRows<typename Traits::V>& value,
                         const SampleRow& place, const SoftmaxRow<typename Traits::T>& softmax, int32_t slab,
                         BoardOf<Traits>& board, typename Traits::V* out) {
  using Channels = LaneChannels<Traits>;
  constexpr int kUnroll = Traits::kLanes < 4 ? Traits::kLanes : 4;
  const int32_t channel = Channels::first(slab, group.rank());
  const bool owns = Channels::owns(channel, value.channels);
  const typename Traits::V* own_value =
      value.data + place.image * value.image_stride + int64_t{place.head} * value.channels + (owns ? channel : 0);
  typename Traits::T sum[Traits::kVector] = {};
  for (int32_t k0 = 0; k0 < in.samples; k0 += Traits::kLanes) {
    show_chunk<fused, Traits>(group, in, row, place.active, levels, value.tokens, softmax, k0, board);
    for (int32_t i = 0; i < Traits::kLanes && k0 + i < in.samples; i += kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {  // samples beyond the last one have no corners
        add_sample<Traits>(board, board.slot(group.index(), i + u), own_value, value.row_bytes, owns, sum);
      }
    }
    group.sync();  // before the next chunk overwrites the board
  }
  if (place.active && owns) {
    const int64_t row_head = place.row * in.heads + place.head;
    Traits::Memory::template store<Traits::kVector>(out + row_head * value.channels + channel, sum);
  }
}

// out [rows, M * C] and, of the fused op, lse [rows, M] of one query under one head.
template <bool fused, typename Traits, typename Group>
SSOD_HD void attend_row(Group& group, const InputOf<Traits>& in, const SampledLevel<typename Traits::T>* levels,
                        const TokenRows<typename Traits::V>& value, const SampleRow& place, BoardOf<Traits>& board,
                        typename Traits::V* out, typename Traits::T* lse) {
  const RowOf<Traits> row = row_input(in, place);
  SoftmaxRow<typename Traits::T> softmax{};
  if constexpr (fused) {
    softmax = softmax_row<Traits>(group, row, in.samples);
    if (place.active && group.rank() == 0) {
      lse[place.row * in.heads + place.head] = softmax.log_sum_exp;
    }
  }
  const int32_t slabs = LaneChannels<Traits>::slabs(value.channels);
  for (int32_t slab = 0; slab < slabs; ++slab) {
    attend_slab<fused, Traits>(group, in, row, levels, value, place, softmax, slab, board, out);
  }
}

}  // namespace ssod
