// Packed masks on the CPU: their tensors, the area and box of each mask, the intersection of two masks.
//
// words [N, H, pitch]: bit b of word w of a row is pixel 32 w + b, bits past the end of a row are 0. On a little-endian
// machine two neighbouring words can be read as one of 64 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "fastseg/dense.h"
#include "fastseg/parallel.h"

namespace fastseg {

constexpr int kWord = 32;  // pixels in a word

// A row of the tensor of boxes: x2 and y2 lie one past the last pixel, an empty mask has zeros.
struct Box {
  int32_t x1, y1, x2, y2;

  bool empty() const { return x2 <= x1 || y2 <= y1; }
};

struct PackedMasks {
  const uint32_t* words;
  int64_t count, height, pitch;

  const uint32_t* mask(int64_t n) const { return words + n * height * pitch; }
};

// Two words as one of 64 bits, or the last word if only that one is left.
FASTSEG_INLINE uint64_t load_words(const uint32_t* from, int64_t left) {
  if (left == 1) return *from;
  uint64_t both;
  std::memcpy(&both, from, sizeof both);
  return both;
}

// ---- area and tight box ----

struct MaskStatistics {
  int64_t area = 0;
  Box box{std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::max(), 0, 0};

  void add(const MaskStatistics& other) {
    area += other.area;
    box = {std::min(box.x1, other.box.x1), std::min(box.y1, other.box.y1), std::max(box.x2, other.box.x2),
           std::max(box.y2, other.box.y2)};
  }
};

// Finds the statistics of a mask row by row.
class RowStatistics {
 public:
  explicit RowStatistics(int64_t pitch) : columns_(pitch) {}

  // row: the words [pitch] of row y
  void add(const uint32_t* row, int64_t y) {
    const int64_t pitch = static_cast<int64_t>(columns_.size());
    uint32_t* columns = columns_.data();
    uint32_t any = 0;
    for (int64_t w = 0; w < pitch; ++w) {
      columns[w] |= row[w];
      any |= row[w];
    }
    if (any == 0) return;
    for (int64_t w = 0; w < pitch; w += 2) found_.area += __builtin_popcountll(load_words(row + w, pitch - w));
    found_.box.y1 = std::min(found_.box.y1, static_cast<int32_t>(y));
    found_.box.y2 = static_cast<int32_t>(y) + 1;
  }

  // The statistics of the rows so far.
  MaskStatistics found() const {
    MaskStatistics found = found_;
    for (size_t w = 0; w < columns_.size(); ++w) {
      if (columns_[w] == 0) continue;
      const int32_t x = static_cast<int32_t>(w) * kWord;
      found.box.x1 = std::min(found.box.x1, x + __builtin_ctz(columns_[w]));
      found.box.x2 = x + kWord - __builtin_clz(columns_[w]);
    }
    return found;
  }

 private:
  MaskStatistics found_;
  std::vector<uint32_t> columns_;  // [pitch], the OR of all rows: found() searches it for the first and last column
};

// Calls find(mask, first_row, rows) -> MaskStatistics for strips of rows, in parallel, and writes the area and box of
// every mask. If there are few masks, each is cut into several strips.
template <typename Find>
void collect_statistics(const PackedMasks& masks, int64_t* areas, Box* boxes, const Find& find) {
  constexpr int64_t kFewestPixels = 1 << 16;  // worth another thread
  constexpr int64_t kFewestRows = 16;
  if (masks.count == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, masks.height / kFewestRows);
  const int64_t strips = std::min(most, ceil_divide(4 * threads, masks.count));
  std::vector<MaskStatistics> partial(masks.count * strips);
  const int64_t pixels = std::max<int64_t>(1, masks.height * masks.pitch * kWord / strips);
  const UnevenSlices slices(masks.count * strips, ceil_divide(kFewestPixels, pixels));
  slices.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item % strips, first = masks.height * strip / strips;
      partial[item] = find(item / strips, first, masks.height * (strip + 1) / strips - first);
    }
  });
  for (int64_t n = 0; n < masks.count; ++n) {
    MaskStatistics whole;
    for (int64_t strip = 0; strip < strips; ++strip) whole.add(partial[n * strips + strip]);
    areas[n] = whole.area;
    boxes[n] = whole.area == 0 ? Box{0, 0, 0, 0} : whole.box;
  }
}

// ---- the intersection of two masks ----

// The rows and words that two boxes have in common, and how many pixels that is at most.
struct Overlap {
  int64_t first_row, rows, first_word, words, pixels;

