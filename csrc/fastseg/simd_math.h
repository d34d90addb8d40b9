// Exponentials and logarithms of 16 lanes. fp64 is for gradcheck: lane by lane through libm.
#pragma once

#include <cmath>

#include "fastseg/simd_memory.h"

namespace simd {

namespace detail {

template <typename Function>
FASTSEG_INLINE f64x16 each_lane(f64x16 x, const Function& fn) {
  double lanes[kLanes];
  store(lanes, x);
  for (double& lane : lanes) lane = fn(lane);
  return load(lanes);
}

}  // namespace detail

constexpr float kLog2e = 1.44269504f;

// e^x within 2 ulp for x in [-87.3, 88.3]; NaN kept; anything else gives garbage (AVX-512: from [-110, 90] the right
// denormal, 0 or inf).
// Cody-Waite reduction x = n ln2 + r with |r| <= ln2/2, degree-6 polynomial in r, exponent added as integer or, on
// AVX-512, by scalef.
FASTSEG_INLINE f32x16 exp_in_range(f32x16 x) {
#if defined(__AVX512F__)
  const __m512 nearest = _mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(x * kLog2e), 0);
  const f32x16 n = bit_cast<f32x16>(nearest);
#else
  constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const f32x16 shifted = x * kLog2e + kRoundMagic;
  const f32x16 n = shifted - kRoundMagic;
#endif
  f32x16 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<f32x16>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), nearest));
#else
  const u32x16 exponent = (bit_cast<u32x16>(shifted) << 23) + (127u << 23);
  return p * bit_cast<f32x16>(exponent);
#endif
}

// e^x within 2 ulp: inf above 88.7 (88.3 below AVX-512), NaN kept. Below -87.3, where e^x is no normal number: 0, or on
// AVX-512 the denormal.
FASTSEG_INLINE f32x16 exp(f32x16 x) {
#if defined(__AVX512F__)
  return exp_in_range(minimum(maximum(x, splat(-110.0f)), splat(90.0f)));
#else
  const f32x16 low = splat(-87.33f), high = splat(88.37f);
  const f32x16 scaled = exp_in_range(minimum(maximum(x, low), high));
  const f32x16 floored = select(x < low, f32x16{}, scaled);
  return select(x > high, splat(INFINITY), floored);
#endif
}
FASTSEG_INLINE f64x16 exp(f64x16 x) {
  return detail::each_lane(x, [](double lane) { return std::exp(lane); });
}

// e^x for x <= 0, the exponential of a softmax: absolute error below 1e-7, e^0 = 1 exactly, 0 for -inf, NaN kept. Less
// work than exp(): no upper limit, and x log2(e) is reduced in one step, whose relative error grows with |x| only where
// e^x is small.
FASTSEG_INLINE f32x16 exp_nonpositive(f32x16 x) {
#if defined(__AVX512F__)
  // Below -110 2^n is 0. (GCC 12 makes a comparison and a masked move of maximum() with a constant.)
  const f32x16 clamped = bit_cast<f32x16>(_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-110.0f), bit_cast<__m512>(x)));
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(clamped * kLog2e), 0);
  // Compilers do not fuse a product that has a second use, and r needs its last digits.
  const f32x16 r = bit_cast<f32x16>(_mm512_fmsub_ps(bit_cast<__m512>(clamped), _mm512_set1_ps(kLog2e), n));
#else
  constexpr float kLowest = -87.0f;           // below: 0, the exponent would leave its field
  constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const f32x16 shifted = x * kLog2e + kRoundMagic;
  const f32x16 n = shifted - kRoundMagic;
#if defined(__x86_64__) && !defined(__FMA__)
  // Without fused multiply-add the product is rounded before n cancels most of it: take n ln2 off in two exact steps.
  const f32x16 r = (x - n * 0.693359375f + n * 2.12194440e-4f) * kLog2e;
#else
  const f32x16 r = x * kLog2e - n;
