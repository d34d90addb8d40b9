// Soft masks interpolated to the size of an image, on the CPU, in boxes or over the whole image. For a row of pixels,
// rows of the mask are mixed, then elements of the mixed row; 32 pixels make a word of bits. See README.md.
#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"
#include "fastseg/parallel.h"
#include "paste_masks/arguments.h"
#include "paste_masks/sampling.h"

namespace {

using namespace fastseg::paste_masks;
using fastseg::ceil_divide;
using simd::f32x16;
using simd::kLanes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWord = word_pixels;

// The taps of the pixels [first, end) of a row, laid out for blocks of 16.
template <int count>
class Columns {
 public:
  explicit Columns(int64_t width) : base_(ceil_divide(width, kWord) * (kWord / kLanes)) {
    for (int k = 0; k < count; ++k) {
      index_[k].resize(base_.size() * kLanes);
      weight_[k].resize(base_.size() * kLanes);
    }
  }

  int first = 0, end = 0;

  void set(int pixel, const Taps<count>& taps) {
    for (int k = 0; k < count; ++k) {
      index_[k][pixel] = taps.index[k];
      weight_[k][pixel] = taps.weight[k];
    }
  }

  // Called after the pixels [first, end) are set: makes indices relative to the lowest index of their block.
  void finish() {
    is_narrow_ = true;
    constexpr int kBlocks = kWord / kLanes;
    for (int block = first / kWord * kBlocks; block < ceil_divide(end, kWord) * kBlocks; ++block) {
      const int begin = std::max(first, block * kLanes), last = std::min(end, (block + 1) * kLanes);
      int low = INT32_MAX, high = 0;
      for (int k = 0; k < count; ++k) {
        for (int pixel = begin; pixel < last; ++pixel) {
          low = std::min(low, index_[k][pixel]);
          high = std::max(high, index_[k][pixel]);
        }
      }
      base_[block] = begin < last ? low : 0;
      is_narrow_ = is_narrow_ && high - base_[block] < kLanes;
      for (int k = 0; k < count; ++k) {
        for (int pixel = block * kLanes; pixel < (block + 1) * kLanes; ++pixel) {
          const bool inside = pixel >= begin && pixel < last;
          index_[k][pixel] = inside ? index_[k][pixel] - base_[block] : 0;
          if (!inside) weight_[k][pixel] = 0;
        }
      }
    }
  }

  // Whether every block reads at most 16 neighbouring elements.
  bool is_narrow() const { return is_narrow_; }

  template <bool narrow>
  FASTSEG_INLINE f32x16 values(const float* row, int block) const {
    const float* from = row + base_[block];
    f32x16 sum{};
    FASTSEG_UNROLL
    for (int k = 0; k < count; ++k) {
      const auto index = simd::load(&index_[k][block * kLanes]);
      const f32x16 part =
          simd::load(&weight_[k][block * kLanes]) * (narrow ? simd::permute(from, index) : simd::gather(from, index));
      sum = k == 0 ? part : sum + part;
    }
    return sum;
  }

  // The bits of a word whose pixels lie in [first, end).
  uint32_t mask(int word) const {
    const int low = first - word * kWord, high = end - word * kWord;
    uint32_t bits = ~0u;
    if (low > 0) bits &= ~0u << low;
    if (high < kWord) bits &= ~(~0u << high);
    return bits;
  }

 private:
  bool is_narrow_ = true;
  std::vector<int32_t> base_, index_[count];
  std::vector<float> weight_[count];
};

// A mask as floats, with `border` zeros around it and padding for a load of 16 at the end of each row.
class Source {
 public:
  Source(int64_t rows, int64_t columns, int border)
      : rows_(rows), columns_(columns), border_(border),
        stride_(ceil_divide(columns + 2 * border, kLanes) * kLanes + kLanes), elements_((rows + 2 * border) * stride_),
        mix_(stride_) {}

  template <typename scalar_t>
  void load(const scalar_t* mask) {
    for (int64_t row = 0; row < rows_; ++row) {
      float* to = elements_.data() + (row + border_) * stride_ + border_;
      for (int64_t column = 0; column < columns_; ++column) to[column] = mask[row * columns_ + column];
    }
  }

  template <int count>
  const float* mix(const Taps<count>& taps) {
    for (int64_t column = 0; column < stride_; column += kLanes) {
      f32x16 sum{};
      FASTSEG_UNROLL
      for (int k = 0; k < count; ++k) {
        const f32x16 part = simd::load(&elements_[taps.index[k] * stride_ + column]) * simd::splat(taps.weight[k]);
        sum = k == 0 ? part : sum + part;
      }
      simd::store(&mix_[column], sum);
    }
    return mix_.data();
  }

