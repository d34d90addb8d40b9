// How one output row is cut into blocks of 16 lanes.
//
// A lane is a source cell (see bilinear.h) and k counts output pixels inside the cell: along k the logits of a lane are
// linear. A cell with more than kMostSteps pixels is cut into several blocks. When the output is so much smaller than
// the source that most cells hold no pixel, a lane is one pixel with whatever cell it lies in.
#pragma once

#include <vector>

#include "fastseg/bilinear.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace upsample_cross_entropy {

using fastseg::BilinearAxis;
using fastseg::ceil_divide;
using simd::f32x16;
using simd::i32x16;
using simd::kLanes;
using simd::u32x16;

constexpr int kMostSteps = 8;

struct alignas(64) Block {
  float fraction[kMostSteps][kLanes];  // of the pixel between the left and right end of its cell
  int32_t pixel[kMostSteps][kLanes];   // output column, or the output width where the lane has no such pixel
  int32_t cell[kLanes];
  bool full;  // every lane has all its pixels
};

struct Plan {
  std::vector<Block> blocks;
  int steps;         // pixels per lane and block, 1 to kMostSteps
  bool consecutive;  // the cells of a block are cell[0], cell[0] + 1, ...
  float step;        // growth of the fraction from one pixel of a cell to the next
};

namespace detail {

inline Block empty_block(const BilinearAxis& axis) {
  Block block{};
  for (auto& lanes : block.pixel) std::fill(lanes, lanes + kLanes, static_cast<int32_t>(axis.output_size));
  return block;
}

// Pixels [first, first + steps) of the cells [cell, cell + 16), first counted from each cell's own first pixel.
inline Block block_of_cells(const BilinearAxis& axis, int64_t cell, int64_t first, int steps) {
  Block block = empty_block(axis);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t q = cell + lane;
    block.cell[lane] = static_cast<int32_t>(q);
    if (q > axis.source_size) continue;
    const int64_t begin = axis.first[q] + first, end = axis.first[q + 1];
    for (int k = 0; k < steps; ++k) {
      if (begin + k < end) {
        block.fraction[k][lane] = axis.fraction[begin + k];
        block.pixel[k][lane] = static_cast<int32_t>(begin + k);
      } else if (begin < end) {  // the sequence goes on, so that the lane's exponentials stay ordinary numbers
        block.fraction[k][lane] = axis.fraction[begin] + static_cast<float>(k * axis.step);
      }
    }
  }
  const auto& last = block.pixel[steps - 1];  // a lane that lacks a pixel lacks its last
  block.full = std::all_of(last, last + kLanes, [&](int32_t pixel) { return pixel < axis.output_size; });
  return block;
}

inline Block block_of_pixels(const BilinearAxis& axis, int64_t first) {
  Block block = empty_block(axis);
  for (int lane = 0; lane < kLanes && first + lane < axis.output_size; ++lane) {
    const int64_t pixel = first + lane;
    block.cell[lane] = axis.cell[pixel];
    block.fraction[0][lane] = axis.fraction[pixel];
    block.pixel[0][lane] = static_cast<int32_t>(pixel);
  }
  return block;
}

}  // namespace detail

inline Plan make_plan(const BilinearAxis& axis) {
  constexpr int64_t kSparse = 2;  // cells per pixel beyond which gathering pixels is cheaper than skipping cells
  Plan plan;
  plan.step = static_cast<float>(axis.step);
  const int64_t first_cell = axis.cell.front(), cells = axis.cell.back() + 1 - first_cell;
  plan.consecutive = cells <= kSparse * axis.output_size;
  if (!plan.consecutive) {
    plan.steps = 1;
    for (int64_t pixel = 0; pixel < axis.output_size; pixel += kLanes) {
      plan.blocks.push_back(detail::block_of_pixels(axis, pixel));
    }
    return plan;
  }
  const int64_t largest = axis.largest_cell(), pieces = ceil_divide(largest, kMostSteps);
  plan.steps = static_cast<int>(ceil_divide(largest, pieces));
  for (int64_t cell = first_cell; cell < first_cell + cells; cell += kLanes) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      plan.blocks.push_back(detail::block_of_cells(axis, cell, piece * plan.steps, plan.steps));
    }
  }
  return plan;
}

}  // namespace upsample_cross_entropy
