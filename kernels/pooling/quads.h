// Windows of 2x2 pixels without overlap or gap, by far the commonest: no borders, every tap is loaded from the tensor.
// phases.h and scatter.h handle all other windows.
//
// Rows are handled in runs: a whole row in planes, the channels of one window in interleaved pixels. Of the `count`
// windows (or channels) in a run, 16 are handled at a time.
#pragma once

#include <atomic>

#include "pooling/row_streams.h"
#include "pooling/windows.h"

namespace fastseg::pooling {

inline bool are_quads(const Windows& windows, const Planes& planes) {
  const auto are_pairs = [](const Axis& axis) {
    return axis.kernel == 2 && (axis.stride == 2 || axis.output == 1) && axis.padding == 0 && axis.dilation == 1 &&
           2 * axis.output <= axis.input;
  };
  return are_pairs(windows.y) && are_pairs(windows.x) && (!planes.channels_last || planes.channels >= kLanes);
}

template <int count, typename value_t>
FASTSEG_INLINE void prefetch_lines(const value_t* from) {
  const char* later = reinterpret_cast<const char*>(from) + 2048;
  for (size_t line = 0; line < count * sizeof(value_t); line += kLine) __builtin_prefetch(later + line);
}

template <bool interleaved>
class Quads {
 public:
  Quads(const Windows& windows, const Planes& planes)
      : windows_(windows), planes_(interleaved ? planes.images : planes.images * planes.channels),
        channels_(interleaved ? planes.channels : 1), lanes_(simd::convert<simd::i64x16>(simd::lane_index()) * kStep) {}

  int64_t planes() const { return planes_; }
  int64_t height() const { return windows_.y.input; }               // rows of pixels in a plane,
  int64_t width() const { return windows_.x.input * channels_; }    // and elements in each
  int64_t rows() const { return windows_.y.output; }                // rows of windows in a plane,
  int64_t length() const { return windows_.x.output * channels_; }  // and elements in each
  int64_t runs() const { return interleaved ? windows_.x.output : 1; }
  int64_t count() const { return interleaved ? channels_ : windows_.x.output; }

  template <typename compute_t>
  FASTSEG_INLINE Labels<compute_t> label(int64_t kh, int64_t kw) const {
    return splat_label<compute_t>(windows_.label(kh, kw));
  }

  // Calls body(i) for 16 windows or channels from i on. Channels may repeat; windows may lie past the last.
  template <typename Body>
  FASTSEG_INLINE void for_each(const Body& body) const {
    const int64_t lanes = count();
    for (int64_t i = 0; i < lanes; i += kLanes) body(interleaved ? std::min(i, lanes - kLanes) : i);
  }

  // Prefetches what load() will read a little later: the hardware prefetcher does not recognise two rows that are read
  // in short alternating pieces.
  template <typename scalar_t>
  FASTSEG_INLINE void prefetch(const scalar_t* top, const scalar_t* bottom, int64_t i) const {
    if constexpr (interleaved) {
      prefetch_lines<2 * kLanes>(top + 2 * i);
      prefetch_lines<2 * kLanes>(bottom + 2 * i);
    } else {
      prefetch_lines<4 * kLanes>(top + 4 * i);  // the bottom row follows the top row
    }
  }

  // Pixels of one row, left and right, from or to a run of 2 * count().
  template <typename scalar_t, typename vector_t>
  FASTSEG_INLINE void load(const scalar_t* run, int64_t i, vector_t& left, vector_t& right) const {
    if constexpr (interleaved) {
      left = simd::load(run + i);
      right = simd::load(run + channels_ + i);
    } else {
      const vector_t first = simd::load(run + 2 * i), second = simd::load(run + 2 * i + kLanes);
      left = simd::every_second<0>(first, second);
      right = simd::every_second<1>(first, second);
    }
  }
  template <typename scalar_t, typename vector_t>
  FASTSEG_INLINE void store(scalar_t* run, int64_t i, vector_t left, vector_t right) const {
    if constexpr (interleaved) {
      simd::store(run + i, left);
      simd::store(run + channels_ + i, right);
    } else {
      simd::store(run + 2 * i, simd::interleave_low(left, right));
      simd::store(run + 2 * i + kLanes, simd::interleave_high(left, right));
    }
  }

