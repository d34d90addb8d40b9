// IoU of two boxes on CUDA. Every operation is rounded (none is fused), as on the CPU. Shared with soft_nms.
#pragma once

#include "cuda/pack.h"
#include "fastseg/exact.h"

namespace fastseg::cuda {

template <typename real_t>
using Corners = Pack<real_t, 4>;  // left, top, right, bottom

template <typename real_t>
__device__ real_t area_of(const Corners<real_t>& box) {
  return multiply(box.values[2] - box.values[0], box.values[3] - box.values[1]);
}

// A NaN coordinate makes an area NaN, and so the result, whatever fmax and fmin return for it.
template <typename real_t>
__device__ real_t overlap(const Corners<real_t>& one, real_t area_of_one, const Corners<real_t>& other,
                          real_t area_of_other) {
  const real_t left = max(one.values[0], other.values[0]), right = min(one.values[2], other.values[2]);
  const real_t top = max(one.values[1], other.values[1]), bottom = min(one.values[3], other.values[3]);
  const real_t shared = multiply(max(right - left, real_t(0)), max(bottom - top, real_t(0)));
  return shared / (area_of_one + area_of_other - shared);
}

}  // namespace fastseg::cuda
