// Confusion matrix on the CPU, from labels or logits: blocks of pixels pass through small int32 buffers that
// stay in the first-level cache (prediction, truth), then through a private histogram per slice. See
// README.md.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/layout.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace {

using simd::i32x16;
using simd::kLanes;
using simd::u32x16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 512;       // pixels; their labels and running maxima take 8 KiB
constexpr int32_t kOutside = -1;  // a label that no class can have
constexpr int32_t kIgnored = -2;  // a true label equal to ignore_index

// Writes the int32 labels of pixels [first, first + count), count <= kBlock, to `labels`, which has room for
// kBlock.
using LabelReader = std::function<void(int64_t first, int count, int32_t* labels)>;

// ---- labels from label maps ----

// `ignored`: the label that becomes kIgnored, if there is one. A plain loop, which the compiler vectorizes.
template <typename label_t>
void read_labels(const label_t* __restrict__ from, int count, const label_t* ignored,
                 int32_t* __restrict__ labels) {
  const label_t ignored_label = ignored ? *ignored : 0;
  const bool may_ignore = ignored != nullptr;
  for (int i = 0; i < count; ++i) {
    const label_t label = from[i];
    const int32_t known = static_cast<uint64_t>(label) <= INT32_MAX ? static_cast<int32_t>(label) : kOutside;
    labels[i] = (label == ignored_label) & may_ignore ? kIgnored : known;
  }
}

template <typename label_t>
LabelReader label_map_reader(const Tensor& map, const int64_t* ignore_index) {
  const label_t* labels = map.const_data_ptr<label_t>();
  const label_t ignored = ignore_index ? static_cast<label_t>(*ignore_index) : 0;
  const bool can_occur = ignore_index && static_cast<int64_t>(ignored) == *ignore_index;
  return [=](int64_t first, int count, int32_t* to) {
    read_labels(labels + first, count, can_occur ? &ignored : nullptr, to);
  };
}

// `map` must be contiguous and outlive the reader.
LabelReader label_map_reader(const Tensor& map, const int64_t* ignore_index) {
  switch (map.scalar_type()) {
    case ScalarType::Byte: return label_map_reader<uint8_t>(map, ignore_index);
    case ScalarType::Int: return label_map_reader<int32_t>(map, ignore_index);
    case ScalarType::Long: return label_map_reader<int64_t>(map, ignore_index);
    default: STD_TORCH_CHECK(false, "fastseg::_confusion_matrix: labels must be uint8, int32 or int64");
  }
}

// ---- labels from logits: the first maximum, NaN above every number ----

template <typename vector_t>
FASTSEG_INLINE void keep_maximum(vector_t& best, i32x16& label, vector_t candidate, int32_t candidate_label) {
  const auto better = ~(candidate <= best) & (best == best);
  best = better ? candidate : best;
  label = __builtin_convertvector(better, i32x16) ? simd::splat(candidate_label) : label;
}

// Class c of the `count` pixels stands at logits + c * plane.
template <typename scalar_t>
void argmax_of_planes(const scalar_t* logits, int64_t plane, int classes, int count, int32_t* labels) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  vector_t best[kBlock / kLanes];
  i32x16 label[kBlock / kLanes];
  const int whole = count / kLanes, rest = count % kLanes;
  for (int c = 0; c < classes; ++c, logits += plane) {
    for (int v = 0; v < whole; ++v) {
      const vector_t candidate = simd::load(logits + v * kLanes);
      if (c == 0) best[v] = candidate, label[v] = i32x16{};
      else keep_maximum(best[v], label[v], candidate, c);
    }
    if (rest == 0) continue;
    const vector_t candidate = simd::load_partial(logits + whole * kLanes, rest, scalar_t(0));
    if (c == 0) best[whole] = candidate, label[whole] = i32x16{};
    else keep_maximum(best[whole], label[whole], candidate, c);
  }
  for (int v = 0; v * kLanes < count; ++v) simd::store(labels + v * kLanes, label[v]);
}

// The classes of a pixel stand next to each other: 16 pixels at a time are turned into 16 lanes.
template <typename scalar_t>
void argmax_of_pixels(const scalar_t* logits, int classes, int count, int32_t* labels) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  for (int first = 0; first < count; first += kLanes, logits += int64_t{kLanes} * classes) {
    const int pixels = std::min(kLanes, count - first);
    vector_t best;
    i32x16 label{};
    for (int c = 0; c < classes; ++c) {
      vector_t candidate{};
      for (int lane = 0; lane < pixels; ++lane) candidate[lane] = logits[int64_t{lane} * classes + c];
      if (c == 0) best = candidate;
      else keep_maximum(best, label, candidate, c);
    }
    simd::store(labels + first, label);
  }
}

template <typename scalar_t>
LabelReader argmax_reader(const Tensor& logits) {
  const scalar_t* data = logits.const_data_ptr<scalar_t>();  // [N, C, P] or [N, P, C]
  const int classes = static_cast<int>(logits.size(1));
  if (!logits.is_contiguous()) {
    return [=](int64_t first, int count, int32_t* labels) {
      argmax_of_pixels(data + first * classes, classes, count, labels);
    };
  }
  const int64_t plane = logits.numel() / (logits.size(0) * classes);
  return [=](int64_t first, int count, int32_t* labels) {
    for (int done = 0; done < count;) {  // a block may reach into the next image
      const int64_t image = (first + done) / plane, pixel = (first + done) % plane;
      const int part = static_cast<int>(std::min<int64_t>(count - done, plane - pixel));
      int32_t part_labels[kBlock];
      argmax_of_planes(data + image * classes * plane + pixel, plane, classes, part, part_labels);
      std::copy(part_labels, part_labels + part, labels + done);
      done += part;
    }
  };
}

