// Which cells belong to a bin of roi_pool, along one axis: shared by cpu.cpp and cuda.cu. See README.md.
#pragma once

#include "roi_align/grid.h"

namespace fastseg::roi {

// `a` rounded to a whole number, halves away from 0, and clamped to 2^30 cells.
template <typename T>
FASTSEG_HOST_DEVICE inline T round_to_cell(T a) {
  constexpr T kFar = T(1 << 30);
  const T whole = static_cast<T>(round(a));
  return whole > kFar ? kFar : whole < -kFar ? -kFar : whole;
}

template <typename T>
struct Bins {
  T start, bin;  // begin of the box, in whole cells, and length of a bin
  int size;      // of the map

  // Bin `p` has the cells [first(p), end(p)).
  FASTSEG_HOST_DEVICE int first(int p) const { return inside(static_cast<T>(floor(p * bin)) + start); }
  FASTSEG_HOST_DEVICE int end(int p) const { return inside(static_cast<T>(ceil((p + 1) * bin)) + start); }

  // A range that contains all of the `bins` that have cell `cell`.
  struct Near {
    int first, end;
  };
  FASTSEG_HOST_DEVICE Near near(int cell, int bins) const {
    const T before = floor((cell - start) / bin) - 1, after = ceil((cell + 1 - start) / bin) + 1;
    return {!(before > 0)    ? 0
            : before >= bins ? bins
                             : static_cast<int>(before),
            !(after > 0)    ? 0
            : after >= bins ? bins
                            : static_cast<int>(after)};
  }

 private:
  FASTSEG_HOST_DEVICE int inside(T cell) const {
    return !(cell > 0) ? 0 : cell >= size ? size : static_cast<int>(cell);
  }
};

template <typename T>
FASTSEG_HOST_DEVICE inline Bins<T> make_bins(T low, T high, T scale, int bins, int size) {
  const T start = round_to_cell(low * scale), length = round_to_cell(high * scale) - start + 1;
  return {start, (length < 1 ? T(1) : length) / static_cast<T>(bins), size};
}

// Whether a box is finite; only such boxes have bins.
template <typename T>
FASTSEG_HOST_DEVICE inline bool is_box(T x1, T y1, T x2, T y2) {
  return is_finite(x1) && is_finite(y1) && is_finite(x2) && is_finite(y2);
}

}  // namespace fastseg::roi
