// How upsample_argmax cuts the output: bands of rows, blocks of 16 columns, tiles of blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastseg/bilinear.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace fastseg::upsample_argmax {

using simd::f32x16;
using simd::i32x16;
using simd::kLanes;

constexpr int64_t kStagedBytes = 512 << 10;  // two staged source rows of a tile: half of the second-level cache

// 16 neighbouring output columns.
struct Block {
  int64_t column;    // leftmost source column they read
  int64_t cells;     // source cells column .. column + cells - 1 hold them; cell j lies between columns j and j + 1
  bool narrow;       // they read columns column .. column + 15 only
  i32x16 low, high;  // [16] source columns left and right of each output column, counted from `column`
  f32x16 fraction;   // [16] weight of the right one
};

// Output rows begin .. end - 1 lie between source rows `top` and `bottom`.
struct Band {
  int64_t top, bottom, begin, end;
};

// Blocks begin .. end - 1 read source columns column .. column + columns - 1.
struct Tile {
  int64_t begin, end, column, columns;
};

// The two source elements that an output pixel reads and the weight of the second, by PyTorch's rule: where the
// coordinate is clamped to 0 the first two elements are read with weights 1 and 0, and an axis that keeps its size is
// copied. That matters for infinite and NaN elements, since 0 times them is NaN.
struct Sample {
  int64_t low, high;
  float fraction;
};

inline Sample sample(const BilinearAxis& axis, int64_t o) {
  const int64_t cell = axis.cell[o];
  if (axis.source_size == axis.output_size) return {o, o, 0.0f};
  if (cell == 0) return {0, std::min<int64_t>(1, axis.source_size - 1), 0.0f};
  return {axis.left(cell), axis.right(cell), axis.fraction[o]};
}

inline std::vector<Band> find_bands(const BilinearAxis& rows) {
  std::vector<Band> bands;
  for (int64_t y = 0; y < rows.output_size; ++y) {
    const Sample row = sample(rows, y);
    if (bands.empty() || bands.back().top != row.low || bands.back().bottom != row.high) {
      bands.push_back({row.low, row.high, y, y});
    }
    bands.back().end = y + 1;
  }
  return bands;
}

// The last block repeats the last output column in its unused lanes.
inline std::vector<Block> find_blocks(const BilinearAxis& columns) {
  std::vector<Block> blocks(ceil_divide(columns.output_size, kLanes));
  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& block = blocks[i];
    block.column = sample(columns, i * kLanes).low;
    alignas(64) int32_t low[kLanes], high[kLanes];
    alignas(64) float fraction[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Sample column = sample(columns, std::min<int64_t>(i * kLanes + lane, columns.output_size - 1));
      low[lane] = static_cast<int32_t>(column.low - block.column);
      high[lane] = static_cast<int32_t>(column.high - block.column);
      fraction[lane] = column.fraction;
    }
    block.low = simd::load(low);
    block.high = simd::load(high);
    block.fraction = simd::load(fraction);
    block.cells = low[kLanes - 1] + 1;
    block.narrow = high[kLanes - 1] < kLanes;
  }
  return blocks;
}

inline std::vector<Tile> find_tiles(const std::vector<Block>& blocks, int64_t classes) {
  const int64_t most = std::max<int64_t>(4 * kLanes, kStagedBytes / (2 * classes * sizeof(float)) - 2 * kLanes);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t end = blocks[i].column + blocks[i].high[kLanes - 1] + 1;
    if (tiles.empty() || end - tiles.back().column > most) {
      const int64_t begin = i;
      tiles.push_back({begin, begin, blocks[i].column, 0});
    }
    tiles.back().end = i + 1;
    tiles.back().columns = end - tiles.back().column;
  }
  return tiles;
}

}  // namespace fastseg::upsample_argmax