#endif
#endif
  // 2^r on [-1/2, 1/2] by a polynomial of least relative error (2e-9), fitted with constant term 1
  f32x16 p = r * 1.5345812e-4f + 1.3399931e-3f;
  p = p * r + 9.6184891e-3f;
  p = p * r + 5.5503286e-2f;
  p = p * r + 2.4022646e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<f32x16>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), n));
#else
  const u32x16 exponent = (bit_cast<u32x16>(shifted) << 23) + (127u << 23);
  return select(x < kLowest, f32x16{}, p * bit_cast<f32x16>(exponent));
#endif
}
FASTSEG_INLINE f64x16 exp_nonpositive(f64x16 x) { return exp(x); }

// exp_nonpositive() to the digits of scalar_t. For half types AVX-512 takes fewer steps: relative error 3e-6, which is
// less than a fiftieth of half a unit in the last place of such a type, for x >= -87.3.
template <typename scalar_t, typename vector_t>
FASTSEG_INLINE vector_t exp_of_logits(vector_t x) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(scalar_t) == 2) {
    const __m512 scaled = bit_cast<__m512>(x * kLog2e);
    const f32x16 r = bit_cast<f32x16>(_mm512_maskz_reduce_ps(0xffff, scaled, 1));  // scaled - floor(scaled)
    f32x16 p = r * 1.3426862e-2f + 5.2242193e-2f;  // 2^r on [0, 1), of least relative error with constant term 1
    p = p * r + 2.4128030e-1f;
    p = p * r + 6.9304484e-1f;
    p = p * r + 1.0f;
    return bit_cast<f32x16>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), scaled));  // p 2^floor(scaled)
  }
#endif
  return exp_nonpositive(x);
}

// ln(x) within 2 ulp for normal positive finite x, NaN for NaN and infinity; any other x gives garbage.
FASTSEG_INLINE f32x16 log_finite(f32x16 x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;  // bits of sqrt(1/2): the mantissa is taken in [sqrt(1/2), sqrt(2))
  const u32x16 bits = bit_cast<u32x16>(x) - kSqrtHalf;
  const f32x16 exponent = convert<f32x16>(bit_cast<i32x16>(bits) >> 23);
  const f32x16 m = bit_cast<f32x16>((bits & 0x007fffffu) + kSqrtHalf) - 1.0f;
  // In pairs, whose chain of products is half as long as Horner's.
  const f32x16 square = m * m, fourth = square * square;
  const f32x16 p01 = m * -2.4999993993e-1f + 3.3333331174e-1f;
  const f32x16 p23 = m * -1.6668057665e-1f + 2.0000714765e-1f;
  const f32x16 p45 = m * -1.2420140846e-1f + 1.4249322787e-1f;
  const f32x16 p67 = m * -1.1514610310e-1f + 1.1676998740e-1f;
  const f32x16 p03 = p23 * square + p01;
  const f32x16 p48 = (fourth * 7.0376836292e-2f) + (p67 * square + p45);
  const f32x16 p = p48 * fourth + p03;
  const f32x16 tail = p * m * square + exponent * -2.12194440e-4f - 0.5f * square;
  return m + tail + exponent * 0.693359375f + (x - x);
}

// ln(x) within 2 ulp for normal positive x; other x: 0 -> -inf, +inf -> +inf, negative or NaN -> NaN.
FASTSEG_INLINE f32x16 log(f32x16 x) {
  f32x16 result = log_finite(x);
  result = select(x == splat(INFINITY), x, result);
  result = select(x == f32x16{}, splat(-INFINITY), result);
  return select(x >= f32x16{}, result, splat(NAN));
}
FASTSEG_INLINE f64x16 log(f64x16 x) {
  return detail::each_lane(x, [](double lane) { return std::log(lane); });
}
FASTSEG_INLINE f64x16 log_finite(f64x16 x) { return log(x); }

}  // namespace simd
