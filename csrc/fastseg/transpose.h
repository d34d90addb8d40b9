// Transposition between interleaved pixels [count][C] and class rows [C][row_stride].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fastseg/simd.h"

namespace fastseg::detail {

template <typename value_t>
void transpose_block(const value_t* from, int64_t from_stride, value_t* to, int64_t to_stride, int64_t rows,
                     int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column)
      to[column * to_stride + row] = from[row * from_stride + column];
  }
}

using f32x4 = float __attribute__((vector_size(16)));

FASTSEG_INLINE void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  f32x4 line[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&line[i], from + i * from_stride, sizeof(f32x4));
  const f32x4 low01 = __builtin_shufflevector(line[0], line[1], 0, 4, 1, 5);
  const f32x4 low23 = __builtin_shufflevector(line[2], line[3], 0, 4, 1, 5);
  const f32x4 high01 = __builtin_shufflevector(line[0], line[1], 2, 6, 3, 7);
  const f32x4 high23 = __builtin_shufflevector(line[2], line[3], 2, 6, 3, 7);
  line[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  line[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  line[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  line[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &line[i], sizeof(f32x4));
}

using u16x8 = uint16_t __attribute__((vector_size(16)));

// Pairs, fours and eights of elements change places.
template <typename half_t>
FASTSEG_INLINE void transpose_8x8(const half_t* from, int64_t from_stride, half_t* to, int64_t to_stride) {
  u16x8 line[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&line[i], from + i * from_stride, sizeof(u16x8));
  for (int i = 0; i < 4; ++i) {
    const u16x8 upper = line[2 * i], lower = line[2 * i + 1];
    pairs[i] = __builtin_shufflevector(upper, lower, 0, 8, 1, 9, 2, 10, 3, 11);
    pairs[i + 4] = __builtin_shufflevector(upper, lower, 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 2) {
    const u16x8 upper = pairs[i], lower = pairs[i + 1];
    fours[i] = __builtin_shufflevector(upper, lower, 0, 1, 8, 9, 2, 3, 10, 11);
    fours[i + 1] = __builtin_shufflevector(upper, lower, 4, 5, 12, 13, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {  // fours[0, 1] and [2, 3] hold columns 0 to 3, those after them columns 4 to 7
    const int first = i / 2 * 4 + i % 2;
    const u16x8 upper = fours[first], lower = fours[first + 2];
    line[2 * i] = __builtin_shufflevector(upper, lower, 0, 1, 2, 3, 8, 9, 10, 11);
    line[2 * i + 1] = __builtin_shufflevector(upper, lower, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &line[i], sizeof(u16x8));
}

// to[column][row] = from[row][column]. A last block that does not fill 4 x 4 (8 x 8 of half types) overlaps the block
// before it.
template <typename value_t>
void transpose(const value_t* from, int64_t from_stride, value_t* to, int64_t to_stride, int64_t rows,
               int64_t columns) {
  constexpr int64_t kBlock = sizeof(value_t) == 2 ? 8 : 4;
  if constexpr (sizeof(value_t) <= 4) {
    if (rows >= kBlock && columns >= kBlock) {
      for (int64_t row = 0; row < rows; row += kBlock) {
        row = std::min(row, rows - kBlock);
        for (int64_t column = 0; column < columns; column += kBlock) {
          column = std::min(column, columns - kBlock);
          const value_t* corner = from + row * from_stride + column;
          value_t* turned = to + column * to_stride + row;
          if constexpr (sizeof(value_t) == 2) transpose_8x8(corner, from_stride, turned, to_stride);
          else transpose_4x4(corner, from_stride, turned, to_stride);
        }
      }
      return;
    }
  }
  transpose_block(from, from_stride, to, to_stride, rows, columns);
}

}  // namespace fastseg::detail
