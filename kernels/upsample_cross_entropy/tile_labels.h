// Labels and weights of one block's pixels in one or two output rows.
#pragma once

#include "fastseg/transpose.h"
#include "problem.h"

namespace upsample_cross_entropy {

namespace detail {

// steps[k][lane] = lanes[lane][k]
template <int columns>
FASTSEG_INLINE void transpose_labels(const int32_t (&lanes)[kLanes][kMostSteps], int32_t (&steps)[kMostSteps][kLanes]) {
  constexpr int kSquare = fastseg::detail::square_of<int32_t>, kRows = kSquare * fastseg::detail::kSquares;
  for (int lane = 0; lane < kLanes; lane += kRows) {
    for (int k = 0; k < columns; k += kSquare) {
      fastseg::detail::transpose_register<true>(&lanes[lane][k], kMostSteps, &steps[k][lane], kLanes);
    }
  }
}

// Of pixels k of the lanes in output row y, which are vector i of the tile.
inline void load_pixel_weights(const Problem& problem, const Block& block, int64_t image, int64_t y, int k, int i,
                               PixelTile& tile) {
  const int64_t row = image * problem.height() + y;
  const float smoothing = problem.label_smoothing;
  const int64_t* strides = problem.grad_losses_strides;
  alignas(64) float target_lanes[kLanes]{}, smooth_lanes[kLanes]{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t label = tile.label[i][lane];
    if (label < 0) continue;
    const int64_t x = block.pixel[k][lane];
    float weight = problem.grad_numerator;
    if (problem.pixel_weight) weight *= problem.pixel_weight[row * problem.width() + x];
    if (problem.grad_losses) weight *= problem.grad_losses[image * strides[0] + y * strides[1] + x * strides[2]];
    target_lanes[lane] = weight * (1.0f - smoothing) * problem.weight_of(label);
    smooth_lanes[lane] = weight * smoothing / static_cast<float>(problem.classes);
  }
  const f32x16 target = simd::load(target_lanes), smooth = simd::load(smooth_lanes);
  tile.target[i] = target;
  tile.smooth[i] = smooth;
  tile.through[i] = target + smooth * problem.class_weight_sum;
}

}  // namespace detail

// Labels and weights of the block in output rows y, y + 1, ..., whose labels are given: label_stride() a row.
template <int steps, int rows>
[[gnu::noinline]] void load_tile(const Problem& problem, const Block& block, int64_t image, int64_t y,
                                 const int32_t* labels, PixelTile& tile) {
  const i32x16 none = simd::splat(int32_t(-1)), width = simd::splat(static_cast<int32_t>(problem.width()));
  const u32x16 one = simd::bit_cast<u32x16>(simd::splat(int32_t(1)));
  const bool several_words = problem.classes > 32;
  u32x16 residues{}, words{};
  for (int row = 0; row < rows; ++row) {
    // The pixels of a lane are neighbours, those of a vector are not.
    alignas(64) int32_t by_lane[kLanes][kMostSteps], by_step[kMostSteps][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(by_lane[lane], labels + row * problem.label_stride() + block.pixel[0][lane], sizeof by_lane[lane]);
    }
    detail::transpose_labels<(steps > kMostSteps / 2 ? kMostSteps : kMostSteps / 2)>(by_lane, by_step);
    for (int k = 0; k < steps; ++k) {
      const int i = row * steps + k;
      i32x16 label = simd::load(by_step[k]);
      if (!block.full) label = simd::select(simd::load(block.pixel[k]) < width, label, none);
      const auto counted = label >= 0;
      const u32x16 bits = simd::bit_cast<u32x16>(label);
      residues |= simd::keep_where(counted, simd::shift_left(one, bits & 31u));
      if (several_words) words |= simd::keep_where(counted, simd::shift_left(one, (bits >> 5) & 31u));
      tile.label[i] = label;
    }
  }
  const uint32_t modulo_32 = simd::reduce_or(residues);
  tile.classes = {modulo_32, several_words ? simd::reduce_or(words) : modulo_32 != 0};
  if (tile.classes.empty() || problem.plain()) return;
  for (int i = 0; i < rows * steps; ++i) {
    detail::load_pixel_weights(problem, block, image, y + i / steps, i % steps, i, tile);
  }
}

// Calls fn(c) for every class of the set.
template <typename Function>
FASTSEG_INLINE void for_each_class(const Problem& problem, const ClassSet& set, const Function& fn) {
  for (int64_t first = 0; first < problem.classes; first += 32) {
    if (!(set.words >> (first / 32 % 32) & 1)) continue;
    for (uint32_t bits = set.modulo_32; bits; bits &= bits - 1) {
      const int64_t c = first + __builtin_ctz(bits);
      if (c < problem.classes) fn(c);
    }
  }
}

// Where 16 lanes have pixels of one class, in integers: kPixel for each, and its k.
constexpr int kPixelBits = 16;
constexpr int32_t kPixel = 1 << kPixelBits;
struct alignas(64) PixelNumbers {
  int32_t values[kMostSteps][kLanes];

  constexpr PixelNumbers() : values() {
    for (int i = 0; i < kMostSteps * kLanes; ++i) values[i / kLanes][i % kLanes] = kPixel + i / kLanes;
  }
};
inline constexpr PixelNumbers kNumbers;

template <int steps>
FASTSEG_INLINE i32x16 count_pixels(const PixelTile& tile, int row, int64_t c) {
  i32x16 counted{};
  for (int k = 0; k < steps; ++k) {
    counted += simd::keep_where(tile.label[row * steps + k] == static_cast<int32_t>(c), simd::load(kNumbers.values[k]));
  }
  return counted;
}

}  // namespace upsample_cross_entropy
