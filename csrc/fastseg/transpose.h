// Transposition between interleaved pixels [count][C] and class rows [C][row_stride].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// Squares are transposed in registers. A lane is 128 bits, one row of a square; a register has kSquares lanes, one row
// of each of kSquares squares.
using Lane = simd::Vector<uint64_t, 2>;
using Register = simd::Vector<uint64_t, simd::kRegisterBytes / 8>;
constexpr int kSquares = simd::kRegisterBytes / 16;

// Reads or writes the lanes of a register, `step` bytes apart.
template <typename vector_t>
FASTSEG_INLINE vector_t read_lanes(const char* from, int64_t step) {
  if constexpr (sizeof(vector_t) == sizeof(Lane)) {
    return simd::detail::read<vector_t>(from);
  } else {
    using half_t = simd::half_of<vector_t>;
    const int64_t half_step = step * static_cast<int64_t>(sizeof(half_t) / sizeof(Lane));
    return simd::join<vector_t>(read_lanes<half_t>(from, step), read_lanes<half_t>(from + half_step, step));
  }
}
template <typename vector_t>
FASTSEG_INLINE void write_lanes(char* to, int64_t step, vector_t lanes) {
  if constexpr (sizeof(vector_t) == sizeof(Lane)) {
    simd::detail::write(to, lanes);
  } else {
    const int64_t half_step = step * static_cast<int64_t>(sizeof(vector_t) / sizeof(Lane) / 2);
    write_lanes(to, step, simd::low_half(lanes));
    write_lanes(to + half_step, step, simd::high_half(lanes));
  }
}

// Within each lane, the lower (or higher) halves of two registers are interleaved, `unit` elements of each in turn.
// Gives the source of element `i`.
constexpr int interleaved(int i, int unit, int higher, int square, int elements) {
  const int within = i % square, place = within / unit;
  return i / square * square + higher * square / 2 + place / 2 * unit + within % unit + place % 2 * elements;
}
template <int unit, int higher, int square, typename vector_t, size_t... i>
FASTSEG_INLINE vector_t interleave(vector_t even, vector_t odd, std::index_sequence<i...>) {
  constexpr int kElements = simd::lanes_of<vector_t>;
  return __builtin_shufflevector(even, odd, interleaved(i, unit, higher, square, kElements)...);
}

// Rows and columns of a square.
template <typename value_t>
constexpr int64_t square_of = sizeof(value_t) <= 4 ? sizeof(Lane) / sizeof(value_t) : 1;

// Transposes the squares: elements, then pairs, then fours change places.
template <int unit = 1, typename vector_t, int square>
FASTSEG_INLINE void transpose_squares(vector_t (&rows)[square]) {
  if constexpr (unit < square) {
    constexpr int kHalf = square / (2 * unit);
    constexpr auto kAll = std::make_index_sequence<simd::lanes_of<vector_t>>();
    vector_t next[square];
    for (int i = 0; i < square / 2; ++i) {
      const int to = i / kHalf * 2 * kHalf + i % kHalf;
      next[to] = interleave<unit, 0, square>(rows[2 * i], rows[2 * i + 1], kAll);
      next[to + kHalf] = interleave<unit, 1, square>(rows[2 * i], rows[2 * i + 1], kAll);
    }
    transpose_squares<2 * unit>(next);
    for (int i = 0; i < square; ++i) rows[i] = next[i];
  }
}

// Transposes squares that lie one below the other (`tall`) or side by side.
template <bool tall, typename value_t>
FASTSEG_INLINE void transpose_register(const value_t* from, int64_t from_stride, value_t* to, int64_t to_stride) {
  using bits_t = std::conditional_t<sizeof(value_t) == 2, uint16_t, uint32_t>;
  using vector_t = simd::Vector<bits_t, sizeof(Register) / sizeof(bits_t)>;
  constexpr int kSquare = sizeof(Lane) / sizeof(bits_t);
  constexpr int64_t kSize = sizeof(value_t);
  const int64_t from_step = tall ? kSquare * kSize * from_stride : sizeof(Lane);
  const int64_t to_step = tall ? sizeof(Lane) : kSquare * kSize * to_stride;
  vector_t rows[kSquare];
  for (int i = 0; i < kSquare; ++i) {
    const char* row = reinterpret_cast<const char*>(from + i * from_stride);
    rows[i] = simd::bit_cast<vector_t>(tall ? read_lanes<Register>(row, from_step) : simd::detail::read<Register>(row));
  }
  transpose_squares(rows);
  for (int i = 0; i < kSquare; ++i) {
    char* row = reinterpret_cast<char*>(to + i * to_stride);
    const Register lanes = simd::bit_cast<Register>(rows[i]);
    tall ? simd::detail::write(row, lanes) : write_lanes(row, to_step, lanes);
  }
}

// to[column][row] = from[row][column]. A last block that does not fill its registers overlaps the block before it.
template <typename value_t>
void transpose(const value_t* from, int64_t from_stride, value_t* to, int64_t to_stride, int64_t rows,
               int64_t columns) {
  if constexpr (sizeof(value_t) <= 4) {
    constexpr int64_t kSquare = square_of<value_t>, kLong = kSquare * kSquares;
    const auto registers = [&](int64_t height, int64_t width) {
      if (rows < height || columns < width) return INT64_MAX;
      return (rows + height - 1) / height * ((columns + width - 1) / width);
    };
    const bool tall = registers(kLong, kSquare) <= registers(kSquare, kLong);
    if (std::min(registers(kLong, kSquare), registers(kSquare, kLong)) < INT64_MAX) {
      const int64_t height = tall ? kLong : kSquare, width = tall ? kSquare : kLong;
      for (int64_t row = 0; row < rows; row += height) {
        row = std::min(row, rows - height);
        for (int64_t column = 0; column < columns; column += width) {
          column = std::min(column, columns - width);
          const value_t* corner = from + row * from_stride + column;
          value_t* transposed = to + column * to_stride + row;
          tall ? transpose_register<true>(corner, from_stride, transposed, to_stride)
               : transpose_register<false>(corner, from_stride, transposed, to_stride);
        }
      }
      return;
    }
  }
  transpose_block(from, from_stride, to, to_stride, rows, columns);
}

}  // namespace fastseg::detail