  // Labels from or to the indices at i of run number `run` in row oy.
  template <typename compute_t>
  FASTSEG_INLINE Labels<compute_t> load_labels(const uint8_t* indices, int64_t i, int64_t, int64_t) const {
    return pooling::load_labels<compute_t>(indices + i);
  }
  template <typename compute_t>
  FASTSEG_INLINE Labels<compute_t> load_labels(const int64_t* indices, int64_t i, int64_t oy, int64_t run) const {
    using unsigned_t = simd::Vector<uint64_t, kLanes>;  // invalid indices may be given: their difference wraps around
    const auto labels = simd::bit_cast<simd::i64x16>(simd::bit_cast<unsigned_t>(simd::load(indices + i)) -
                                                     simd::bit_cast<unsigned_t>(origins(i, oy, run)));
    // Narrowed only where they fit: a label is not negative and below 2^31. From there to 2^32 they become negative.
    const auto fits = simd::convert<Labels<compute_t>>(labels >> 32) == Labels<compute_t>{};
    return simd::select(fits, simd::convert<Labels<compute_t>>(labels), splat_label<compute_t>(-1));
  }
  template <typename labels_t>
  FASTSEG_INLINE void store_labels(uint8_t* indices, int64_t i, labels_t labels, int64_t, int64_t) const {
    simd::store(indices + i, simd::convert<simd::u8x16>(labels));
  }
  template <typename labels_t>
  FASTSEG_INLINE void store_labels(int64_t* indices, int64_t i, labels_t labels, int64_t oy, int64_t run) const {
    simd::store(indices + i, simd::convert<simd::i64x16>(labels) + origins(i, oy, run));
  }

 private:
  static constexpr int64_t kStep = interleaved ? 0 : 2;  // pixels from one lane's window to the next

  // Indices of the first pixels of 16 windows.
  FASTSEG_INLINE simd::i64x16 origins(int64_t i, int64_t oy, int64_t run) const {
    return lanes_ + (2 * oy * windows_.x.input + (interleaved ? 2 * run : 2 * i));
  }

  const Windows& windows_;
  int64_t planes_, channels_;
  simd::i64x16 lanes_;
};

// Calls body(quads) with the Quads of these planes.
template <typename Body>
void with_quads(const Windows& windows, const Planes& planes, const Body& body) {
  if (planes.channels_last) body(Quads<true>(windows, planes));
  else body(Quads<false>(windows, planes));
}

// image [planes, height, width] -> pooled and indices [planes, rows, length]
template <bool interleaved, typename scalar_t, typename index_t>
void pool_quads(const scalar_t* image, scalar_t* pooled, index_t* indices, const Quads<interleaved>& quads) {
  using compute_t = simd::accumulate<scalar_t>;
  const int64_t rows = quads.rows(), width = quads.width(), length = quads.length(), count = quads.count();
  const int64_t all_rows = quads.planes() * rows;
  const scalar_t* end_of_image = image + quads.planes() * quads.height() * width;
  parallel_rows(all_rows, length, [&](int64_t begin, int64_t end) {
    ReadableRow<scalar_t> upper(end_of_image), lower(end_of_image);
    OutputStream<scalar_t> maxima(pooled + begin * length, count, all_rows * length);
    OutputStream<index_t> places(indices + begin * length, count, all_rows * length);
    RowOfPlane row(begin, rows);
    for (int64_t number = begin; number < end; ++number, row.next()) {
      const int64_t oy = row.y;
      const scalar_t* from = image + (row.plane * quads.height() + 2 * oy) * width;
      const scalar_t* top = upper.get(from, width);
      const scalar_t* bottom = lower.get(from + width, width);
      for (int64_t run = 0; run < quads.runs(); ++run, top += 2 * count, bottom += 2 * count) {
        scalar_t* best_to = maxima.next(count);
        index_t* labels_to = places.next(count);
        quads.for_each([&](int64_t i) {
          quads.prefetch(top, bottom, i);
          simd::vec<compute_t> best, other[3];
          quads.load(top, i, best, other[0]);
          quads.load(bottom, i, other[1], other[2]);
          Labels<compute_t> labels = quads.template label<compute_t>(0, 0);
          for (int tap = 1; tap < 4; ++tap) {
            const auto value = other[tap - 1];
            const auto taken = (value > best) | (value != value);  // the last NaN, else the first maximum
            best = simd::select(taken, value, best);
            labels = simd::select(taken, quads.template label<compute_t>(tap / 2, tap % 2), labels);
          }
          simd::store(best_to + i, best);
          quads.store_labels(labels_to, i, labels, oy, run);
        });
      }
    }
    maxima.finish();
    places.finish();
  });
}

// Whether all labels seen are taps of their windows.
template <typename compute_t>
class SeenLabels {
 public:
  template <typename quads_t>
  explicit SeenLabels(const quads_t& quads) : count_(quads.count()) {
    for (int tap = 0; tap < 4; ++tap) taps_[tap] = quads.template label<compute_t>(tap / 2, tap % 2);
  }

  // Takes labels of compact indices at i of a run: only their bits are collected.
  FASTSEG_INLINE void collect(const uint8_t*, int64_t, Labels<compute_t> labels) { compact_ = compact_ | labels; }
  // Takes labels of flat indices; lanes past the end of the run hold indices of other rows.
  FASTSEG_INLINE void collect(const int64_t*, int64_t i, Labels<compute_t> labels) {
    const auto top = (labels == taps_[0]) | (labels == taps_[1]);
    const auto bottom = (labels == taps_[2]) | (labels == taps_[3]);
    const auto beyond = simd::lane_index() >= simd::splat(static_cast<int32_t>(count_ - i));
    flat_ = flat_ & (top | bottom | simd::convert<Labels<compute_t>>(beyond));
  }

  bool all_taps() const {
    return !simd::any((compact_ > splat_label<compute_t>(3)) | (flat_ == splat_label<compute_t>(0)));
  }