 private:
  int64_t rows_, columns_, border_, stride_;
  std::vector<float> elements_, mix_;
};

// The forms of an output row. A value belongs to the mask if it is above the limit; `row` is the output, zeros at
// first.

struct PackedRow {
  int32_t* row;

  void write(int word, f32x16 low, f32x16 high, uint32_t wanted, f32x16 limit) const {
    row[word] = static_cast<int32_t>((simd::mask_bits(low > limit) | simd::mask_bits(high > limit) << kLanes) & wanted);
  }
};

struct BoolRow {
  uint8_t* row;

  void write(int word, f32x16 low, f32x16 high, uint32_t wanted, f32x16 limit) const {
    const uint32_t bits = (simd::mask_bits(low > limit) | simd::mask_bits(high > limit) << kLanes) & wanted;
    for (uint32_t left = wanted; left != 0; left &= left - 1) {
      const int pixel = __builtin_ctz(left);
      row[word * kWord + pixel] = bits >> pixel & 1;
    }
  }
};

struct SoftRow {
  float* row;

  void write(int word, f32x16 low, f32x16 high, uint32_t wanted, f32x16) const {
    float* to = row + word * kWord;
    if (wanted == ~0u) {
      simd::store(to, low);
      simd::store(to + kLanes, high);
      return;
    }
    alignas(64) float values[kWord];
    simd::store(values, low);
    simd::store(values + kLanes, high);
    for (uint32_t left = wanted; left != 0; left &= left - 1) to[__builtin_ctz(left)] = values[__builtin_ctz(left)];
  }
};

template <bool narrow, int count, typename Row>
void fill_row(const float* mixed, const Columns<count>& columns, float limit, const Row& to) {
  const f32x16 limits = simd::splat(limit);
  for (int word = columns.first / kWord; word * kWord < columns.end; ++word) {
    const f32x16 low = columns.template values<narrow>(mixed, 2 * word);
    const f32x16 high = columns.template values<narrow>(mixed, 2 * word + 1);
    to.write(word, low, high, columns.mask(word), limits);
  }
}

template <int count, typename Row>
void fill_row(const float* mixed, const Columns<count>& columns, float limit, const Row& to) {
  columns.is_narrow() ? fill_row<true>(mixed, columns, limit, to) : fill_row<false>(mixed, columns, limit, to);
}

constexpr int64_t kFewestPixels = 1 << 15;  // of a slice

// Cuts the rows of all images into slices and calls body(image, first row, end) for the images of each. `make` returns
// the body of a slice.
template <typename Make>
void over_rows(const Problem& problem, const Make& make) {
  const int64_t rows = problem.images * problem.height;
  const int64_t slices = fastseg::slice_count(rows, ceil_divide(kFewestPixels, std::max<int64_t>(1, problem.width)));
  std::vector<decltype(make())> bodies;
  bodies.reserve(slices);
  for (int64_t slice = 0; slice < slices; ++slice) bodies.push_back(make());
  fastseg::parallel_slices(rows, slices, [&](int64_t slice, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / problem.height, first = begin % problem.height;
      const int64_t last = std::min(problem.height, first + end - begin);
      bodies[slice](image, first, last);
      begin += last - first;
    }
  });
}

template <typename scalar_t, typename Row>
class Paster {
 public:
  Paster(const Problem& problem, const scalar_t* masks, const float* boxes, Convention convention,
         decltype(Row::row) output)
      : problem_(problem), masks_(masks), boxes_(boxes), convention_(convention), output_(output),
        columns_(problem.width), source_(problem.rows, problem.columns, 1) {}

  void operator()(int64_t image, int64_t first_row, int64_t end_row) {
    const int64_t stride = problem_.row_size();
    auto* rows = output_ + image * problem_.height * stride;
    std::fill(rows + first_row * stride, rows + end_row * stride, 0);
    const float* box = boxes_ + 4 * image;
    const auto across = BoxAxis::make(convention_, box[0], box[2], static_cast<int>(problem_.columns));
    const auto down = BoxAxis::make(convention_, box[1], box[3], static_cast<int>(problem_.rows));
    int top, bottom;
    down.reach(static_cast<int>(problem_.height), top, bottom);
    if (top >= bottom || !set_columns(across)) return;
    source_.load(masks_ + image * problem_.rows * problem_.columns);
    for (int64_t y = std::max<int64_t>(top, first_row); y < std::min<int64_t>(bottom, end_row); ++y) {
      Taps<2> taps;
      if (!down.sample(static_cast<int>(y), taps)) continue;
      fill_row(source_.mix(taps), columns_, problem_.limit, Row{rows + y * stride});
    }
  }

