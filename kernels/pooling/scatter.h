// Pooled elements to the pixels of their indices (`scatter`), and back (`gather`), one element at a time. Windows of
// 2x2 without overlap are handled by quads.h, gradients of many interleaved channels by `spread` below.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "pooling/row_streams.h"
#include "pooling/windows.h"

namespace fastseg::pooling {

// How a pixel combines the elements of several indices, in the order of the pooled plane.
struct Add {
  template <typename value_t>
  static void combine(value_t value, value_t* pixel) {
    *pixel += value;
  }
};
struct Last {
  template <typename value_t>
  static void combine(value_t value, value_t* pixel) {
    *pixel = value;
  }
};

// Stores the first index found outside of the plane, if any: an exception must not leave a parallel region.
class Outside {
 public:
  bool any() const { return found_.load(std::memory_order_acquire); }
  void found(int64_t index) {
    index_.store(index, std::memory_order_relaxed);
    found_.store(true, std::memory_order_release);
  }
  void check(int64_t height, int64_t width) const {
    if (!any()) return;
    throw std::runtime_error("fastseg.ops.max_unpool2d: indices holds a position outside the plane, " +
                             std::to_string(index_.load(std::memory_order_relaxed)) + "; allowed: 0 to " +
                             std::to_string(height * width - 1) + " in a plane of " + std::to_string(height) + "x" +
                             std::to_string(width));
  }

 private:
  std::atomic<int64_t> index_{0};
  std::atomic<bool> found_{false};
};

// Calls body(state, number) for every plane, or for every image if pixels are interleaved. start() makes the state of a
// thread.
template <typename Start, typename Body>
void for_each_block(const Planes& planes, const Start& start, const Body& body) {
  const int64_t blocks = planes.channels_last ? planes.images : planes.images * planes.channels;
  parallel_slices(blocks, slice_count(blocks), [&](int64_t, int64_t begin, int64_t end) {
    auto state = start();
    for (int64_t number = begin; number < end; ++number) body(state, number);
  });
}

// The indices of one image or plane as positions in the plane, row by row; -1 for an offset that is no pixel of its
// window and for an index of a window without a pixel.
template <typename index_t>
class Places {
 public:
  // windows: of the indices, null for int64 indices without known windows; channels: interleaved ones
  Places(const Windows* windows, int64_t columns, int64_t channels)
      : windows_(windows), columns_(columns), channels_(channels),
        as_they_are_(sizeof(index_t) == 8 && (!windows || (windows->y.dilation == 1 && windows->x.dilation == 1))),
        row_(as_they_are_ ? 0 : columns * channels) {}

  // The positions of row `oy` of `indices` [rows, columns, channels].
  const int64_t* row(const index_t* indices, int64_t oy) {
    const index_t* from = indices + oy * columns_ * channels_;
    if constexpr (sizeof(index_t) == 8) {
      if (as_they_are_) return from;
      const bool any = windows_->y.first_tap(oy) < windows_->y.end_tap(oy);
      for (int64_t i = 0; i < columns_ * channels_; ++i) {
        const int64_t ox = i / channels_;
        row_[i] = any && windows_->x.first_tap(ox) < windows_->x.end_tap(ox) ? from[i] : -1;
      }
    } else if (channels_ == 1) {
      convert(from, columns_, oy, 0, windows_->x.stride, row_.data());
    } else {
      for (int64_t ox = 0; ox < columns_; ++ox) {
        convert(from + ox * channels_, channels_, oy, ox, 0, row_.data() + ox * channels_);
      }
    }
    return row_.data();
  }

 private:
  // Converts offsets of window ox in row oy and of the following windows, `step` pixels apart.
  void convert(const index_t* offsets, int64_t count, int64_t oy, int64_t ox, int32_t step, int64_t* places) const {
    // In 32 bits, which suffice (windows_of checks it): vectors of 64-bit products are slow.
    const Axis &y = windows_->y, &x = windows_->x;
    const int32_t kernel = x.kernel, dilation = x.dilation, left = x.start(ox), width = x.input;
    const int32_t first_kh = y.first_tap(oy), end_kh = y.end_tap(oy), last_kh = y.kernel - 1;
    const int32_t inverse = ceil_divide(1 << 16, kernel);  // tap / kernel, exact for both below 256
    const int32_t next_row = y.dilation * width;
    const int64_t row = y.start(oy) * width;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t tap = offsets[i], kh = tap * inverse >> 16;
      const int32_t column = left + static_cast<int32_t>(i) * step + (tap - kh * kernel) * dilation;
      const bool inside = kh >= first_kh && kh < end_kh && column >= 0 && column < width;
      places[i] = inside ? row + (std::min(kh, last_kh) * next_row + column) : -1;
    }
  }

  const Windows* windows_;
  int64_t columns_, channels_;
  bool as_they_are_;
  std::vector<int64_t> row_;
};