 private:
  int64_t count_;
  Labels<compute_t> taps_[4];
  Labels<compute_t> compact_{}, flat_ = splat_label<compute_t>(-1);
};

// Writes pooled values to their pixels, 0 elsewhere: pooled, indices [planes, rows, length] -> image [planes, height,
// width]. Returns whether all indices were taps of their windows; values of other indices are dropped.
template <bool interleaved, typename scalar_t, typename index_t>
bool spread_quads(const scalar_t* pooled, const index_t* indices, scalar_t* image, const Quads<interleaved>& quads) {
  using compute_t = simd::accumulate<scalar_t>;
  const int64_t rows = quads.rows(), width = quads.width(), length = quads.length(), count = quads.count();
  const int64_t height = quads.height(), all_windows = quads.planes() * rows * length;
  std::atomic<bool> all_taps{true};
  parallel_rows(quads.planes() * height, width, [&](int64_t begin, int64_t end) {
    SeenLabels<compute_t> seen(quads);
    ReadableRow<scalar_t> readable_values(pooled + all_windows);
    ReadableRow<index_t> readable_places(indices + all_windows);
    OutputStream<scalar_t> pixels(image + begin * width, 2 * count, quads.planes() * height * width);
    RowOfPlane row(begin, height);
    for (int64_t number = begin; number < end; ++number, row.next()) {
      const int64_t y = row.y, oy = y / 2;
      if (oy >= rows) {  // rows below the last window
        pixels.zeros(width);
        continue;
      }
      const int64_t from = (row.plane * rows + oy) * length;
      const scalar_t* values = readable_values.get(pooled + from, length);
      const index_t* places = readable_places.get(indices + from, length);
      const auto left = quads.template label<compute_t>(y % 2, 0), right = quads.template label<compute_t>(y % 2, 1);
      for (int64_t run = 0; run < quads.runs(); ++run, values += count, places += count) {
        scalar_t* to = pixels.next(2 * count);
        quads.for_each([&](int64_t i) {
          prefetch_lines<kLanes>(values + i);
          prefetch_lines<kLanes>(places + i);
          const simd::vec<compute_t> value = simd::load(values + i);
          const auto labels = quads.template load_labels<compute_t>(places, i, oy, run);
          seen.collect(places, i, labels);
          quads.store(to, i, simd::keep_where(labels == left, value), simd::keep_where(labels == right, value));
        });
      }
      pixels.zeros(width - 2 * length);  // right of the last window
    }
    pixels.finish();
    if (!seen.all_taps()) all_taps.store(false, std::memory_order_relaxed);
  });
  return all_taps.load();
}

// Reads the pixels at the indices: image [planes, height, width] -> pooled [planes, rows, length]. Returns whether all
// indices were taps of their windows.
template <bool interleaved, typename scalar_t, typename index_t>
bool choose_quads(const scalar_t* image, const index_t* indices, scalar_t* pooled, const Quads<interleaved>& quads) {
  using compute_t = simd::accumulate<scalar_t>;
  const int64_t rows = quads.rows(), width = quads.width(), length = quads.length(), count = quads.count();
  const int64_t all_rows = quads.planes() * rows;
  const scalar_t* end_of_image = image + quads.planes() * quads.height() * width;
  std::atomic<bool> all_taps{true};
  parallel_rows(all_rows, length, [&](int64_t begin, int64_t end) {
    SeenLabels<compute_t> seen(quads);
    ReadableRow<scalar_t> upper(end_of_image), lower(end_of_image);
    ReadableRow<index_t> readable_places(indices + all_rows * length);
    OutputStream<scalar_t> chosen(pooled + begin * length, count, all_rows * length);
    RowOfPlane row(begin, rows);
    for (int64_t number = begin; number < end; ++number, row.next()) {
      const scalar_t* from = image + (row.plane * quads.height() + 2 * row.y) * width;
      const scalar_t* top = upper.get(from, width);
      const scalar_t* bottom = lower.get(from + width, width);
      const index_t* places = readable_places.get(indices + number * length, length);
      for (int64_t run = 0; run < quads.runs(); ++run, top += 2 * count, bottom += 2 * count, places += count) {
        scalar_t* to = chosen.next(count);
        quads.for_each([&](int64_t i) {
          quads.prefetch(top, bottom, i);
          simd::vec<compute_t> value, other[3];
          quads.load(top, i, value, other[0]);
          quads.load(bottom, i, other[1], other[2]);
          const auto wanted = quads.template load_labels<compute_t>(places, i, row.y, run);
          seen.collect(places, i, wanted);
          for (int tap = 1; tap < 4; ++tap) {
            const auto here = wanted == quads.template label<compute_t>(tap / 2, tap % 2);
            value = simd::select(here, other[tap - 1], value);
          }
          simd::store(to + i, value);
        });
      }
    }
    chosen.finish();
    if (!seen.all_taps()) all_taps.store(false, std::memory_order_relaxed);
  });
  return all_taps.load();
}

}  // namespace fastseg::pooling