 private:
  // False if the box lies outside of the image.
  bool set_columns(const BoxAxis& axis) {
    int first, end;
    axis.reach(static_cast<int>(problem_.width), first, end);
    Taps<2> taps;
    while (first < end && !axis.sample(first, taps)) ++first;
    while (first < end && !axis.sample(end - 1, taps)) --end;
    columns_.first = first;
    columns_.end = end;
    for (int pixel = first; pixel < end; ++pixel) {
      axis.sample(pixel, taps);
      columns_.set(pixel, taps);
    }
    columns_.finish();
    return first < end;
  }

  const Problem& problem_;
  const scalar_t* masks_;
  const float* boxes_;
  const Convention convention_;
  decltype(Row::row) output_;
  Columns<2> columns_;
  Source source_;
};

template <int count, typename scalar_t, typename Row>
class Upsampler {
 public:
  Upsampler(const Problem& problem, const scalar_t* masks, const ResizeAxis& across, const ResizeAxis& down,
            decltype(Row::row) output)
      : problem_(problem), masks_(masks), down_(down), output_(output), columns_(problem.width),
        source_(problem.rows, problem.columns, 0) {
    columns_.end = static_cast<int>(problem.width);
    for (int pixel = 0; pixel < columns_.end; ++pixel) columns_.set(pixel, across.sample<count>(pixel));
    columns_.finish();
  }

  void operator()(int64_t image, int64_t first_row, int64_t end_row) {
    const int64_t stride = problem_.row_size();
    auto* rows = output_ + image * problem_.height * stride;
    source_.load(masks_ + image * problem_.rows * problem_.columns);
    for (int64_t y = first_row; y < end_row; ++y) {
      const Taps<count> taps = down_.sample<count>(static_cast<int>(y));
      fill_row(source_.mix(taps), columns_, problem_.limit, Row{rows + y * stride});
    }
  }

 private:
  const Problem& problem_;
  const scalar_t* masks_;
  const ResizeAxis down_;
  decltype(Row::row) output_;
  Columns<count> columns_;
  Source source_;
};

// Calls fn(scalar_t{}, Row{}) for the dtype of the masks and the form of the output.
template <typename Function>
void with_types(const char* op, const Tensor& masks, Form form, const Function& fn) {
  with_mask_type<simd::Half, simd::BFloat16>(op, masks, [&](auto zero) {
    if (form == Form::packed) return fn(zero, PackedRow{});
    if (form == Form::boolean) return fn(zero, BoolRow{});
    return fn(zero, SoftRow{});
  });
}

void paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, double threshold, bool torchvision,
                 int64_t form, Tensor output) {
  constexpr const char* op = "_paste_masks";
  FASTSEG_CHECK(masks.is_cpu(), "fastseg::", op, ": masks must be on the CPU");
  const Problem problem = make_problem(op, masks, height, width, threshold, !torchvision, form, output);
  const float* corners = fastseg::dense_values<float>(boxes, 4 * problem.images, "boxes");
  const auto convention = torchvision ? Convention::torchvision : Convention::detectron2;
  fastseg::use_huge_pages(output);
  with_types(op, masks, problem.form, [&](auto zero, auto row) {
    using scalar_t = decltype(zero);
    auto* to = static_cast<decltype(row.row)>(output.mutable_data_ptr());
    over_rows(problem, [&] {
      return Paster<scalar_t, decltype(row)>(problem, masks.const_data_ptr<scalar_t>(), corners, convention, to);
    });
  });
}

void upsample_masks(Tensor logits, std::vector<int64_t> padded, std::vector<int64_t> input, int64_t height,
                    int64_t width, double threshold, int64_t form, Tensor output) {
  constexpr const char* op = "_upsample_masks";
  FASTSEG_CHECK(logits.is_cpu(), "fastseg::", op, ": logits must be on the CPU");
  FASTSEG_CHECK(padded.size() == 2 && input.size() == 2, "fastseg::", op, ": sizes must be (height, width)");
  const Problem problem = make_problem(op, logits, height, width, threshold, false, form, output);
  const ResizeAxis down = make_axis(op, problem.rows, padded[0], input[0], height);
  const ResizeAxis across = make_axis(op, problem.columns, padded[1], input[1], width);
  fastseg::use_huge_pages(output);
  with_types(op, logits, problem.form, [&](auto zero, auto row) {
    using scalar_t = decltype(zero);
    using Row = decltype(row);
    const scalar_t* values = logits.const_data_ptr<scalar_t>();
    auto* to = static_cast<decltype(row.row)>(output.mutable_data_ptr());
    if (down.is_single() && across.is_single()) {
      over_rows(problem, [&] { return Upsampler<2, scalar_t, Row>(problem, values, across, down, to); });
    } else {
      over_rows(problem, [&] { return Upsampler<4, scalar_t, Row>(problem, values, across, down, to); });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_paste_masks", TORCH_BOX(&paste_masks));
  m.impl("_upsample_masks", TORCH_BOX(&upsample_masks));
}
