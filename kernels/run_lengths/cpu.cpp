// Packed masks to run lengths, without transposing the masks, and back; run lengths to text and back. See README.md.
#include <algorithm>
#include <atomic>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "fastseg/packed_masks.h"
#include "fastseg/pixel_tile.h"

namespace {

using fastseg::Box;
using fastseg::dense_output;
using fastseg::dense_values;
using fastseg::kWord;
using fastseg::PackedMasks;
using torch::stable::Tensor;

constexpr int64_t kMostPixels = (int64_t{1} << 31) - 1;
constexpr int kMostCharacters = 7;  // of a count, see reference.py

// Calls body(mask, begin, end) for every mask, in parallel; the elements of mask n end at ends[n].
template <typename Body>
void for_each_mask(const int64_t* ends, int64_t masks, const Body& body) {
  const fastseg::UnevenSlices slices(masks, 8);
  slices.run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) body(n, n > 0 ? ends[n - 1] : 0, ends[n]);
  });
}

// ---- from masks to counts ----

// Calls visit(y, w, bits) with the pixels of word w in row y that differ from the pixel before them in column order:
// the one above, or in the first row the last one of the column to the left.
template <typename Visit>
void for_each_change(const uint32_t* mask, const Box& box, int64_t height, int64_t width, int64_t pitch,
                     const Visit& visit) {
  if (box.empty()) return;
  const int64_t first = box.x1 / kWord, last = (box.x2 - 1) / kWord;
  if (box.y1 == 0 || box.y2 == height) {
    const uint32_t* bottom = mask + (height - 1) * pitch;
    const int64_t end = std::min<int64_t>(box.x2 / kWord, pitch - 1);  // includes the pixel after the box
    for (int64_t w = first; w <= end; ++w) {
      const uint32_t left = bottom[w] << 1 | (w > 0 ? bottom[w - 1] >> (kWord - 1) : 0);
      uint32_t bits = mask[w] ^ left;
      if (w == pitch - 1 && width % kWord != 0) bits &= (1u << width % kWord) - 1;
      if (bits != 0) visit(0, w, bits);
    }
  }
  for (int64_t y = std::max(box.y1, 1); y <= std::min<int64_t>(box.y2, height - 1); ++y) {
    const uint32_t *row = mask + y * pitch, *above = row - pitch;
    for (int64_t w = first; w <= last; ++w) {
      const uint32_t bits = row[w] ^ above[w];
      if (bits != 0) visit(y, w, bits);
    }
  }
}

void check_width(const PackedMasks& masks, int64_t width, const char* op) {
  FASTSEG_CHECK(width >= 0 && fastseg::ceil_divide(width, kWord) == masks.pitch && masks.height * width <= kMostPixels,
                "fastseg::", op, ": width does not fit words, or there are too many pixels");
}

const Box* checked_boxes(const PackedMasks& masks, const Tensor& words, const Tensor& boxes, const Tensor& list,
                         const char* op) {
  FASTSEG_CHECK(list.numel() == masks.count, "fastseg::", op, ": one number for each mask is needed");
  return fastseg::known_masks(words, list, boxes, op).boxes;
}

// runs: [N]
void count_runs(const Tensor& words, const Tensor& boxes, int64_t width, const Tensor& runs) {
  constexpr const char* op = "_count_runs";
  const PackedMasks masks = fastseg::packed_masks(words, op);
  check_width(masks, width, op);
  const Box* box = checked_boxes(masks, words, boxes, runs, op);
  int64_t* to = runs.mutable_data_ptr<int64_t>();
  const fastseg::UnevenSlices slices(masks.count, 8);
  slices.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t changes = 0;
      for_each_change(masks.mask(n), box[n], masks.height, width, masks.pitch,
                      [&](int64_t, int64_t, uint32_t bits) { changes += __builtin_popcount(bits); });
      to[n] = changes + 1;
    }
  });
}

