// Labels of a band whose exponentials grow from row to row (row_growth.h).
//
// There logits and normalisers are bilinear in the whole band, so all that its labels contribute to the loss and to the
// gradient follows from how many pixels of each class a cell has, and from the sums of their columns, rows and products
// of both. They are counted row by row in integers and turned into numbers once per band.
#pragma once

#include "row_growth.h"
#include "tile_labels.h"

namespace upsample_cross_entropy {

// Whether the labels of the tiles are left to the end of the band.
inline bool counts_by_band(const Problem& problem, const Workspace& work) {
  return work.growth.active && problem.plain() && !problem.losses;
}

// Adds the labels of the tile, whose first output row is y: work.label_counts[c] are the sums of count_pixels() and of
// its products with the row, counted from the band's first.
template <int steps, int rows>
[[gnu::noinline]] void count_band_labels(const Problem& problem, Workspace& work, int64_t y) {
  const int row = static_cast<int>(y - work.growth.first_row);
  const PixelTile& tile = work.tile;
  work.growth.classes.modulo_32 |= tile.classes.modulo_32;
  work.growth.classes.words |= tile.classes.words;
  for_each_class(problem, tile.classes, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
    i32x16 all = count_pixels<steps>(tile, 0, c), later{};
    for (int r = 1; r < rows; ++r) {
      const i32x16 counted = count_pixels<steps>(tile, r, c);
      all += counted;
      later += counted * r;
    }
    int32_t* to = work.label_counts.get() + c * 2 * kLanes;
    simd::store(to, simd::load(to) + all);
    simd::store(to + kLanes, simd::load(to + kLanes) + all * row + later);
  });
}

// The sum of the labels' logits less their normalisers; subtracts the labels' part from the gradients.
inline f32x16 flush_band_labels(const Problem& problem, Workspace& work, const Block& block) {
  const float column = problem.plan.step, row = static_cast<float>(problem.vertical.step);
  const f32x16 first_column = simd::load(block.fraction[0]);
  const float first_row = problem.vertical.fraction[work.growth.first_row];
  f32x16 logits{};
  for_each_class(problem, work.growth.classes, [&](int64_t c) {
    int32_t* counts = work.label_counts.get() + c * 2 * kLanes;
    const i32x16 all = simd::load(counts), by_row = simd::load(counts + kLanes);
    const f32x16 pixels = simd::convert<f32x16>(all >> kPixelBits), rows = simd::convert<f32x16>(by_row >> kPixelBits);
    const f32x16 columns = simd::convert<f32x16>(all & (kPixel - 1));
    const f32x16 products = simd::convert<f32x16>(by_row & (kPixel - 1));
    simd::store(counts, i32x16{});
    simd::store(counts + kLanes, i32x16{});
    // Sums of the weights of the right, lower and lower right corners.
    const f32x16 right = pixels * first_column + columns * column, lower = pixels * first_row + rows * row;
    const f32x16 lower_right = right * first_row + (rows * first_column + products * column) * row;
    const f32x16 lower_left = lower - lower_right, upper_right = right - lower_right;
    const f32x16 left = pixels - right, upper_left = left - lower_left;
    const f32x16(&corner)[4] = Corners(work, block, c).values;
    const f32x16(&highest)[4] = work.growth.highest;
    logits += (corner[0] - highest[0]) * upper_left + (corner[1] - highest[1]) * upper_right +
              (corner[2] - highest[2]) * lower_left + (corner[3] - highest[3]) * lower_right;
    if (problem.task == Task::kStatistics) {
      float* truth = work.truth + c * kLanes;
      simd::store(truth, simd::load(truth) + pixels);
    }
    if (problem.task != Task::kGradient || problem.classes == 1) return;
    float* to = work.accumulators.get() + c * 4 * kLanes;
    const f32x16 parts[] = {left, right, lower_left, lower_right};
    for (int i = 0; i < 4; ++i) {
      simd::store(to + i * kLanes, simd::load(to + i * kLanes) - parts[i] * problem.grad_numerator);
    }
  });
  work.growth.classes = {};
  return logits * problem.grad_numerator;
}

}  // namespace upsample_cross_entropy
