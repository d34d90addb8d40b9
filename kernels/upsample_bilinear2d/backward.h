// The backward, a gather: the gradient rows that read a source row are summed up first, then the columns of that sum.
#pragma once

#include <algorithm>
#include <vector>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "fastseg/transpose.h"
#include "upsample_bilinear2d/axis.h"
#include "upsample_bilinear2d/element_rows.h"

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
        columns_(problem.columns), group_(problem.inner == 1 ? simd::kLanes : 1),
        lanes_(problem.inner == 1 ? simd::kLanes : problem.inner) {
    const int64_t width = problem.columns.source;
    for (int64_t begin = 0; begin < width;) {
      const int64_t first = columns_.begin[begin];
      int64_t end = begin + 1;
      while (end < width && (columns_.end[end] - first) * lanes_ <= kTileElements) ++end;
      tiles_.push_back({begin, end, first, columns_.end[end - 1]});
      begin = end;
    }
  }

  void run() const {
    const int64_t height = problem_.rows.source;
    const int64_t elements = problem_.columns.output * problem_.inner * problem_.rows.output / height;
    const UnevenSlices slices(problem_.planes * height, kFewestElements / std::max<int64_t>(1, elements));
    int64_t widest = 0, longest = 0;
    for (const SourceTile& tile : tiles_) {
      widest = std::max(widest, tile.last - tile.first);
      longest = std::max(longest, tile.end - tile.begin);
    }
    slices.run([&](int64_t, int64_t begin, int64_t end) {
      // With spare vectors. If pixels are single elements: `group_` source rows as [row][column], and as [column][row].
      std::vector<float> sums(widest * lanes_ + 2 * simd::kLanes), result(longest * lanes_ + 2 * simd::kLanes);
      std::vector<float> turned(group_ > 1 ? std::max(sums.size(), result.size()) : 0);
      for (const SourceTile& tile : tiles_) {
        const int64_t read = tile.last - tile.first, written = tile.end - tile.begin;
        for (int64_t row = begin; row < end; row += group_) {
          const int64_t rows = std::min(group_, end - row);
          for (int64_t r = 0; r < rows; ++r) sum_rows(row + r, tile, sums.data() + r * read);
          if (group_ > 1) {
            detail::transpose(sums.data(), read, turned.data(), group_, group_, read);
            sum_columns(tile, turned.data(), result.data());
            detail::transpose(result.data(), group_, turned.data(), written, written, group_);
          } else {
            sum_columns(tile, sums.data(), result.data());
          }
          for (int64_t r = 0; r < rows; ++r) {
            const float* from = group_ > 1 ? turned.data() + r * written : result.data();
            const int64_t place = (row + r) * problem_.columns.source + tile.begin;
            write_row(grad_source_ + place * problem_.inner, written * problem_.inner, stream_,
                      [&](int64_t i) FASTSEG_ALWAYS_INLINE { return simd::load(from + i); });
          }
        }
      }
      simd::stream_fence();
    });
  }

 private:
  // sums[j] = sum over the outputs y that read a source row of weight(y) grad_output[y, j], j over the tile's columns.
  // row: counted over all planes.
  void sum_rows(int64_t row, const SourceTile& tile, float* sums) const {
    const int64_t plane = row / problem_.rows.source, i = row % problem_.rows.source;
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
      const int lanes_left = static_cast<int>(std::min(kLanes, count - j));
      simd::f32x16 sum{};
      for (int64_t y = 0; y < readers; ++y) {
        const scalar_t* part = from + y * pitch + j;
        sum +=
            weight[y] * (lanes_left == kLanes ? simd::load(part) : simd::load_partial(part, lanes_left, scalar_t(0)));
      }
      if (lanes_left == kLanes) {
        simd::store(sums + j, sum);
      } else {
        simd::store_partial(sums + j, sum, lanes_left);
      }
    }
  }

  // result[i] = sum over the outputs x that read source column i of weight(x) sums[x]: pixels of `lanes_` elements.
  void sum_columns(const SourceTile& tile, const float* sums, float* result) const {
    for (int64_t i = tile.begin; i < tile.end; ++i, result += lanes_) {
      const float* from = sums + (columns_.begin[i] - tile.first) * lanes_;
      const float* weight = columns_.weight.data() + columns_.offset[i];
      const int64_t readers = columns_.count(i);
      for_each_vector(lanes_, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
        simd::f32x16 sum{};
        for (int64_t x = 0; x < readers; ++x) sum += weight[x] * simd::load(from + x * lanes_ + c);
        simd::store(result + c, sum);
      });
    }
  }

  const Problem& problem_;
  const scalar_t* grad_output_;
  scalar_t* grad_source_;
  bool stream_;
  Readers rows_, columns_;
  int64_t group_, lanes_;  // source rows that are handled together, and elements of a pixel
  std::vector<SourceTile> tiles_;
};

}  // namespace fastseg::upsample_bilinear2d
