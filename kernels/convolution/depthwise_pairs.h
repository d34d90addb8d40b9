// Kernels of 3x3 neighbours on channels_last images, without strides: two rows of outputs at a time. They share two of
// the three rows that each reads, and a pixel of the source is loaded once for its up to six products.
#pragma once

#include "convolution/depthwise_pixels.h"

namespace fastseg::depthwise {

class RowPairs {
 public:
  // Sums of 2 x 4 pixels and nine weights stay in registers where there are 32 wide ones.
  static bool fits(const Map& map) {
    return simd::kRegisterBytes == 64 && map.channels >= kLanes && map.rows.output > 1 && are_neighbours(map.rows) &&
           are_neighbours(map.columns) && last_of(map.columns) - first_of(map.columns) >= kPixels;
  }

  explicit RowPairs(const Map& map)
      : map_(map), left_(first_of(map.columns)), right_(last_of(map.columns)), rows_(by_offset(map.rows)),
        columns_(by_offset(map.columns)) {}

  // Outputs [left, right) of a row see all taps of the columns.
  int64_t left() const { return left_; }
  int64_t right() const { return right_; }

  // These outputs of rows y and y + 1; `source` is the image, `to` the upper of the rows.
  template <typename scalar_t>
  void run(int64_t y, const scalar_t* source, const simd::accumulate<scalar_t>* weights,
           const PixelRow<scalar_t>& upper, const PixelRow<scalar_t>& lower) const {
    const int64_t row = map_.columns.source * map_.channels;
    const scalar_t* rows[4];  // null outside of the image
    for (int r = 0; r < 4; ++r) {
      const int64_t source_y = y + rows_[0].offset + r;
      rows[r] = 0 <= source_y && source_y < map_.rows.source ? source + source_y * row : nullptr;
    }
    for (int64_t x = left_; x < right_;) {
      const int64_t first = std::min(x, right_ - kPixels);  // the last ones may repeat some of those before
      for (int64_t channel = 0; channel < map_.channels; channel += kLanes) {
        sum_tile(rows, weights, upper, lower, first, std::min(channel, map_.channels - kLanes));
      }
      x = first + kPixels;
    }
  }

 private:
  static bool are_neighbours(const Axis& axis) {
    if (axis.source_step * axis.output_step != 1 || axis.phases[0].taps.size() != 3) return false;
    const std::vector<Tap>& taps = axis.phases[0].taps;
    return std::abs(taps[1].offset - taps[0].offset) == 1;
  }
  static int64_t first_of(const Axis& axis) {
    const std::vector<Tap>& taps = axis.phases[0].taps;
    return std::max(taps[0].first, taps[2].first);
  }
  static int64_t last_of(const Axis& axis) {
    const std::vector<Tap>& taps = axis.phases[0].taps;
    return std::min(taps[0].end, taps[2].end);
  }
  static std::vector<Tap> by_offset(const Axis& axis) {
    std::vector<Tap> taps = axis.phases[0].taps;
    if (taps[0].offset > taps[2].offset) std::swap(taps[0], taps[2]);
    return taps;
  }

  // kPixels outputs of both rows from `x` on, 16 channels.
  template <typename scalar_t>
  FASTSEG_INLINE void sum_tile(const scalar_t* const* rows, const simd::accumulate<scalar_t>* weights,
                               const PixelRow<scalar_t>& upper, const PixelRow<scalar_t>& lower, int64_t x,
                               int64_t channel) const {
    using vector_t = simd::vec<simd::accumulate<scalar_t>>;
    const int64_t stride = upper.weight_stride, kernel = map_.columns.kernel;
    vector_t weight[3][3], sums[2][kPixels];
    FASTSEG_UNROLL
    for (int r = 0; r < 3; ++r) {
      FASTSEG_UNROLL
      for (int c = 0; c < 3; ++c) {
        weight[r][c] = simd::load(weights + (rows_[r].index * kernel + columns_[c].index) * stride + channel);
      }
    }
    FASTSEG_UNROLL
    for (int p = 0; p < kPixels; ++p) sums[0][p] = sums[1][p] = vector_t{};
    FASTSEG_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (rows[r] == nullptr) continue;
      const scalar_t* from = rows[r] + (x + columns_[0].offset) * upper.channels + channel;
      FASTSEG_UNROLL
      for (int p = 0; p < kPixels + 2; ++p) {
        const vector_t value = simd::load(from + p * upper.channels);
        FASTSEG_UNROLL
        for (int c = 0; c < 3; ++c) {
          if (p < c || p - c >= kPixels) continue;
          if (r < 3) sums[0][p - c] += value * weight[r][c];
          if (r > 0) sums[1][p - c] += value * weight[r - 1][c];
        }
      }
    }
    FASTSEG_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      upper.finish(x + p, channel, sums[0][p], kLanes);
      lower.finish(x + p, channel, sums[1][p], kLanes);
    }
  }

  const Map& map_;
  int64_t left_, right_;
  std::vector<Tap> rows_, columns_;  // by offset
};

template <typename scalar_t>
void map_pixels(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
                const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  const auto intervals = intervals_of(map.columns);
  std::optional<RowPairs> pairs;
  if (RowPairs::fits(map)) pairs.emplace(map);
  const int64_t height = map.rows.output, channels = map.channels, weight_stride = padded(channels);
  const int64_t source_row = map.columns.source * channels, output_row = map.columns.output * channels;
  const int few = static_cast<int>(std::min<int64_t>(kLanes, channels));
  const UnevenSlices slices(map.images * height, map.smallest_slice(channels));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    std::vector<PixelTap<scalar_t>> met(map.rows.kernel);
    const auto outputs_of = [&](int64_t row) {
      PixelRow<scalar_t> to{epilogue, channels, weight_stride, output + row * output_row, nullptr};
      if (epilogue.residual.data) to.residual = epilogue.residual.at(row / height, 0, row % height, 0);
      return to;
    };
    int64_t paired = begin;  // rows before this one have what lies between the ends of the row
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      if (pairs && row >= paired && row + 1 < end && y + 1 < height) {
        const scalar_t* source = input + image * map.rows.source * source_row;
        pairs->run(y, source, weights.data(), outputs_of(row), outputs_of(row + 1));
        paired = row + 2;
      }
      int64_t count = 0;
      bool careful = false;
      map.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
        const int64_t number = image * map.rows.source + source_y;
        met[count++] = {input + number * source_row, weights.data() + tap.index * map.columns.kernel * weight_stride};
        careful = careful || ends_memory(number, map.images * map.rows.source, source_row);
      });
      const PixelRow<scalar_t> to = outputs_of(row);
      for (size_t phase = 0; phase < intervals.size(); ++phase) {
        for (const Interval& interval : intervals[phase]) {
          if (row < paired && interval.first == pairs->left()) continue;
          if (few < kLanes && careful) {
            sum_interval<true>(map.columns, phase, interval, met.data(), count, to, few);
          } else {
            sum_interval<false>(map.columns, phase, interval, met.data(), count, to, few);
          }
        }
      }
    }
  });
}

}  // namespace fastseg::depthwise
