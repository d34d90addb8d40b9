// The unit of work of the softmax losses: a tile of consecutive pixels times all classes.
//
// A loss works on rows of `tile_pixels(C)` pixels, one row per class, in the accumulator type; only this file
// deals with memory layouts and dtypes:
//   for_each_tile(...)             cuts [N, P] into tiles
//   TileAccess::visit(...)         calls a body with one tile: `load(c, i)` 16 logits, `store(c, i, lanes)` gradients
//   load_labels(...)               (labels.h) the tile's labels as int32, -1 where the pixel is ignored
//   for_each_group(...)            walks its pixels, as many at a time as fit the registers
// tile_softmax.h computes its largest logits and exponentials.
// Memory beyond the tensor is never touched: a partial tile is padded in scratch with zero logits and ignored
// labels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "fastseg/labels.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "fastseg/transpose.h"

namespace fastseg {

constexpr int kRowPadding = 16;  // keeps the scratch rows of one pixel out of the same cache set

// Pixels in a tile: one group of for_each_group(), so that it stays in the first-level cache. With few classes a tile
// has more groups, because each step over a tile waits for the one before it; with very many it has fewer pixels, so
// that two tiles (this one and the one being prefetched) fit the second-level cache.
constexpr int tile_pixels(int64_t classes) {
  constexpr int64_t kGroup = 64, kMostGroups = 4, kElements = 1 << 11, kMostElements = 1 << 16;
  classes = std::max<int64_t>(1, classes);
  const int64_t groups = std::clamp<int64_t>(kElements / classes / kGroup, 1, kMostGroups);
  const int64_t fitting = kMostElements / classes / kLanes * kLanes;
  return static_cast<int>(std::clamp<int64_t>(fitting, kLanes, groups * kGroup));
}

// A [N, C, P] tensor, strides in elements. Planar (NCHW): pixel_stride is 1. Interleaved (channels_last):
// class_stride is 1.
template <typename scalar_t>
struct PixelView {
  scalar_t* data = nullptr;
  int64_t image_stride = 0, class_stride = 0, pixel_stride = 0;

