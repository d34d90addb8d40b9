// 16-lane SIMD in GCC/Clang vector extensions.
//
// The same source serves every instruction level: a 64-byte vector is one register under AVX-512, two under AVX2, four
// under SSE2. Lane-wise operators and comparisons (giving 0/-1 integer lanes) are the compiler's own. Kernels write
// select(mask, a, b), convert<to>(a) and load(array), never `?:`, __builtin_convertvector or lanes[i] = x on a vector.
// Raw intrinsics stand here only, where the compilers have no spelling of their own: fp16, streaming stores, gathers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace simd {

using c10::BFloat16;
using c10::Half;

constexpr int kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u8x16 = uint8_t __attribute__((vector_size(16)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using f64x16 = double __attribute__((vector_size(128)));
using i64x16 = int64_t __attribute__((vector_size(128)));

#define FASTSEG_INLINE inline __attribute__((always_inline))

// The vector an accumulator type computes in. fp64 exists for gradcheck: same code, not tuned.
template <typename accumulate_t>
struct vector_of;
template <>
struct vector_of<float> {
  using type = f32x16;
  using mask = i32x16;
};
template <>
struct vector_of<double> {
  using type = f64x16;
  using mask = int64_t __attribute__((vector_size(128)));
};
template <typename accumulate_t>
using vec = typename vector_of<accumulate_t>::type;

// What a storage type accumulates in.
template <typename scalar_t>
struct accumulate_of {
  using type = float;
};
template <>
struct accumulate_of<double> {
  using type = double;
};
template <typename scalar_t>
using accumulate = typename accumulate_of<scalar_t>::type;

FASTSEG_INLINE f32x16 splat(float value) { return value - f32x16{}; }
FASTSEG_INLINE f64x16 splat(double value) { return value - f64x16{}; }
FASTSEG_INLINE i32x16 splat(int32_t value) { return value - i32x16{}; }

FASTSEG_INLINE i32x16 lane_index() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

template <typename to_t, typename from_t>
FASTSEG_INLINE to_t bit_cast(const from_t& from) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  to_t to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Lane by lane a C++ conversion, e.g. convert<f64x16>(f32x16).
template <typename to_t, typename from_t>
FASTSEG_INLINE to_t convert(from_t from) {
  return __builtin_convertvector(from, to_t);
}

// Lane by lane `mask ? chosen : other`, for a comparison's result of the same lane width.
template <typename mask_t, typename vector_t>
FASTSEG_INLINE vector_t select(mask_t mask, vector_t chosen, vector_t other) {
  return mask ? chosen : other;
}

// NaN in `candidate` is passed over, as in `candidate > best ? candidate : best`.
template <typename vector_t>
FASTSEG_INLINE vector_t maximum(vector_t best, vector_t candidate) {
  return select(candidate > best, candidate, best);
}
template <typename vector_t>
FASTSEG_INLINE vector_t minimum(vector_t best, vector_t candidate) {
  return select(candidate < best, candidate, best);
}

// `lanes` where the mask is set, else 0. Bit by bit: below AVX-512, GCC 12 takes comparisons and `mask ? a : b` of 64-byte
// vectors apart lane by lane, but not arithmetic and bit operations.
template <typename mask_t, typename vector_t>
FASTSEG_INLINE vector_t keep_where(mask_t mask, vector_t lanes) {
  return bit_cast<vector_t>(bit_cast<mask_t>(lanes) & mask);
}

// --- loads: 16 consecutive elements of any storage type, widened to the accumulator ---

FASTSEG_INLINE f32x16 load(const float* from) {
  f32x16 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

FASTSEG_INLINE f64x16 load(const double* from) {
  f64x16 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

FASTSEG_INLINE i32x16 load(const int32_t* from) {
  i32x16 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

FASTSEG_INLINE f32x16 load(const BFloat16* from) {
  u16x16 half;
  std::memcpy(&half, from, sizeof half);
  return bit_cast<f32x16>(convert<u32x16>(half) << 16);
}

FASTSEG_INLINE f32x16 load(const Half* from) {
#if defined(__AVX512F__)  // (the full zero mask is free, and spares GCC 12's warning about its own unmasked intrinsic)
  return bit_cast<f32x16>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  f32x16 lanes;
  for (int half = 0; half < 2; ++half) {
    const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + half));
    std::memcpy(reinterpret_cast<char*>(&lanes) + 32 * half, &eight, sizeof eight);
  }
  return lanes;
#else
  f32x16 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(from[i]);
  return lanes;
#endif
}

// --- stores: rounded to nearest even, NaN kept ---

FASTSEG_INLINE void store(float* to, f32x16 lanes) { std::memcpy(to, &lanes, sizeof lanes); }
FASTSEG_INLINE void store(double* to, f64x16 lanes) { std::memcpy(to, &lanes, sizeof lanes); }
FASTSEG_INLINE void store(int32_t* to, i32x16 lanes) { std::memcpy(to, &lanes, sizeof lanes); }
FASTSEG_INLINE void store(int64_t* to, i64x16 lanes) { std::memcpy(to, &lanes, sizeof lanes); }
FASTSEG_INLINE void store(uint8_t* to, u8x16 lanes) { std::memcpy(to, &lanes, sizeof lanes); }

FASTSEG_INLINE void store(BFloat16* to, f32x16 lanes) {
  const u32x16 bits = bit_cast<u32x16>(lanes);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 quiet_nan = (bits >> 16) | 0x40u;
  const u16x16 half = convert<u16x16>(select(lanes == lanes, rounded, quiet_nan));
  std::memcpy(to, &half, sizeof half);
}

FASTSEG_INLINE void store(Half* to, f32x16 lanes) {
#if defined(__AVX512F__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(lanes), kNearest);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
#elif defined(__F16C__)
  for (int half = 0; half < 2; ++half) {
    __m256 eight;
    std::memcpy(&eight, reinterpret_cast<const char*>(&lanes) + 32 * half, sizeof eight);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + half, _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<Half>(lanes[i]);
#endif
}

// The first `count` (0..16) elements only; the other lanes are `fill` and no memory beyond is touched.
template <typename scalar_t>
FASTSEG_INLINE auto load_partial(const scalar_t* from, int count, scalar_t fill) {
  alignas(64) scalar_t buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = fill;
  std::memcpy(buffer, from, sizeof(scalar_t) * count);
  return load(buffer);
}

template <typename scalar_t, typename vector_t>
FASTSEG_INLINE void store_partial(scalar_t* to, vector_t lanes, int count) {
  alignas(64) scalar_t buffer[kLanes];
  store(buffer, lanes);
  std::memcpy(to, buffer, sizeof(scalar_t) * count);
}

// Streaming stores write whole cache lines without reading them first: for outputs larger than the cache that nobody
// reads soon. `to` must be aligned to its 16 elements (64 bytes; 32 for half types). Call stream_fence() once per
// thread after the last of them.
FASTSEG_INLINE void stream(float* to, f32x16 lanes) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, bit_cast<__m512>(lanes));
#elif defined(__AVX__)
  for (int part = 0; part < 2; ++part) {
    __m256 eight;
    std::memcpy(&eight, reinterpret_cast<const char*>(&lanes) + 32 * part, sizeof eight);
    _mm256_stream_ps(to + 8 * part, eight);
  }
#elif defined(__SSE2__)
  for (int part = 0; part < 4; ++part) {
    __m128 four;
    std::memcpy(&four, reinterpret_cast<const char*>(&lanes) + 16 * part, sizeof four);
    _mm_stream_ps(to + 4 * part, four);
  }
#else
  store(to, lanes);
#endif
}

template <typename half_t>
FASTSEG_INLINE void stream_half(half_t* to, f32x16 lanes) {
  alignas(32) half_t rounded[kLanes];
  store(rounded, lanes);
#if defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
#else
  std::memcpy(to, rounded, sizeof rounded);
#endif
}
FASTSEG_INLINE void stream(BFloat16* to, f32x16 lanes) { stream_half(to, lanes); }
FASTSEG_INLINE void stream(Half* to, f32x16 lanes) { stream_half(to, lanes); }
FASTSEG_INLINE void stream(double* to, f64x16 lanes) { store(to, lanes); }
FASTSEG_INLINE void stream(int64_t* to, i64x16 lanes) {
  f32x16 lines[2];
  std::memcpy(lines, &lanes, sizeof lines);
  for (int line = 0; line < 2; ++line) stream(reinterpret_cast<float*>(to) + line * kLanes, lines[line]);
}

FASTSEG_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

FASTSEG_INLINE bool is_aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 63) == 0; }

