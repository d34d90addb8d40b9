// Vectors of 16 lanes, whatever the width of the machine's registers.
//
// Where 16 lanes fit a register the type is GCC's own vector; elsewhere a Pair of vectors of half the lanes,
// split further until they fit. (GCC 12 also compiles vectors wider than a register, but splits their comparisons
// into scalars and keeps them in memory: several times slower.) Both kinds have lane-wise operators,
// comparisons that give masks of 0 / -1 integer lanes, scalar operands and lanes[i] for reading; everything
// else is a function below.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace simd {

#define FASTSEG_ALWAYS_INLINE __attribute__((always_inline))  // after the parameters of a lambda
#define FASTSEG_INLINE inline FASTSEG_ALWAYS_INLINE

// Stands before a loop over an array of vectors that must stay in registers: GCC unrolls such a loop by itself, but
// only after it has placed the array in memory.
#define FASTSEG_UNROLL _Pragma("GCC unroll 16")

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;  // SSE2, NEON
#endif

template <typename lane_t, int lanes>
struct Pair;

namespace detail {

template <typename lane_t, int lanes>
struct Register {
  typedef lane_t type __attribute__((vector_size(sizeof(lane_t) * lanes)));
};
template <typename lane_t, int lanes>
struct Registers {
  using type = Pair<lane_t, lanes>;
};

template <typename lane_t>
using signed_of_same_size = std::conditional_t<
    sizeof(lane_t) == 8, int64_t,
    std::conditional_t<sizeof(lane_t) == 4, int32_t, std::conditional_t<sizeof(lane_t) == 2, int16_t, int8_t>>>;

}  // namespace detail

template <typename lane_t, int lanes>
using Vector = typename std::conditional_t<sizeof(lane_t) * lanes <= kRegisterBytes, detail::Register<lane_t, lanes>,
                                           detail::Registers<lane_t, lanes>>::type;

template <typename lane_t, int lanes>
struct Pair {
  using half_t = Vector<lane_t, lanes / 2>;
  using mask_t = Vector<detail::signed_of_same_size<lane_t>, lanes>;
  half_t low, high;

  Pair() = default;  // not set; Pair{} is zero
  FASTSEG_INLINE Pair(half_t low, half_t high) : low(low), high(high) {}
  FASTSEG_INLINE Pair(lane_t value) : low(value - half_t{}), high(low) {}
  // Register by register: GCC copies a struct as a whole through the stack, in pieces of 16 bytes.
  FASTSEG_INLINE Pair(const Pair& other) : low(other.low), high(other.high) {}
  FASTSEG_INLINE Pair& operator=(const Pair& other) {
    low = other.low;
    high = other.high;
    return *this;
  }

  FASTSEG_INLINE lane_t operator[](int lane) const { return lane < lanes / 2 ? low[lane] : high[lane - lanes / 2]; }

  FASTSEG_INLINE Pair operator-() const { return {-low, -high}; }
  FASTSEG_INLINE Pair operator~() const { return {~low, ~high}; }
  FASTSEG_INLINE Pair operator<<(int bits) const { return {low << bits, high << bits}; }
  FASTSEG_INLINE Pair operator>>(int bits) const { return {low >> bits, high >> bits}; }

  // clang-format off: it would separate the two halves of an operator
#define FASTSEG_ARITHMETIC(op)                                                                          \
  friend FASTSEG_INLINE Pair operator op(Pair a, Pair b) { return {a.low op b.low, a.high op b.high}; } \
  FASTSEG_INLINE Pair& operator op##=(Pair other) { return *this = *this op other; }
  // clang-format on
  FASTSEG_ARITHMETIC(+)
  FASTSEG_ARITHMETIC(-)
  FASTSEG_ARITHMETIC(*)
  FASTSEG_ARITHMETIC(/)
  FASTSEG_ARITHMETIC(&)
  FASTSEG_ARITHMETIC(|)
  FASTSEG_ARITHMETIC(^)
#undef FASTSEG_ARITHMETIC

#define FASTSEG_COMPARISON(op) \
  friend FASTSEG_INLINE mask_t operator op(Pair a, Pair b) { return {a.low op b.low, a.high op b.high}; }
  FASTSEG_COMPARISON(==)
  FASTSEG_COMPARISON(!=)
  FASTSEG_COMPARISON(<)
  FASTSEG_COMPARISON(<=)
  FASTSEG_COMPARISON(>)
  FASTSEG_COMPARISON(>=)
#undef FASTSEG_COMPARISON
};

using f32x16 = Vector<float, 16>;
using i32x16 = Vector<int32_t, 16>;
using u32x16 = Vector<uint32_t, 16>;
using u8x16 = Vector<uint8_t, 16>;
using u16x16 = Vector<uint16_t, 16>;
using u16x32 = Vector<uint16_t, 32>;
using f64x16 = Vector<double, 16>;
using i64x16 = Vector<int64_t, 16>;

