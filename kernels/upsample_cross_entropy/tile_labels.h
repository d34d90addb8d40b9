// Labels and weights of one block's pixels in one output row.
#pragma once

#include "fastseg/transpose.h"
#include "problem.h"

namespace upsample_cross_entropy {

namespace detail {

// labels: of the output row, label_stride() of them. The pixels of a lane are neighbours, those of a vector are not.
inline void load_tile_labels(const Problem& problem, const Block& block, const int32_t* labels, PixelTile& tile) {
  alignas(64) int32_t lanes[kLanes][kMostSteps], steps[kMostSteps][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(lanes[lane], labels + block.pixel[0][lane], sizeof lanes[lane]);
  }
  const int count = problem.plan.steps, columns = count > kMostSteps / 2 ? kMostSteps : kMostSteps / 2;
  fastseg::detail::transpose(lanes[0], kMostSteps, steps[0], kLanes, kLanes, columns);
  const i32x16 none = simd::splat(int32_t(-1)), width = simd::splat(static_cast<int32_t>(problem.width()));
  for (int k = 0; k < count; ++k) {
    const i32x16 label = simd::load(steps[k]);
    tile.label[k] = block.full ? label : simd::select(simd::load(block.pixel[k]) < width, label, none);
  }
}

// Which classes occur, by their residues: a few vector operations per vector of labels where a table would take sixteen
// stores.
inline void note_classes(const Problem& problem, PixelTile& tile) {
  const u32x16 one = simd::bit_cast<u32x16>(simd::splat(int32_t(1)));
  const bool many = problem.classes > 32;
  u32x16 residues{}, words{};
  for (int k = 0; k < problem.plan.steps; ++k) {
    const auto counted = tile.label[k] >= 0;
    const u32x16 label = simd::bit_cast<u32x16>(tile.label[k]);
    residues |= simd::keep_where(counted, simd::shift_left(one, label & 31u));
    if (many) words |= simd::keep_where(counted, simd::shift_left(one, (label >> 5) & 31u));
  }
  tile.classes_modulo_32 = simd::reduce_or(residues);
  tile.class_words = many ? simd::reduce_or(words) : 1;
  tile.counts = tile.classes_modulo_32 != 0;
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

// labels: of output row y.
inline void load_tile(const Problem& problem, const Block& block, int64_t image, int64_t y, const int32_t* labels,
                      PixelTile& tile) {
  detail::load_tile_labels(problem, block, labels, tile);
  detail::note_classes(problem, tile);
  if (!tile.counts) return;
  for (int k = 0; k < problem.plan.steps; ++k) {
    if (problem.plain()) {
      tile.target[k] = tile.through[k] = simd::keep_where(tile.label[k] >= 0, simd::splat(problem.grad_numerator));
    } else {
      detail::load_pixel_weights(problem, block, image, y, k, tile);
    }
  }
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
