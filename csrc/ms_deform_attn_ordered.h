// The gradient of value without atomics: a block owns a run of tokens and goes through all samples that may touch them
// in a fixed order, so that the result is the same bits every time. See ms_deform_attn_rows.h for groups of lanes.
#pragma once

#include "ms_deform_attn_rows.h"

namespace ssod {

template <typename Traits>
struct OrderedInput {
  using T = typename Traits::T;
  InputOf<Traits> samples;
  int64_t queries;
  int32_t tokens, channels;
  const typename Traits::V* grad_output;  // [rows, M * C]
  const T* lse;                           // [rows, M], of the fused op
};

// Tokens of one image under one head that a block owns, and a slab of their channels, one per lane.
struct OwnedTokens {
  int32_t image, head;
  int32_t first, count;
  int32_t channel;  // of the first lane
};

// Samples of one level, one query after the other.
struct LevelSamples {
  int32_t level, first, points;
};

// Whether a corner of the level may be one of the tokens.
template <typename T>
SSOD_HD bool may_touch(const SampledLevel<T>& level, const OwnedTokens& own) {
  return !level.fits || (level.start < int64_t{own.first} + own.count && own.first < level.start + level.size());
}

// Sample i of a level, with its weight.
template <bool fused, typename Traits>
SSOD_HD OwnSample<typename Traits::T> ordered_sample(const OrderedInput<Traits>& in,
                                                     const SampledLevel<typename Traits::T>* levels, int32_t image,
                                                     int32_t head, const LevelSamples& run, int64_t i) {
  const int64_t query = i / run.points;
  const auto k = static_cast<int32_t>(run.first + i - query * run.points);
  const SampleRow place{image * in.queries + query, image, head, true};
  return weighted_sample<fused>(in.samples, in.lse, levels, in.tokens, place, k);
}

// Whether a corner that counts is one of the tokens.
template <typename T>
SSOD_HD bool touches(const CornerRows<T>& rows, const OwnedTokens& own) {
  bool any = false;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    any = any | in_range<int32_t>(rows.row[c] - own.first, own.count);
  }
  return any;
}

// sums[token, lane] of the samples begin <= i < end of one level. A chunk of samples, one per lane, is located at a
// time; then all lanes add those that touch the tokens, in order, each for its channel.
template <bool fused, typename Traits, typename Group>
SSOD_HD void add_in_order(Group& group, const OrderedInput<Traits>& in, const SampledLevel<typename Traits::T>* levels,
                          const OwnedTokens& own, const LevelSamples& run, int64_t begin, int64_t end,
                          BoardOf<Traits>& board, typename Traits::T* sums) {
  using T = typename Traits::T;
  const int32_t channel = own.channel + group.rank();
  const bool owns = channel < in.channels;
  const int64_t width = int64_t{in.samples.heads} * in.channels;
  const typename Traits::V* grad = in.grad_output + (own.image * in.queries * width + own.head * in.channels) + channel;
  for (int64_t chunk = begin; chunk < end; chunk += Traits::kLanes) {
    const int64_t i = chunk + group.rank();
    OwnSample<T> sample{};
    if (i < end) {
      sample = ordered_sample<fused>(in, levels, own.image, own.head, run, i);
    }
    board.put(0, group.rank(), sample);
    uint32_t hits = group.ballot(touches(board.rows[board.slot(0, group.rank())], own));
    group.sync();
    for (int j = 0; hits != 0; ++j, hits >>= 1) {
      if (!(hits & 1) || !owns) {
        continue;
      }
      T g;
      Traits::Memory::template load_if<1>(true, grad + (chunk + j) / run.points * width, &g);
      const auto rows = board.rows[board.slot(0, j)];
      const auto shares = board.shares[board.slot(0, j)];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int32_t token = rows.row[c] - own.first;
        if (in_range<int32_t>(token, own.count)) {
          sums[token * Traits::kLanes + group.rank()] += shares.share[c] * g;
        }
      }
    }
    group.sync();  // before the next chunk overwrites the board
  }
}

// The part `part` of `parts` of the samples of all levels.
template <bool fused, typename Traits, typename Group>
SSOD_HD void add_part_in_order(Group& group, const OrderedInput<Traits>& in,
                               const SampledLevel<typename Traits::T>* levels, const OwnedTokens& own, int part,
                               int parts, BoardOf<Traits>& board, typename Traits::T* sums) {
  for (int32_t l = 0; l < in.samples.levels; ++l) {
    const LevelSamples run{l, levels[l].first_sample, levels[l].points};
    if (run.points > 0 && may_touch(levels[l], own)) {
      const int64_t count = in.queries * run.points, share = (count + parts - 1) / parts;
      const int64_t begin = part * share, end = begin + share < count ? begin + share : count;
      add_in_order<fused>(group, in, levels, own, run, begin, end, board, sums);
    }
  }
}

}  // namespace ssod
