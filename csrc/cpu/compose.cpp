// compose_images and cache_write on the CPU. One pass: each source row is resampled horizontally once and kept while
// the output rows need it; each output pixel is written once.
#include "compose.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "compose_axis.h"
#include "compose_rows.h"

namespace ssod {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr int kChannels = 3;
constexpr int64_t kGrainRows = 32;  // about 0.1 ms of work at 1333 columns

// One source image, any strides; they count elements.
struct Image {
  const char* data;
  int64_t stride_c, stride_y, stride_x;
  int32_t height, width;
};

// Everything that the canvases have in common.
struct Mix {
  std::vector<Image> images;
  ScalarType dtype;  // of the sources
  int64_t element_size;
  const int32_t* canvas;  // [B, 2]
  const Place* places;    // [B, K]
  const Scales* scales;   // [B, K]
  const Rect* erase;      // [B, K, E]
  const Rect* erase_canvas;
  int64_t num_canvases, num_places, num_erase, num_erase_canvas;
  int64_t out_h, out_w;
  float mean[kChannels], std[kChannels], blank[kChannels];  // blank: the normalised fill colour
  int channel[kChannels];                                   // source channel of each output channel
  Interp interp;
  bool over;
  float pad_value;
};

template <typename T>
void widen(float* dst, const T* src, int64_t stride, int64_t n) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (stride == 1) return rows::widen_bytes(dst, src, n);
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i * stride]);
}

class PlacedSource {
 public:
  PlacedSource(const Mix& mix, int64_t index)
      : mix_(mix), place_(mix.places[index]), scales_(mix.scales[index]), erase_(mix.erase + index * mix.num_erase) {
    if (!place_.used()) return;
    image_ = mix.images[place_.src];
    const Local column{place_.x0, place_.off_x, place_.out_w, place_.flip_x()};
    const Local row{place_.y0, place_.off_y, place_.out_h, place_.flip_y()};
    columns_ = make_axis(place_.x1 - place_.x0, column, scales_.inv_x, image_.width, mix.interp);
    rows_ = make_axis(place_.y1 - place_.y0, row, scales_.inv_y, image_.height, mix.interp);
    cached_row_.assign(rows_.taps, -1);
    cache_.resize(rows_.taps * kChannels * columns_.n);
    wide_.resize(columns_.last - columns_.first + 1);
    packed_.resize(wide_.size());
    if (rows_.taps > 1 && !rows_.linear) blended_.resize(columns_.n);
  }

  const Place& place() const { return place_; }
  float weight() const { return scales_.weight; }

  // weight * normalised sample of the canvas pixels (x0..x1, y), erased where the plan says so.
  void sample(float* dst, int64_t y, int c, int32_t x0, int32_t x1, float weight) {
    const int64_t i = y - place_.y0, skip = x0 - place_.x0, n = x1 - x0;
    const rows::Normal normal{mix_.mean[c], mix_.std[c], weight};
    if (rows_.taps == 1) {
      rows::normalise(dst, row(rows_.at(0, i), c) + skip, normal, n);
    } else if (rows_.linear) {
      const float* upper = row(rows_.at(0, i), c) + skip;
      const float t = rows_.weight[i];
      if (t == 0.0f) {
        rows::normalise(dst, upper, normal, n);
      } else {
        rows::normalise_linear(dst, upper, row(rows_.at(1, i), c) + skip, t, normal, n);
      }
    } else {
      rows::fill(blended_.data(), 0.0f, n);
      for (int tap = 0; tap < rows_.taps; ++tap) {
        const float w = rows_.weight_at(tap, i);
        if (w != 0.0f) rows::add_scaled(blended_.data(), row(rows_.at(tap, i), c) + skip, w, n);
      }
      rows::normalise(dst, blended_.data(), normal, n);
    }
    erase(dst, y, x0, x1, weight * mix_.blank[c]);
  }

 private:
  void erase(float* dst, int64_t y, int32_t x0, int32_t x1, float value) const {
    for (int32_t e = 0; e < place_.n_erase; ++e) {
      const Rect& r = erase_[e];
      if (y < int64_t{r.y0} + place_.off_y || y >= int64_t{r.y1} + place_.off_y) continue;
      const int64_t begin = std::max<int64_t>(int64_t{r.x0} + place_.off_x, x0);
      const int64_t end = std::min<int64_t>(int64_t{r.x1} + place_.off_x, x1);
      if (end > begin) rows::fill(dst + (begin - x0), value, end - begin);
    }
  }

