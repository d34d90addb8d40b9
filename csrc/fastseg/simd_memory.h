// Loads and stores of vectors, and reductions of their lanes. Raw intrinsics are used here where compilers have
// no syntax of their own: fp16, streaming stores, gathers, permutations, masks as bits.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "fastseg/simd_vector.h"

namespace simd {

using c10::BFloat16;
using c10::Half;

namespace detail {

// Register by register, see Pair.
template <typename vector_t>
FASTSEG_INLINE vector_t read(const void* from) {
  if constexpr (is_pair<vector_t>) {
    using half_t = half_of<vector_t>;
    return {read<half_t>(from), read<half_t>(static_cast<const char*>(from) + sizeof(half_t))};
  } else {
    vector_t lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
  }
}

template <typename vector_t>
FASTSEG_INLINE void write(void* to, vector_t lanes) {
  if constexpr (is_pair<vector_t>) {
    write(to, lanes.low);
    write(static_cast<char*>(to) + sizeof lanes.low, lanes.high);
  } else {
    std::memcpy(to, &lanes, sizeof lanes);
  }
}

// The same for elements of the lanes' own type: such a store cannot change an object of another type (pointers, sizes),
// so compilers need not read those again after every store of a loop.
template <typename lane_t, typename vector_t>
FASTSEG_INLINE void write_lanes(lane_t* to, vector_t lanes) {
  if constexpr (is_pair<vector_t>) {
    write_lanes(to, lanes.low);
    write_lanes(to + lanes_of<half_of<vector_t>>, lanes.high);
  } else {
    typedef vector_t unaligned __attribute__((aligned(alignof(lane_t))));
    *reinterpret_cast<unaligned*>(to) = lanes;
  }
}

// Past the cache. `to` is aligned to the vector or, where it is larger, to the cache line.
template <typename vector_t>
FASTSEG_INLINE void write_past_cache(void* to, vector_t lanes) {
  if constexpr (is_pair<vector_t>) {
    write_past_cache(to, lanes.low);
    write_past_cache(static_cast<char*>(to) + sizeof lanes.low, lanes.high);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof lanes == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(lanes));
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof lanes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(lanes));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof lanes == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(lanes));
  }
#endif
  write(to, lanes);
}

// --- half types as bits ---

template <typename float_t, typename bits_t>
FASTSEG_INLINE float_t widen_half(bits_t bits) {
  if constexpr (is_pair<float_t>) {
    using half_t = half_of<float_t>;
    return {widen_half<half_t>(low_half(bits)), widen_half<half_t>(high_half(bits))};
  } else {
#if defined(__AVX512F__)  // (a zero mask is free, and spares GCC 12's warning about its own intrinsics)
    return bit_cast<float_t>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__) && defined(__F16C__)
    return bit_cast<float_t>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
    float lanes[lanes_of<float_t>];
    for (int i = 0; i < lanes_of<float_t>; ++i) lanes[i] = Half(bits[i], Half::from_bits());
    return read<float_t>(lanes);
#endif
  }
}

template <typename bits_t, typename float_t>
FASTSEG_INLINE bits_t round_to_half(float_t lanes) {
  if constexpr (is_pair<float_t>) {
    using half_t = half_of<bits_t>;
    return join<bits_t>(round_to_half<half_t>(lanes.low), round_to_half<half_t>(lanes.high));
  } else {
#if defined(__AVX512F__)
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return bit_cast<bits_t>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(lanes), kNearest));
#elif defined(__AVX2__) && defined(__F16C__)
    return bit_cast<bits_t>(_mm256_cvtps_ph(bit_cast<__m256>(lanes), _MM_FROUND_TO_NEAREST_INT));
#else
    uint16_t bits[lanes_of<float_t>];
    for (int i = 0; i < lanes_of<float_t>; ++i) bits[i] = Half(lanes[i]).x;
    return read<bits_t>(bits);
#endif
  }
}

FASTSEG_INLINE f32x16 widen_bfloat16(u16x16 bits) {
#if defined(__AVX512BW__)  // a zero below every element: one shuffle, where widening and shifting are two
  alignas(64) static constexpr uint16_t kPlaces[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i elements = _mm512_castsi256_si512(bit_cast<__m256i>(bits));
  return bit_cast<f32x16>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(kPlaces), elements));
#else
  return bit_cast<f32x16>(convert<u32x16>(bits) << 16);
#endif
}

FASTSEG_INLINE u16x16 round_to_bfloat16(f32x16 lanes) {
  const u32x16 bits = bit_cast<u32x16>(lanes);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 quiet_nan = (bits >> 16) | 0x40u;
  return convert<u16x16>(select(lanes == lanes, rounded, quiet_nan));
}