  Overlap(const Box& a, const Box& b) {
    const int32_t x1 = std::max(a.x1, b.x1), x2 = std::min(a.x2, b.x2);
    const int32_t y1 = std::max(a.y1, b.y1), y2 = std::min(a.y2, b.y2);
    const bool disjoint = x1 >= x2 || y1 >= y2;
    pixels = disjoint ? 0 : int64_t{x2 - x1} * (y2 - y1);
    first_row = y1;
    rows = disjoint ? 0 : y2 - y1;
    first_word = x1 / kWord;
    words = disjoint ? 0 : (x2 - 1) / kWord + 1 - first_word;
  }
};

namespace detail {

inline int64_t count_common(const uint32_t* a, const uint32_t* b, int64_t rows, int64_t words, int64_t pitch) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row, a += pitch, b += pitch) {
    for (int64_t w = 0; w < words; w += 2) {
      count += __builtin_popcountll(load_words(a + w, words - w) & load_words(b + w, words - w));
    }
  }
  return count;
}

#if defined(__AVX512F__)
inline int64_t sum_of_lanes(__m512i lanes) {
  alignas(64) int64_t numbers[8];
  _mm512_store_si512(numbers, lanes);
  int64_t sum = 0;
  for (const int64_t number : numbers) sum += number;
  return sum;
}

// AVX-512 machines since 2019 count bits in vectors, but x86-64-v4 does not include it.
__attribute__((target("avx512vpopcntdq"))) inline int64_t count_common_vectors(const uint32_t* a, const uint32_t* b,
                                                                               int64_t rows, int64_t words,
                                                                               int64_t pitch) {
  constexpr int64_t kLanes = 16;
  const __mmask16 tail = static_cast<__mmask16>((1u << ((words - 1) % kLanes + 1)) - 1);
  const int64_t whole = (words - 1) / kLanes * kLanes;
  __m512i count = _mm512_setzero_si512();
  for (int64_t row = 0; row < rows; ++row, a += pitch, b += pitch) {
    for (int64_t w = 0; w < whole; w += kLanes) {
      const __m512i both = _mm512_and_si512(_mm512_loadu_si512(a + w), _mm512_loadu_si512(b + w));
      count = _mm512_add_epi64(count, _mm512_popcnt_epi64(both));
    }
    const __m512i both =
        _mm512_and_si512(_mm512_maskz_loadu_epi32(tail, a + whole), _mm512_maskz_loadu_epi32(tail, b + whole));
    count = _mm512_add_epi64(count, _mm512_popcnt_epi64(both));
  }
  return sum_of_lanes(count);
}
#endif

using CountCommon = int64_t (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t);

inline CountCommon fastest_count_common() {
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512vpopcntdq")) return count_common_vectors;
#endif
  return count_common;
}

}  // namespace detail

// The number of pixels that two masks of one size share.
inline int64_t intersection(const uint32_t* a, const uint32_t* b, const Overlap& at, int64_t pitch) {
  static const detail::CountCommon count = detail::fastest_count_common();
  if (at.rows == 0) return 0;
  const int64_t first = at.first_row * pitch;
  // Outside of the overlap one of the two is 0: if the overlap is most of the row, whole rows are counted as one run.
  if (at.words * 2 > pitch && at.words > 8) return count(a + first, b + first, 1, at.rows * pitch, pitch);
  return count(a + first + at.first_word, b + first + at.first_word, at.rows, at.words, pitch);
}

// 0 / 0 is 0.
inline double ratio(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0.0;
}

// ---- from tensors, checking only what memory safety needs ----

inline PackedMasks packed_masks(const Tensor& words, const char* op) {
  FASTSEG_CHECK(words.is_cpu() && words.is_contiguous() && words.dim() == 3 && words.scalar_type() == ScalarType::Int,
                "fastseg::", op, ": words must be contiguous int32 [N, H, words] on the CPU");
  return {reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()), words.size(0), words.size(1),
          words.size(2)};
}

// Packed masks with their areas and boxes.
struct KnownMasks : PackedMasks {
  const int64_t* areas;
  const Box* boxes;
};

inline void check_statistics(const PackedMasks& masks, const Tensor& area, const Tensor& boxes) {
  dense_values<int64_t>(area, masks.count, "area");
  dense_values<int32_t>(boxes, 4 * masks.count, "boxes");
}

inline KnownMasks known_masks(const Tensor& words, const Tensor& area, const Tensor& boxes, const char* op) {
  const PackedMasks masks = packed_masks(words, op);
  check_statistics(masks, area, boxes);
  const auto* rows = reinterpret_cast<const Box*>(boxes.const_data_ptr<int32_t>());
  for (int64_t n = 0; n < masks.count; ++n) {
    FASTSEG_CHECK(rows[n].empty() || (rows[n].x1 >= 0 && rows[n].y1 >= 0 && rows[n].x2 <= masks.pitch * kWord &&
                                      rows[n].y2 <= masks.height),
                  "fastseg::", op, ": a box lies outside of the masks");
  }
  return {masks, area.const_data_ptr<int64_t>(), rows};
}

}  // namespace fastseg
