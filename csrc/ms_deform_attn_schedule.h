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
  int64_t queries;
  int32_t images, heads;
  int32_t per_block;  // queries under one head
  bool strips;        // queries may be the tokens of the pyramid: neighbours share what they read

  SSOD_HD int64_t tiles() const { return (queries + per_block - 1) / per_block; }
  SSOD_HD int64_t blocks() const { return tiles() * heads * images; }
};

// `rows_at_once` rows fit a block of threads.
inline RowSchedule make_row_schedule(int64_t images, int64_t queries, int64_t heads, int64_t tokens,
                                     int32_t rows_at_once) {
  const bool strips = queries == tokens && tokens < kMaxStripTokens;
  const int32_t per_block = strips && rows_at_once < kTileQueries ? kTileQueries : rows_at_once;
  return {queries, static_cast<int32_t>(images), static_cast<int32_t>(heads), per_block, strips};
}

// Row `position` of a block; blocks follow each other along the queries, then the heads, then the images. `strips` says
// that the levels cover the queries. Beyond the last query: that query again, inactive.
template <typename T>
SSOD_HD SampleRow scheduled_row(const RowSchedule& schedule, int64_t block, int32_t position, bool strips,
                                const SampledLevel<T>* levels) {
  const int64_t tiles = schedule.tiles(), outer = block / tiles;
  const int64_t wanted = (block - outer * tiles) * schedule.per_block + position;
  const bool active = wanted < schedule.queries;
  const int64_t place = active ? wanted : schedule.queries - 1;
  const int64_t query = strips ? pyramid_token(place, levels) : place;
  const auto image = static_cast<int32_t>(outer / schedule.heads);
  const auto head = static_cast<int32_t>(outer - int64_t{image} * schedule.heads);
  return {image * schedule.queries + query, image, head, active};
}

}  // namespace ssod
