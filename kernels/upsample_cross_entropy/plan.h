// How one output row is cut into blocks of 16 lanes.
//
// A lane is a source cell (see bilinear.h) and k counts output pixels inside the cell: along k the logits of a lane are
// linear. A cell with more than kMostSteps pixels is cut into several blocks. When the output is so much smaller than
// the source that most cells hold no pixel, a lane is one pixel with whatever cell it lies in; so are the few pixels of
// a row's last cells, where a block of cells would leave most lanes empty.
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

enum class Cells {
  neighbours,  // cell[0], cell[0] + 1, ...
  close,       // within 16 of cell[0]
  anywhere,
};

struct alignas(64) Block {
  float fraction[kMostSteps][kLanes];  // of the pixel between the left and right end of its cell
  int32_t pixel[kMostSteps][kLanes];   // output column, or the output width where the lane has no such pixel
  int32_t cell[kLanes];
  Cells cells;
  int steps;  // pixels per lane, 1 to kMostSteps
  int lanes;  // that have pixels
  bool full;  // every lane has all its pixels
};

struct Plan {
  std::vector<Block> blocks;
  float step;  // growth of the fraction from one pixel of a cell to the next
};

namespace detail {

inline Block empty_block(const BilinearAxis& axis, Cells cells, int steps, int64_t lanes) {
  Block block{};
  block.cells = cells;
  block.steps = steps;
  block.lanes = static_cast<int>(lanes);
  for (auto& pixels : block.pixel) std::fill_n(pixels, kLanes, static_cast<int32_t>(axis.output_size));
  return block;
}

// Pixels [first, first + steps) of the cells [cell, cell + 16), first counted from each cell's own first pixel.
inline Block block_of_cells(const BilinearAxis& axis, int64_t cell, int64_t first, int steps) {
  Block block = empty_block(axis, Cells::neighbours, steps, kLanes);
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

inline Block block_of_pixels(const BilinearAxis& axis, int64_t first, Cells cells) {
  Block block = empty_block(axis, cells, 1, std::min<int64_t>(kLanes, axis.output_size - first));
  std::fill_n(block.cell, kLanes, axis.cell[first]);
  for (int lane = 0; lane < block.lanes; ++lane) {
    const int64_t pixel = first + lane;
    block.cell[lane] = axis.cell[pixel];
    block.fraction[0][lane] = axis.fraction[pixel];
    block.pixel[0][lane] = static_cast<int32_t>(pixel);
  }
  block.full = block.lanes == kLanes;
  return block;
}

}  // namespace detail

inline Plan make_plan(const BilinearAxis& axis) {
  constexpr int64_t kSparse = 2;  // cells per pixel beyond which gathering pixels is cheaper than skipping cells
  Plan plan;
  plan.step = static_cast<float>(axis.step);
  const int64_t first_cell = axis.cell.front(), cells = axis.cell.back() + 1 - first_cell;
  if (cells > kSparse * axis.output_size) {
    for (int64_t pixel = 0; pixel < axis.output_size; pixel += kLanes) {
      plan.blocks.push_back(detail::block_of_pixels(axis, pixel, Cells::anywhere));
    }
    return plan;
  }
  const int64_t largest = axis.largest_cell(), pieces = ceil_divide(largest, kMostSteps);
  const int steps = static_cast<int>(ceil_divide(largest, pieces));
  for (int64_t cell = first_cell; cell < first_cell + cells; cell += kLanes) {
    const int64_t pixel = axis.first[cell];
    if (steps > 1 && first_cell + cells - cell < kLanes && axis.output_size - pixel <= kLanes) {
      plan.blocks.push_back(detail::block_of_pixels(axis, pixel, Cells::close));
      continue;
    }
    for (int64_t piece = 0; piece < pieces; ++piece) {
      plan.blocks.push_back(detail::block_of_cells(axis, cell, piece * steps, steps));
    }
  }
  return plan;
}

}  // namespace upsample_cross_entropy
