// Arithmetic on single numbers that the CPU and the CUDA kernels of nms and soft_nms share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "fastseg/exact.h"

namespace fastseg::nms {

// The largest real_t not above `threshold`: a number of that type is above it exactly if it is above `threshold`.
template <typename real_t>
real_t rounded_down(double threshold) {
  const real_t rounded = static_cast<real_t>(threshold);
  return rounded <= threshold ? rounded : std::nextafter(rounded, -std::numeric_limits<real_t>::infinity());
}

template <typename real_t>
using score_key_t = std::conditional_t<sizeof(real_t) == 8, uint64_t, uint32_t>;

// A number that ascends as scores descend: NaN first, -0 equal to 0.
template <typename real_t>
FASTSEG_HOST_DEVICE score_key_t<real_t> score_key(real_t score) {
  using key_t = score_key_t<real_t>;
  if (score != score) return 0;
  score += real_t(0);  // -0 becomes 0
  key_t bits;
  memcpy(&bits, &score, sizeof bits);
  constexpr key_t sign = key_t(1) << (8 * sizeof(key_t) - 1);
  return (bits & sign) != 0 ? bits : ~(bits | sign);
}

}  // namespace fastseg::nms
