// Between pooled elements and the pixels their indices point at, one after the other: `scatter` goes one way,
// `gather` the other. For int64 indices of which nothing is known, and where looking at whole rows (spread.h)
// does not pay.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "max_pool2d/rows.h"
#include "max_pool2d/spread.h"
#include "max_pool2d/windows.h"

namespace fastseg::pooling {

// The first index found outside the plane, if any: an exception must not leave a parallel region.
class Outside {
 public:
  void found(int64_t index) {
    index_.store(index, std::memory_order_relaxed);
    found_.store(true, std::memory_order_release);
  }
  void check(int64_t height, int64_t width) const {
    if (!found_.load(std::memory_order_acquire)) return;
    throw std::runtime_error("fastseg.ops.max_unpool2d: indices holds a position outside the plane, " +
                             std::to_string(index_.load(std::memory_order_relaxed)) + "; allowed: 0 to " +
                             std::to_string(height * width - 1) + " in a plane of " + std::to_string(height) + "x" +
                             std::to_string(width));
  }

 private:
  std::atomic<int64_t> index_{0};
  std::atomic<bool> found_{false};
};

// Into how many parts the channels of an image are cut: interleaved ones only if there are fewer images than threads.
inline int64_t parts_of_channels(const Planes& planes) {
  if (!planes.channels_last) return planes.channels;
  return ceil_divide(torch::stable::get_num_threads(), std::max<int64_t>(1, planes.images));
}

// Calls body(state, image, first channel, end channel) for planes one after the other, or for images if their
// pixels are interleaved, or for parts of the channels of these. start() makes a thread's state. No way mixes planes.
template <typename Start, typename Body>
void for_each_block(const Planes& planes, const Start& start, const Body& body) {
  const int64_t even = ceil_divide(planes.channels, parts_of_channels(planes));
  const int64_t block = planes.channels_last ? round_up(even) : 1;
  const int64_t blocks = ceil_divide(planes.channels, block);
  const int64_t items = planes.images * blocks;
  parallel_slices(items, slice_count(items), [&](int64_t, int64_t begin, int64_t end) {
    auto state = start();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * block;
      body(state, item / blocks, first, std::min(first + block, planes.channels));
    }
    simd::stream_fence();
  });
}

// The indices of one image or plane as positions in the plane, row by row.
template <typename index_t>
class Places {
 public:
  // windows: of compact indices; channels: interleaved ones
  Places(const Windows* windows, int64_t columns, int64_t channels)
      : windows_(windows),
        columns_(columns),
        channels_(channels),
        row_(sizeof(index_t) == 1 ? columns * channels : 0) {}

  // Row `oy` of `indices` [rows, columns, channels]. Offsets that no tap has give places outside the plane.
  const int64_t* row(const index_t* indices, int64_t oy) {
    const index_t* from = indices + oy * columns_ * channels_;
    if constexpr (sizeof(index_t) == 8) {
      return from;
    } else {
      const int64_t origin = windows_->y.start(oy) * windows_->x.input - windows_->x.padding;
      const int64_t stride = windows_->x.stride;
      if (channels_ == 1) {
        convert(from, columns_, origin, stride, row_.data());
      } else {
        for (int64_t ox = 0; ox < columns_; ++ox) {
          convert(from + ox * channels_, channels_, origin + ox * stride, 0, row_.data() + ox * channels_);
        }
      }
      return row_.data();
    }
  }

 private:
  void convert(const index_t* offsets, int64_t count, int64_t origin, int64_t step, int64_t* places) const {
    // In 32 bits, which windows_of has checked to be enough: vectors of 64-bit products are slow.
    const int32_t kernel = windows_->x.kernel, dilation = windows_->x.dilation, taps = windows_->taps();
    const int32_t last_row = windows_->y.kernel - 1;
    const int32_t inverse = ceil_divide(1 << 16, kernel);  // tap / kernel, exact for both below 256
    const int32_t next_row = windows_->y.dilation * windows_->x.input - kernel * dilation;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t tap = offsets[i], kh = tap * inverse >> 16;
      const int64_t place = origin + i * step + (tap * dilation + std::min(kh, last_row) * next_row);
      places[i] = tap < taps ? place : -1;
    }
  }

  const Windows* windows_;
  int64_t columns_, channels_;
  std::vector<int64_t> row_;
};

// Calls body(i, c, place) for every index of channels c in [first, end) of an image or plane [rows, columns,
// step], of which it is element i. A place outside the plane is told to `outside` instead.
template <typename index_t, typename Body>
FASTSEG_INLINE void for_each_place(Places<index_t>& places, const index_t* indices, int64_t rows, int64_t columns,
                                   int64_t step, int64_t first, int64_t end, int64_t plane, Outside& outside,
                                   const Body& body) {
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
      for (int64_t c = first; c < end; ++c) visit(at + ox * step + c, c, row[ox * step + c]);
    }
  }
  if (!all_inside) outside.found(wrong);
}

