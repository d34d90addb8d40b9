// The forward: every source row is expanded along the width, once, and two expanded rows are blended into each output
// row that lies between them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "upsample_bilinear2d/axis.h"
#include "upsample_bilinear2d/rows.h"

namespace fastseg::upsample_bilinear2d {

// How 16 neighbouring outputs of an axis read a row of single elements.
template <typename accumulate_t>
struct Block {
  int64_t first;      // the leftmost element, from which on `low` and `high` count
  bool narrow;        // 16 elements hold all
  simd::i32x16 low, high;
  simd::vec<accumulate_t> low_weight, high_weight;
};

// The last block repeats the last output.
template <typename accumulate_t>
std::vector<Block<accumulate_t>> blocks_of(const Axis& axis) {
  std::vector<Block<accumulate_t>> blocks(ceil_divide(axis.output, simd::kLanes));
  for (size_t b = 0; b < blocks.size(); ++b) {
    alignas(64) int32_t low[simd::kLanes], high[simd::kLanes];
    alignas(64) accumulate_t low_weight[simd::kLanes], high_weight[simd::kLanes];
    const int64_t begin = b * simd::kLanes;
    for (int lane = 0; lane < simd::kLanes; ++lane) {
      const int64_t o = std::min(begin + lane, axis.output - 1);
      low[lane] = axis.low[o] - axis.low[begin];
      high[lane] = axis.high[o] - axis.low[begin];
      low_weight[lane] = static_cast<accumulate_t>(axis.low_weight[o]);
      high_weight[lane] = static_cast<accumulate_t>(axis.high_weight[o]);
    }
    blocks[b] = {axis.low[begin], high[simd::kLanes - 1] < simd::kLanes, simd::load(low), simd::load(high),
                 simd::load(low_weight), simd::load(high_weight)};
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
  using accumulate_t = simd::accumulate<scalar_t>;

  // source: [planes, h, w, inner]; output: [planes, H, W, inner].
  Forward(const Problem& problem, const scalar_t* source, scalar_t* output, bool stream)
      : problem_(problem), source_(source), output_(output), stream_(stream),
        low_weight_(problem.columns.low_weight.begin(), problem.columns.low_weight.end()),
        high_weight_(problem.columns.high_weight.begin(), problem.columns.high_weight.end()) {
    if (problem.inner == 1) blocks_ = blocks_of<accumulate_t>(problem.columns);
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
  // What a thread holds: two expanded rows of a tile.
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
      const accumulate_t* upper = expanded(low, high);
      const accumulate_t* lower = expanded(high, low);
      const int64_t place = (plane_ * rows.output + y) * problem_.columns.output + tile_.begin;
      const auto upper_weight = static_cast<accumulate_t>(rows.low_weight[y]);
      const auto lower_weight = static_cast<accumulate_t>(rows.high_weight[y]);
      write_row(forward_.output_ + place * problem_.inner, elements, forward_.stream_, [&](int64_t i)
                    FASTSEG_ALWAYS_INLINE {
        return upper_weight * simd::load(upper + i) + lower_weight * simd::load(lower + i);
      });
    }

   private:
    static constexpr int64_t kNone = -2;

    int64_t source_columns(const Tile& tile) const {
      return problem_.columns.high[tile.end - 1] - problem_.columns.low[tile.begin] + 1;
    }

    // Source row i of the tile; row `other` stays where it is.
    const accumulate_t* expanded(int64_t i, int64_t other) {
      if (i < 0 || i >= problem_.rows.source) return expanded_.data() + 2 * pitch_;
      for (const int slot : {0, 1}) {
        if (held_[slot] == i) return expanded_.data() + slot * pitch_;
      }
      const int slot = held_[0] == other ? 1 : 0;
      held_[slot] = i;
      accumulate_t* to = expanded_.data() + slot * pitch_;
      stage(i);
      problem_.inner == 1 ? expand_elements(to) : expand_pixels(to);
      return to;
    }

    // The columns that the tile reads, in the accumulator's type, zeros where there are none.
    void stage(int64_t i) {
      const Axis& columns = problem_.columns;
      const int64_t inner = problem_.inner, first = columns.low[tile_.begin], count = source_columns(tile_);
      const int64_t before = std::clamp<int64_t>(-first, 0, count);
      const int64_t inside = std::clamp<int64_t>(columns.source - first, before, count) - before;
      const int64_t place = (plane_ * problem_.rows.source + i) * columns.source + first + before;
      std::fill_n(staged_.data(), before * inner, accumulate_t(0));
      read_row(forward_.source_ + place * inner, inside * inner, staged_.data() + before * inner);
      std::fill_n(staged_.data() + (before + inside) * inner, (count - before - inside) * inner, accumulate_t(0));
    }

    // inner == 1
    void expand_elements(accumulate_t* to) const {
      const int64_t begin = tile_.begin / simd::kLanes, end = ceil_divide(tile_.end, simd::kLanes);
      const int64_t origin = problem_.columns.low[tile_.begin];
      for (int64_t b = begin; b < end; ++b, to += simd::kLanes) {
        const Block<accumulate_t>& block = forward_.blocks_[b];
        const accumulate_t* from = staged_.data() + (block.first - origin);
        if (block.narrow) {
          simd::store(to, block.low_weight * permute(from, block.low) + block.high_weight * permute(from, block.high));
        } else {
          simd::store(to, block.low_weight * gather(from, block.low) + block.high_weight * gather(from, block.high));
        }
      }
    }

    void expand_pixels(accumulate_t* to) const {
      const Axis& columns = problem_.columns;
      const int64_t inner = problem_.inner, origin = columns.low[tile_.begin];
      for (int64_t x = tile_.begin; x < tile_.end; ++x, to += inner) {
        const accumulate_t* left = staged_.data() + (columns.low[x] - origin) * inner;
        const accumulate_t* right = staged_.data() + (columns.high[x] - origin) * inner;
        const accumulate_t left_weight = forward_.low_weight_[x], right_weight = forward_.high_weight_[x];
        for_each_vector(inner, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
          simd::store(to + c, left_weight * simd::load(left + c) + right_weight * simd::load(right + c));
        });
      }
    }

    const Forward& forward_;
    const Problem& problem_;
    int64_t plane_ = 0, pitch_, held_[2];
    Tile tile_{};
    std::vector<accumulate_t> staged_;    // columns of a source row, and two vectors that may be read beyond
    std::vector<accumulate_t> expanded_;  // [3][pitch]
  };

  const Problem& problem_;
  const scalar_t* source_;
  scalar_t* output_;
  bool stream_;
  std::vector<accumulate_t> low_weight_, high_weight_;  // of the columns
  std::vector<Block<accumulate_t>> blocks_;
  std::vector<Tile> tiles_;
};

}  // namespace fastseg::upsample_bilinear2d