  // Row y of output channel c of the source, resampled to all visible columns. A few neighbouring rows are kept.
  const float* row(int32_t y, int c) {
    const int64_t slot = y % rows_.taps, n = columns_.n;
    float* kept = cache_.data() + slot * kChannels * n;
    if (cached_row_[slot] != y) {
      cached_row_[slot] = y;
      if (mix_.dtype == ScalarType::Byte && !columns_.run) {
        resample_bytes(kept, kept + n, kept + 2 * n, y);
      } else {
        for (int channel = 0; channel < kChannels; ++channel) resample(kept + channel * n, y, channel);
      }
    }
    return kept + c * n;
  }

  void resample(float* dst, int32_t y, int c) {
    if (columns_.run) return widen_row(dst, y, c);
    widen_row(wide_.data(), y, c);
    const float* src = wide_.data() - columns_.first;
    const int32_t* index = columns_.index.data();
    const float* weight = columns_.weight.data();
    const int64_t n = columns_.n;
    if (columns_.taps == 1) return rows::gather(dst, src, index, n);
    if (columns_.linear) return rows::gather_linear(dst, src, index, index + n, weight, n);
    rows::fill(dst, 0.0f, n);
    for (int tap = 0; tap < columns_.taps; ++tap) rows::gather_add(dst, src, index + tap * n, weight + tap * n, n);
  }

  void resample_bytes(float* d0, float* d1, float* d2, int32_t y) {
    pack_row(y);
    const uint32_t* src = packed_.data() - columns_.first;
    const int32_t* index = columns_.index.data();
    const float* weight = columns_.weight.data();
    const int64_t n = columns_.n;
    if (columns_.taps == 1) return rows::gather(d0, d1, d2, src, index, n);
    if (columns_.linear) return rows::gather_linear(d0, d1, d2, src, index, index + n, weight, n);
    for (float* dst : {d0, d1, d2}) rows::fill(dst, 0.0f, n);
    for (int tap = 0; tap < columns_.taps; ++tap) {
      rows::gather_add(d0, d1, d2, src, index + tap * n, weight + tap * n, n);
    }
  }

  // First byte or value that is read of row y, channel c.
  const char* begin_of(int32_t y, int c) const {
    const int64_t offset = mix_.channel[c] * image_.stride_c + y * image_.stride_y + columns_.first * image_.stride_x;
    return image_.data + offset * mix_.element_size;
  }

  void pack_row(int32_t y) {
    const uint8_t* src[kChannels];
    for (int c = 0; c < kChannels; ++c) src[c] = reinterpret_cast<const uint8_t*>(begin_of(y, c));
    const int64_t n = static_cast<int64_t>(packed_.size());
    if (image_.stride_x == 1) {
      rows::pack_bytes(packed_.data(), src[0], src[1], src[2], n);
    } else {
      rows::pack_bytes_strided(packed_.data(), src[0], src[1], src[2], image_.stride_x, n);
    }
  }

  // The columns that are read, as floats.
  void widen_row(float* dst, int32_t y, int c) const {
    const int64_t n = columns_.last - columns_.first + 1;
    const char* src = begin_of(y, c);
    switch (mix_.dtype) {
      case ScalarType::Byte:
        return widen(dst, reinterpret_cast<const uint8_t*>(src), image_.stride_x, n);
      case ScalarType::Half:
        return widen(dst, reinterpret_cast<const rows::Half*>(src), image_.stride_x, n);
      case ScalarType::BFloat16:
        return widen(dst, reinterpret_cast<const rows::BFloat16*>(src), image_.stride_x, n);
      default:
        return widen(dst, reinterpret_cast<const float*>(src), image_.stride_x, n);
    }
  }

  const Mix& mix_;
  const Place& place_;
  const Scales& scales_;
  const Rect* erase_;
  Image image_{};
  Axis columns_, rows_;
  std::vector<int32_t> cached_row_;  // source row in each slot of cache_
  std::vector<float> cache_;         // [taps of rows_, channel, column]
  std::vector<float> wide_, blended_;
  std::vector<uint32_t> packed_;
};

class Canvas {
 public:
  Canvas(const Mix& mix, int64_t b)
      : mix_(mix),
        height_(mix.canvas[2 * b]),
        width_(mix.canvas[2 * b + 1]),
        erase_(mix.erase_canvas + b * mix.num_erase_canvas),
        scratch_(mix.out_w) {
    sources_.reserve(mix.num_places);
    for (int64_t k = 0; k < mix.num_places; ++k) sources_.emplace_back(mix, b * mix.num_places + k);
  }

  // Writes row y of all channels; dst holds one row of out_w values per channel.
  void write_row(int64_t y, float* const dst[kChannels]) {
    const int64_t width = y < height_ ? width_ : 0;
    if (width > 0) find_segments(y);
    for (int c = 0; c < kChannels; ++c) {
      for (size_t s = 0; s + 1 < edges_.size() && width > 0; ++s) write_segment(dst[c], y, c, edges_[s], edges_[s + 1]);
      if (width > 0) erase(dst[c], y, c);
      rows::fill(dst[c] + width, mix_.pad_value, mix_.out_w - width);
    }
  }

