// The forward: every source row is interpolated along the width once ("expanded"), and each output row is a blend of
// the two expanded rows around it.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "upsample_bilinear2d/axis.h"
#include "upsample_bilinear2d/element_rows.h"

namespace fastseg::upsample_bilinear2d {

// How 16 neighbouring outputs of an axis read a row of single elements.
struct Block {
  int64_t first;  // the leftmost element; `low` and `high` are relative to it
  bool narrow;    // all lie within 16 elements, which can be read
  simd::i32x16 low, high;
  simd::f32x16 low_weight, high_weight;
};

// The last block repeats the last output.
inline std::vector<Block> blocks_of(const Axis& axis) {
  std::vector<Block> blocks(ceil_divide(axis.output, simd::kLanes));
  for (size_t b = 0; b < blocks.size(); ++b) {
    alignas(64) int32_t low[simd::kLanes], high[simd::kLanes];
    alignas(64) float low_weight[simd::kLanes], high_weight[simd::kLanes];
    const int64_t begin = b * simd::kLanes;
    for (int lane = 0; lane < simd::kLanes; ++lane) {
      const int64_t o = std::min(begin + lane, axis.output - 1);
      low[lane] = axis.low[o] - axis.low[begin];
      high[lane] = axis.high[o] - axis.low[begin];
      low_weight[lane] = axis.low_weight[o];
      high_weight[lane] = axis.high_weight[o];
    }
    const bool narrow = high[simd::kLanes - 1] < simd::kLanes && axis.low[begin] + simd::kLanes <= axis.source;
    blocks[b] = {axis.low[begin],        narrow, simd::load(low), simd::load(high), simd::load(low_weight),
                 simd::load(high_weight)};
  }
  return blocks;
}

// Output columns begin .. end - 1.
struct Tile {
  int64_t begin, end;
};

template <typename scalar_t>
class Forward {
 public:
  // source: [planes, h, w, inner]; output: [planes, H, W, inner].
  Forward(const Problem& problem, const scalar_t* source, scalar_t* output, bool stream)
      : problem_(problem), source_(source), output_(output), stream_(stream) {
    if (problem.inner == 1) blocks_ = blocks_of(problem.columns);
    const int64_t width = problem.columns.output;
    const int64_t step = std::max<int64_t>(1, kTileElements / problem.inner);  // whole blocks where inner == 1
    for (int64_t begin = 0; begin < width; begin += step) tiles_.push_back({begin, std::min(begin + step, width)});
  }

  void run() const {
    const int64_t height = problem_.rows.output, elements = problem_.columns.output * problem_.inner;
    const UnevenSlices slices(problem_.planes * height, ceil_divide(kFewestElements, elements));
    slices.run([&](int64_t, int64_t begin, int64_t end) {
      Rows rows(*this);
      while (begin < end) {
        const int64_t plane = begin / height, last = std::min(end, (plane + 1) * height);
        for (const Tile& tile : tiles_) {
          rows.start(plane, tile);
          for (int64_t row = begin; row < last; ++row) rows.write(row % height);
        }
        begin = last;
      }
      simd::stream_fence();
    });
  }

 private:
  // The scratch of a thread: two expanded rows of a tile.
  class Rows {
   public:
    explicit Rows(const Forward& forward) : forward_(forward), problem_(forward.problem_) {
      const Tile& tile = forward.tiles_.front();
      pitch_ = ceil_divide((tile.end - tile.begin) * problem_.inner, simd::kLanes) * simd::kLanes + simd::kLanes;
      expanded_.assign(3 * pitch_, 0);  // the third one is zero
      int64_t widest = 0;
      for (const Tile& some : forward.tiles_) widest = std::max(widest, source_columns(some));
      staged_.assign(widest * problem_.inner + 2 * simd::kLanes, 0);
    }

    void start(int64_t plane, const Tile& tile) {
      plane_ = plane;
      tile_ = tile;
      held_[0] = held_[1] = kNone;
    }

