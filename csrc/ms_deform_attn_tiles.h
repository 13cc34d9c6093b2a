// The gradient of value with few atomics in memory, for queries that are the tokens of the pyramid: a block sums what
// its tile of neighbouring queries gives to a token before memory sees it.
//
// Level by level, a block sorts the corners of the samples of its tile by bucket, position modulo 32 x 32 pixels, with
// integer counters in shared memory. Then groups of lanes take equal parts of the sorted corners: a group adds up in
// registers what follows each other for one token, each lane for channels of its own, and one vector atomic ends the
// run. Nothing is assumed of where samples lie: what lies 32 pixels apart meets in a bucket, which makes runs shorter
// and no sum wrong. No sum is kept in shared memory, where float atomics are loops of compare and swap on sm_90, and
// where a window of 24 x 24 tokens of 32 channels would take 74 KB.
//
// The closer together the samples of neighbouring queries lie, the longer the runs and the fewer the atomics. In
// return, positions, weights and the incoming gradient are read once more, and a corner costs shared memory a counter,
// 8 bytes written and read, and its row of the incoming gradient.
#pragma once

#include "ms_deform_attn_rows.h"
#include "ms_deform_attn_schedule.h"

namespace ssod {

constexpr int32_t kBucketSide = 32, kBuckets = kBucketSide * kBucketSide;
constexpr int kTileSamples = 2;  // per thread, that are sorted at a time

// Threads of a block, threads that swap values without a barrier, and queries of a tile, a power of two.
template <int threads, int warp, int rows>
struct TileShape {
  static constexpr int kThreads = threads, kWarp = warp, kRows = rows;
  static constexpr int kChunk = kTileSamples * threads;             // samples that are sorted at a time
  static constexpr int64_t kMaxTokens = (int64_t{1} << 32) / rows;  // that a CornerEntry tells apart
  static_assert(kBuckets % threads == 0 && threads % warp == 0 && (rows & (rows - 1)) == 0);
  static_assert(4 * kChunk <= (1 << 16) && kBuckets <= (1 << 16));
};

// A block of threads is a team (csrc/team.h) without reduce, and with
//   T swap(T value, int distance)    the value of the thread rank() ^ distance, for distances within a warp;
//   int32_t next(int32_t& counter)   counts up, one thread at a time, and returns the number before.
// Traits::Memory (see ms_deform_attn_rows.h) has also copy<kVector>(V* to, const V* from), `to` in shared memory, and
// widen<kVector>(const V* from, T* to), `from` in shared memory.
template <typename Traits>
struct TileInput {
  using T = typename Traits::T;
  InputOf<Traits> samples;
  RowSchedule schedule;
  int32_t tokens, channels;
  const typename Traits::V* grad_output;  // [rows, M * C]
  const T* lse;                           // [rows, M], of the fused op
  T* grad_value;                          // [B, S, M, C], added to
};

// The queries of one block, and a slab of the channels of their head, kVector per lane.
struct Tile {
  int32_t image, head;
  int32_t rows;
  int32_t channel;  // of the first lane
};

// What a corner of a sample gives to a token: share times the incoming gradient of a row of the tile.
template <typename T>
struct alignas(2 * sizeof(T)) CornerEntry {
  uint32_t place;  // token * rows of a tile + row
  T share;
};

// Shared memory of a block.
template <typename Traits, typename Shape>
struct TileBoard {
  static constexpr int kWidth = Traits::kLanes * Traits::kVector;
  CornerEntry<typename Traits::T> entries[4 * Shape::kChunk];   // sorted
  alignas(16) typename Traits::V grads[Shape::kRows * kWidth];  // grad_output of every row
  alignas(16) int32_t buckets[kBuckets];                        // number of corners, then place of the first one
  int64_t rows[Shape::kRows];                                   // image * queries + query
  int32_t warps[Shape::kThreads / Shape::kWarp];
};

// A sample between the steps of sorting.
template <typename T>
struct SortedSample {
  int32_t inside;  // as in Footprint
  T fx, fy, weight;
  uint32_t place;     // of the first corner, as in CornerEntry modulo 2^32
  uint32_t slots[4];  // bucket << 16 | rank among the corners of the bucket
};

// Neighbours in either direction lie in different banks.
SSOD_HD uint32_t bucket_of(uint32_t y, uint32_t x) { return y % kBucketSide * kBucketSide + (x + 4 * y) % kBucketSide; }

// Tokens from the first corner to corner c, modulo 2^32.
SSOD_HD uint32_t corner_step(int c, int32_t row_width) { return (c & 1) + (c >> 1) * static_cast<uint32_t>(row_width); }

// Counts the corners of a sample that count, and remembers which of its bucket each is.
template <typename Shape, typename Block, typename T>
SSOD_HD SortedSample<T> count_corners(Block& block, const OwnSample<T>& own, const SampledLevel<T>& level, uint32_t row,
                                      int32_t* buckets) {
  const auto token = static_cast<uint32_t>(own.at.row);
  SortedSample<T> sample{own.at.inside, own.at.fx, own.at.fy, own.weight, token * Shape::kRows + row, {}};
  const int some = sample.inside & 1 ? 0 : sample.inside & 2 ? 1 : sample.inside & 4 ? 2 : 3;  // one that is inside
  const uint32_t width = level.row_width ? static_cast<uint32_t>(level.row_width) : 1;
  const uint32_t at = token + corner_step(some, level.row_width) - static_cast<uint32_t>(level.start);
  const uint32_t y = at / width, top = y - (some >> 1), left = at - y * width - (some & 1);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (sample.inside >> c & 1) {
      const uint32_t bucket = bucket_of(top + (c >> 1), left + (c & 1));
      sample.slots[c] = bucket << 16 | static_cast<uint32_t>(block.next(buckets[bucket]));
    }
  }
  return sample;
}