#if defined(__AVX512BW__)
// NaN replaced by the quiet one whose lower 16 bits are zero.
FASTSEG_INLINE f32x16 canonical_nan(f32x16 lanes) {
  const __m512 values = bit_cast<__m512>(lanes);
  const __m512i tokens = _mm512_set1_epi32(0x33);  // the lowest two of eight tokens: quiet, signalling NaN
  return bit_cast<f32x16>(_mm512_maskz_fixupimm_ps(0xffff, values, values, tokens, 0));
}
#endif

// 32 elements at a time, to nearest, ties away from zero: under AVX-512 half the work of twice 16. For numbers of full
// precision, whose ties are rare.
FASTSEG_INLINE u16x32 round_to_bfloat16(f32x16 first, f32x16 second) {
#if defined(__AVX512BW__)
  const auto up = [](f32x16 lanes) FASTSEG_ALWAYS_INLINE {
    return bit_cast<u16x32>(bit_cast<u32x16>(canonical_nan(lanes)) + 0x8000u);
  };
  return every_second<1>(up(first), up(second));
#else
  return join<u16x32>(round_to_bfloat16(first), round_to_bfloat16(second));
#endif
}

}  // namespace detail

// --- loads: 16 consecutive elements of any storage type, widened to the accumulator ---

FASTSEG_INLINE f32x16 load(const float* from) { return detail::read<f32x16>(from); }
FASTSEG_INLINE f64x16 load(const double* from) { return detail::read<f64x16>(from); }
FASTSEG_INLINE i32x16 load(const int32_t* from) { return detail::read<i32x16>(from); }
FASTSEG_INLINE i64x16 load(const int64_t* from) { return detail::read<i64x16>(from); }
FASTSEG_INLINE u8x16 load(const uint8_t* from) { return detail::read<u8x16>(from); }
FASTSEG_INLINE f32x16 load(const BFloat16* from) { return detail::widen_bfloat16(detail::read<u16x16>(from)); }
FASTSEG_INLINE f32x16 load(const Half* from) { return detail::widen_half<f32x16>(detail::read<u16x16>(from)); }

FASTSEG_INLINE i32x16 lane_index() {
  constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kIndex);
}

// --- stores: rounded to nearest even, NaN kept ---

FASTSEG_INLINE void store(float* to, f32x16 lanes) { detail::write_lanes(to, lanes); }
FASTSEG_INLINE void store(double* to, f64x16 lanes) { detail::write_lanes(to, lanes); }
FASTSEG_INLINE void store(int32_t* to, i32x16 lanes) { detail::write_lanes(to, lanes); }
FASTSEG_INLINE void store(int64_t* to, i64x16 lanes) { detail::write_lanes(to, lanes); }
FASTSEG_INLINE void store(uint8_t* to, u8x16 lanes) { detail::write(to, lanes); }
FASTSEG_INLINE void store(BFloat16* to, f32x16 lanes) { detail::write(to, detail::round_to_bfloat16(lanes)); }
FASTSEG_INLINE void store(Half* to, f32x16 lanes) { detail::write(to, detail::round_to_half<u16x16>(lanes)); }

