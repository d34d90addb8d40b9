// Confusion matrix on the CPU, from labels or logits: the predicted and the true labels of a few hundred pixels are
// written to small buffers that stay in the first-level cache, then counted in the histogram of the slice. See
// README.md.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/check.h"
#include "fastseg/layout.h"
#include "fastseg/parallel.h"
#include "fastseg/pixel_tile.h"
#include "fastseg/simd.h"
#include "fastseg/tile_argmax.h"

namespace {

using fastseg::LabelView;
using fastseg::PixelView;
using simd::i32x16;
using simd::kLanes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 512;     // pixels of two label maps handled at a time
constexpr int64_t kSparse = 5;  // pixels per bin below which a table is counted by rows

// Counts pairs of labels. Neighbouring pixels mostly fall into one bin: 16 that do are counted at once. The
// others are counted one by one, where an increment must wait for the one before it to reach memory if it
// hits the same bin: several copies of the counters, used in turn, break that chain.
class Histogram {
 public:
  explicit Histogram(int classes) : classes_(classes), bins_(classes * classes) {
    constexpr int64_t kCachedCounters = 16 * 1024;
    while (copies_log2_ < 3 && int64_t{bins_} << (copies_log2_ + 1) <= kCachedCounters) ++copies_log2_;
    counts_.resize(static_cast<size_t>(bins_ + 1) << copies_log2_);  // one extra bin, for pixels that do not count
  }

  // truth, prediction: [count], -1 where there is no class; count is a multiple of 16, at most kBlock. Pixels
  // without true class are not counted. False if a pixel with a true class had no predicted one.
  bool add(const int32_t* truth, const int32_t* prediction, int count) {
    if (pixels_ > kMostPixels) spill();
    pixels_ += count;
    i32x16 unpredicted{};
    for (int i = 0; i < count; i += kLanes) {
      const i32x16 row = simd::load(truth + i), column = simd::load(prediction + i);
      unpredicted |= (row >= 0) & (column < 0);
      add(row * classes_ + column, (row | column) >= 0);
    }
    return !simd::any(unpredicted);
  }

  // totals: [classes, classes]
  void add_to(int64_t* totals) const {
    for (int bin = 0; bin < bins_; ++bin) {
      int64_t sum = spilled_.empty() ? 0 : spilled_[bin];
      for (int copy = 0; copy < 1 << copies_log2_; ++copy) {
        sum += counts_[(static_cast<size_t>(bin) << copies_log2_) + copy];
      }
      totals[bin] += sum;
    }
  }

 private:
  static constexpr int64_t kMostPixels = int64_t{1} << 31;  // no 32-bit counter can overflow before

  // Adds the bins of 16 pixels, of which those in `counted` count.
  FASTSEG_INLINE void add(i32x16 bin, i32x16 counted) {
    const uint32_t lanes = simd::mask_bits(counted);
    if (lanes == 0) return;
    alignas(64) int32_t slots[kLanes];
    simd::store(slots, bin);
    const int32_t common = slots[__builtin_ctz(lanes)];
    uint32_t* counts = counts_.data();
    if ((simd::mask_bits(bin == simd::splat(common)) & lanes) == lanes) {
      counts[static_cast<int64_t>(common) << copies_log2_] += __builtin_popcount(lanes);
      return;
    }
    const i32x16 copy = simd::lane_index() & ((1 << copies_log2_) - 1);
    simd::store(slots, (simd::select(counted, bin, simd::splat(bins_)) << copies_log2_) | copy);
    for (int i = 0; i < kLanes; i += 2) {
      uint64_t pair;  // two slots by one load: this loop is bound by loads
      std::memcpy(&pair, slots + i, sizeof pair);
      ++counts[static_cast<uint32_t>(pair)];
      ++counts[pair >> 32];
    }
  }

  void spill() {
    std::vector<int64_t> totals(bins_);
    add_to(totals.data());
    spilled_ = std::move(totals);
    std::fill(counts_.begin(), counts_.end(), 0u);
    pixels_ = 0;
  }

