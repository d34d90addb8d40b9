// Where the samples of a box lie along one axis of a feature map: shared by cpu.cpp and cuda.cu. See README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastseg/exact.h"

namespace fastseg::roi {

// a * b, rounded: no compiler may fuse it with an addition, or a sample at the border of the map would count on one
// machine and not on another.
template <typename T>
FASTSEG_HOST_DEVICE inline T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  return multiply(a, b);
#else
  volatile T rounded = a * b;
  return rounded;
#endif
}

template <typename T>
FASTSEG_HOST_DEVICE inline bool is_finite(T value) {
  return value - value == 0;
}

struct Range {
  int64_t first, end;
};

// A sample between two cells: cell `low` has weight 1 - upper, the next one `upper`.
template <typename T>
struct Sample {
  int low;
  T upper;
  bool inside;  // else the sample adds nothing, but counts in the mean
};

template <typename T>
struct Grid {
  T start, bin;  // begin of the box and length of a bin, in cells
  T samples;     // per bin, a whole number
  int size;      // of the map, in cells

  // Samples per bin: with more, float positions are off by a fraction of the distance between samples; with more, those
  // in the map weigh less than any rounding; up to so many, all are visited.
  static constexpr T kPrecise = 4096, kMost = T(1ll << 40), kVisited = 8;

  FASTSEG_HOST_DEVICE T position(int p, int64_t i) const {
    if (sizeof(T) < 8 && samples > kPrecise) {
      return static_cast<T>(start + product<double>(p, bin) + (i + 0.5) * bin / samples);
    }
    return start + product(static_cast<T>(p), bin) + (static_cast<T>(i) + T(0.5)) * bin / samples;
  }

  // A range that contains all samples of bin `p` at positions in [low, high].
  FASTSEG_HOST_DEVICE Range between(int p, double low, double high) const {
    const int64_t all = static_cast<int64_t>(samples);
    if (all <= kVisited || bin <= 1) return {0, all};
    const double begin = start + product<double>(p, bin), density = samples / static_cast<double>(bin);
    const double first = (low - begin) * density - 2, end = (high - begin) * density + 2;
    return {first <= 0        ? 0
            : first < samples ? static_cast<int64_t>(first)
                              : all,
            end <= 0        ? 0
            : end < samples ? static_cast<int64_t>(end)
                            : all};
  }

  FASTSEG_HOST_DEVICE Sample<T> sample(int p, int64_t i) const {
    const T at = position(p, i);
    if (!(at >= -1 && at <= size)) return {0, 0, false};
    if (at <= 0) return {0, 0, true};
    const int low = static_cast<int>(at);
    if (low >= size - 1) return {size - 1, 0, true};
    return {low, at - low, true};
  }

  // The weight of cell `cell` in bin `p`.
  FASTSEG_HOST_DEVICE T weight(int p, int cell) const {
    const Range range = between(p, cell - 1, cell + 1);
    T sum = 0;
    for (int64_t i = range.first; i < range.end; ++i) {
      const Sample<T> at = sample(p, i);
      if (!at.inside) continue;
      if (at.low == cell) sum += 1 - at.upper;
      else if (at.low + 1 == cell) sum += at.upper;
    }
    return range.first < range.end ? sum / samples : sum;
  }
};

// The grid along one axis, on which the box extends from `low` to `high` in image coordinates. sampling_ratio <= 0: as
// many samples as a bin has cells, rounded up. A box that is not finite has no samples.
template <typename T>
FASTSEG_HOST_DEVICE inline Grid<T> make_grid(T low, T high, T scale, bool aligned, int bins, int64_t sampling_ratio,
                                             int size) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = product(low, scale) - offset;
  T length = product(high, scale) - offset - start;
  if (!aligned && length < 1) length = 1;
  const T bin = length / static_cast<T>(bins);
  const T samples = sampling_ratio > 0 ? static_cast<T>(sampling_ratio) : static_cast<T>(ceil(bin));
  const bool any = is_finite(start) && is_finite(bin) && samples > 0 && samples <= Grid<T>::kMost;
  return {start, bin, any ? samples : T(0), size};
}

// The level of a pyramid that a box belongs to: areas[l] is the least area of level l + 1.
template <typename T, typename Areas>
FASTSEG_HOST_DEVICE inline int level_of(T x1, T y1, T x2, T y2, const Areas& areas, int levels) {
  const double area = static_cast<double>(x2 - x1) * static_cast<double>(y2 - y1);
  int level = 0;
  while (level + 1 < levels && area >= areas[level]) ++level;
  return level;
}

// The image of a box with batch index `index`, -1 if there is no such image.
template <typename T>
FASTSEG_HOST_DEVICE inline int64_t image_of(T index, int64_t images) {
  return index > -1 && index < static_cast<T>(images) ? static_cast<int64_t>(index) : -1;
}

}  // namespace fastseg::roi
