// One axis of a bilinear upsampling, or of a bilinear transposed convolution: two taps per output, and the same matrix
// read by columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastseg::upsample_bilinear2d {

// value(o) = low_weight[o] * element[low[o]] + high_weight[o] * element[high[o]]
//
// Indices ascend. They are in [-1, source]: -1 and `source` stand for a zero, so that an output that the source does
// not reach is 0 whatever the source holds.
struct Axis {
  int64_t source, output;
  std::vector<int32_t> low, high;              // [output]
  std::vector<float> low_weight, high_weight;  // [output]

  Axis(int64_t source, int64_t output)
      : source(source), output(output), low(output), high(output), low_weight(output), high_weight(output) {}

  void set(int64_t o, int64_t first, int64_t second, double fraction) {
    low[o] = static_cast<int32_t>(first);
    high[o] = static_cast<int32_t>(second);
    low_weight[o] = static_cast<float>(1.0 - fraction);
    high_weight[o] = static_cast<float>(fraction);
  }
};

// torch's rule for interpolation, also for an axis that keeps its size (1 and 0 times the same element), with
// coordinates in double. scale: the scale_factor, or 0 for none.
inline Axis interpolating_axis(int64_t source, int64_t output, bool align_corners, double scale) {
  Axis axis(source, output);
  double step = scale > 0 ? 1.0 / scale : static_cast<double>(source) / static_cast<double>(output);
  if (align_corners) step = output > 1 ? static_cast<double>(source - 1) / static_cast<double>(output - 1) : 0.0;
  const double half = align_corners ? 0.0 : 0.5;
  for (int64_t o = 0; o < output; ++o) {
    if (source == output) {
      axis.set(o, o, o, 0.0);
      continue;
    }
    const double coordinate = std::max(step * (static_cast<double>(o) + half) - half, 0.0);
    if (coordinate > static_cast<double>(source - 1)) {
      axis.set(o, source - 1, source - 1, 0.5);  // the last element twice, by half: exact
      continue;
    }
    const int64_t low = static_cast<int64_t>(coordinate);
    axis.set(o, low, std::min(low + 1, source - 1), coordinate - static_cast<double>(low));
  }
  return axis;
}

// A transposed convolution with the bilinear kernel of `kernel` = 2 stride or 2 stride - 1 taps: interpolation at
// (o + padding - centre) / stride of a source that is 0 outside.
inline Axis deconvolving_axis(int64_t source, int64_t output, int64_t kernel, int64_t stride, int64_t padding) {
  Axis axis(source, output);
  const double centre = kernel % 2 ? static_cast<double>(stride) - 1 : static_cast<double>(stride) - 0.5;
  const double past_end = static_cast<double>(source);
  for (int64_t o = 0; o < output; ++o) {
    const double place = static_cast<double>(o) + static_cast<double>(padding) - centre;
    const double coordinate = std::clamp(place / static_cast<double>(stride), -1.0, past_end);
    const int64_t low = static_cast<int64_t>(std::floor(coordinate));
    const double fraction = coordinate - static_cast<double>(low);
    // On an element: the element twice, by half, since 0 times its neighbour may be NaN.
    axis.set(o, low, fraction > 0 ? low + 1 : low, fraction > 0 ? fraction : 0.5);
  }
  return axis;
}

// The outputs [begin[i], end[i]) that read source element i, and their weights: weight[offset[i] + o - begin[i]].
struct Readers {
  std::vector<int64_t> begin, end, offset;  // [source]
  std::vector<float> weight;

  explicit Readers(const Axis& axis) : begin(axis.source, axis.output), end(axis.source, 0), offset(axis.source) {
    const auto for_each_tap = [&](const auto& body) {
      for (int64_t o = 0; o < axis.output; ++o) {
        if (axis.low[o] >= 0 && axis.low[o] < axis.source) body(axis.low[o], o, axis.low_weight[o]);
        if (axis.high[o] >= 0 && axis.high[o] < axis.source) body(axis.high[o], o, axis.high_weight[o]);
      }
    };
    for_each_tap([&](int64_t i, int64_t o, float) {
      begin[i] = std::min(begin[i], o);
      end[i] = std::max(end[i], o + 1);
    });
    int64_t total = 0;
    for (int64_t i = 0; i < axis.source; ++i) {
      if (begin[i] >= end[i]) begin[i] = end[i] = i > 0 ? end[i - 1] : 0;  // no reader: an empty range in order
      offset[i] = total;
      total += end[i] - begin[i];
    }
    weight.assign(total, 0.0f);
    for_each_tap([&](int64_t i, int64_t o, float share) { weight[offset[i] + o - begin[i]] += share; });
  }

  int64_t count(int64_t i) const { return end[i] - begin[i]; }
};

// [planes, height, width, inner] of a source and of an output: NC images with inner = 1, or N of them with inner = C.
struct Problem {
  int64_t planes, inner;
  Axis rows, columns;
};

constexpr int64_t kTileElements = 1 << 14;    // of a row, handled at a time: a few such tiles stay in the cache
constexpr int64_t kStreamedBytes = 8 << 20;   // outputs from this size on bypass the cache
constexpr int64_t kFewestElements = 1 << 15;  // of an output, or of a gradient that is read, per thread

}  // namespace fastseg::upsample_bilinear2d
