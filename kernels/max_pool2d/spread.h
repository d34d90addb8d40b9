// From pooled elements to the pixels their indices point at: the gradient of max_pool2d, and max_unpool2d.
//
// `spread` goes through the pixels and asks every window that covers one whether its index is this pixel:
// each pixel is written once, and there is nothing to clear or to add to in memory. It needs the geometry of
// the windows; scatter.h does without.
#pragma once

#include "max_pool2d/phases.h"
#include "max_pool2d/rows.h"
#include "max_pool2d/windows.h"

namespace fastseg::pooling {

// What a pixel becomes when several indices point at it. They come in the order of the pooled plane.
struct Add {
  template <typename mask_t, typename vector_t>
  static FASTSEG_INLINE vector_t combine(mask_t hit, vector_t value, vector_t before) {
    return before + simd::keep_where(hit, value);
  }
  template <typename value_t>
  static void combine(value_t value, value_t* pixel) {
    *pixel += value;
  }
};
struct Last {
  template <typename mask_t, typename vector_t>
  static FASTSEG_INLINE vector_t combine(mask_t hit, vector_t value, vector_t before) {
    return simd::select(hit, value, before);
  }
  template <typename value_t>
  static void combine(value_t value, value_t* pixel) {
    *pixel = value;
  }
};

constexpr int32_t kNowhere = -1;  // a label that no tap has

// labels[i] of the `count` indices of window ox + i * step in row oy.
template <typename index_t>
void read_labels(const index_t* indices, int64_t count, const Windows& windows, int64_t oy, int64_t ox, int64_t step,
                 int32_t* labels) {
  if constexpr (sizeof(index_t) == 1) {
    for (int64_t i = 0; i < count; ++i) labels[i] = indices[i];
  } else {
    const int64_t origin = windows.label_origin(oy, ox), stride = step * windows.x.stride;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t label = static_cast<uint64_t>(indices[i]) - static_cast<uint64_t>(origin + i * stride);
      labels[i] = label < INT32_MAX ? static_cast<int32_t>(label) : kNowhere;
    }
  }
}

// The windows that cover 16 neighbouring pixels: their rows and their columns, both in the order of the
// pooled plane.
template <typename value_t>
struct CoverRow {
  const value_t* values;
  const int32_t* labels;
  int32_t label;
};
template <typename value_t>
using CoverRows = std::vector<CoverRow<value_t>>;

// [begin, end) of the columns: where a window lies in its row, and which of its taps the pixel is
template <typename combine_t, typename value_t, typename scalar_t, typename Load>
FASTSEG_INLINE void collect(const CoverRows<value_t>& rows, const TapColumn* begin, const TapColumn* end,
                            int64_t count, scalar_t* pixels, const Load& load) {
  using compute_t = simd::accumulate<scalar_t>;
  for_lanes(count, [&](int64_t i, auto vectors) {
    simd::vec<compute_t> sums[vectors]{};
    for (const CoverRow<value_t>& row : rows) {
      for (const TapColumn* column = begin; column < end; ++column) {
        const auto label = splat_label<compute_t>(row.label + column->label);
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = column->offset + i + v * kLanes;
          sums[v] =
              combine_t::combine(load_labels<compute_t>(row.labels + at) == label, load(row.values + at), sums[v]);
        }
      }
    }
    for (int v = 0; v < vectors; ++v) simd::store(pixels + i + v * kLanes, sums[v]);
  });
}

// How many pooled rows can cover one row of pixels.
inline int64_t covering_rows(const Axis& y) {
  return std::min(y.output, (y.kernel - 1) * y.dilation / y.stride + 1);
}

// The windows whose rows cover each row of pixels, in their order: offset is their row, label that of the
// tap's row.
class RowCovers {
 public:
  explicit RowCovers(const Windows& windows) : first_{0} {
    for (int64_t y = 0; y < windows.y.input; ++y) {
      for (int64_t kh = windows.y.kernel - 1; kh >= 0; --kh) {
        const int64_t oy = windows.y.window_of(y, kh);
        if (oy >= 0) covers_.push_back({oy, windows.label(kh, 0)});
      }
      first_.push_back(static_cast<int64_t>(covers_.size()));
    }
  }

  const TapColumn* begin(int64_t y) const { return covers_.data() + first_[y]; }
  const TapColumn* end(int64_t y) const { return covers_.data() + first_[y + 1]; }

 private:
  std::vector<TapColumn> covers_;
  std::vector<int64_t> first_;  // [H + 1]
};