// The buckets of one thread.
template <typename Shape, typename Board>
SSOD_HD int32_t* own_buckets(int rank, Board& board) {
  return board.buckets + rank * (kBuckets / Shape::kThreads);
}

template <typename Shape, typename Board>
SSOD_HD void clear_buckets(int rank, Board& board) {
  int32_t* own = own_buckets<Shape>(rank, board);
#pragma unroll
  for (int i = 0; i < kBuckets / Shape::kThreads; ++i) {
    own[i] = 0;
  }
}

// Numbers of corners in the buckets of the threads before this one, and in all.
struct CornerCount {
  int32_t before, total;
};

template <typename Shape, typename Block, typename Board>
SSOD_HD CornerCount count_before(Block& block, Board& board) {
  const int32_t* own = own_buckets<Shape>(block.rank(), board);
  CornerCount count{};
  int32_t sum = 0;  // of twice as many threads at every distance
#pragma unroll
  for (int i = 0; i < kBuckets / Shape::kThreads; ++i) {
    sum += own[i];
  }
#pragma unroll
  for (int distance = 1; distance < Shape::kWarp; distance *= 2) {
    const int32_t other = block.swap(sum, distance);
    count.before += block.rank() & distance ? other : 0;
    sum += other;
  }
  const int warp = block.rank() / Shape::kWarp;
  if (block.rank() % Shape::kWarp == 0) {
    board.warps[warp] = sum;
  }
  block.sync();
#pragma unroll
  for (int other = 0; other < Shape::kThreads / Shape::kWarp; ++other) {
    count.before += other < warp ? board.warps[other] : 0;
    count.total += board.warps[other];
  }
  return count;
}

// Makes of the number of corners of every bucket the place of its first one. Returns the number of all corners.
template <typename Shape, typename Block, typename Board>
SSOD_HD int32_t order_buckets(Block& block, Board& board) {
  CornerCount count = count_before<Shape>(block, board);
  int32_t* own = own_buckets<Shape>(block.rank(), board);
#pragma unroll
  for (int i = 0; i < kBuckets / Shape::kThreads; ++i) {
    const int32_t corners = own[i];
    own[i] = count.before;
    count.before += corners;
  }
  block.sync();
  return count.total;
}