    void write(int64_t y) {
      const Axis& rows = problem_.rows;
      const int64_t low = rows.low[y], high = rows.high[y], elements = (tile_.end - tile_.begin) * problem_.inner;
      const float* upper = expanded(low, high);
      const float* lower = expanded(high, low);
      const int64_t place = (plane_ * rows.output + y) * problem_.columns.output + tile_.begin;
      const float upper_weight = rows.low_weight[y], lower_weight = rows.high_weight[y];
      write_row(forward_.output_ + place * problem_.inner, elements, forward_.stream_,
                [&](int64_t i) FASTSEG_ALWAYS_INLINE {
                  return upper_weight * simd::load(upper + i) + lower_weight * simd::load(lower + i);
                });
    }

   private:
    static constexpr int64_t kNone = -2;

    int64_t source_columns(const Tile& tile) const {
      return problem_.columns.high[tile.end - 1] - problem_.columns.low[tile.begin] + 1;
    }

    // Source row i of the tile, expanded; row `other` is not replaced.
    const float* expanded(int64_t i, int64_t other) {
      if (i < 0 || i >= problem_.rows.source) return expanded_.data() + 2 * pitch_;
      for (const int slot : {0, 1}) {
        if (held_[slot] == i) return expanded_.data() + slot * pitch_;
      }
      const int slot = held_[0] == other ? 1 : 0;
      held_[slot] = i;
      float* to = expanded_.data() + slot * pitch_;
      const float* from = staged(i);
      problem_.inner == 1 ? expand_elements(from, to) : expand_pixels(from, to);
      return to;
    }

    // The columns of source row i that the tile reads, in fp32, zeros outside of the source: in place or copied.
    const float* staged(int64_t i) {
      const Axis& columns = problem_.columns;
      const int64_t inner = problem_.inner, first = columns.low[tile_.begin], count = source_columns(tile_);
      const int64_t before = std::clamp<int64_t>(-first, 0, count);
      const int64_t inside = std::clamp<int64_t>(columns.source - first, before, count) - before;
      const int64_t place = (plane_ * problem_.rows.source + i) * columns.source + first + before;
      if constexpr (std::is_same_v<scalar_t, float>) {  // a vector at a shorter pixel would reach past the row
        if (inside == count && (inner == 1 || inner >= simd::kLanes)) return forward_.source_ + place * inner;
      }
      std::fill_n(staged_.data(), before * inner, 0.0f);
      read_row(forward_.source_ + place * inner, inside * inner, staged_.data() + before * inner);
      std::fill_n(staged_.data() + (before + inside) * inner, (count - before - inside) * inner, 0.0f);
      return staged_.data();
    }

    // inner == 1
    void expand_elements(const float* row, float* to) const {
      const int64_t begin = tile_.begin / simd::kLanes, end = ceil_divide(tile_.end, simd::kLanes);
      const int64_t origin = problem_.columns.low[tile_.begin];
      for (int64_t b = begin; b < end; ++b, to += simd::kLanes) {
        const Block& block = forward_.blocks_[b];
        const float* from = row + (block.first - origin);
        simd::f32x16 low, high;
        if (block.narrow) {
          low = simd::permute(from, block.low);
          high = simd::permute(from, block.high);
        } else {
          low = simd::gather(from, block.low);
          high = simd::gather(from, block.high);
        }
        simd::store(to, block.low_weight * low + block.high_weight * high);
      }
    }

    void expand_pixels(const float* row, float* to) const {
      const Axis& columns = problem_.columns;
      const int64_t inner = problem_.inner, origin = columns.low[tile_.begin];
      for (int64_t x = tile_.begin; x < tile_.end; ++x, to += inner) {
        const float* left = row + (columns.low[x] - origin) * inner;
        const float* right = row + (columns.high[x] - origin) * inner;
        const float left_weight = columns.low_weight[x], right_weight = columns.high_weight[x];
        for_each_vector(inner, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
          simd::store(to + c, left_weight * simd::load(left + c) + right_weight * simd::load(right + c));
        });
      }
    }

    const Forward& forward_;
    const Problem& problem_;
    int64_t plane_ = 0, pitch_, held_[2];
    Tile tile_{};
    std::vector<float> staged_;    // columns of a source row, and two more vectors that may be read
    std::vector<float> expanded_;  // [3][pitch]
  };

  const Problem& problem_;
  const scalar_t* source_;
  scalar_t* output_;
  bool stream_;
  std::vector<Block> blocks_;
  std::vector<Tile> tiles_;
};

}  // namespace fastseg::upsample_bilinear2d