// 32 consecutive elements, for half types one line of the cache under AVX-512, where bfloat16's ties go away from zero.
template <typename scalar_t, typename vector_t>
FASTSEG_INLINE void store(scalar_t* to, vector_t first, vector_t second) {
  store(to, first);
  store(to + kLanes, second);
}
FASTSEG_INLINE void store(BFloat16* to, f32x16 first, f32x16 second) {
  detail::write(to, detail::round_to_bfloat16(first, second));
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

// Streaming stores write whole cache lines without reading them first: for outputs larger than the cache that
// are not read soon. `to` must be aligned to 64 bytes; 32 for 16 elements of half types. Call stream_fence() once per
// thread after the last of them.
FASTSEG_INLINE void stream(float* to, f32x16 lanes) { detail::write_past_cache(to, lanes); }
FASTSEG_INLINE void stream(double* to, f64x16 lanes) { detail::write_past_cache(to, lanes); }
FASTSEG_INLINE void stream(int64_t* to, i64x16 lanes) { detail::write_past_cache(to, lanes); }
FASTSEG_INLINE void stream(BFloat16* to, f32x16 lanes) {
  detail::write_past_cache(to, detail::round_to_bfloat16(lanes));
}
FASTSEG_INLINE void stream(Half* to, f32x16 lanes) {
  detail::write_past_cache(to, detail::round_to_half<u16x16>(lanes));
}

// 32 consecutive elements.
template <typename scalar_t, typename vector_t>
FASTSEG_INLINE void stream(scalar_t* to, vector_t first, vector_t second) {
  stream(to, first);
  stream(to + kLanes, second);
}
FASTSEG_INLINE void stream(BFloat16* to, f32x16 first, f32x16 second) {
  detail::write_past_cache(to, detail::round_to_bfloat16(first, second));
}
FASTSEG_INLINE void stream(Half* to, f32x16 first, f32x16 second) {
  const u16x16 low = detail::round_to_half<u16x16>(first), high = detail::round_to_half<u16x16>(second);
  detail::write_past_cache(to, join<u16x32>(low, high));
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
  alignas(64) int32_t positions[kLanes];
  alignas(64) float lanes[kLanes];
  store(positions, index);
  for (int i = 0; i < kLanes; ++i) lanes[i] = base[positions[i]];
  return load(lanes);
#endif
}

// base[index[lane]] where every index is in [0, 16) and 16 elements are readable: shuffles instead of loads.
FASTSEG_INLINE f32x16 permute(const float* base, i32x16 index) {
#if defined(__AVX512F__)
  const __m512i lanes = bit_cast<__m512i>(index);
  return bit_cast<f32x16>(_mm512_maskz_permutexvar_ps(0xffff, lanes, _mm512_loadu_ps(base)));
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(base), high = _mm256_loadu_ps(base + 8);
  const auto eight = [&](Vector<int32_t, 8> positions) {
    const __m256i position = bit_cast<__m256i>(positions);
    const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(position, 28));  // bit 3 into the sign
    return bit_cast<Vector<float, 8>>(
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, position), _mm256_permutevar8x32_ps(high, position), in_high));
  };
  return {eight(index.low), eight(index.high)};
#else
  return gather(base, index);
#endif
}

// --- one number from 16 lanes ---

template <typename vector_t>
FASTSEG_INLINE auto reduce_add(vector_t lanes) {
  if constexpr (lanes_of<vector_t> == 2) {
    return lanes[0] + lanes[1];
  } else {
    return reduce_add(low_half(lanes) + high_half(lanes));
  }
}

template <typename vector_t>
FASTSEG_INLINE auto reduce_or(vector_t lanes) {
  if constexpr (lanes_of<vector_t> == 2) {
    return lanes[0] | lanes[1];
  } else {
    return reduce_or(low_half(lanes) | high_half(lanes));
  }
}

// One bit per lane of a comparison's result, lane 0 lowest.
template <typename mask_t>
FASTSEG_INLINE uint32_t mask_bits(mask_t mask) {
  if constexpr (is_pair<mask_t>) {
    return mask_bits(mask.low) | mask_bits(mask.high) << lanes_of<half_of<mask_t>>;
  } else {
    [[maybe_unused]] constexpr bool kNarrow = sizeof(lane_of<mask_t>) == 4;  // else 8 bytes
#if defined(__AVX512DQ__)
    if constexpr (kNarrow) return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
    return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
#elif defined(__AVX2__)
    if constexpr (kNarrow) return _mm256_movemask_ps(bit_cast<__m256>(mask));
    return _mm256_movemask_pd(bit_cast<__m256d>(mask));
#elif defined(__SSE2__)
    if constexpr (kNarrow) return _mm_movemask_ps(bit_cast<__m128>(mask));
    return _mm_movemask_pd(bit_cast<__m128d>(mask));
#else
    uint32_t bits = 0;
    for (int i = 0; i < lanes_of<mask_t>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
    return bits;
#endif
  }
}

// The inverse: `chosen` in the lanes whose bits are set, `other` in the lanes whose bits are not.
template <typename vector_t>
FASTSEG_INLINE vector_t select_bits(uint16_t bits, vector_t chosen, vector_t other) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<vector_t, f32x16>) {
    return bit_cast<f32x16>(_mm512_mask_mov_ps(bit_cast<__m512>(other), bits, bit_cast<__m512>(chosen)));
  }
#endif
  using bits_t = mask_of<vector_t>;
  using lane_t = lane_of<bits_t>;
  alignas(64) static constexpr lane_t kBit[kLanes] = {1 << 0,  1 << 1,  1 << 2,  1 << 3, 1 << 4,  1 << 5,
                                                      1 << 6,  1 << 7,  1 << 8,  1 << 9, 1 << 10, 1 << 11,
                                                      1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const bits_t own = bits_t{} + static_cast<lane_t>(bits);
  return select((own & load(kBit)) != bits_t{}, chosen, other);
}

// True if any lane of a comparison's result is set.
template <typename mask_t>
FASTSEG_INLINE bool any(mask_t mask) {
  return mask_bits(mask) != 0;
}

}  // namespace simd