// base[index[lane]] for 16 lanes.
FASTSEG_INLINE f32x16 gather(const float* base, i32x16 index) {
#if defined(__AVX512F__)
  const __m512i lanes = bit_cast<__m512i>(index);
  return bit_cast<f32x16>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, lanes, base, 4));
#else
  f32x16 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = base[index[i]];
  return lanes;
#endif
}

// base[index[lane]] where every index is in [0, 16) and 16 elements are readable: shuffles instead of 16 loads.
FASTSEG_INLINE f32x16 permute(const float* base, i32x16 index) {
#if defined(__AVX512F__)
  return bit_cast<f32x16>(_mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(index), _mm512_loadu_ps(base)));
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(base), high = _mm256_loadu_ps(base + 8);
  f32x16 lanes;
  for (int part = 0; part < 2; ++part) {
    __m256i position;
    std::memcpy(&position, reinterpret_cast<const char*>(&index) + 32 * part, sizeof position);
    const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(position, 28));  // bit 3 into the sign
    const __m256 eight = _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, position), _mm256_permutevar8x32_ps(high, position), in_high);
    std::memcpy(reinterpret_cast<char*>(&lanes) + 32 * part, &eight, sizeof eight);
  }
  return lanes;
#else
  return gather(base, index);
#endif
}

// --- arithmetic ---