// --- what a vector is made of ---

template <typename vector_t>
using lane_of = std::decay_t<decltype(std::declval<vector_t>()[0])>;
template <typename vector_t>
constexpr int lanes_of = sizeof(vector_t) / sizeof(lane_of<vector_t>);
template <typename vector_t>
using half_of = Vector<lane_of<vector_t>, lanes_of<vector_t> / 2>;

// A comparison's result.
template <typename vector_t>
using mask_of = Vector<detail::signed_of_same_size<lane_of<vector_t>>, lanes_of<vector_t>>;

template <typename vector_t>
constexpr bool is_pair = false;
template <typename lane_t, int lanes>
constexpr bool is_pair<Pair<lane_t, lanes>> = true;

namespace detail {

// Lanes first, first + step, ... of `low` followed by `high`.
template <int first, int step = 1, typename vector_t, size_t... index>
FASTSEG_INLINE auto pick(vector_t low, vector_t high, std::index_sequence<index...>) {
  return __builtin_shufflevector(low, high, (first + step * static_cast<int>(index))...);
}

// Lanes first, first + 1, ... of both, alternating.
template <int first, typename vector_t, size_t... index>
FASTSEG_INLINE auto alternate(vector_t even, vector_t odd, std::index_sequence<index...>) {
  constexpr int kLanes = lanes_of<vector_t>;
  return __builtin_shufflevector(even, odd, (first + static_cast<int>(index / 2 + index % 2 * kLanes))...);
}

}  // namespace detail

template <typename vector_t>
FASTSEG_INLINE half_of<vector_t> low_half(vector_t lanes) {
  if constexpr (is_pair<vector_t>) {
    return lanes.low;
  } else {
    constexpr int kHalf = lanes_of<vector_t> / 2;
    return detail::pick<0>(lanes, lanes, std::make_index_sequence<kHalf>());
  }
}
template <typename vector_t>
FASTSEG_INLINE half_of<vector_t> high_half(vector_t lanes) {
  if constexpr (is_pair<vector_t>) {
    return lanes.high;
  } else {
    constexpr int kHalf = lanes_of<vector_t> / 2;
    return detail::pick<kHalf>(lanes, lanes, std::make_index_sequence<kHalf>());
  }
}
template <typename vector_t>
FASTSEG_INLINE vector_t join(half_of<vector_t> low, half_of<vector_t> high) {
  if constexpr (is_pair<vector_t>) {
    return {low, high};
  } else {
    return detail::pick<0>(low, high, std::make_index_sequence<lanes_of<vector_t>>());
  }
}

// Lanes `first`, first + 2, ... of `low` followed by `high`: the even or the odd ones.
template <int first, typename vector_t>
FASTSEG_INLINE vector_t every_second(vector_t low, vector_t high) {
  if constexpr (is_pair<vector_t>) {
    return {every_second<first>(low.low, low.high), every_second<first>(high.low, high.high)};
  } else {
    return detail::pick<first, 2>(low, high, std::make_index_sequence<lanes_of<vector_t>>());
  }
}

// The inverse of every_second: even[0], odd[0], even[1], ... of the lower or of the higher halves.
template <typename vector_t>
FASTSEG_INLINE vector_t interleave_low(vector_t even, vector_t odd);
template <typename vector_t>
FASTSEG_INLINE vector_t interleave_high(vector_t even, vector_t odd) {
  if constexpr (is_pair<vector_t>) {
    return {interleave_low(even.high, odd.high), interleave_high(even.high, odd.high)};
  } else {
    constexpr int kLanes = lanes_of<vector_t>;
    return detail::alternate<kLanes / 2>(even, odd, std::make_index_sequence<kLanes>());
  }
}
template <typename vector_t>
FASTSEG_INLINE vector_t interleave_low(vector_t even, vector_t odd) {
  if constexpr (is_pair<vector_t>) {
    return {interleave_low(even.low, odd.low), interleave_high(even.low, odd.low)};
  } else {
    return detail::alternate<0>(even, odd, std::make_index_sequence<lanes_of<vector_t>>());
  }
}

// --- lane by lane ---

FASTSEG_INLINE f32x16 splat(float value) { return value - f32x16{}; }
FASTSEG_INLINE f64x16 splat(double value) { return value - f64x16{}; }
FASTSEG_INLINE i32x16 splat(int32_t value) { return value - i32x16{}; }

template <typename to_t, typename from_t>
FASTSEG_INLINE to_t bit_cast(const from_t& from) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  if constexpr (is_pair<to_t> && is_pair<from_t>) {
    return {bit_cast<typename to_t::half_t>(from.low), bit_cast<typename to_t::half_t>(from.high)};
  } else {
    to_t to;
    std::memcpy(&to, &from, sizeof to);
    return to;
  }
}