template <typename Shape, typename T, typename Board>
SSOD_HD void place_corners(const SortedSample<T>& sample, int32_t row_width, Board& board) {
  const CornerShares<T> all = corner_shares(sample.fx, sample.fy, sample.weight);
  const T shares[4] = {all.w00, all.w01, all.w10, all.w11};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (sample.inside >> c & 1) {
      const int32_t to = board.buckets[sample.slots[c] >> 16] + static_cast<int32_t>(sample.slots[c] & 0xffff);
      board.entries[to] = {sample.place + corner_step(c, row_width) * Shape::kRows, shares[c]};
    }
  }
}

// Sample i of those of a level, query by query of the tile, with its weight.
template <bool fused, typename Shape, typename Traits>
SSOD_HD OwnSample<typename Traits::T> tile_sample(const TileInput<Traits>& in,
                                                  const SampledLevel<typename Traits::T>* levels, const Tile& tile,
                                                  const SampledLevel<typename Traits::T>& level, int32_t i,
                                                  const TileBoard<Traits, Shape>& board) {
  const int32_t row = i / level.points, k = level.first_sample + i - row * level.points;
  const SampleRow place{board.rows[row], tile.image, tile.head, true};
  return weighted_sample<fused>(in.samples, in.lse, levels, in.tokens, place, k);
}

// Sorts the corners of the samples first, first + 1, ... of a level, at most kChunk of them, into the entries of the
// board, whose buckets are 0 before and after. Returns the number of corners.
template <bool fused, typename Shape, typename Traits, typename Block>
SSOD_HD int32_t sort_corners(Block& block, const TileInput<Traits>& in, const SampledLevel<typename Traits::T>* levels,
                             const Tile& tile, const SampledLevel<typename Traits::T>& level, int32_t first,
                             TileBoard<Traits, Shape>& board) {
  SortedSample<typename Traits::T> samples[kTileSamples];
#pragma unroll
  for (int s = 0; s < kTileSamples; ++s) {
    const int32_t i = first + s * Shape::kThreads + block.rank();
    samples[s].inside = 0;
    if (i < tile.rows * level.points) {
      const auto own = tile_sample<fused>(in, levels, tile, level, i, board);
      samples[s] = count_corners<Shape>(block, own, level, static_cast<uint32_t>(i / level.points), board.buckets);
    }
  }
  block.sync();
  const int32_t corners = order_buckets<Shape>(block, board);
#pragma unroll
  for (int s = 0; s < kTileSamples; ++s) {
    place_corners<Shape>(samples[s], level.row_width, board);
  }
  block.sync();
  clear_buckets<Shape>(block.rank(), board);
  return corners;
}

// What a lane has of the gradient of a token.
template <typename Traits>
struct TokenRun {
  uint32_t token;
  typename Traits::T sum[Traits::kVector];
};

// Where a lane adds: its first channel of token 0, and bytes from one token to the next.
template <typename T>
struct LaneTarget {
  T* first;
  uint32_t row_bytes;
};

template <typename Traits>
SSOD_HD void end_run(const TokenRun<Traits>& run, const LaneTarget<typename Traits::T>& target) {
  auto* row = at_row(target.first, static_cast<int32_t>(run.token), target.row_bytes);
  Traits::Memory::template add<Traits::kVector>(row, run.sum);
}

// Adds share * grad for a token, which may begin another run.
template <typename Traits>
SSOD_HD void extend_run(TokenRun<Traits>& run, const LaneTarget<typename Traits::T>& target, uint32_t token,
                        typename Traits::T share, const typename Traits::T* grad) {
  if (token != run.token) {
    end_run(run, target);
    run = {token, {}};
  }
#pragma unroll
  for (int i = 0; i < Traits::kVector; ++i) {
    run.sum[i] = multiply_add(share, grad[i], run.sum[i]);
  }
}

