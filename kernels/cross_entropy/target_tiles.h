// Target distributions for the sweep of probabilities.h: rows of the accumulator's type, from any dtype and layout. A
// virtual call per tile avoids compiling the sweep once per pair of dtypes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>

#include "fastseg/arguments.h"
#include "fastseg/pixel_tile.h"

namespace fastseg::probability_targets {

// One tile of targets [C, T], in memory or in scratch, and of its gradient (which may be the memory of the values).
template <typename accumulate_t>
struct TargetRows {
  const accumulate_t* values;  // [C, T], rows `stride` apart
  accumulate_t* gradient;      // [C, T], rows `gradient_stride` apart; null: not wanted
  int64_t stride, gradient_stride;
  bool streaming;

  FASTSEG_INLINE auto load(int64_t c, int i) const { return simd::load(values + c * stride + i); }
  FASTSEG_INLINE void store(int64_t c, int i, simd::vec<accumulate_t> lanes) const {
    accumulate_t* to = gradient + c * gradient_stride + i;
    if (streaming) {
      simd::stream(to, lanes);
    } else {
      simd::store(to, lanes);
    }
  }
  // Prefetches the same row of the next tile: the hardware prefetcher does not follow hundreds of rows at once.
  FASTSEG_INLINE void prefetch(int64_t c, int i, int tile) const { __builtin_prefetch(values + c * stride + i + tile); }
};

// The targets of one thread.
template <typename accumulate_t>
class TargetTiles {
 public:
  using Body = std::function<void(const TargetRows<accumulate_t>&)>;
  virtual ~TargetTiles() = default;
  // Calls body with `count` pixels of one image from `first` on, then writes their gradient to the tensor.
  virtual void visit(int64_t image, int64_t first, int count, const Body& body) = 0;
};

template <typename scalar_t>
class TargetTilesOf final : public TargetTiles<simd::accumulate<scalar_t>> {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using typename TargetTiles<accumulate_t>::Body;

  TargetTilesOf(PixelView<const scalar_t> values, PixelView<scalar_t> gradient, int64_t classes)
      : access_(values, gradient, classes), classes_(classes), wants_gradient_(gradient.data != nullptr) {}

  void visit(int64_t image, int64_t first, int count, const Body& body) override {
    access_.visit(image, first, count, [&](const Tile<scalar_t>& tile) {
      if constexpr (std::is_same_v<scalar_t, accumulate_t>) {
        body({tile.logits, tile.gradient, tile.logits_stride, tile.gradient_stride, tile.streaming});
      } else {
        widen(tile);
        body({tile.rows, wants_gradient_ ? tile.rows : nullptr, tile.row_stride, tile.row_stride, false});
        if (wants_gradient_) narrow(tile);
      }
    });
  }

 private:
  void widen(const Tile<scalar_t>& tile) const {
    for (int64_t c = 0; c < classes_; ++c) {
      for (int i = 0; i < access_.tile(); i += kLanes) {
        tile.prefetch(c, i);
        tile.fetch(c, i);
      }
    }
  }

  void narrow(const Tile<scalar_t>& tile) const {
    for (int64_t c = 0; c < classes_; ++c) {
      const accumulate_t* row = tile.rows + c * tile.row_stride;
      for (int i = 0; i < access_.tile(); i += kLanes) tile.store(c, i, simd::load(row + i));
    }
  }

  TileAccess<scalar_t> access_;
  int64_t classes_;
  bool wants_gradient_;
};

// For the target, input 1 of `walk`, and its gradient, output `gradient` of `walk` and of the same dtype, unless that
// number is negative. accumulate_t is double if and only if the target is fp64.
template <typename accumulate_t>
std::unique_ptr<TargetTiles<accumulate_t>> target_tiles(const PixelWalk& walk, const Tensor& target, int gradient) {
  std::unique_ptr<TargetTiles<accumulate_t>> tiles;
  with_floating_type(target, "target", [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (std::is_same_v<simd::accumulate<scalar_t>, accumulate_t>) {
      const PixelView<scalar_t> to = gradient < 0 ? PixelView<scalar_t>{} : walk.output<scalar_t>(gradient);
      tiles = std::make_unique<TargetTilesOf<scalar_t>>(walk.input<scalar_t>(1), to, walk.classes);
    }
  });
  return tiles;
}

}  // namespace fastseg::probability_targets
