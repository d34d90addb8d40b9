// IoU of one box with 16 others. Shared with soft_nms.
//
// Every operation is rounded, as in torchvision and on the GPU: CMakeLists.txt compiles the sources that include this
// header without contraction to fused multiply-adds.
#pragma once

#include <limits>
#include <vector>

#include "fastseg/simd.h"

namespace fastseg::nms {

template <typename real_t>
struct Box {
  real_t left, top, right, bottom, area;

  explicit Box(const real_t* corners)
      : left(corners[0]), top(corners[1]), right(corners[2]), bottom(corners[3]),
        area((right - left) * (bottom - top)) {}
};

// Boxes as a structure of arrays. An unused place has an area of NaN and overlaps nothing.
template <typename real_t>
class Boxes {
 public:
  explicit Boxes(int64_t places)
      : left_(places), top_(places), right_(places), bottom_(places),
        area_(places, std::numeric_limits<real_t>::quiet_NaN()) {}

  void set(int64_t place, const Box<real_t>& box) {
    left_[place] = box.left;
    top_[place] = box.top;
    right_[place] = box.right;
    bottom_[place] = box.bottom;
    area_[place] = box.area;
  }

  // IoU of `box` with the 16 boxes from `first` on. NaN if both have no area, or one has a NaN.
  FASTSEG_INLINE simd::vec<real_t> overlap(int64_t first, const Box<real_t>& box) const {
    using simd::load, simd::splat;
    const simd::vec<real_t> zero{};
    const auto left = simd::maximum(splat(box.left), load(&left_[first]));
    const auto right = simd::minimum(splat(box.right), load(&right_[first]));
    const auto top = simd::maximum(splat(box.top), load(&top_[first]));
    const auto bottom = simd::minimum(splat(box.bottom), load(&bottom_[first]));
    const auto shared = simd::maximum(zero, right - left) * simd::maximum(zero, bottom - top);
    return shared / (load(&area_[first]) + splat(box.area) - shared);
  }

 private:
  std::vector<real_t> left_, top_, right_, bottom_, area_;
};

}  // namespace fastseg::nms