  int classes_, bins_, copies_log2_ = 0;
  int64_t pixels_ = 0;
  std::vector<uint32_t> counts_;  // [bins + 1, copies]
  std::vector<int64_t> spilled_;  // [bins] or empty
};

struct InRange {
  bool truth = true, prediction = true;
};

struct Slice {
  explicit Slice(int classes) : histogram(classes) {}
  Histogram histogram;
  InRange in_range;
};

// Throws IndexError for a label out of range.
void check(const InRange& in_range, int classes) {
  if (in_range.truth && in_range.prediction) return;
  const std::string name = in_range.truth ? "input" : "target";
  throw std::out_of_range("fastseg.ops.confusion_matrix: " + name + " holds a label out of range; allowed: 0 to " +
                          std::to_string(classes - 1) + (in_range.truth ? "" : " and ignore_index"));
}

// Cuts `items` into slices of `fewest` or more, each with its own histogram, and adds the histograms up.
template <typename Body>
void count_in_slices(int64_t items, int64_t fewest, int classes, int64_t* totals, const Body& body) {
  const int64_t slices = fastseg::slice_count(items, fewest);
  std::vector<Slice> partial(slices, Slice(classes));
  fastseg::parallel_slices(items, slices,
                           [&](int64_t slice, int64_t begin, int64_t end) { body(partial[slice], begin, end); });
  for (const Slice& slice : partial) {
    check(slice.in_range, classes);
    slice.histogram.add_to(totals);
  }
}

void count_labels(const LabelView& prediction, const LabelView& truth, int64_t pixels, int64_t* totals) {
  const int classes = static_cast<int>(truth.classes);
  const int64_t blocks = fastseg::ceil_divide(pixels, kBlock);
  const int64_t fewest_pixels = std::max<int64_t>(16384, int64_t{classes} * classes);
  const int64_t fewest = fastseg::ceil_divide(fewest_pixels, kBlock);
  count_in_slices(blocks, fewest, classes, totals, [&](Slice& slice, int64_t begin, int64_t end) {
    alignas(64) int32_t predicted[kBlock], real[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      const int count = static_cast<int>(std::min<int64_t>(kBlock, pixels - first));
      slice.in_range.truth &= fastseg::load_labels(truth, first, count, kBlock, real);
      fastseg::load_labels(prediction, first, count, kBlock, predicted);
      slice.in_range.prediction &= slice.histogram.add(real, predicted, kBlock);
    }
  });
}

// Counts those of `bins` [count] that lie in [first, end) in the totals; count is a multiple of 16.
void count_bins(const int32_t* bins, int64_t count, int32_t first, int32_t end, int64_t* totals) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const i32x16 bin = simd::load(bins + i);
    uint32_t lanes = simd::mask_bits((bin >= first) & (bin < end));
    if (lanes == 0) continue;
    const int32_t common = bins[i + __builtin_ctz(lanes)];
    if ((simd::mask_bits(bin == simd::splat(common)) & lanes) == lanes) {
      totals[common] += __builtin_popcount(lanes);
      continue;
    }
    for (; lanes != 0; lanes &= lanes - 1) ++totals[bins[i + __builtin_ctz(lanes)]];
  }
}

// The same without histograms, for tables so large that clearing and adding them up would be most of the work: the bins
// of all pixels are stored, then each thread counts those of its rows of the totals.
void count_labels_by_rows(const LabelView& prediction, const LabelView& truth, int64_t pixels, int64_t* totals) {
  const int classes = static_cast<int>(truth.classes);
  const int64_t blocks = fastseg::ceil_divide(pixels, kBlock);
  const fastseg::Scratch<int32_t> bins(blocks * kBlock);  // -1 where a pixel is not counted
  const int64_t slices = fastseg::slice_count(blocks, 32);
  std::vector<InRange> in_range(slices);
  fastseg::parallel_slices(blocks, slices, [&](int64_t slice, int64_t begin, int64_t end) {
    alignas(64) int32_t predicted[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      int32_t* real = bins.get() + first;
      const int count = static_cast<int>(std::min<int64_t>(kBlock, pixels - first));
      in_range[slice].truth &= fastseg::load_labels(truth, first, count, kBlock, real);
      fastseg::load_labels(prediction, first, count, kBlock, predicted);
      i32x16 unpredicted{};
      for (int i = 0; i < kBlock; i += kLanes) {
        const i32x16 row = simd::load(real + i), column = simd::load(predicted + i);
        unpredicted |= (row >= 0) & (column < 0);
        simd::store(real + i, simd::select((row | column) >= 0, row * classes + column, simd::splat(-1)));
      }
      in_range[slice].prediction &= !simd::any(unpredicted);
    }
  });
  for (const InRange& slice : in_range) check(slice, classes);
  fastseg::parallel_slices(classes, slices, [&](int64_t, int64_t begin, int64_t end) {
    count_bins(bins.get(), blocks * kBlock, begin * classes, end * classes, totals);
  });
}

