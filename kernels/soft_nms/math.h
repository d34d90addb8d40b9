// The factor by which a picked box multiplies another box's score: the same bits on the CPU and on the GPU.
#pragma once

#include "nms/math.h"

namespace fastseg::soft_nms {

// e^x for x <= 0 within two units in the last place, by operations that every processor rounds in the same way.
FASTSEG_HOST_DEVICE inline double exp_of_negative(double x) {
  if (x < -700.0) return 0.0;
  const double power = ::rint(x * 1.4426950408889634);
  // x - power ln 2, with ln 2 in two parts: |reduced| <= ln 2 / 2
  const double reduced = ::fma(power, -1.9082149292705877e-10, ::fma(power, -0.6931471803691238, x));
  double sum = 1.0 / 6227020800;  // 1 / 13!, and so on down: Taylor's series
  sum = ::fma(sum, reduced, 1.0 / 479001600);
  sum = ::fma(sum, reduced, 1.0 / 39916800);
  sum = ::fma(sum, reduced, 1.0 / 3628800);
  sum = ::fma(sum, reduced, 1.0 / 362880);
  sum = ::fma(sum, reduced, 1.0 / 40320);
  sum = ::fma(sum, reduced, 1.0 / 5040);
  sum = ::fma(sum, reduced, 1.0 / 720);
  sum = ::fma(sum, reduced, 1.0 / 120);
  sum = ::fma(sum, reduced, 1.0 / 24);
  sum = ::fma(sum, reduced, 1.0 / 6);
  sum = ::fma(sum, reduced, 0.5);
  sum = ::fma(sum, reduced, 1.0);
  sum = ::fma(sum, reduced, 1.0);
  const int64_t bits = (static_cast<int64_t>(power) + 1023) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

template <typename real_t>
struct Decay {
  real_t threshold;  // overlaps up to it do not change scores
  double sigma;      // 0 for the linear method

  static Decay make(double iou_threshold, bool gaussian, double sigma) {
    return gaussian ? Decay{real_t(0), sigma} : Decay{nms::rounded_down<real_t>(iou_threshold), 0.0};
  }

  // For overlap > threshold, so not NaN.
  FASTSEG_HOST_DEVICE real_t weight(real_t overlap) const {
    if (sigma == 0.0) return real_t(1) - overlap;
    const double exact = overlap;
    return static_cast<real_t>(exp_of_negative(-(exact * exact) / sigma));
  }

  FASTSEG_HOST_DEVICE real_t decayed(real_t score, real_t overlap) const {
    const real_t by = weight(overlap);
    return by == real_t(0) ? real_t(0) : score * by;  // also for an infinite score, where inf * 0 is NaN
  }
};

}  // namespace fastseg::soft_nms