template <typename to_t, typename from_t>
FASTSEG_INLINE to_t convert(from_t from);

namespace detail {

// Between bytes and wider integers GCC 12 converts lane by lane.
FASTSEG_INLINE i32x16 widen_bytes(u8x16 bytes) {
#if defined(__AVX512F__)
  return bit_cast<i32x16>(_mm512_maskz_cvtepu8_epi32(0xffff, bit_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
  const __m128i all = bit_cast<__m128i>(bytes);
  using eight_t = half_of<i32x16>;
  return {bit_cast<eight_t>(_mm256_cvtepu8_epi32(all)),
          bit_cast<eight_t>(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(all, all)))};
#else
  return convert<i32x16>(convert<u16x16>(bytes));
#endif
}

#if defined(__AVX512F__)
// Between float and double GCC 12 converts four lanes at a time.
FASTSEG_INLINE half_of<f64x16> widen_floats(half_of<f32x16> lanes) {
  return bit_cast<half_of<f64x16>>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(lanes)));
}
FASTSEG_INLINE half_of<f32x16> round_doubles(half_of<f64x16> lanes) {
  return bit_cast<half_of<f32x16>>(_mm512_maskz_cvtpd_ps(0xff, bit_cast<__m512d>(lanes)));
}
#endif

}  // namespace detail

// A C++ conversion of every lane, e.g. convert<f64x16>(f32x16).
template <typename to_t, typename from_t>
FASTSEG_INLINE to_t convert(from_t from) {
  static_assert(lanes_of<to_t> == lanes_of<from_t>);
  if constexpr (std::is_same_v<to_t, from_t>) {
    return from;
  } else if constexpr (std::is_same_v<from_t, u8x16> && std::is_same_v<to_t, i32x16>) {
    return detail::widen_bytes(from);
  } else if constexpr (std::is_same_v<from_t, u8x16> && std::is_same_v<to_t, i64x16>) {
    return convert<to_t>(detail::widen_bytes(from));
  } else if constexpr (std::is_same_v<to_t, u8x16> && is_pair<from_t> && !std::is_same_v<from_t, u16x16>) {
    return convert<to_t>(convert<u16x16>(from));
  } else if constexpr (is_pair<to_t> || is_pair<from_t>) {
    return join<to_t>(convert<half_of<to_t>>(low_half(from)), convert<half_of<to_t>>(high_half(from)));
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<from_t, half_of<f32x16>> && std::is_same_v<to_t, half_of<f64x16>>) {
    return detail::widen_floats(from);
  } else if constexpr (std::is_same_v<from_t, half_of<f64x16>> && std::is_same_v<to_t, half_of<f32x16>>) {
    return detail::round_doubles(from);
#endif
  } else {
    return __builtin_convertvector(from, to_t);
  }
}

// mask ? chosen : other, for a comparison's result of the same lane width.
template <typename mask_t, typename vector_t>
FASTSEG_INLINE vector_t select(mask_t mask, vector_t chosen, vector_t other) {
  if constexpr (is_pair<vector_t>) {
    return {select(mask.low, chosen.low, other.low), select(mask.high, chosen.high, other.high)};
  } else {
    return mask ? chosen : other;
  }
}

// mask ? lanes : 0
template <typename mask_t, typename vector_t>
FASTSEG_INLINE vector_t keep_where(mask_t mask, vector_t lanes) {
  return select(mask, lanes, vector_t{});
}

// -|lanes|
template <typename vector_t>
FASTSEG_INLINE vector_t negative(vector_t lanes) {
  using bits_t = mask_of<vector_t>;
  return bit_cast<vector_t>(bit_cast<bits_t>(lanes) | std::numeric_limits<lane_of<bits_t>>::min());
}

// NaN in `candidate` is skipped, as in `candidate > best ? candidate : best`.
template <typename vector_t>
FASTSEG_INLINE vector_t maximum(vector_t best, vector_t candidate) {
  return select(candidate > best, candidate, best);
}
template <typename vector_t>
FASTSEG_INLINE vector_t minimum(vector_t best, vector_t candidate) {
  return select(candidate < best, candidate, best);
}

// lanes << bits, lane by lane; bits in [0, 31].
template <typename vector_t>
FASTSEG_INLINE vector_t shift_left(vector_t lanes, vector_t bits) {
  if constexpr (is_pair<vector_t>) {
    return {shift_left(lanes.low, bits.low), shift_left(lanes.high, bits.high)};
  } else {
    return lanes << bits;
  }
}

// --- what an accumulator type computes in ---

// fp64 exists for gradcheck: same code, not tuned.
template <typename accumulate_t>
using vec = Vector<accumulate_t, kLanes>;

// A comparison's result of vec<accumulate_t>.
template <typename accumulate_t>
using mask = mask_of<vec<accumulate_t>>;

// What a storage type accumulates in.
template <typename scalar_t>
using accumulate = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

}  // namespace simd