// Calls body(i, c, place) for every index of an image or plane [rows, columns, step]: element i, in channel c. A place
// outside of the plane is passed to `outside` instead.
template <typename index_t, typename Body>
FASTSEG_INLINE void for_each_place(Places<index_t>& places, const index_t* indices, int64_t rows, int64_t columns,
                                   int64_t step, int64_t plane, Outside& outside, const Body& body) {
  bool all_inside = true;
  int64_t wrong = 0;
  const auto visit = [&](int64_t i, int64_t c, int64_t place) {
    if (static_cast<uint64_t>(place) < static_cast<uint64_t>(plane)) {
      body(i, c, place);
    } else {
      all_inside = false;
      wrong = place;
    }
  };
  for (int64_t oy = 0; oy < rows; ++oy) {
    const int64_t* row = places.row(indices, oy);
    const int64_t at = oy * columns * step;
    if (step == 1) {
      for (int64_t ox = 0; ox < columns; ++ox) visit(at + ox, 0, row[ox]);
      continue;
    }
    for (int64_t ox = 0; ox < columns; ++ox) {
      for (int64_t c = 0; c < step; ++c) visit(at + ox * step + c, c, row[ox * step + c]);
    }
  }
  if (!all_inside) outside.found(wrong);
}

// image[indices[i]] = combination of all pooled[i] with that index, 0 elsewhere. Indices outside of the plane are
// passed to `outside` and skipped. windows: null for int64 indices.
template <typename combine_t, typename index_t, typename scalar_t>
void scatter_by(const Tensor& pooled, const Tensor& indices, const Tensor& image, const Windows* windows,
                const Planes& planes, Outside& outside) {
  using compute_t = simd::accumulate<scalar_t>;
  // Sums of half types are rounded once, from a buffer; all else is combined in the image.
  constexpr bool kInPlace = std::is_same_v<combine_t, Last> || std::is_same_v<scalar_t, compute_t>;
  using pixel_t = std::conditional_t<kInPlace, scalar_t, compute_t>;
  const scalar_t* values = pooled.const_data_ptr<scalar_t>();
  const index_t* all_indices = indices.const_data_ptr<index_t>();
  scalar_t* pixels = image.mutable_data_ptr<scalar_t>();
  const int64_t rows = pooled.size(2), columns = pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  struct State {
    Places<index_t> places;
    std::vector<pixel_t> sums;
  };
  const auto start = [&] {
    return State{Places<index_t>(windows, columns, step), std::vector<pixel_t>(kInPlace ? 0 : plane * step)};
  };
  for_each_block(planes, start, [&](State& state, int64_t number) {
    const int64_t at = number * rows * columns * step;
    scalar_t* result = pixels + number * plane * step;
    pixel_t* to;
    if constexpr (kInPlace) to = result;
    else to = state.sums.data();
    std::fill(to, to + plane * step, pixel_t(0));
    for_each_place(state.places, all_indices + at, rows, columns, step, plane, outside,
                   [&](int64_t i, int64_t c, int64_t place) {
                     combine_t::combine(static_cast<pixel_t>(values[at + i]), &to[place * step + c]);
                   });
    if constexpr (!kInPlace) {
      for (int64_t p = 0; p < plane * step; ++p) result[p] = static_cast<scalar_t>(to[p]);
    }
  });
}

template <typename combine_t, typename scalar_t>
void scatter(const Tensor& pooled, const Tensor& indices, const Tensor& image, const Windows* windows,
             const Planes& planes, Outside& outside) {
  if (indices.scalar_type() == ScalarType::Long) {
    scatter_by<combine_t, int64_t, scalar_t>(pooled, indices, image, windows, planes, outside);
  } else {
    scatter_by<combine_t, uint8_t, scalar_t>(pooled, indices, image, windows, planes, outside);
  }
}

// pooled[i] = image[indices[i]]; indices outside of the plane are passed to `outside`.
template <typename index_t, typename scalar_t>
void gather(const Tensor& image, const Tensor& indices, const Tensor& pooled, const Windows* windows,
            const Planes& planes, Outside& outside) {
  const scalar_t* pixels = image.const_data_ptr<scalar_t>();
  const index_t* all_indices = indices.const_data_ptr<index_t>();
  scalar_t* values = pooled.mutable_data_ptr<scalar_t>();
  const int64_t rows = pooled.size(2), columns = pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  const auto start = [&] { return Places<index_t>(windows, columns, step); };
  for_each_block(planes, start, [&](Places<index_t>& places, int64_t number) {
    const int64_t at = number * rows * columns * step;
    const scalar_t* from = pixels + number * plane * step;
    for_each_place(places, all_indices + at, rows, columns, step, plane, outside,
                   [&](int64_t i, int64_t c, int64_t place) { values[at + i] = from[place * step + c]; });
  });
}

// ---- whole rows of interleaved pixels ----

constexpr int32_t kNowhere = -1;  // a label that no tap has