// `logits` must be contiguous or channels_last, not empty, and outlive the reader.
LabelReader argmax_reader(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return argmax_reader<float>(logits);
    case ScalarType::Double: return argmax_reader<double>(logits);
    case ScalarType::Half: return argmax_reader<simd::Half>(logits);
    case ScalarType::BFloat16: return argmax_reader<simd::BFloat16>(logits);
    default: STD_TORCH_CHECK(false, "fastseg::_confusion_matrix: logits must be a floating dtype");
  }
}

// ---- counting ----

// Counts pairs of labels. Neighbouring pixels mostly fall into one bin, and an increment must wait for the
// one before it to reach memory: several copies of the counters, used in turn, break that chain.
class Histogram {
 public:
  explicit Histogram(int classes) : classes_(classes), bins_(classes * classes) {
    constexpr int64_t cached_bytes = 64 * 1024;
    while (copies_log2_ < (getenv("LOG2") ? atoi(getenv("LOG2")) : 3) && (4 * int64_t{bins_} << (copies_log2_ + 1)) <= cached_bytes) ++copies_log2_;
    counts_.resize(static_cast<size_t>(bins_ + 1) << copies_log2_);  // one bin more, for what is not counted
  }

  // truth, prediction: [kBlock], of which the first `count` are counted.
  void add(int32_t* truth, const int32_t* prediction, int count) {
    if (pixels_ > kMostPixels) spill();
    pixels_ += count;
    const int whole = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(truth + count, truth + whole, kIgnored);
    const i32x16 copy = simd::lane_index() & ((1 << copies_log2_) - 1);
    // Copied to locals, which the increments cannot alias.
    const int classes = classes_, copies_log2 = copies_log2_;
    uint32_t* counts = counts_.data();
    i32x16 outside = outside_;
    for (int i = 0; i < whole; i += kLanes) {
      const i32x16 row = simd::load(truth + i), column = simd::load(prediction + i);
      const auto row_outside = simd::bit_cast<u32x16>(row) >= static_cast<uint32_t>(classes);
      const auto column_outside = simd::bit_cast<u32x16>(column) >= static_cast<uint32_t>(classes);
      const i32x16 uncounted = row_outside | column_outside;
      outside |= uncounted & (row != kIgnored);
      const i32x16 bin = uncounted ? simd::splat(classes * classes) : row * classes + column;
      alignas(64) int32_t slots[kLanes];
      simd::store(slots, (bin << copies_log2) | copy);
      for (const int32_t slot : slots) ++counts[slot];
    }
    outside_ = outside;
  }

  // Whether a label outside [0, classes) was met at a pixel that is not ignored.
  bool met_outside() const { return simd::any(outside_); }

  // totals: [classes, classes]
  void add_to(int64_t* totals) {
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

  void spill() {
    std::vector<int64_t> totals(bins_);
    add_to(totals.data());
    spilled_ = std::move(totals);
    std::fill(counts_.begin(), counts_.end(), 0u);
    pixels_ = 0;
  }

  int classes_, bins_, copies_log2_ = 0;
  int64_t pixels_ = 0;
  i32x16 outside_{};
  std::vector<uint32_t> counts_;  // [bins + 1, copies]
  std::vector<int64_t> spilled_;  // [bins] or empty
};

void count(const LabelReader& predict, const LabelReader& truth, int64_t pixels, int classes,
           int64_t* totals) {
  // no slice smaller than its own histogram
  const int64_t slices = fastseg::slice_count(pixels, std::max<int64_t>(16384, int64_t{classes} * classes));
  std::vector<Histogram> histograms(slices, Histogram(classes));
  fastseg::parallel_slices(pixels, slices, [&](int64_t slice, int64_t begin, int64_t end) {
    alignas(64) int32_t predicted_labels[kBlock], true_labels[kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int block = static_cast<int>(std::min<int64_t>(kBlock, end - first));
      predict(first, block, predicted_labels);
      truth(first, block, true_labels);
      histograms[slice].add(true_labels, predicted_labels, block);
    }
  });
  for (Histogram& histogram : histograms) {
    if (histogram.met_outside()) {
      throw std::out_of_range(
          "fastseg.ops.confusion_matrix: a label of target or input is out of range; allowed: 0 to " +
          std::to_string(classes - 1) + ", and ignore_index in target");
    }
    histogram.add_to(totals);
  }
}

Tensor forward(const Tensor& input, const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const bool from_logits = input.scalar_type() != ScalarType::Byte &&
                           input.scalar_type() != ScalarType::Int && input.scalar_type() != ScalarType::Long;
  STD_TORCH_CHECK(num_classes >= 1 && num_classes <= 32767,
                  "fastseg::_confusion_matrix: num_classes out of range");
  STD_TORCH_CHECK(!from_logits || (input.dim() >= 2 && input.size(1) == num_classes),
                  "fastseg::_confusion_matrix: logits must be (N, num_classes, *spatial)");
  STD_TORCH_CHECK(input.numel() == target.numel() * (from_logits ? num_classes : 1),
                  "fastseg::_confusion_matrix: input and target differ in size");
  Tensor result = torch::stable::new_zeros(target, {num_classes, num_classes}, ScalarType::Long);
  const int64_t pixels = target.numel();
  if (pixels == 0) return result;
  const Tensor truth = torch::stable::contiguous(target);
  const Tensor source =
      from_logits && fastseg::is_channels_last(input) ? input : torch::stable::contiguous(input);
  count(from_logits ? argmax_reader(source) : label_map_reader(source, nullptr),
        label_map_reader(truth, &ignore_index), pixels, static_cast<int>(num_classes),
        result.mutable_data_ptr<int64_t>());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_confusion_matrix", TORCH_BOX(&forward)); }
