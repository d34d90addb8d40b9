// The unit of work of the softmax losses: a tile of consecutive pixels times all classes.
//
// A loss sees rows of `tile_pixels(C)` pixels, one row per class, in the accumulator type; only this file
// knows how the tensor lies in memory and which dtype it has:
//   for_each_tile(...)             cuts [N, P] into tiles
//   TileAccess::visit(...)         hands a body one tile: `load(c, i)` 16 logits, `store(c, i, lanes)` gradients
//   load_labels(...)               the tile's labels as int32, -1 where the pixel is ignored
//   tile_maximum, tile_softmax     largest logit and exponentials of every pixel
// Memory beyond the tensor is never touched: a partial tile is padded in scratch with zero logits and ignored
// labels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "fastseg/transpose.h"

namespace fastseg {

using simd::kLanes;

constexpr int kRowPadding = 16;  // keeps the scratch rows of one pixel out of the same cache set

// Pixels in a tile: one group of tile_softmax.h, so that a tile of few classes stays in the first-level cache, or fewer
// where two tiles (this one and the one on its way) would not fit the second-level cache.
inline int tile_pixels(int64_t classes) {
  constexpr int64_t kMostElements = 1 << 16;
  const int64_t fitting = kMostElements / std::max<int64_t>(1, classes) / kLanes * kLanes;
  return static_cast<int>(std::clamp<int64_t>(fitting, kLanes, 64));
}

// A [N, C, P] tensor, strides in elements. Planar (NCHW): pixel_stride is 1. Interleaved (channels_last):
// class_stride is 1.
template <typename scalar_t>
struct PixelView {
  scalar_t* data = nullptr;
  int64_t image_stride = 0, class_stride = 0, pixel_stride = 0;

  bool planar() const { return pixel_stride == 1; }
  scalar_t* at(int64_t image, int64_t pixel) const {
    return data + image * image_stride + pixel * pixel_stride;
  }
};

// A 64-byte aligned array of one thread.
template <typename value_t>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : values_(
            static_cast<value_t*>(std::aligned_alloc(64, (count * sizeof(value_t) + 63) / 64 * 64 + 64))) {
    if (!values_) throw std::bad_alloc();
  }
  value_t* get() const { return values_.get(); }

 private:
  struct Free {
    void operator()(value_t* values) const { std::free(values); }
  };
  std::unique_ptr<value_t, Free> values_;
};

// Calls body(image, first_pixel, count) for tiles [begin, end) of the ceil(P / T) tiles of each image, in
// order.
template <typename Body>
void for_each_tile(int64_t begin, int64_t end, int64_t pixels, int tile, const Body& body) {
  const int64_t per_image = ceil_divide(pixels, tile);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index % per_image * tile;
    body(index / per_image, first, static_cast<int>(std::min<int64_t>(tile, pixels - first)));
  }
}

// --- one tile, as a loss sees it ---

// What to ask memory for while a tile is computed, as many cache lines per class as the tile has: the hardware neither
// follows hundreds of rows at once nor, between two tiles, the stream of interleaved pixels.
template <typename scalar_t>
struct LinesAhead {
  const scalar_t* from;  // [C, T], rows `stride` apart
  int64_t stride;

  // Into the second-level cache; the first, where rows a power of two apart compete for the same few places, loses some
  // before their turn.
  FASTSEG_INLINE void prefetch(int64_t c, int i) const {
    if (i * sizeof(scalar_t) % 64 == 0) __builtin_prefetch(from + c * stride + i, 0, 2);
  }
};

// Rows of logits and gradients in their own type: where they lie, if planar and full, or in scratch.
template <typename scalar_t>
struct Tile {
  using accumulate_t = simd::accumulate<scalar_t>;
  const scalar_t* logits;  // [C, T], rows logits_stride apart
  scalar_t* gradient;      // [C, T], rows gradient_stride apart; perhaps over the logits
  accumulate_t* rows;      // [C, T], rows row_stride apart; perhaps over the logits
  int64_t logits_stride, gradient_stride, row_stride;
  bool streaming;
  LinesAhead<scalar_t> ahead;