// image[indices[i]] = combination of every pooled[i] that goes there, 0 elsewhere. Tells `outside` of indices
// outside the plane, and passes them over. windows: null for int64 indices.
template <typename combine_t, typename index_t, typename scalar_t>
void scatter_by(const Tensor& pooled, const Tensor& indices, const Tensor& image, const Windows* windows,
                const Planes& planes, Outside& outside) {
  using compute_t = simd::accumulate<scalar_t>;
  // Sums of half types are rounded once; everything else is combined where it belongs.
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
  const bool cleared = kInPlace && planes.channels_last && parts_of_channels(planes) > 1;
  if (cleared) {  // at once: part by part it is slow
    parallel_rows(planes.images * plane, step, [&](int64_t begin, int64_t end) {
      std::fill(pixels + begin * step, pixels + end * step, scalar_t(0));
    });
  }
  for_each_block(planes, start, [&](State& state, int64_t number, int64_t first, int64_t end) {
    if (!planes.channels_last) number = number * planes.channels + first, first = 0, end = 1;
    const int64_t at = number * rows * columns * step;
    scalar_t* result = pixels + number * plane * step;
    pixel_t* to;
    if constexpr (kInPlace) to = result;
    else to = state.sums.data();
    if (!cleared && end - first == step) {
      std::fill(to, to + plane * step, pixel_t(0));
    } else if (!cleared) {
      for (int64_t p = 0; p < plane; ++p) std::fill(to + p * step + first, to + p * step + end, pixel_t(0));
    }
    for_each_place(state.places, all_indices + at, rows, columns, step, first, end, plane, outside,
                   [&](int64_t i, int64_t c, int64_t place) {
                     combine_t::combine(static_cast<pixel_t>(values[at + i]), &to[place * step + c]);
                   });
    if constexpr (!kInPlace) {
      for (int64_t p = 0; p < plane; ++p) {
        for (int64_t c = first; c < end; ++c) result[p * step + c] = static_cast<scalar_t>(to[p * step + c]);
      }
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

// pooled[i] = image[indices[i]]; tells `outside` of indices outside the plane.
template <typename index_t, typename scalar_t>
void gather(const Tensor& image, const Tensor& indices, const Tensor& pooled, const Windows* windows,
            const Planes& planes, Outside& outside) {
  const scalar_t* pixels = image.const_data_ptr<scalar_t>();
  const index_t* all_indices = indices.const_data_ptr<index_t>();
  scalar_t* values = pooled.mutable_data_ptr<scalar_t>();
  const int64_t rows = pooled.size(2), columns = pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  // to[i] = pixel_of(i) of every place, if all are inside.
  const auto pick = [&](const int64_t* places, int64_t count, scalar_t* to, const auto& pixel_of) {
    uint64_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint64_t>(places[i]));
    if (largest >= static_cast<uint64_t>(plane)) return outside.found(static_cast<int64_t>(largest));
    for (int64_t i = 0; i < count; ++i) to[i] = pixel_of(i);
  };
  // Rows of int64 indices follow one another.
  const int64_t length = sizeof(index_t) == 8 && step == 1 ? rows * columns : columns;
  const auto start = [&] { return Places<index_t>(windows, length, step); };
  for_each_block(planes, start, [&](Places<index_t>& places, int64_t number, int64_t first, int64_t end) {
    if (!planes.channels_last) number = number * planes.channels + first;
    const int64_t at = number * rows * columns * step;
    const scalar_t* from = pixels + number * plane * step;
    for (int64_t i = 0; i < rows * columns; i += length) {
      const int64_t* row = places.row(all_indices + at, i / length);
      scalar_t* to = values + at + i * step;
      if (step == 1) {
        pick(row, length, to, [&](int64_t j) { return from[row[j]]; });
        continue;
      }
      for (int64_t ox = 0; ox < columns; ++ox, row += step, to += step) {
        pick(row + first, end - first, to + first, [&](int64_t c) { return from[row[first + c] * step + first + c]; });
      }
    }
  });
}

// Whether going through rows (spread.h) beats going through the pooled elements: there must be no more than a
// few taps per step, and in planes rows of at least `shortest` pixels. Measured; dilated windows may hold no
// pixel, which only rows know.
inline bool rows_pay(const Windows& windows, const Planes& planes, int64_t shortest) {
  if (windows.y.dilation > 1 || windows.x.dilation > 1) return true;
  const bool long_rows = planes.channels_last ? planes.channels >= 2 * kLanes : windows.x.input >= shortest;
  return long_rows && windows.taps() <= 4 * windows.y.stride * windows.x.stride;
}
constexpr int64_t kShortestSpread = 192;
constexpr int64_t kShortestChoice = 96;

}  // namespace fastseg::pooling