 private:
  // The columns where the set of covering placements changes.
  void find_segments(int64_t y) {
    active_.clear();
    edges_ = {0, width_};
    for (PlacedSource& source : sources_) {
      if (!source.place().covers_row(static_cast<int32_t>(y))) continue;
      active_.push_back(&source);
      edges_.push_back(source.place().x0);
      edges_.push_back(source.place().x1);
    }
    std::sort(edges_.begin(), edges_.end());
    edges_.erase(std::unique(edges_.begin(), edges_.end()), edges_.end());
  }

  void write_segment(float* row, int64_t y, int c, int32_t x0, int32_t x1) {
    float* dst = row + x0;
    const auto covers = [&](const PlacedSource* s) { return s->place().x0 <= x0 && x1 <= s->place().x1; };
    if (mix_.over) {
      const auto top = std::find_if(active_.rbegin(), active_.rend(), covers);
      if (top == active_.rend()) return rows::fill(dst, mix_.blank[c], x1 - x0);
      return (*top)->sample(dst, y, c, x0, x1, 1.0f);
    }
    float total = 0.0f;
    int layers = 0;
    for (PlacedSource* source : active_) {
      if (!covers(source)) continue;
      source->sample(layers == 0 ? dst : scratch_.data(), y, c, x0, x1, source->weight());
      if (layers++ > 0) rows::add(dst, scratch_.data(), x1 - x0);
      total += source->weight();
    }
    const float rest = (1.0f - total) * mix_.blank[c];
    if (layers == 0) {
      rows::fill(dst, mix_.blank[c], x1 - x0);
    } else if (rest != 0.0f) {
      rows::add_value(dst, rest, x1 - x0);
    }
  }

  void erase(float* row, int64_t y, int c) const {
    for (int64_t e = 0; e < mix_.num_erase_canvas; ++e) {
      const Rect& r = erase_[e];
      if (y < r.y0 || y >= r.y1) continue;
      const int32_t x0 = std::max(r.x0, 0), x1 = std::min(r.x1, width_);
      if (x1 > x0) rows::fill(row + x0, mix_.blank[c], x1 - x0);
    }
  }

  const Mix& mix_;
  const int32_t height_, width_;
  const Rect* erase_;
  std::vector<PlacedSource> sources_;
  std::vector<PlacedSource*> active_;
  std::vector<int32_t> edges_;
  std::vector<float> scratch_;
};

// Rows of the result: planar float rows are written in place, all others through a buffer of floats.
template <typename T>
class Output {
 public:
  Output(T* data, const Mix& mix, bool channels_last)
      : data_(data), height_(mix.out_h), width_(mix.out_w), channels_last_(channels_last) {
    if (!in_place()) buffer_.resize(kChannels * width_);
  }

  void rows_of(int64_t b, int64_t y, float* dst[kChannels]) {
    for (int c = 0; c < kChannels; ++c) {
      if constexpr (std::is_same_v<T, float>) {
        dst[c] = in_place() ? planar(b, c, y) : buffer_.data() + c * width_;
      } else {
        dst[c] = buffer_.data() + c * width_;
      }
    }
  }

  void store(int64_t b, int64_t y) const {
    if (in_place()) return;
    const float* c0 = buffer_.data();
    if (channels_last_) {
      T* dst = data_ + (b * height_ + y) * width_ * kChannels;
      return rows::store_interleaved(dst, c0, c0 + width_, c0 + 2 * width_, width_);
    }
    for (int c = 0; c < kChannels; ++c) rows::store(planar(b, c, y), c0 + c * width_, width_);
  }

 private:
  bool in_place() const { return std::is_same_v<T, float> && !channels_last_; }
  T* planar(int64_t b, int c, int64_t y) const { return data_ + ((b * kChannels + c) * height_ + y) * width_; }

  T* data_;
  int64_t height_, width_;
  bool channels_last_;
  std::vector<float> buffer_;
};

template <typename T>
void write_canvases(T* data, const Mix& mix, bool channels_last) {
  torch::stable::parallel_for(0, mix.num_canvases * mix.out_h, kGrainRows, [&](int64_t begin, int64_t end) {
    Output<T> output(data, mix, channels_last);
    float* dst[kChannels];
    while (begin < end) {
      const int64_t b = begin / mix.out_h, stop = std::min(end, (b + 1) * mix.out_h);
      Canvas canvas(mix, b);
      for (; begin < stop; ++begin) {
        output.rows_of(b, begin % mix.out_h, dst);
        canvas.write_row(begin % mix.out_h, dst);
        output.store(b, begin % mix.out_h);
      }
    }
  });
}

const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

