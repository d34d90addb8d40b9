// Rows of elements, converted to and from fp32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastseg/simd.h"

namespace fastseg::upsample_bilinear2d {

// Calls body(c) for vectors c .. c + 15 that cover the elements [0, inner) of a pixel. The last vector overlaps the one
// before or, with fewer than 16 elements, reaches into the next pixel: visit pixels in ascending order, with room for a
// vector after the last.
template <typename Body>
FASTSEG_INLINE void for_each_vector(int64_t inner, const Body& body) {
  int64_t c = 0;
  for (; c + simd::kLanes <= inner; c += simd::kLanes) body(c);
  if (c < inner) body(std::max<int64_t>(0, inner - simd::kLanes));
}

// Widens from: [count] to to: [count].
template <typename scalar_t>
void read_row(const scalar_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + simd::kLanes <= count; i += simd::kLanes) simd::store(to + i, simd::load(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// Writes to: [count]; vector_at(i) gives elements i .. i + 15, also past count.
template <typename scalar_t, typename Vectors>
FASTSEG_INLINE void write_row(scalar_t* to, int64_t count, bool stream, const Vectors& vector_at) {
  constexpr int64_t kLanes = simd::kLanes;
  int64_t i = 0;
  if (stream) {  // whole lines of the cache, after the first one
    constexpr uintptr_t kLine = 64;
    const uintptr_t over = reinterpret_cast<uintptr_t>(to) % kLine;
    const int64_t head = over ? static_cast<int64_t>((kLine - over) / sizeof(scalar_t)) : 0;
    for (; i + kLanes <= head && i + kLanes <= count; i += kLanes) simd::store(to + i, vector_at(i));
    const int64_t head_left = std::min(head, count) - i;
    if (head_left > 0) {
      simd::store_partial(to + i, vector_at(i), static_cast<int>(head_left));
      i += head_left;
    }
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      simd::stream(to + i, vector_at(i));
      simd::stream(to + i + kLanes, vector_at(i + kLanes));
    }
  }
  for (; i + kLanes <= count; i += kLanes) simd::store(to + i, vector_at(i));
  if (i < count) simd::store_partial(to + i, vector_at(i), static_cast<int>(count - i));
}

}  // namespace fastseg::upsample_bilinear2d