// labels[i] of the `count` indices of window ox + i * step in row oy.
template <typename index_t>
void read_labels(const index_t* indices, int64_t count, const Windows& windows, int64_t oy, int64_t ox, int64_t step,
                 int32_t* labels) {
  if constexpr (sizeof(index_t) == 1) {
    for (int64_t i = 0; i < count; ++i) labels[i] = indices[i];
  } else {
    const int64_t origin = windows.label_origin(oy, ox), stride = step * windows.x.stride;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t label = static_cast<uint64_t>(indices[i]) - static_cast<uint64_t>(origin + i * stride);
      labels[i] = label < INT32_MAX ? static_cast<int32_t>(label) : kNowhere;
    }
  }
}

// A row of windows that covers a row of pixels.
template <typename value_t>
struct CoverRow {
  const value_t* values;
  const int32_t* labels;
  int32_t label;
};

// The most pooled rows that can cover one row of pixels.
inline int64_t covering_rows(const Axis& y) { return std::min(y.output, (y.kernel - 1) * y.dilation / y.stride + 1); }

// For each row of pixels the windows that cover it, in their order: `offset` is their row, `label` that of the tap's
// row.
class RowCovers {
 public:
  explicit RowCovers(const Windows& windows) : first_{0} {
    for (int64_t y = 0; y < windows.y.input; ++y) {
      for (int64_t kh = windows.y.kernel - 1; kh >= 0; --kh) {
        const int64_t oy = windows.y.window_of(y, kh);
        if (oy >= 0) covers_.push_back({oy, windows.label(kh, 0)});
      }
      first_.push_back(static_cast<int64_t>(covers_.size()));
    }
  }

  const TapColumn* begin(int64_t y) const { return covers_.data() + first_[y]; }
  const TapColumn* end(int64_t y) const { return covers_.data() + first_[y + 1]; }

 private:
  std::vector<TapColumn> covers_;
  std::vector<int64_t> first_;  // [H + 1]
};

// The gradient of a pooling: every pixel sums over the windows that cover it and have its index, so that it is written
// once and nothing is cleared. pooled and indices [images, rows, columns, C], image [images, H, W, C]
template <typename scalar_t, typename index_t>
void spread(const scalar_t* pooled, const index_t* indices, scalar_t* image, const Windows& windows,
            const Planes& planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const Axis &y_axis = windows.y, &x_axis = windows.x;
  const int64_t height = y_axis.input, width = x_axis.input, channels = planes.channels;
  const int64_t length = x_axis.output * channels;
  std::vector<TapColumn> covers;  // of all columns of pixels, one after the other
  std::vector<int64_t> first{0};  // [W + 1]
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t kw = x_axis.kernel - 1; kw >= 0; --kw) {
      const int64_t ox = x_axis.window_of(x, kw);
      if (ox >= 0) covers.push_back({ox * channels, windows.label(0, kw)});
    }
    first.push_back(static_cast<int64_t>(covers.size()));
  }
  const scalar_t* past_end = pooled + planes.images * y_axis.output * length;
  const RowCovers row_covers(windows);
  const int64_t all_rows = planes.images * height;
  parallel_rows(all_rows, width * channels, [&](int64_t begin, int64_t end) {
    KeptRows<int32_t> labels(covering_rows(y_axis), length + kLanes, kNowhere);
    std::vector<CoverRow<scalar_t>> rows;
    OutputStream<scalar_t> output(image + begin * width * channels, channels, all_rows * width * channels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % height;
      rows.clear();
      for (const TapColumn* cover = row_covers.begin(y); cover < row_covers.end(y); ++cover) {
        const int64_t oy = cover->offset, from = row / height * y_axis.output + oy;
        const int32_t* row_labels = labels.get(from, [&](int32_t* to) {
          const int64_t at_once = windows.flat ? channels : length;
          for (int64_t i = 0; i < length; i += at_once) {
            read_labels(indices + from * length + i, at_once, windows, oy, i / channels, 0, to + i);
          }
        });
        rows.push_back({pooled + from * length, row_labels, cover->label});
      }
      for (int64_t x = 0; x < width; ++x) {
        scalar_t* pixels = output.next(channels);
        for (int64_t i = 0; i < channels; i += kLanes) {
          simd::vec<compute_t> sum{};
          for (const CoverRow<scalar_t>& cover : rows) {
            for (const TapColumn* column = covers.data() + first[x]; column < covers.data() + first[x + 1]; ++column) {
              const int64_t at = column->offset + i;
              const auto wanted = splat_label<compute_t>(cover.label + column->label);
              const auto hit = load_labels<compute_t>(cover.labels + at) == wanted;
              sum += simd::keep_where(hit, load_before(cover.values + at, past_end));
            }
          }
          simd::store(pixels + i, sum);
        }
      }
    }
    output.finish();
  });
}

// Whether spread() is faster than scatter(), from measurements.
inline bool spread_pays(const Windows& windows, const Planes& planes) {
  return planes.channels_last && planes.channels >= 2 * kLanes &&
         windows.taps() <= 4 * windows.y.stride * windows.x.stride;
}

}  // namespace fastseg::pooling