  FASTSEG_INLINE auto load(int64_t c, int i) const { return simd::load(logits + c * logits_stride + i); }
  // load(c, i), leaving the logits in `rows` too.
  FASTSEG_INLINE auto fetch(int64_t c, int i) const {
    const auto lanes = load(c, i);
    simd::store(rows + c * row_stride + i, lanes);
    return lanes;
  }
  // One vector, or two for the 32 pixels from i on.
  template <typename... vector_t>
  FASTSEG_INLINE void store(int64_t c, int i, vector_t... lanes) const {
    scalar_t* to = gradient + c * gradient_stride + i;
    if (streaming) {
      simd::stream(to, lanes...);
    } else {
      simd::store(to, lanes...);
    }
  }
  FASTSEG_INLINE void prefetch(int64_t c, int i) const { ahead.prefetch(c, i); }
};

// Moves tiles between memory and one thread's scratch.
template <typename scalar_t>
class TileAccess {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;

  // `gradient.data` may be null: nothing is written then.
  TileAccess(PixelView<const scalar_t> logits, PixelView<scalar_t> gradient, int64_t classes)
      : logits_(logits),
        gradient_(gradient),
        classes_(classes),
        tile_(tile_pixels(classes)),
        row_stride_(tile_ + kRowPadding),
        rows_(padded_classes() * row_stride_),
        narrow_rows_(kNarrow ? padded_classes() * row_stride_ : 0),
        lines_(logits.planar() && (!gradient.data || gradient.planar()) ? 0 : tile_ * padded_classes() + kSquare) {
    const int64_t row_bytes = gradient.class_stride * sizeof(scalar_t);
    const int64_t image_bytes = gradient.image_stride * sizeof(scalar_t);
    rows_aligned_ = simd::is_aligned(gradient.data) && row_bytes % 64 == 0 && image_bytes % 64 == 0;
  }
  ~TileAccess() { simd::stream_fence(); }

  int tile() const { return tile_; }
  // [C][row_stride()]: the tile's logits once tile_maximum() has run, its exponentials after tile_softmax().
  accumulate_t* rows() const { return rows_.get(); }
  int64_t row_stride() const { return row_stride_; }

