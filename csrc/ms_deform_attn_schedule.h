// Which queries a block of threads takes in multi-scale deformable attention. Scheduling alone: no result depends on
// it.
#pragma once

#include "ms_deform_attn_samples.h"
#include "strip_order.h"

namespace ssod {

// Pixels of a tile of queries that a block walks through, about 8 x 8.
constexpr int32_t kTileQueries = 64;
constexpr int64_t kMaxStripTokens = int64_t{1} << 28;  // eight rows of them fit 32 bits

struct RowSchedule {
  int32_t queries, images, heads;
  int32_t per_block;  // queries under one head
  bool strips;        // queries may be the tokens of the pyramid: neighbours share what they read

  SSOD_HD int32_t tiles() const { return (queries - 1) / per_block + 1; }
  SSOD_HD int64_t blocks() const { return int64_t{tiles()} * heads * images; }
};

// At least one row of each; fewer than 2^31 queries. `rows_at_once` rows fit a block of threads.
inline RowSchedule make_row_schedule(int64_t images, int64_t queries, int64_t heads, int64_t tokens,
                                     int32_t rows_at_once) {
  const bool strips = queries == tokens && tokens < kMaxStripTokens;
  const int32_t per_block = strips && rows_at_once < kTileQueries ? kTileQueries : rows_at_once;
  return {static_cast<int32_t>(queries), static_cast<int32_t>(images), static_cast<int32_t>(heads), per_block, strips};
}

// The rows of one block: blocks follow each other along the queries, then the heads, then the images.
struct BlockRows {
  int32_t image, head;
  int32_t first;  // position of its first query
  bool strips;    // the levels do cover the queries
};

template <typename T>
SSOD_HD BlockRows block_rows(const RowSchedule& schedule, uint32_t block, const SampledLevel<T>* levels,
                             int32_t level_count) {
  const auto tiles = static_cast<uint32_t>(schedule.tiles()), heads = static_cast<uint32_t>(schedule.heads);
  const uint32_t outer = block / tiles, image = outer / heads;
  const bool strips = schedule.strips && levels_cover(levels, level_count, schedule.queries);
  return {static_cast<int32_t>(image), static_cast<int32_t>(outer - image * heads),
          static_cast<int32_t>(block - outer * tiles) * schedule.per_block, strips};
}

// Row `position` of a block. Beyond the last query: that query again, inactive.
template <typename T>
SSOD_HD SampleRow scheduled_row(const RowSchedule& schedule, const BlockRows& block, int32_t position,
                                const SampledLevel<T>* levels) {
  const int32_t left = schedule.queries - block.first;
  const int32_t place = block.first + (position < left ? position : left - 1);
  const int32_t query = block.strips ? pyramid_token(place, levels) : place;
  return {int64_t{block.image} * schedule.queries + query, block.image, block.head, position < left};
}

}  // namespace ssod
