// Half types: the exponentials of a block from row to row.
//
// Inside a cell the upsampled logits are bilinear, and so is their distance to a normaliser that interpolates the
// largest logits of the cell's four corners. The start e_0 and the ratio q of block_rows.h form geometric sequences in
// y: two multiplications per class and row take the place of interpolating and of two exponentials. Over the 8 x 8
// pixels of a cell the rounding of q's own ratio is amplified up to 49 times. That is nothing in a half type; in float
// it would break the tolerance policy.
#pragma once

#include "problem.h"

namespace upsample_cross_entropy {

constexpr float kLargestGrowth = 42.0f;  // twice this is the largest exponent: e^84 times a few is still a number
constexpr int kFewestRows = 2;           // with fewer rows there is nothing to be gained

// Four corners of the block's cells: upper left and right, lower left and right.
struct Corners {
  f32x16 values[4];

  Corners(const Workspace& work, const Block& block, int64_t c) {
    with_cells(block, [&](auto cells) FASTSEG_ALWAYS_INLINE {
      for (int i = 0; i < 4; ++i) {
        values[i] = read_row<cells>(block, (i < 2 ? work.upper : work.lower) + c * work.stride + i % 2);
      }
    });
  }
};

// Normalisers of the corners. False if the logits there are too far apart to grow from row to row, or are no numbers.
inline bool normalise_corners(Workspace& work, const Block& block) {
  i32x16 grows = simd::splat(int32_t(-1));
  with_cells(block, [&](auto cells) FASTSEG_ALWAYS_INLINE {
    for (int i = 0; i < 4; ++i) {
      const float* column = (i < 2 ? work.upper_extremes : work.lower_extremes) + i % 2;
      const f32x16 highest = read_row<cells>(block, column);
      const f32x16 lowest = read_row<cells>(block, column + work.stride);
      const f32x16 not_finite = read_row<cells>(block, column + 2 * work.stride);
      grows &= highest - lowest + not_finite <= simd::splat(kLargestGrowth);
      work.growth.highest[i] = highest;
    }
  });
  return simd::mask_bits(grows) == 0xffff;
}

// Label smoothing: sum_c w_c logit_c at the corners.
inline void weight_corners(const Problem& problem, Workspace& work, const Block& block) {
  for (f32x16& weighted : work.growth.weighted) weighted = f32x16{};
  for (int64_t c = 0; c < problem.classes; ++c) {
    const Corners corners(work, block, c);
    for (int i = 0; i < 4; ++i) work.growth.weighted[i] += corners.values[i] * problem.weight_of(c);
  }
}

// Start and ratio of every class in output row y, and the factors that lead from there to the rows below it.
inline void start_growth(const Problem& problem, Workspace& work, const Block& block, int64_t y) {
  const float fraction_y = problem.vertical.fraction[y];
  const f32x16 fraction_x = simd::load(block.fraction[0]);
  // Ratios enter up to seventh powers, their own ratio up to the 49th: these exponentials take a digit more.
  const float step_x = problem.plan.step, step_y = static_cast<float>(problem.vertical.step);
  const float log_x = step_x * simd::kLog2e, log_y = step_y * simd::kLog2e, log_xy = step_x * log_y;
  const f32x16(&highest)[4] = work.growth.highest;
  float* row = work.logits.get();
  float* factors = work.growth_factors.get();
  for (int64_t c = 0; c < problem.classes; ++c, row += 2 * kLanes, factors += 2 * kLanes) {
    const f32x16(&corner)[4] = Corners(work, block, c).values;
    const f32x16 upper_left = corner[0] - highest[0], upper_right = corner[1] - highest[1];
    const f32x16 left_slope = corner[2] - highest[2] - upper_left, right_slope = corner[3] - highest[3] - upper_right;
    const f32x16 left = upper_left + left_slope * fraction_y, twist = right_slope - left_slope;
    const f32x16 slope = upper_right - upper_left + twist * fraction_y;
    simd::store(row, simd::exp2<4>((left + slope * fraction_x) * simd::kLog2e));
    simd::store(row + kLanes, simd::exp2<5>(slope * log_x));
    simd::store(factors, simd::exp2<5>((left_slope + twist * fraction_x) * log_y));
    simd::store(factors + kLanes, simd::exp2<5>(twist * log_xy));
  }
}

// Prepares the `rows` output rows from y on, if they can grow.
inline void open_growth(const Problem& problem, Workspace& work, const Block& block, int64_t y, int rows) {
  work.growth.active = problem.half_digits && rows >= kFewestRows && normalise_corners(work, block);
  if (!work.growth.active) return;
  work.growth.first_row = y;
  if (problem.label_smoothing > 0) weight_corners(problem, work, block);
  start_growth(problem, work, block, y);
}

// On by the two rows that were computed together.
inline void grow(const Problem& problem, Workspace& work) {
  float* state = work.logits.get();
  const float* factors = work.growth_factors.get();
  for (int64_t i = 0; i < 2 * kLanes * problem.classes; i += kLanes) {
    const f32x16 factor = simd::load(factors + i);
    simd::store(state + i, simd::load(state + i) * factor * factor);
  }
}

}  // namespace upsample_cross_entropy
