// Rows of a plane split by column modulo the stride of the windows, so that one tap of neighbouring windows is a run of
// neighbouring elements for any stride:
//     phase r, element q  =  row[q * stride + r]
#pragma once

#include "pooling/row_streams.h"
#include "pooling/windows.h"

namespace fastseg::pooling {

// The phases of one row, padded so that every tap of every window exists.
class PhaseLayout {
 public:
  explicit PhaseLayout(const Axis& axis) : axis_(axis) {
    const int64_t last = (axis.kernel - 1) * axis.dilation - axis.padding;
    margin_ = ceil_divide(axis.padding, axis.stride);
    length_ = round_up(axis.output) + margin_ + std::max<int64_t>(0, last / axis.stride) + kLanes;
    in_phase_.resize(axis.stride);
    for (int64_t r = 0; r < axis.stride; ++r) {
      const int64_t inside = axis.input > r ? ceil_divide(axis.input - r, axis.stride) : 0;
      in_phase_[r] = std::min(inside, length_ - margin_);
    }
  }

  int64_t size() const { return length_ * axis_.stride; }
  int64_t stride() const { return axis_.stride; }
  int64_t phase(int64_t r) const { return r * length_ + margin_; }  // where its element 0 lies
  int64_t in_phase(int64_t r) const { return in_phase_[r]; }        // elements that exist

  // Where tap k of window 0 lies; that of window o lies o elements further.
  int64_t tap(int64_t k) const {
    const int64_t position = k * axis_.dilation - axis_.padding;
    const int64_t r = (position % axis_.stride + axis_.stride) % axis_.stride;
    return phase(r) + (position - r) / axis_.stride;
  }

  // Splits row [axis.input] into phases [size()]; does not write the padding.
  template <typename value_t>
  void split(const value_t* row, value_t* phases) const {
    if (axis_.stride == 2) split_by(std::integral_constant<int64_t, 2>(), row, phases);  // with shuffles
    else split_by(axis_.stride, row, phases);
  }

 private:
  template <typename stride_t, typename value_t>
  void split_by(stride_t stride, const value_t* row, value_t* phases) const {
    for (int64_t r = 0; r < stride; ++r) {
      value_t* __restrict to = phases + phase(r);
      for (int64_t q = 0; q < in_phase(r); ++q) to[q] = row[q * stride + r];
    }
  }

  Axis axis_;
  int64_t margin_, length_;
  std::vector<int64_t> in_phase_;
};

// Split rows of a plane, kept for the windows that overlap in them.
template <typename scalar_t>
class PhaseRows {
 public:
  using compute_t = simd::accumulate<scalar_t>;

  // outside: value of the taps outside the row
  PhaseRows(const Windows& windows, compute_t outside)
      : windows_(windows), y_(windows.y), layout_(windows.x), width_(windows.x.input),
        rows_(std::min(windows.y.input, (windows.y.kernel - 1) * windows.y.dilation + 1), layout_.size(), outside),
        converted_(kConverts ? round_up(width_) : 0) {}

  const PhaseLayout& layout() const { return layout_; }

  // Sets the rows of the taps of row `oy` of windows, in planes [N * C, H, W]; the columns are at layout().tap(kw).
  void taps_of(const scalar_t* planes, int64_t plane, int64_t oy, Taps<compute_t>& taps) {
    taps.rows.clear();
    const int64_t top = plane * y_.input + y_.start(oy);
    for (int64_t kh = y_.first_tap(oy); kh < y_.end_tap(oy); ++kh) {
      taps.rows.push_back({get(planes, top + kh * y_.dilation), windows_.label(kh, 0)});
    }
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<scalar_t, compute_t>;

  // The split row number `row` of all the rows of all the planes, [N * C * H, W].
  const compute_t* get(const scalar_t* rows, int64_t row) {
    return rows_.get(row, [&](compute_t* phases) {
      const scalar_t* from = rows + row * width_;
      if constexpr (kConverts) {
        read_row(from, width_, converted_.data());
        layout_.split(converted_.data(), phases);
      } else {
        layout_.split(from, phases);
      }
    });
  }

  const Windows& windows_;
  const Axis& y_;
  PhaseLayout layout_;
  int64_t width_;
  KeptRows<compute_t> rows_;
  std::vector<compute_t> converted_;
};

}  // namespace fastseg::pooling