  // Calls body(tile), then writes what it stored to the gradient. A body that is given a non-null gradient must store
  // all of it.
  template <typename Body>
  void visit(int64_t image, int64_t first, int count, const Body& body) {
    const scalar_t* from = logits_.at(image, first);
    scalar_t* to = gradient_.data ? gradient_.at(image, first) : nullptr;
    if (count == tile_ && logits_.planar() && (!to || gradient_.planar())) {
      body(Tile<scalar_t>{from, to, rows(), logits_.class_stride, gradient_.class_stride, row_stride_, rows_aligned_,
                          ahead_of(from)});
      return;
    }
    bring(from, count);
    body(Tile<scalar_t>{own_rows(), own_rows(), rows(), row_stride_, row_stride_, row_stride_, false, ahead_of(from)});
    if (to) send(to, count);
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<scalar_t, accumulate_t>;
  static constexpr int64_t kSquare = detail::square_of<scalar_t>;

  // Fewer classes than transpose() takes at once get rows that hold nothing.
  int64_t padded_classes() const { return std::max(classes_, kSquare); }

  scalar_t* own_rows() const {
    if constexpr (kNarrow) {
      return narrow_rows_.get();
    } else {
      return rows_.get();
    }
  }

  // Planar: the same rows of the next tile but one. Interleaved: the pixels of the next.
  LinesAhead<scalar_t> ahead_of(const scalar_t* from) const {
    if (logits_.planar()) return {from + 2 * tile_, logits_.class_stride};
    return {from + tile_ * logits_.pixel_stride, tile_};
  }

  // Zero logits behind the `count` pixels that there are.
  void bring(const scalar_t* from, int count) {
    scalar_t* rows = own_rows();
    const int64_t step = logits_.pixel_stride;
    if (logits_.planar()) {
      for (int64_t c = 0; c < classes_; ++c) std::copy_n(from + c * logits_.class_stride, count, rows + c * row_stride_);
    } else if (classes_ >= kSquare) {
      detail::transpose(from, step, rows, row_stride_, count, classes_);
    } else {
      if (step == classes_) {
        std::copy_n(from, count * classes_, lines_.get());
      } else {
        for (int i = 0; i < count; ++i) std::copy_n(from + i * step, classes_, lines_.get() + i * classes_);
      }
      detail::transpose(lines_.get(), classes_, rows, row_stride_, count, kSquare);
    }
    for (int64_t c = 0; count < tile_ && c < classes_; ++c) {
      std::fill(rows + c * row_stride_ + count, rows + c * row_stride_ + tile_, static_cast<scalar_t>(0.0f));
    }
  }

  void send(scalar_t* to, int count) {
    const scalar_t* rows = own_rows();
    const int64_t step = gradient_.pixel_stride;
    if (gradient_.planar()) {
      for (int64_t c = 0; c < classes_; ++c) std::copy_n(rows + c * row_stride_, count, to + c * gradient_.class_stride);
      return;
    }
    scalar_t* lines = lines_.get();
    const int64_t line = padded_classes();
    detail::transpose(rows, row_stride_, lines, line, line, count);
    if (step != classes_) {
      for (int i = 0; i < count; ++i) std::copy_n(lines + i * line, classes_, to + i * step);
      return;
    }
    for (int i = 0; line > classes_ && i < count; ++i) std::memmove(lines + i * classes_, lines + i * line, sizeof(scalar_t) * kSquare);
    write_lines(to, count * classes_);
  }

  void write_lines(scalar_t* to, int64_t elements) const {
    const scalar_t* lines = lines_.get();
    constexpr int64_t kPerLine = 64 / sizeof(scalar_t);
    int64_t i = 0;
    if (simd::is_aligned(to)) {
      for (; i + kPerLine <= elements; i += kPerLine) {
        simd::detail::write_past_cache(to + i, simd::detail::read<simd::f32x16>(lines + i));
      }
    }
    std::copy(lines + i, lines + elements, to + i);
  }

  PixelView<const scalar_t> logits_;
  PixelView<scalar_t> gradient_;
  int64_t classes_;
  int tile_;
  int64_t row_stride_;
  Scratch<accumulate_t> rows_;     // [C][row_stride]
  Scratch<scalar_t> narrow_rows_;  // [C][row_stride], of half types: logits or gradients that do not lie in memory so
  Scratch<scalar_t> lines_;        // [tile][C], interleaved pixels on their way
  bool rows_aligned_;
};

// --- labels ---

// A contiguous [N, P] label map.
struct LabelView {
  enum class Type { int64, int32, uint8 };
  const void* data;
  Type type;
  int64_t ignore_index;
  int64_t classes;
};

namespace detail {

// What a label is, by comparisons in its own width. classes: 1 to 2^31 - 1.
template <typename label_t>
struct LabelTest {
  using unsigned_t = std::make_unsigned_t<label_t>;
  unsigned_t last, ignores;
  label_t ignored;

  LabelTest(int64_t ignore_index, int64_t classes)
      : last(static_cast<unsigned_t>(std::min<uint64_t>(classes - 1, static_cast<unsigned_t>(-1)))),
        ignores(static_cast<int64_t>(static_cast<label_t>(ignore_index)) == ignore_index),  // else no label is ignored
        ignored(static_cast<label_t>(ignore_index)) {}

