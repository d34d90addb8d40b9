// Rows of pixels and of pooled elements, read and written by the pooling kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace fastseg::pooling {

using simd::kLanes;

constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kSpare = 2 * kLanes;    // elements past the end of a row that kernels may touch: up to two vectors
constexpr int64_t kSliceElements = 4096;  // with fewer outputs another thread does not pay

inline int64_t round_up(int64_t count) { return ceil_divide(count, kLanes) * kLanes; }

// Outputs from this size on are written past the caches.
constexpr int64_t kStreamedBytes = int64_t{1} << 23;

// Writes elements to memory, one run after the other from `to` on. Runs are computed in a buffer, so that they may end
// in the middle of a vector; it is written as whole cache lines, past the caches if the output is large.
template <typename value_t>
class OutputStream {
 public:
  // to: address of the first element; longest: longest run; total: elements of the output, of all threads
  OutputStream(value_t* to, int64_t longest, int64_t total)
      : to_(to), streamed_(total * static_cast<int64_t>(sizeof(value_t)) >= kStreamedBytes),
        memory_(kPerLine + kEnough + kPerLine + std::max(longest, kEnough) + kSpare) {
    const int64_t past_line = reinterpret_cast<uintptr_t>(memory_.data()) % kLine / sizeof(value_t);
    aligned_ = memory_.data() + (kPerLine - past_line) % kPerLine;
    first_ = aligned_ + reinterpret_cast<uintptr_t>(to) % kLine / sizeof(value_t);
  }
  OutputStream(const OutputStream&) = delete;

  // Where to write the next `count` elements. kSpare more may be written, which the next run overwrites.
  FASTSEG_INLINE value_t* next(int64_t count) {
    if (held_ >= kEnough) write_lines();
    value_t* run = first_ + held_;
    held_ += count;
    return run;
  }

  void zeros(int64_t count) {
    for (int64_t some; count > 0; count -= some) {
      some = std::min(count, kEnough);
      std::fill_n(next(some), some, value_t(0));
    }
  }

  // Writes what is left in the buffer; called after the last run.
  void finish() {
    write(held_);
    simd::stream_fence();
  }

 private:
  static constexpr int64_t kPerLine = kLine / sizeof(value_t);
  static constexpr int64_t kEnough = 4096 / sizeof(value_t);

  // Writes all whole lines and moves the remaining elements to the beginning of the buffer.
  void write_lines() {
    const int64_t past_line = first_ - aligned_;
    const int64_t whole = (past_line + held_) / kPerLine * kPerLine - past_line;
    write(whole);
    std::memmove(aligned_, first_ + whole, (held_ - whole) * sizeof(value_t));
    to_ += whole;
    held_ -= whole;
    first_ = aligned_;
  }

  void write(int64_t count) const {
    int64_t i = 0;
    if (streamed_) {
      i = std::min(count, (kPerLine - (first_ - aligned_)) % kPerLine);
      std::memcpy(to_, first_, i * sizeof(value_t));
      for (; i + kPerLine <= count; i += kPerLine) {
        simd::detail::write_past_cache(to_ + i, simd::detail::read<simd::f32x16>(first_ + i));
      }
    }
    std::memcpy(to_ + i, first_ + i, (count - i) * sizeof(value_t));
  }

  value_t* to_;
  bool streamed_;
  std::vector<value_t> memory_;
  value_t* aligned_;  // first line in memory_
  value_t* first_;    // first element held, at the same offset in a line as to_
  int64_t held_ = 0;
};

// Calls body(begin, end) in parallel for slices of `rows` rows of an output, of `length` elements each.
template <typename Body>
void parallel_rows(int64_t rows, int64_t length, const Body& body) {
  const int64_t slices = slice_count(rows, ceil_divide(kSliceElements, length));
  parallel_slices(rows, slices, [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

// Walks rows of planes of `rows` each, from number `row` on, without dividing: a division costs as much as a short row.
struct RowOfPlane {
  RowOfPlane(int64_t row, int64_t rows) : plane(row / rows), y(row % rows), rows(rows) {}
  void next() {
    if (++y == rows) y = 0, ++plane;
  }

  int64_t plane, y;

 private:
  int64_t rows;
};

// Keeps the rows used last, each with padding.
template <typename value_t>
class KeptRows {
 public:
  // kept: least number of rows; room: elements of a row, with padding; fill: their initial value
  KeptRows(int64_t kept, int64_t room, value_t fill) : room_(room) {
    int64_t slots = 1;  // a power of two: divisions cost as much as a short row
    while (slots < kept) slots *= 2;
    row_of_.assign(slots, -1);
    values_.assign(slots * room, fill);
  }

  // Returns row number `row`; calls read(to) if it is not kept.
  template <typename Read>
  FASTSEG_INLINE const value_t* get(int64_t row, const Read& read) {
    const int64_t slot = row & (static_cast<int64_t>(row_of_.size()) - 1);
    value_t* values = values_.data() + slot * room_;
    if (row_of_[slot] != row) {
      row_of_[slot] = row;
      read(values);
    }
    return values;
  }

 private:
  int64_t room_;
  std::vector<int64_t> row_of_;
  std::vector<value_t> values_;
};

// Rows of a tensor from which kernels may read kSpare more elements: those near the tensor's end are copied.
template <typename value_t>
class ReadableRow {
 public:
  explicit ReadableRow(const value_t* end) : end_(end) {}  // of the tensor

  FASTSEG_INLINE const value_t* get(const value_t* row, int64_t count) {
    return end_ - row >= count + kSpare ? row : copied(row, count);
  }

 private:
  __attribute__((noinline)) const value_t* copied(const value_t* row, int64_t count) {
    copy_.assign(count + kSpare, value_t(0));
    std::memcpy(copy_.data(), row, count * sizeof(value_t));
    return copy_.data();
  }

  const value_t* end_;
  std::vector<value_t> copy_;
};

// Copies `count` elements in the type of the computation.
template <typename scalar_t, typename compute_t>
void read_row(const scalar_t* from, int64_t count, compute_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) simd::store(to + i, simd::load(from + i));
  for (; i < count; ++i) to[i] = static_cast<compute_t>(from[i]);
}

// Loads 16 elements; those from `end` on do not exist and are 0.
template <typename scalar_t>
__attribute__((noinline)) auto load_last(const scalar_t* from, const scalar_t* end) {
  return simd::load_partial(from, static_cast<int>(end - from), scalar_t(0));
}
template <typename scalar_t>
FASTSEG_INLINE auto load_before(const scalar_t* from, const scalar_t* end) {
  if (__builtin_expect(from + kLanes <= end, 1)) return simd::load(from);
  return load_last(from, end);
}

}  // namespace fastseg::pooling
