// The backward, a gather: the gradient rows that read a source row are summed up first, then the columns of that sum.
#pragma once

#include <algorithm>
#include <vector>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "upsample_bilinear2d/axis.h"
#include "upsample_bilinear2d/rows.h"

namespace fastseg::upsample_bilinear2d {

// Source columns begin .. end - 1 and the outputs first .. last - 1 that read them.
struct SourceTile {
  int64_t begin, end, first, last;
};

template <typename scalar_t>
class Backward {
 public:
  // grad_output: [planes, H, W, inner]; grad_source: [planes, h, w, inner].
  Backward(const Problem& problem, const scalar_t* grad_output, scalar_t* grad_source, bool stream)
      : problem_(problem), grad_output_(grad_output), grad_source_(grad_source), stream_(stream), rows_(problem.rows),
        columns_(problem.columns) {
    const int64_t width = problem.columns.source;
    for (int64_t begin = 0; begin < width;) {
      SourceTile tile{begin, begin, columns_.begin[begin], columns_.end[begin]};
      const auto fits = [&](int64_t end) { return (columns_.end[end] - tile.first) * problem.inner <= kTileElements; };
      do {
        tile.end += problem.inner == 1 ? std::min<int64_t>(simd::kLanes, width - tile.end) : 1;  // whole blocks
        tile.last = columns_.end[tile.end - 1];
      } while (tile.end < width &&
               fits(problem.inner == 1 ? std::min<int64_t>(tile.end + simd::kLanes, width) - 1 : tile.end));
      tiles_.push_back(tile);
      begin = tile.end;
    }
    if (problem.inner == 1) find_blocks();
  }

  void run() const {
    const int64_t height = problem_.rows.source;
    const int64_t elements = problem_.columns.output * problem_.inner * problem_.rows.output / height;
    const UnevenSlices slices(problem_.planes * height, kFewestElements / std::max<int64_t>(1, elements));
    slices.run([&](int64_t, int64_t begin, int64_t end) {
      int64_t widest = 0, longest = 0;
      for (const SourceTile& tile : tiles_) {
        widest = std::max(widest, tile.last - tile.first);
        longest = std::max(longest, tile.end - tile.begin);
      }
      std::vector<float> sums(widest * problem_.inner + 2 * simd::kLanes);  // zeros after the last
      std::vector<float> result(longest * problem_.inner + 2 * simd::kLanes);
      while (begin < end) {
        const int64_t plane = begin / height, last = std::min(end, (plane + 1) * height);
        for (const SourceTile& tile : tiles_) {
          std::fill(sums.begin() + (tile.last - tile.first) * problem_.inner, sums.end(), 0.0f);
          for (int64_t row = begin; row < last; ++row) {
            sum_rows(plane, row % height, tile, sums.data());
            problem_.inner == 1 ? sum_elements(tile, sums.data(), result.data())
                                : sum_pixels(tile, sums.data(), result.data());
            const int64_t place = (plane * height + row % height) * problem_.columns.source + tile.begin;
            write_row(grad_source_ + place * problem_.inner, (tile.end - tile.begin) * problem_.inner, stream_,
                      [&](int64_t i) FASTSEG_ALWAYS_INLINE { return simd::load(result.data() + i); });
          }
        }
        begin = last;
      }
      simd::stream_fence();
    });
  }

 private:
  // The columns that 16 neighbouring source elements take from a row of sums, one tap of each at a time.
  struct Block {
    int64_t first, taps, offset;  // column counted from the tile's first; taps `offset` .. of index_ and weight_
    bool narrow;                  // 16 elements hold all
  };

  void find_blocks() {
    for (const SourceTile& tile : tiles_) {
      for (int64_t begin = tile.begin; begin < tile.end; begin += simd::kLanes) {
        const int64_t end = std::min(begin + simd::kLanes, tile.end);
        int64_t taps = 0;
        for (int64_t i = begin; i < end; ++i) taps = std::max(taps, columns_.count(i));
        const int64_t first = columns_.begin[begin], offset = static_cast<int64_t>(index_.size());
        bool narrow = true;
        for (int64_t tap = 0; tap < taps; ++tap) {
          alignas(64) int32_t index[simd::kLanes];
          alignas(64) float weight[simd::kLanes];
          for (int lane = 0; lane < simd::kLanes; ++lane) {
            // A lane without this tap reads its last one again, or where it has none the zero after the tile.
            const int64_t i = std::min(begin + lane, end - 1), count = columns_.count(i);
            const int64_t column = count > 0 ? columns_.begin[i] + std::min(tap, count - 1) : tile.last;
            index[lane] = static_cast<int32_t>(column - first);
            narrow = narrow && index[lane] < simd::kLanes;
            weight[lane] = tap < count ? columns_.weight[columns_.offset[i] + tap] : 0.0f;
          }
          index_.push_back(simd::load(index));
          weight_.push_back(simd::load(weight));
        }
        blocks_.push_back({first - tile.first, taps, offset, narrow});
      }
    }
  }