// pooled and indices [planes, rows, columns], image [planes, H, W]
template <typename combine_t, typename scalar_t, typename index_t>
void spread_planar(const scalar_t* pooled, const index_t* indices, scalar_t* image, const Windows& windows,
                   int64_t planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const Axis &y_axis = windows.y, &x_axis = windows.x;
  const int64_t height = y_axis.input, width = x_axis.input, columns = x_axis.output, stride = x_axis.stride;
  // Pixels go by their column modulo the stride, as in phases.h: pixel q * stride + r is tap kw of window
  // q - (kw * dilation - padding - r) / stride, where that is a whole number.
  const int64_t phases = std::min(stride, width), in_phase = round_up(ceil_divide(width, stride));
  const int64_t before = ceil_divide((x_axis.kernel - 1) * x_axis.dilation, stride);
  const int64_t room = before + std::max(columns, in_phase) + ceil_divide(x_axis.padding + stride, stride) + kLanes;
  std::vector<std::vector<TapColumn>> covers(phases);
  for (int64_t r = 0; r < phases; ++r) {
    for (int64_t kw = x_axis.kernel - 1; kw >= 0; --kw) {
      const int64_t distance = kw * x_axis.dilation - x_axis.padding - r;
      if (distance % stride == 0) covers[r].push_back({before - distance / stride, windows.label(0, kw)});
    }
  }
  const RowCovers row_covers(windows);
  parallel_rows(planes * height, width, [&](int64_t begin, int64_t end) {
    KeptRows<compute_t> values(covering_rows(y_axis), room, 0);
    KeptRows<int32_t> labels(covering_rows(y_axis), room, kNowhere);
    std::vector<scalar_t> by_phase(stride > 1 ? phases * in_phase : 0);
    CoverRows<compute_t> rows;
    OutputStream<scalar_t> output(image + begin * width, width, planes * height * width);
    RowOfPlane row(begin, height);
    for (int64_t number = begin; number < end; ++number, row.next()) {
      rows.clear();
      for (const TapColumn* cover = row_covers.begin(row.y); cover < row_covers.end(row.y); ++cover) {
        const int64_t oy = cover->offset, from = row.plane * y_axis.output + oy;
        const compute_t* row_values = values.get(
            from, [&](compute_t* to) { read_row(pooled + from * columns, columns, to + before); });
        const int32_t* row_labels = labels.get(from, [&](int32_t* to) {
          read_labels(indices + from * columns, columns, windows, oy, 0, 1, to + before);
        });
        rows.push_back({row_values, row_labels, cover->label});
      }
      scalar_t* pixels = output.next(width);
      for (int64_t r = 0; r < phases; ++r) {
        const TapColumn* first = covers[r].data();
        collect<combine_t>(rows, first, first + covers[r].size(), ceil_divide(width - r, stride),
                           stride > 1 ? by_phase.data() + r * in_phase : pixels,
                           [](const compute_t* at) { return simd::load(at); });
      }
      if (stride > 1) PhaseLayout::merge(by_phase.data(), in_phase, stride, width, pixels);
    }
    output.finish();
  });
}

// pooled and indices [images, rows, columns, C], image [images, H, W, C]
template <typename combine_t, typename scalar_t, typename index_t>
void spread_interleaved(const scalar_t* pooled, const index_t* indices, scalar_t* image, const Windows& windows,
                        const Planes& planes) {
  const Axis &y_axis = windows.y, &x_axis = windows.x;
  const int64_t height = y_axis.input, width = x_axis.input, channels = planes.channels;
  const int64_t length = x_axis.output * channels;
  std::vector<TapColumn> covers;      // of all columns of pixels, one after the other
  std::vector<int64_t> first{0};      // [W + 1]
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t kw = x_axis.kernel - 1; kw >= 0; --kw) {
      const int64_t ox = x_axis.window_of(x, kw);
      if (ox >= 0) covers.push_back({ox * channels, windows.label(0, kw)});
    }
    first.push_back(static_cast<int64_t>(covers.size()));
  }
  const scalar_t* past_end = pooled + planes.images * y_axis.output * length;
  const RowCovers row_covers(windows);
  const int64_t all_rows = planes.images * height;
  parallel_rows(all_rows, width * channels, [&](int64_t begin, int64_t end) {
    KeptRows<int32_t> labels(covering_rows(y_axis), length + kLanes, kNowhere);
    CoverRows<scalar_t> rows;
    OutputStream<scalar_t> output(image + begin * width * channels, channels, all_rows * width * channels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % height;
      rows.clear();
      for (const TapColumn* cover = row_covers.begin(y); cover < row_covers.end(y); ++cover) {
        const int64_t oy = cover->offset, from = row / height * y_axis.output + oy;
        const int32_t* row_labels = labels.get(from, [&](int32_t* to) {
          const int64_t at_once = windows.flat ? channels : length;
          for (int64_t i = 0; i < length; i += at_once) {
            read_labels(indices + from * length + i, at_once, windows, oy, i / channels, 0, to + i);
          }
        });
        rows.push_back({pooled + from * length, row_labels, cover->label});
      }
      for (int64_t x = 0; x < width; ++x) {
        collect<combine_t>(rows, covers.data() + first[x], covers.data() + first[x + 1], channels,
                           output.next(channels),
                           [&](const scalar_t* values) { return load_before(values, past_end); });
      }
    }
    output.finish();
  });
}

template <typename combine_t, typename scalar_t>
void spread(const Tensor& pooled, const Tensor& indices, const Tensor& image, const Windows& windows,
            const Planes& planes) {
  const scalar_t* from = pooled.const_data_ptr<scalar_t>();
  scalar_t* to = image.mutable_data_ptr<scalar_t>();
  const auto run = [&](const auto* places) {
    if (planes.channels_last) spread_interleaved<combine_t>(from, places, to, windows, planes);
    else spread_planar<combine_t>(from, places, to, windows, planes.images * planes.channels);
  };
  if (windows.flat) run(indices.const_data_ptr<int64_t>());
  else run(indices.const_data_ptr<uint8_t>());
}

}  // namespace fastseg::pooling