template <typename vector_t>
FASTSEG_INLINE auto reduce_add(vector_t lanes) {
  auto sum = lanes[0];
  for (int i = 1; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// True if any lane of a comparison's result is set.
template <typename mask_t>
FASTSEG_INLINE bool any(mask_t mask) {
  auto bits = mask[0];
  for (int i = 1; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
}

// One bit per lane of a comparison's result, lane 0 lowest.
template <typename mask_t>
FASTSEG_INLINE uint32_t mask_bits(mask_t mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(mask_t) == 64) return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
#elif defined(__AVX__)
  if constexpr (sizeof(mask_t) == 64) {
    __m256 parts[2];
    std::memcpy(parts, &mask, sizeof parts);
    return _mm256_movemask_ps(parts[0]) | (_mm256_movemask_ps(parts[1]) << 8);
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
}

// e^x within 2 ulp for x in [-87.3, 88.3]; NaN kept; anything else gives garbage.
// Cody-Waite reduction x = n ln2 + r with |r| <= ln2/2, degree-6 polynomial in r, exponent added as integer.
FASTSEG_INLINE f32x16 exp_in_range(f32x16 x) {
  constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const f32x16 shifted = x * 1.44269504f + kRoundMagic;
  const f32x16 n = shifted - kRoundMagic;
  f32x16 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const u32x16 exponent = (bit_cast<u32x16>(shifted) << 23) + (127u << 23);
  return p * bit_cast<f32x16>(exponent);
}

// e^x within 2 ulp: 0 below -87.3 (no denormals), inf above 88.3, NaN kept.
FASTSEG_INLINE f32x16 exp(f32x16 x) {
  constexpr float kLowest = -87.33f, kHighest = 88.37f;
  const f32x16 low = splat(kLowest), high = splat(kHighest);
  const f32x16 clamped = minimum(maximum(x, low), high);
  const f32x16 scaled = exp_in_range(clamped);
  const f32x16 floored = select(x < low, f32x16{}, scaled);
  return select(x > high, splat(INFINITY), floored);
}

// e^x for x <= 0, the exponential of a softmax: absolute error below 1e-7, e^0 = 1 exactly, 0 below -87 and for -inf,
// NaN kept. Half the work of exp(): no upper end, and x log2(e) is reduced in one step, whose relative error grows with
// |x| only where e^x is small. For vectors and, in loops that the compiler vectorises, for scalars.
template <typename float_t, typename bits_t>
FASTSEG_INLINE float_t exp_nonpositive_as(float_t x) {
  constexpr float kLowest = -87.0f, kLog2e = 1.44269504f;
  constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const float_t shifted = x * kLog2e + kRoundMagic;
  const float_t n = shifted - kRoundMagic;
#if defined(__x86_64__) && !defined(__FMA__)
  // Without fused multiply-add the product is rounded before n cancels most of it: take n ln2 off in two exact steps.
  const float_t r = (x - n * 0.693359375f + n * 2.12194440e-4f) * kLog2e;
#else
  const float_t r = x * kLog2e - n;
#endif
  // 2^r on [-1/2, 1/2] by a polynomial of least relative error (2e-9), fitted with constant term 1
  float_t p = r * 1.5345812e-4f + 1.3399931e-3f;
  p = p * r + 9.6184891e-3f;
  p = p * r + 5.5503286e-2f;
  p = p * r + 2.4022646e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const bits_t exponent = (bit_cast<bits_t>(shifted) << 23) + (127u << 23);
  const float_t result = p * bit_cast<float_t>(exponent);
  return x < kLowest - float_t{} ? float_t{} : result;
}
FASTSEG_INLINE f32x16 exp_nonpositive(f32x16 x) { return exp_nonpositive_as<f32x16, u32x16>(x); }
FASTSEG_INLINE float exp_nonpositive(float x) { return exp_nonpositive_as<float, uint32_t>(x); }
FASTSEG_INLINE double exp_nonpositive(double x) { return std::exp(x); }
FASTSEG_INLINE f64x16 exp_nonpositive(f64x16 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

// ln(x) within 2 ulp for normal positive finite x, NaN for NaN and infinity; any other x gives garbage.
FASTSEG_INLINE f32x16 log_finite(f32x16 x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;  // bits of sqrt(1/2): the mantissa is taken in [sqrt(1/2), sqrt(2))
  const u32x16 bits = bit_cast<u32x16>(x) - kSqrtHalf;
  const f32x16 exponent = convert<f32x16>(bit_cast<i32x16>(bits) >> 23);
  const f32x16 m = bit_cast<f32x16>((bits & 0x007fffffu) + kSqrtHalf) - 1.0f;
  f32x16 p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const f32x16 square = m * m;
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

// fp64 is for gradcheck: lane by lane through libm.
FASTSEG_INLINE f64x16 exp(f64x16 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

FASTSEG_INLINE f64x16 log(f64x16 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::log(x[i]);
  return x;
}
FASTSEG_INLINE f64x16 log_finite(f64x16 x) { return log(x); }

}  // namespace simd