  FASTSEG_INLINE unsigned_t skipped(label_t label) const { return (label == ignored) & ignores; }
  FASTSEG_INLINE unsigned_t in_range(label_t label) const { return static_cast<unsigned_t>(label) <= last; }
};

// Plain loops with their flags in the labels' own width: compilers vectorise them, where they take vectors of 16 int64
// apart.
template <typename label_t>
bool load_labels(const label_t* __restrict__ from, int count, const LabelTest<label_t> test, int32_t* __restrict__ to) {
  std::make_unsigned_t<label_t> out_of_range = 0;
  for (int i = 0; i < count; ++i) {
    const label_t label = from[i];
    const auto skipped = test.skipped(label), valid = test.in_range(label);
    to[i] = valid > skipped ? static_cast<int32_t>(label) : -1;
    out_of_range |= !(valid | skipped);
  }
  return out_of_range == 0;
}

// counted: how many labels are not ignored. At most 255 labels, so that a byte can count them.
template <typename label_t>
bool count_labels(const label_t* from, int count, const LabelTest<label_t> test, int64_t& counted) {
  std::make_unsigned_t<label_t> out_of_range = 0, valid = 0;
  for (int i = 0; i < count; ++i) {
    const auto skipped = test.skipped(from[i]), in_range = test.in_range(from[i]);
    valid += in_range > skipped;
    out_of_range |= !(in_range | skipped);
  }
  counted += valid;
  return out_of_range == 0;
}

// fn(pointer to the labels in their own type)
template <typename Function>
auto with_label_type(const LabelView& labels, const Function& fn) {
  switch (labels.type) {
    case LabelView::Type::int64:
      return fn(static_cast<const int64_t*>(labels.data));
    case LabelView::Type::int32:
      return fn(static_cast<const int32_t*>(labels.data));
    default:
      return fn(static_cast<const uint8_t*>(labels.data));
  }
}

}  // namespace detail

// Writes labels [first, first + count) of the flat map to `to` [tile], -1 where ignored, out of range or past
// `count`. False if one was neither ignored nor in [0, classes).
inline bool load_labels(const LabelView& labels, int64_t first, int count, int tile, int32_t* to) {
  std::fill(to + count, to + tile, -1);
  return detail::with_label_type(labels, [&](const auto* all) {
    const auto* from = all + first;
    // The next tile's, if tiles are small: between two of them the hardware loses sight of this stream.
    const int next = tile <= tile_pixels(1) ? count : 0;
    for (int i = 0; i < next; i += 64 / sizeof *from) __builtin_prefetch(from + count + i);
    return detail::load_labels(from, count, {labels.ignore_index, labels.classes}, to);
  });
}

// Adds to `counted` how many of the labels [first, first + count) are not ignored. False as load_labels().
inline bool count_labels(const LabelView& labels, int64_t first, int64_t count, int64_t& counted) {
  constexpr int64_t kChunk = 192;
  return detail::with_label_type(labels, [&](const auto* all) {
    const detail::LabelTest<std::decay_t<decltype(*all)>> test(labels.ignore_index, labels.classes);
    bool in_range = true;
    for (int64_t i = first; i < first + count; i += kChunk) {
      const int here = static_cast<int>(std::min(kChunk, first + count - i));
      in_range &= detail::count_labels(all + i, here, test, counted);
    }
    return in_range;
  });
}

// The one class of 16 labels (ignored ones apart; any class if all are), -1 if they are of several. Segmentation labels
// come in patches, so most runs of 16 have one.
FASTSEG_INLINE int32_t common_label(const int32_t* labels) {
  const simd::i32x16 lanes = simd::load(labels);
  const uint32_t counted = simd::mask_bits(lanes >= simd::splat(int32_t(0)));
  if (counted == 0) return 0;
  const int32_t first = labels[__builtin_ctz(counted)];
  return (simd::mask_bits(lanes == simd::splat(first)) & counted) == counted ? first : -1;
}

// The first label of the flat map [count] that load_labels() rejects; only called to word the error.
inline int64_t first_bad_label(const LabelView& labels, int64_t count) {
  return detail::with_label_type(labels, [&](const auto* from) -> int64_t {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t label = from[i];
      if (label != labels.ignore_index && (label < 0 || label >= labels.classes)) return label;
    }
    return 0;
  });
}

[[noreturn]] inline void throw_bad_label(const LabelView& labels, int64_t count) {
  throw std::out_of_range("Target " + std::to_string(first_bad_label(labels, count)) +
                          " is out of bounds: labels must be in [0, " + std::to_string(labels.classes) +
                          ") or equal to ignore_index=" + std::to_string(labels.ignore_index));
}

}  // namespace fastseg

#include "fastseg/tile_softmax.h"
