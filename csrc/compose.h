// The plan of a mix as the kernels read it: columns of its tables.
#pragma once

#include <cstdint>

namespace ssod {

// One row of place_i.
struct Place {
  int32_t src;  // -1 = unused
  int32_t flip;
  int32_t off_x, off_y;    // canvas position of the resized source's corner
  int32_t x0, y0, x1, y1;  // visible rectangle on the canvas, half open
  int32_t out_w, out_h;    // resized size
  int32_t n_erase;

  bool used() const { return src >= 0 && x1 > x0 && y1 > y0; }
  bool covers_row(int32_t y) const { return used() && y0 <= y && y < y1; }
  bool flip_x() const { return (flip & 1) != 0; }
  bool flip_y() const { return (flip & 2) != 0; }
};
static_assert(sizeof(Place) == 11 * sizeof(int32_t));

// One row of place_f.
struct Scales {
  float inv_x, inv_y;  // source pixels per output pixel
  float box_sx, box_sy;
  float weight;
};
static_assert(sizeof(Scales) == 5 * sizeof(float));

struct Rect {
  int32_t x0, y0, x1, y1;  // half open
};

}  // namespace ssod