  // sums[j] = sum over the outputs y that read source row i of weight(y) grad_output[y, j], j over the tile's columns.
  void sum_rows(int64_t plane, int64_t i, const SourceTile& tile, float* sums) const {
    const int64_t pitch = problem_.columns.output * problem_.inner;
    const int64_t first = (plane * problem_.rows.output + rows_.begin[i]) * pitch + tile.first * problem_.inner;
    const scalar_t* from = grad_output_ + first;
    const float* weight = rows_.weight.data() + rows_.offset[i];
    const int64_t readers = rows_.count(i), count = (tile.last - tile.first) * problem_.inner;
    constexpr int64_t kLanes = simd::kLanes, kAtOnce = 4;
    int64_t j = 0;
    for (; j + kAtOnce * kLanes <= count; j += kAtOnce * kLanes) {
      simd::f32x16 sum[kAtOnce] = {};
      for (int64_t y = 0; y < readers; ++y) {
        FASTSEG_UNROLL
        for (int64_t k = 0; k < kAtOnce; ++k) sum[k] += weight[y] * simd::load(from + y * pitch + j + k * kLanes);
      }
      FASTSEG_UNROLL
      for (int64_t k = 0; k < kAtOnce; ++k) simd::store(sums + j + k * kLanes, sum[k]);
    }
    for (; j < count; j += kLanes) {
      const int rest = static_cast<int>(std::min(kLanes, count - j));
      simd::f32x16 sum{};
      for (int64_t y = 0; y < readers; ++y) {
        const scalar_t* row = from + y * pitch + j;
        sum += weight[y] * (rest == kLanes ? simd::load(row) : simd::load_partial(row, rest, scalar_t(0)));
      }
      if (rest == kLanes) {
        simd::store(sums + j, sum);
      } else {
        simd::store_partial(sums + j, sum, rest);
      }
    }
  }

  // inner == 1
  void sum_elements(const SourceTile& tile, const float* sums, float* result) const {
    const int64_t first_block = block_of(tile);
    for (int64_t b = first_block; b < first_block + ceil_divide(tile.end - tile.begin, simd::kLanes); ++b) {
      const Block& block = blocks_[b];
      const float* from = sums + block.first;
      const simd::i32x16* index = index_.data() + block.offset;
      const simd::f32x16* weight = weight_.data() + block.offset;
      simd::f32x16 sum{};
      if (block.narrow) {
        for (int64_t tap = 0; tap < block.taps; ++tap) sum += weight[tap] * simd::permute(from, index[tap]);
      } else {
        for (int64_t tap = 0; tap < block.taps; ++tap) sum += weight[tap] * simd::gather(from, index[tap]);
      }
      simd::store(result + (b - first_block) * simd::kLanes, sum);
    }
  }

  // Tiles are whole blocks, but for the last one.
  static int64_t block_of(const SourceTile& tile) { return tile.begin / simd::kLanes; }

  void sum_pixels(const SourceTile& tile, const float* sums, float* result) const {
    const int64_t inner = problem_.inner;
    for (int64_t i = tile.begin; i < tile.end; ++i, result += inner) {
      const float* from = sums + (columns_.begin[i] - tile.first) * inner;
      const float* weight = columns_.weight.data() + columns_.offset[i];
      const int64_t readers = columns_.count(i);
      for_each_vector(inner, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
        simd::f32x16 sum{};
        for (int64_t x = 0; x < readers; ++x) sum += weight[x] * simd::load(from + x * inner + c);
        simd::store(result + c, sum);
      });
    }
  }

  const Problem& problem_;
  const scalar_t* grad_output_;
  scalar_t* grad_source_;
  bool stream_;
  Readers rows_, columns_;
  std::vector<SourceTile> tiles_;
  std::vector<Block> blocks_;
  std::vector<simd::i32x16> index_;  // [taps of all blocks]
  std::vector<simd::f32x16> weight_;     // [taps of all blocks]
};

}  // namespace fastseg::upsample_bilinear2d