template <typename scalar_t>
void count_logits(PixelView<const scalar_t> logits, const LabelView& truth, int64_t images, int64_t plane,
                  int64_t* totals) {
  const int classes = static_cast<int>(truth.classes);
  const int tile = fastseg::tile_pixels(classes);
  const int64_t tiles = images * fastseg::ceil_divide(plane, tile);
  // A pixel reads `classes` logits; the histogram of a slice costs as much as `classes` pixels.
  const int64_t fewest = fastseg::ceil_divide(std::max(16384 / classes, classes), tile);
  count_in_slices(tiles, fewest, classes, totals, [&](Slice& slice, int64_t begin, int64_t end) {
    fastseg::TileAccess<scalar_t> access(logits, {}, classes);
    fastseg::Scratch<int32_t> predicted(tile), real(tile);
    fastseg::for_each_tile(begin, end, plane, tile, [&](int64_t image, int64_t first, int count) {
      slice.in_range.truth &= fastseg::load_labels(truth, image * plane + first, count, tile, real.get());
      access.visit(image, first, count, [&](const fastseg::Tile<scalar_t>& rows) {
        fastseg::tile_argmax(rows, classes, tile, predicted.get());
      });
      slice.histogram.add(real.get(), predicted.get(), tile);
    });
  });
}

// ---- from tensors, checking only what memory safety needs ----

bool holds_labels(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Byte;
}

LabelView label_view(const Tensor& labels, int64_t ignore_index, int64_t classes) {
  FASTSEG_CHECK(holds_labels(labels), "fastseg::_confusion_matrix: labels must be int64, int32 or uint8");
  LabelView::Type type = LabelView::Type::int64;
  if (labels.scalar_type() == ScalarType::Int) type = LabelView::Type::int32;
  if (labels.scalar_type() == ScalarType::Byte) type = LabelView::Type::uint8;
  return {labels.const_data_ptr(), type, ignore_index, classes};
}

// logits: contiguous or channels_last
void count_logits(const Tensor& logits, const LabelView& truth, int64_t* totals) {
  const int64_t images = logits.size(0), classes = logits.size(1);
  const int64_t plane = logits.numel() / (images * classes);
  const bool planar = logits.is_contiguous();
  const auto run = [&](const auto* data) {
    using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const PixelView<const scalar_t> view{data, classes * plane, planar ? plane : 1, planar ? 1 : classes};
    count_logits(view, truth, images, plane, totals);
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float: return run(logits.const_data_ptr<float>());
    case ScalarType::Double: return run(logits.const_data_ptr<double>());
    case ScalarType::Half: return run(logits.const_data_ptr<simd::Half>());
    case ScalarType::BFloat16: return run(logits.const_data_ptr<simd::BFloat16>());
    default: fastseg::fail("fastseg::_confusion_matrix: input must hold labels or a floating dtype");
  }
}

// counts: contiguous int64 [num_classes, num_classes]
void forward(const Tensor& input, const Tensor& target, int64_t num_classes, int64_t ignore_index,
             const Tensor& counts) {
  const bool from_labels = holds_labels(input);
  const int64_t pixels = target.numel();
  FASTSEG_CHECK(num_classes >= 1 && num_classes <= 32767, "fastseg::_confusion_matrix: num_classes out of range");
  FASTSEG_CHECK(from_labels || (input.dim() >= 2 && input.size(1) == num_classes),
                "fastseg::_confusion_matrix: logits must be (N, num_classes, *spatial)");
  FASTSEG_CHECK(input.numel() == pixels * (from_labels ? 1 : num_classes),
                "fastseg::_confusion_matrix: input and target differ in size");
  FASTSEG_CHECK(input.is_cpu() && target.is_cpu() && counts.is_cpu() && counts.is_contiguous() &&
                    counts.scalar_type() == ScalarType::Long && counts.numel() == num_classes * num_classes,
                "fastseg::_confusion_matrix: counts must be int64 [num_classes, num_classes], all on the CPU");
  int64_t* totals = counts.mutable_data_ptr<int64_t>();
  std::fill_n(totals, num_classes * num_classes, int64_t{0});
  if (pixels == 0) return;
  const Tensor real = torch::stable::contiguous(target);
  const LabelView truth = label_view(real, ignore_index, num_classes);
  const bool channels_last = !from_labels && fastseg::is_channels_last(input);
  const Tensor source = channels_last ? input : torch::stable::contiguous(input);
  if (!from_labels) {
    count_logits(source, truth, totals);
  } else {
    const LabelView prediction = label_view(source, -1, num_classes);  // checked only where the truth counts
    const bool sparse = pixels < kSparse * num_classes * num_classes;
    (sparse ? count_labels_by_rows : count_labels)(prediction, truth, pixels, totals);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_confusion_matrix", TORCH_BOX(&forward)); }
