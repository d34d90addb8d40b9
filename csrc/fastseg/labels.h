// Label maps: reading, checking and counting them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fastseg/simd.h"

namespace fastseg {

using simd::kLanes;

// A contiguous [N, P] label map.
struct LabelView {
  enum class Type { int64, int32, uint8 };
  const void* data;
  Type type;
  int64_t ignore_index;
  int64_t classes;
};

namespace detail {

// Tests whether a label is ignored or in range, by comparisons in its own width. classes: 1 to 2^31 - 1.
template <typename label_t>
struct LabelTest {
  using unsigned_t = std::make_unsigned_t<label_t>;
  unsigned_t last, ignores;
  label_t ignored;

  LabelTest(int64_t ignore_index, int64_t classes)
      : last(static_cast<unsigned_t>(std::min<uint64_t>(classes - 1, static_cast<unsigned_t>(-1)))),
        ignores(static_cast<int64_t>(static_cast<label_t>(ignore_index)) == ignore_index),  // else no label is ignored
        ignored(static_cast<label_t>(ignore_index)) {}

  FASTSEG_INLINE unsigned_t skipped(label_t label) const { return (label == ignored) & ignores; }
  FASTSEG_INLINE unsigned_t in_range(label_t label) const { return static_cast<unsigned_t>(label) <= last; }
};

// Scalar loops whose flags have the width of the labels: compilers vectorise these, but split vectors of 16 int64 into
// scalars.
template <typename label_t>
bool load_labels(const label_t* __restrict__ from, int count, const LabelTest<label_t> test, int32_t* __restrict__ to) {
  std::make_unsigned_t<label_t> out_of_range = 0;
  for (int i = 0; i < count; ++i) {
    const label_t label = from[i];
    const auto skipped = test.skipped(label), valid = test.in_range(label);
    to[i] = valid > skipped ? static_cast<int32_t>(label) : -1;
    out_of_range |= !(valid | skipped);
  }
  return out_of_range == 0;
}

#if defined(__AVX512F__)
// int64 labels as two 32-bit halves: comparisons take half as many registers.
inline bool load_labels(const int64_t* __restrict__ from, int count, const LabelTest<int64_t> test,
                        int32_t* __restrict__ to) {
  using simd::i32x16, simd::u32x16;
  const int whole = count / kLanes * kLanes;
  const u32x16 last = simd::bit_cast<u32x16>(simd::splat(static_cast<int32_t>(test.last)));
  const i32x16 none = simd::splat(int32_t(-1));
  const i32x16 ignored_low = simd::splat(static_cast<int32_t>(test.ignored));
  const i32x16 ignored_high = simd::splat(static_cast<int32_t>(test.ignored >> 32));
  i32x16 unknown{};
  for (int i = 0; i < whole; i += kLanes) {
    const i32x16 first = simd::detail::read<i32x16>(from + i), second = simd::detail::read<i32x16>(from + i + 8);
    const i32x16 low = simd::every_second<0>(first, second), high = simd::every_second<1>(first, second);
    const auto in_range = (simd::bit_cast<u32x16>(low) <= last) & (high == 0);
    const auto skipped = (low == ignored_low) & (high == ignored_high);
    unknown = simd::select(in_range | skipped, unknown, none);
    simd::store(to + i, simd::select(in_range & ~skipped, low, none));
  }
  return load_labels<int64_t>(from + whole, count - whole, test, to + whole) && !simd::any(unknown);
}
#endif

// Adds to `counted` how many labels are not ignored. At most 255 labels, so that a byte can count them.
template <typename label_t>
bool count_labels(const label_t* from, int count, const LabelTest<label_t> test, int64_t& counted) {
  std::make_unsigned_t<label_t> out_of_range = 0, valid = 0;
  for (int i = 0; i < count; ++i) {
    const auto skipped = test.skipped(from[i]), in_range = test.in_range(from[i]);
    valid += in_range > skipped;
    out_of_range |= !(in_range | skipped);
  }
  counted += valid;
  return out_of_range == 0;
}

// Calls fn(pointer to the labels in their own type).
template <typename Function>
auto with_label_type(const LabelView& labels, const Function& fn) {
  switch (labels.type) {
    case LabelView::Type::int64: return fn(static_cast<const int64_t*>(labels.data));
    case LabelView::Type::int32: return fn(static_cast<const int32_t*>(labels.data));
    default: return fn(static_cast<const uint8_t*>(labels.data));
  }
}

}  // namespace detail

// Writes labels [first, first + count) of the flat map to `to` [tile], -1 where ignored, out of range or past
// `count`. False if one was neither ignored nor in [0, classes).
inline bool load_labels(const LabelView& labels, int64_t first, int count, int tile, int32_t* to) {
  std::fill(to + count, to + tile, -1);
  return detail::with_label_type(labels, [&](const auto* all) {
    const auto* from = all + first;
    // The next tile's labels, if tiles are small: the hardware prefetcher loses this stream between two tiles.
    const int next = tile <= 256 ? count : 0;
    for (int i = 0; i < next; i += 64 / sizeof *from) __builtin_prefetch(from + count + i);
    return detail::load_labels(from, count, {labels.ignore_index, labels.classes}, to);
  });
}

// Adds to `counted` how many of the labels [first, first + count) are not ignored. Returns what load_labels() does.
inline bool count_labels(const LabelView& labels, int64_t first, int64_t count, int64_t& counted) {
  constexpr int64_t kChunk = 192;
  return detail::with_label_type(labels, [&](const auto* all) {
    const detail::LabelTest<std::decay_t<decltype(*all)>> test(labels.ignore_index, labels.classes);
    bool in_range = true;
    for (int64_t i = first; i < first + count; i += kChunk) {
      const int here = static_cast<int>(std::min(kChunk, first + count - i));
      in_range &= detail::count_labels(all + i, here, test, counted);
    }
    return in_range;
  });
}

// The class of 16 labels if those not ignored all have the same one (any class if all are ignored), else -1.
// Segmentation labels come in patches, so most runs of 16 have one class.
FASTSEG_INLINE int32_t common_label(const int32_t* labels) {
  const simd::i32x16 lanes = simd::load(labels);
  const uint32_t counted = simd::mask_bits(lanes >= simd::splat(int32_t(0)));
  if (counted == 0) return 0;
  const int32_t first = labels[__builtin_ctz(counted)];
  return (simd::mask_bits(lanes == simd::splat(first)) & counted) == counted ? first : -1;
}

// The first label of the flat map [count] that load_labels() rejects; called only for the error message.
inline int64_t first_bad_label(const LabelView& labels, int64_t count) {
  return detail::with_label_type(labels, [&](const auto* from) -> int64_t {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t label = from[i];
      if (label != labels.ignore_index && (label < 0 || label >= labels.classes)) return label;
    }
    return 0;
  });
}

[[noreturn]] inline void throw_bad_label(const LabelView& labels, int64_t count) {
  throw std::out_of_range("Target " + std::to_string(first_bad_label(labels, count)) +
                          " is out of bounds: labels must be in [0, " + std::to_string(labels.classes) +
                          ") or equal to ignore_index=" + std::to_string(labels.ignore_index));
}

}  // namespace fastseg
