// Labels and weights of one block's pixels in one output row.
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

inline void load_pixel_weights(const Problem& problem, const Block& block, int64_t image, int64_t y, int k,
                               PixelTile& tile) {
  const int64_t row = image * problem.height() + y;
  const float smoothing = problem.label_smoothing;
  const int64_t* strides = problem.grad_losses_strides;
  alignas(64) float target_lanes[kLanes]{}, smooth_lanes[kLanes]{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t label = tile.label[k][lane];
    if (label < 0) continue;
    const int64_t x = block.pixel[k][lane];
    float weight = problem.grad_numerator;
    if (problem.pixel_weight) weight *= problem.pixel_weight[row * problem.width() + x];
    if (problem.grad_losses) weight *= problem.grad_losses[image * strides[0] + y * strides[1] + x * strides[2]];
    target_lanes[lane] = weight * (1.0f - smoothing) * problem.weight_of(label);
    smooth_lanes[lane] = weight * smoothing / static_cast<float>(problem.classes);
  }
  const f32x16 target = simd::load(target_lanes), smooth = simd::load(smooth_lanes);
  tile.target[k] = target;
  tile.smooth[k] = smooth;
  tile.through[k] = target + smooth * problem.class_weight_sum;
}

}  // namespace detail

// Labels and weights of the block in output row y, whose labels are given: label_stride() of them.
template <int steps>
[[gnu::noinline]] void load_tile(const Problem& problem, const Block& block, int64_t image, int64_t y,
                                 const int32_t* labels, PixelTile& tile) {
  // The pixels of a lane are neighbours, those of a vector are not.
  alignas(64) int32_t by_lane[kLanes][kMostSteps], by_step[kMostSteps][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(by_lane[lane], labels + block.pixel[0][lane], sizeof by_lane[lane]);
  }
  detail::transpose_labels<(steps > kMostSteps / 2 ? kMostSteps : kMostSteps / 2)>(by_lane, by_step);
  const i32x16 none = simd::splat(int32_t(-1)), width = simd::splat(static_cast<int32_t>(problem.width()));
  const u32x16 one = simd::bit_cast<u32x16>(simd::splat(int32_t(1)));
  u32x16 residues{}, words{};
  for (int k = 0; k < steps; ++k) {
    i32x16 label = simd::load(by_step[k]);
    if (!block.full) label = simd::select(simd::load(block.pixel[k]) < width, label, none);
    const auto counted = label >= 0;
    const u32x16 bits = simd::bit_cast<u32x16>(label);
    residues |= simd::keep_where(counted, simd::shift_left(one, bits & 31u));
    words |= simd::keep_where(counted, simd::shift_left(one, (bits >> 5) & 31u));
    tile.label[k] = label;
    tile.target[k] = tile.through[k] = simd::keep_where(counted, simd::splat(problem.grad_numerator));
  }
  tile.classes_modulo_32 = simd::reduce_or(residues);
  tile.class_words = simd::reduce_or(words);
  tile.counts = tile.class_words != 0;
  if (!tile.counts || problem.plain()) return;
  for (int k = 0; k < steps; ++k) detail::load_pixel_weights(problem, block, image, y, k, tile);
}

// Calls fn(c) for every class that labels a pixel of the tile, and with more than 32 classes perhaps for others.
template <typename Function>
FASTSEG_INLINE void for_each_label(const Problem& problem, const PixelTile& tile, const Function& fn) {
  for (int64_t first = 0; first < problem.classes; first += 32) {
    if (!(tile.class_words >> (first / 32 % 32) & 1)) continue;
    for (uint32_t bits = tile.classes_modulo_32; bits; bits &= bits - 1) {
      const int64_t c = first + __builtin_ctz(bits);
      if (c < problem.classes) fn(c);
    }
  }
}

}  // namespace upsample_cross_entropy