std::vector<Image> list_images(const std::vector<Tensor>& sources, const std::optional<Tensor>& sizes) {
  std::vector<Image> images;
  for (const Tensor& s : sources) {
    const int64_t d = s.dim() - 3;
    const Image image{bytes_of(s),
                      s.stride(d),
                      s.stride(d + 1),
                      s.stride(d + 2),
                      static_cast<int32_t>(s.size(d + 1)),
                      static_cast<int32_t>(s.size(d + 2))};
    for (int64_t n = 0; n < (d == 0 ? 1 : s.size(0)); ++n) {
      images.push_back(image);
      images.back().data += d == 0 ? 0 : n * s.stride(0) * static_cast<int64_t>(s.element_size());
    }
  }
  if (sizes) {
    const int32_t* hw = sizes->const_data_ptr<int32_t>();
    for (size_t i = 0; i < images.size(); ++i) {
      images[i].height = std::clamp(hw[2 * i], 1, images[i].height);
      images[i].width = std::clamp(hw[2 * i + 1], 1, images[i].width);
    }
  }
  return images;
}

Tensor compose_images(std::vector<Tensor> sources, std::optional<Tensor> sizes, Tensor canvas, Tensor place_i,
                      Tensor place_f, Tensor erase, Tensor erase_canvas, int64_t out_h, int64_t out_w,
                      std::vector<double> mean, std::vector<double> std, std::vector<double> fill, int64_t interp,
                      bool over, ScalarType out_dtype, double pad_value, bool channels_last, bool swap_rb) {
  for (Tensor* t : {&canvas, &place_i, &place_f, &erase, &erase_canvas}) *t = torch::stable::contiguous(*t);
  if (sizes) sizes = torch::stable::contiguous(*sizes);
  Mix mix{.images = list_images(sources, sizes),
          .dtype = sources.empty() ? ScalarType::Float : sources[0].scalar_type(),
          .element_size = sources.empty() ? 4 : static_cast<int64_t>(sources[0].element_size()),
          .canvas = canvas.const_data_ptr<int32_t>(),
          .places = reinterpret_cast<const Place*>(place_i.const_data_ptr<int32_t>()),
          .scales = reinterpret_cast<const Scales*>(place_f.const_data_ptr<float>()),
          .erase = reinterpret_cast<const Rect*>(erase.const_data_ptr<int32_t>()),
          .erase_canvas = reinterpret_cast<const Rect*>(erase_canvas.const_data_ptr<int32_t>()),
          .num_canvases = canvas.size(0),
          .num_places = place_i.size(1),
          .num_erase = erase.size(2),
          .num_erase_canvas = erase_canvas.size(1),
          .out_h = out_h,
          .out_w = out_w,
          .interp = static_cast<Interp>(interp),
          .over = over,
          .pad_value = static_cast<float>(pad_value)};
  for (int c = 0; c < kChannels; ++c) {
    mix.mean[c] = static_cast<float>(mean[c]);
    mix.std[c] = static_cast<float>(std[c]);
    mix.blank[c] = (static_cast<float>(fill[c]) - mix.mean[c]) / mix.std[c];
    mix.channel[c] = swap_rb ? kChannels - 1 - c : c;
  }
  const auto layout =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  Tensor out = torch::stable::empty({mix.num_canvases, kChannels, out_h, out_w}, out_dtype, std::nullopt,
                                    canvas.device(), std::nullopt, layout);
  THO_DISPATCH_V2(out_dtype, "compose_images",
                  AT_WRAP([&] { write_canvases(static_cast<scalar_t*>(out.mutable_data_ptr()), mix, channels_last); }),
                  ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte);
  return out;
}

void pack(char* dst, const Image& image, int64_t element_size) {
  for (int c = 0; c < kChannels; ++c) {
    for (int64_t y = 0; y < image.height; ++y) {
      const char* src = image.data + (c * image.stride_c + y * image.stride_y) * element_size;
      if (image.stride_x == 1) {
        std::memcpy(dst, src, image.width * element_size);
      } else {
        for (int64_t x = 0; x < image.width; ++x) {
          std::memcpy(dst + x * element_size, src + x * image.stride_x * element_size, element_size);
        }
      }
      dst += image.width * element_size;
    }
  }
}

void cache_write(Tensor ring, std::vector<Tensor> images, std::vector<int64_t> slots) {
  const int64_t element_size = static_cast<int64_t>(ring.element_size());
  char* data = static_cast<char*>(ring.mutable_data_ptr());
  const std::vector<Image> packed = list_images(images, std::nullopt);
  torch::stable::parallel_for(0, static_cast<int64_t>(packed.size()), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) pack(data + slots[begin] * ring.stride(0) * element_size, packed[begin], element_size);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) {
  m.impl("compose_images", TORCH_BOX(&compose_images));
  m.impl("cache_write", TORCH_BOX(&cache_write));
}

}  // namespace ssod