// Adds an equal part of the sorted corners to the gradient of value. Parts are odd, so that what the groups of a warp
// read at once lies in different banks.
template <typename Shape, typename Traits>
SSOD_HD void add_runs(int rank, const TileBoard<Traits, Shape>& board, int32_t corners,
                      const LaneTarget<typename Traits::T>& target) {
  using T = typename Traits::T;
  constexpr int kVector = Traits::kVector, kGroups = Shape::kThreads / Traits::kLanes;
  constexpr int kAhead = kVector < 8 ? 4 : 2;  // corners on their way
  const int32_t part = ((corners + kGroups - 1) / kGroups) | 1, begin = rank / Traits::kLanes * part;
  const int32_t end = begin + part < corners ? begin + part : corners;
  if (begin >= end) {
    return;
  }
  const typename Traits::V* grads = board.grads + rank % Traits::kLanes * kVector;
  TokenRun<Traits> run{board.entries[begin].place / Shape::kRows, {}};
  for (int32_t i = begin; i < end; i += kAhead) {
    CornerEntry<T> entries[kAhead];
    T grad[kAhead][kVector];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      entries[u] = board.entries[i + u < end ? i + u : i];
      Traits::Memory::template widen<kVector>(grads + entries[u].place % Shape::kRows * board.kWidth, grad[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u < end) {
        extend_run(run, target, entries[u].place / Shape::kRows, entries[u].share, grad[u]);
      }
    }
  }
  end_run(run, target);
}

// The first channel of a lane in a row of all heads, or -1: it has none.
template <typename Traits>
SSOD_HD int64_t lane_channel(const TileInput<Traits>& in, const Tile& tile, int lane) {
  const int32_t channel = tile.channel + lane * Traits::kVector;
  return channel < in.channels ? int64_t{tile.head} * in.channels + channel : -1;
}

// Puts the queries of a block and a slab of their incoming gradient on the board, and clears it.
template <typename Shape, typename Traits, typename Block>
SSOD_HD Tile open_tile(Block& block, const TileInput<Traits>& in, const BlockRows& rows, int32_t slab,
                       const SampledLevel<typename Traits::T>* levels, TileBoard<Traits, Shape>& board) {
  const int32_t left = in.schedule.queries - rows.first;
  const Tile tile{rows.image, rows.head, left < Shape::kRows ? left : Shape::kRows, slab * board.kWidth};
  for (int32_t row = block.rank(); row < tile.rows; row += Shape::kThreads) {
    board.rows[row] = scheduled_row(in.schedule, rows, row, levels).row;
  }
  clear_buckets<Shape>(block.rank(), board);
  block.sync();
  const int64_t width = int64_t{in.samples.heads} * in.channels,
                channel = lane_channel(in, tile, block.rank() % Traits::kLanes);
  for (int32_t i = block.rank(); i < tile.rows * Traits::kLanes && channel >= 0; i += Shape::kThreads) {
    const auto* from = in.grad_output + board.rows[i / Traits::kLanes] * width + channel;
    Traits::Memory::template copy<Traits::kVector>(board.grads + i * Traits::kVector, from);
  }
  return tile;
}

// Adds a slab of what the queries of a block give to the gradient of value.
template <bool fused, typename Shape, typename Traits, typename Block>
SSOD_HD void add_tile(Block& block, const TileInput<Traits>& in, const BlockRows& rows, int32_t slab,
                      const SampledLevel<typename Traits::T>* levels, TileBoard<Traits, Shape>& board) {
  using T = typename Traits::T;
  const Tile tile = open_tile(block, in, rows, slab, levels, board);
  const int64_t width = int64_t{in.samples.heads} * in.channels,
                channel = lane_channel(in, tile, block.rank() % Traits::kLanes);
  const LaneTarget<T> target{in.grad_value + int64_t{tile.image} * in.tokens * width + channel,
                             static_cast<uint32_t>(width * sizeof(T))};
  for (int32_t l = 0; l < in.samples.levels; ++l) {
    for (int32_t first = 0; first < tile.rows * levels[l].points; first += Shape::kChunk) {
      const int32_t corners = sort_corners<fused>(block, in, levels, tile, levels[l], first, board);
      if (channel >= 0) {
        add_runs(block.rank(), board, corners, target);
      }
      block.sync();  // before the next corners are counted, and sorted into the entries
    }
  }
}

}  // namespace ssod