// Writes the counts of a mask [room]. False if their number is not `room`.
bool write_runs(const uint32_t* mask, const Box& box, int64_t height, int64_t width, int64_t pitch, int64_t room,
                int64_t* counts) {
  const int64_t first = box.empty() ? 0 : box.x1 / kWord * kWord;
  const int64_t columns = box.empty() ? 0 : box.x2 / kWord * kWord + kWord - first;
  // Changes are found row by row but needed column by column: the first pass counts those of each column, the second
  // writes their positions.
  const fastseg::Scratch<int64_t> places(columns + 1);
  int64_t* place = places.get();
  std::fill_n(place, columns + 1, int64_t{0});
  const auto for_each_place = [&](const auto& body) {
    for_each_change(mask, box, height, width, pitch, [&](int64_t y, int64_t w, uint32_t bits) {
      int64_t* at = place + (w * kWord - first);
      for (; bits != 0; bits &= bits - 1) body(y, w * kWord + __builtin_ctz(bits), at + __builtin_ctz(bits));
    });
  };
  for_each_place([](int64_t, int64_t, int64_t* at) { ++at[1]; });
  for (int64_t x = 0; x < columns; ++x) place[x + 1] += place[x];
  const int64_t changes = place[columns];
  if (changes + 1 != room) return false;
  for_each_place([&](int64_t y, int64_t x, int64_t* at) { counts[(*at)++] = x * height + y; });
  counts[changes] = height * width;
  for (int64_t i = changes; i > 0; --i) counts[i] -= counts[i - 1];
  return true;
}

// ends: [N], of the counts of each mask; counts: [ends[N - 1]]
void run_lengths(const Tensor& words, const Tensor& boxes, int64_t width, const Tensor& ends, int64_t /*total*/,
                 const Tensor& counts) {
  constexpr const char* op = "_run_lengths";
  const PackedMasks masks = fastseg::packed_masks(words, op);
  check_width(masks, width, op);
  const Box* box = checked_boxes(masks, words, boxes, ends, op);
  const int64_t* stops = ends.const_data_ptr<int64_t>();
  const int64_t total = counts.numel();
  int64_t* to = dense_output<int64_t>(counts, total, "counts");
  std::atomic<bool> fits{true};
  for_each_mask(stops, masks.count, [&](int64_t n, int64_t begin, int64_t end) {
    const bool inside = 0 <= begin && begin <= end && end <= total;
    if (!inside || !write_runs(masks.mask(n), box[n], masks.height, width, masks.pitch, end - begin, to + begin)) {
      fits = false;
    }
  });
  FASTSEG_CHECK(fits, "fastseg::_run_lengths: ends does not fit the masks");
}

// ---- from counts to masks ----

// Marks in words [height, pitch], 0 at first, the pixels that differ from the one above (0 above the first row): XORing
// rows downwards then fills the runs. False if the counts do not add up to the mask.
bool mark_runs(const int64_t* counts, int64_t number, int64_t height, int64_t width, int64_t pitch, uint32_t* words) {
  const int64_t pixels = height * width;
  const auto mark = [&](int64_t y, int64_t x) { words[y * pitch + x / kWord] ^= 1u << x % kWord; };
  int64_t at = 0;
  for (int64_t i = 0; i < number; ++i) {
    if (counts[i] < 0 || counts[i] > pixels - at) return false;
    const int64_t begin = at;
    at += counts[i];
    if (i % 2 == 0 || at == begin) continue;
    int64_t x = begin / height;
    const int64_t end_x = at / height, end_y = at % height;
    mark(begin % height, x);
    for (++x; x < end_x; ++x) mark(0, x);
    if (end_y == 0) continue;
    if (x == end_x) mark(0, x);
    mark(end_y, end_x);
  }
  return at == pixels;
}

// Mask n has counts [begins[n], ends[n]); words: [N, height, ceil(width / 32)]
void masks_of_runs(const Tensor& counts, const Tensor& begins, const Tensor& ends, int64_t height, int64_t width,
                   const Tensor& words) {
  constexpr const char* op = "_masks_of_runs";
  const PackedMasks masks = fastseg::packed_masks(words, op);
  FASTSEG_CHECK(masks.height == height, "fastseg::_masks_of_runs: words do not have the height");
  check_width(masks, width, op);
  const int64_t* lengths = dense_values<int64_t>(counts, counts.numel(), "counts");
  const int64_t* begin = dense_values<int64_t>(begins, masks.count, "begins");
  const int64_t* stops = dense_values<int64_t>(ends, masks.count, "ends");
  auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  const int64_t total = counts.numel(), mask_words = height * masks.pitch;
  std::atomic<bool> fits{true};
  for_each_mask(stops, masks.count, [&](int64_t n, int64_t, int64_t end) {
    uint32_t* mask = to + n * mask_words;
    std::fill_n(mask, mask_words, 0u);
    const bool inside = 0 <= begin[n] && begin[n] <= end && end <= total;
    if (!inside || !mark_runs(lengths + begin[n], end - begin[n], height, width, masks.pitch, mask)) {
      fits = false;
      return;
    }
    for (int64_t i = masks.pitch; i < mask_words; ++i) mask[i] ^= mask[i - masks.pitch];
  });
  FASTSEG_CHECK(fits, "fastseg::_masks_of_runs: the counts of a mask do not add up to its pixels");
}