  bool planar() const { return pixel_stride == 1; }
  scalar_t* at(int64_t image, int64_t pixel) const { return data + image * image_stride + pixel * pixel_stride; }
};

// A 64-byte aligned array of one thread.
template <typename value_t>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : values_(static_cast<value_t*>(std::aligned_alloc(64, (count * sizeof(value_t) + 63) / 64 * 64 + 64))) {
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

// --- one tile ---

// What to prefetch while a tile is computed, as many cache lines per class as the tile has: the hardware prefetcher
// follows neither hundreds of rows at once nor, between two tiles, the stream of interleaved pixels.
template <typename scalar_t>
struct NextLines {
  const scalar_t* from;  // [C, T], rows `stride` apart
  int64_t stride;

  // Into the second-level cache: in the first, rows a power of two apart compete for the same few sets, so that some
  // lines would be evicted before they are read.
  FASTSEG_INLINE void prefetch(int64_t c, int i) const {
    if (i * sizeof(scalar_t) % 64 == 0) __builtin_prefetch(from + c * stride + i, 0, 2);
  }
};

// Rows of logits and gradients in the storage type: in the tensor if it is planar and the tile full, else in scratch.
template <typename scalar_t>
struct Tile {
  using accumulate_t = simd::accumulate<scalar_t>;
  const scalar_t* logits;  // [C, T], rows logits_stride apart
  scalar_t* gradient;      // [C, T], rows gradient_stride apart; may be the memory of the logits
  accumulate_t* rows;      // [C, T], rows row_stride apart; may be the memory of the logits
  int64_t logits_stride, gradient_stride, row_stride;
  bool streaming;
  NextLines<scalar_t> next;

  FASTSEG_INLINE auto load(int64_t c, int i) const { return simd::load(logits + c * logits_stride + i); }
  // load(c, i) that also stores the logits to `rows`.
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
  FASTSEG_INLINE void prefetch(int64_t c, int i) const { next.prefetch(c, i); }
};

// Vectors of 16 pixels whose running maximum and sum stay in registers. (Eight are no faster under AVX-512, and do not
// fit the smaller tiles of many classes, which would then go by single vectors.)
constexpr int kGroup = simd::kRegisterBytes > 16 ? 4 : 2;

// Calls body(first_pixel, constant<vectors>) over the tile's pixels, in groups that fit the registers. Write bodies as
// FASTSEG_ALWAYS_INLINE lambdas on copies of the tile and of numbers: whatever they reach through a reference is read
// again after every store, because a streaming store might have changed it.
template <int vectors>
using constant = std::integral_constant<int, vectors>;

template <typename Body>
FASTSEG_INLINE void for_each_group(int tile, const Body& body) {
  int i = 0;
  for (; i + kGroup * kLanes <= tile; i += kGroup * kLanes) body(i, constant<kGroup>());
  for (; i < tile; i += kLanes) body(i, constant<1>());
}

// Gradients of a whole group, two vectors at a time: half types are written as whole cache lines.
template <typename scalar_t, typename vector_t, int vectors>
FASTSEG_INLINE void store_group(const Tile<scalar_t>& tile, int64_t c, int first, const vector_t (&gradient)[vectors]) {
  if constexpr (vectors == 1) {
    tile.store(c, first, gradient[0]);
  } else {
    for (int v = 0; v < vectors; v += 2) tile.store(c, first + v * kLanes, gradient[v], gradient[v + 1]);
  }
}

// Moves tiles between memory and one thread's scratch.
template <typename scalar_t>
class TileAccess {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;

  // `gradient.data` may be null: nothing is written then.
  TileAccess(PixelView<const scalar_t> logits, PixelView<scalar_t> gradient, int64_t classes)
      : logits_(logits), gradient_(gradient), classes_(classes), tile_(tile_pixels(classes)),
        row_stride_(tile_ + kRowPadding), rows_(padded_classes() * row_stride_),
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

  // Calls body(tile), then writes what it stored to the gradient. If there is a gradient, the body must store all of
  // it.
  template <typename Body>
  void visit(int64_t image, int64_t first, int count, const Body& body) {
    const scalar_t* from = logits_.at(image, first);
    scalar_t* to = gradient_.data ? gradient_.at(image, first) : nullptr;
    if (count == tile_ && logits_.planar() && (!to || gradient_.planar())) {
      body(Tile<scalar_t>{from, to, rows(), logits_.class_stride, gradient_.class_stride, row_stride_, rows_aligned_,
                          next_lines(from)});
      return;
    }
    copy_in(from, count);
    body(
        Tile<scalar_t>{own_rows(), own_rows(), rows(), row_stride_, row_stride_, row_stride_, false, next_lines(from)});
    if (to) copy_out(to, count);
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<scalar_t, accumulate_t>;
  static constexpr int64_t kSquare = detail::square_of<scalar_t>;

  // Rows of scratch: no fewer than transpose() takes at once.
  int64_t padded_classes() const { return std::max(classes_, kSquare); }

  scalar_t* own_rows() const {
    if constexpr (kNarrow) {
      return narrow_rows_.get();
    } else {
      return rows_.get();
    }
  }

  // Planar: the same rows, two tiles on. Interleaved: the pixels of the next tile.
  NextLines<scalar_t> next_lines(const scalar_t* from) const {
    if (logits_.planar()) return {from + 2 * tile_, logits_.class_stride};
    return {from + tile_ * logits_.pixel_stride, tile_};
  }

  // Copies `count` pixels to scratch; the remaining pixels of the tile get zero logits.
  void copy_in(const scalar_t* from, int count) {
    scalar_t* rows = own_rows();
    const int64_t step = logits_.pixel_stride;
    if (logits_.planar()) {
      const int64_t stride = logits_.class_stride;
      for (int64_t c = 0; c < classes_; ++c) std::copy_n(from + c * stride, count, rows + c * row_stride_);
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

  void copy_out(scalar_t* to, int count) {
    const scalar_t* rows = own_rows();
    const int64_t step = gradient_.pixel_stride;
    if (gradient_.planar()) {
      const int64_t stride = gradient_.class_stride;
      for (int64_t c = 0; c < classes_; ++c) std::copy_n(rows + c * row_stride_, count, to + c * stride);
      return;
    }
    scalar_t* lines = lines_.get();
    const int64_t line = padded_classes();
    detail::transpose(rows, row_stride_, lines, line, line, count);
    if (step != classes_) {
      for (int i = 0; i < count; ++i) std::copy_n(lines + i * line, classes_, to + i * step);
      return;
    }
    for (int i = 0; line > classes_ && i < count; ++i) {
      std::memmove(lines + i * classes_, lines + i * line, sizeof(scalar_t) * kSquare);
    }
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
  Scratch<scalar_t> narrow_rows_;  // [C][row_stride], half types only: logits or gradients of a copied tile
  Scratch<scalar_t> lines_;        // [tile][C], interleaved pixels before or after the transposition
  bool rows_aligned_;
};

}  // namespace fastseg
