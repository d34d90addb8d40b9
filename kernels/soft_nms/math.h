// By what a box that is picked multiplies the score of another: the same bits on the CPU and on the GPU.
#pragma once

#include "nms/math.h"

namespace fastseg::soft_nms {

// e^x for x <= 0 within two units in the last place, by operations that every processor rounds alike.
FASTSEG_HOST_DEVICE inline double exp_of_negative(double x) {
  if (x < -700.0) return 0.0;
  const double power = ::rint(x * 1.4426950408889634);
  // x - power ln 2, with ln 2 in two parts: |rest| <= ln 2 / 2
  const double rest = ::fma(power, -1.9082149292705877e-10, ::fma(power, -0.6931471803691238, x));
  double sum = 1.0 / 6227020800;  // 1 / 13!, and so on down: Taylor's series
  sum = ::fma(sum, rest, 1.0 / 479001600);
  sum = ::fma(sum, rest, 1.0 / 39916800);
  sum = ::fma(sum, rest, 1.0 / 3628800);
  sum = ::fma(sum, rest, 1.0 / 362880);
  sum = ::fma(sum, rest, 1.0 / 40320);
  sum = ::fma(sum, rest, 1.0 / 5040);
  sum = ::fma(sum, rest, 1.0 / 720);
  sum = ::fma(sum, rest, 1.0 / 120);
  sum = ::fma(sum, rest, 1.0 / 24);
  sum = ::fma(sum, rest, 1.0 / 6);
  sum = ::fma(sum, rest, 0.5);
  sum = ::fma(sum, rest, 1.0);
  sum = ::fma(sum, rest, 1.0);
  const int64_t bits = (static_cast<int64_t>(power) + 1023) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

template <typename real_t>
struct Decay {
  real_t threshold;  // an overlap up to here leaves scores alone
  double sigma;      // 0 for the linear method

  static Decay make(double iou_threshold, bool gaussian, double sigma) {
    return gaussian ? Decay{real_t(0), sigma} : Decay{nms::rounded_down<real_t>(iou_threshold), 0.0};
  }

  // overlap > threshold, and no NaN
  FASTSEG_HOST_DEVICE real_t weight(real_t overlap) const {
    if (sigma == 0.0) return real_t(1) - overlap;
    const double wide = overlap;
    return static_cast<real_t>(exp_of_negative(-(wide * wide) / sigma));
  }

  FASTSEG_HOST_DEVICE real_t decayed(real_t score, real_t overlap) const {
    const real_t by = weight(overlap);
    return by == real_t(0) ? real_t(0) : score * by;  // of an infinite score, too: it never rises
  }
};

}  // namespace fastseg::soft_nms