// ---- text ----

enum Wrong : int64_t { kBadCharacter = -1, kTruncated = -2, kOutOfRange = -3 };
constexpr int kFirstCharacter = 48, kMore = 32, kSign = 16;

int64_t write_text(const int64_t* counts, int64_t number, uint8_t* text) {
  uint8_t* to = text;
  for (int64_t i = 0; i < number; ++i) {
    int64_t value = i > 2 ? counts[i] - counts[i - 2] : counts[i];
    for (bool more = true; more;) {
      const int low = static_cast<int>(value & 31);
      value >>= 5;
      more = value != ((low & kSign) != 0 ? -1 : 0);
      *to++ = static_cast<uint8_t>(kFirstCharacter + low + (more ? kMore : 0));
    }
  }
  return to - text;
}

// Returns the number of counts, or what is wrong. counts: [characters].
int64_t read_text(const uint8_t* text, int64_t characters, int64_t* counts) {
  int64_t number = 0, value = 0;
  int shift = 0;
  for (int64_t i = 0; i < characters; ++i) {
    const int bits = text[i] - kFirstCharacter;
    if (bits < 0 || bits >= 64) return kBadCharacter;
    value |= static_cast<int64_t>(bits & 31) << shift;
    shift += 5;
    if (bits & kMore) {
      if (shift == 5 * kMostCharacters) return kOutOfRange;
      continue;
    }
    if (bits & kSign) value -= int64_t{1} << shift;
    if (number > 2) value += counts[number - 2];
    if (value < 0 || value > kMostPixels) return kOutOfRange;
    counts[number++] = value;
    value = shift = 0;
  }
  return shift == 0 ? number : static_cast<int64_t>(kTruncated);
}

void check_text(const Tensor& text, const Tensor& counts, const Tensor& ends, const Tensor& numbers, const char* op) {
  const int64_t* stops = dense_values<int64_t>(ends, ends.numel(), "ends");
  dense_values<int64_t>(counts, counts.numel(), "counts");
  dense_values<int64_t>(numbers, ends.numel(), "numbers");
  dense_values<uint8_t>(text, text.numel(), "text");
  const int64_t most = std::min(counts.numel(), text.numel());
  for (int64_t n = 0; n < ends.numel(); ++n) {
    FASTSEG_CHECK(stops[n] >= (n > 0 ? stops[n - 1] : 0) && stops[n] <= most, "fastseg::", op,
                  ": ends must not decrease, nor pass the end of the list");
  }
}

// text: [7 counts], where the text of a mask begins at 7 times the place of its first count; lengths: [N]
void write_counts(const Tensor& counts, const Tensor& ends, const Tensor& text, const Tensor& lengths) {
  check_text(text, counts, ends, lengths, "_write_counts");
  FASTSEG_CHECK(text.numel() == kMostCharacters * counts.numel(), "fastseg::_write_counts: text has no room");
  const int64_t* values = counts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < counts.numel(); ++i) {
    FASTSEG_CHECK(values[i] >= 0 && values[i] <= kMostPixels, "fastseg::_write_counts: a count is out of range");
  }
  uint8_t* to = text.mutable_data_ptr<uint8_t>();
  int64_t* written = lengths.mutable_data_ptr<int64_t>();
  for_each_mask(ends.const_data_ptr<int64_t>(), ends.numel(), [&](int64_t n, int64_t begin, int64_t end) {
    written[n] = write_text(values + begin, end - begin, to + kMostCharacters * begin);
  });
}

// counts: [characters], where the counts of a mask begin at the place of its text, with 0 between; numbers: [N]
void read_counts(const Tensor& text, const Tensor& ends, const Tensor& counts, const Tensor& numbers) {
  check_text(text, counts, ends, numbers, "_read_counts");
  const uint8_t* from = text.const_data_ptr<uint8_t>();
  int64_t *to = counts.mutable_data_ptr<int64_t>(), *found = numbers.mutable_data_ptr<int64_t>();
  std::fill_n(to, counts.numel(), int64_t{0});
  for_each_mask(ends.const_data_ptr<int64_t>(), ends.numel(), [&](int64_t n, int64_t begin, int64_t end) {
    found[n] = read_text(from + begin, end - begin, to + begin);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_count_runs", TORCH_BOX(&count_runs));
  m.impl("_run_lengths", TORCH_BOX(&run_lengths));
  m.impl("_masks_of_runs", TORCH_BOX(&masks_of_runs));
  m.impl("_write_counts", TORCH_BOX(&write_counts));
  m.impl("_read_counts", TORCH_BOX(&read_counts));
}
