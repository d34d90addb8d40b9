// From pooled elements to the pixels their indices point at: the gradient of max_pool2d, and max_unpool2d.
//
// `spread` goes through the pixels and asks every window that covers one whether its index is this pixel: each pixel
// is written once, and there is nothing to clear or to add to in memory. It needs the geometry of the windows;
// scatter.h does without.
#pragma once

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

// A window that covers 16 neighbouring pixels: a tap of theirs.
template <typename value_t>
struct Cover {
  const value_t* values;
  const int32_t* labels;
  int32_t label;
};

template <typename combine_t, typename value_t, typename compute_t, typename Load>
FASTSEG_INLINE void collect(const std::vector<Cover<value_t>>& covers, int64_t count, compute_t* pixels,
                            const Load& load) {
  for (int64_t i = 0; i < count; i += kLanes) {
    simd::vec<compute_t> sum{};
    for (const Cover<value_t>& cover : covers) {
      const auto hit = load_labels<compute_t>(cover.labels + i) == splat_label<compute_t>(cover.label);
      sum = combine_t::combine(hit, load(cover.values + i), sum);
    }
    simd::store(pixels + i, sum);
  }
}

// How many pooled rows can cover one row of pixels.
inline int64_t covering_rows(const Axis& y) {
  return std::min(y.output, (y.kernel - 1) * y.dilation / y.stride + 1);
}

// pooled and indices [planes, rows, columns], image [planes, H, W]
template <typename combine_t, typename scalar_t, typename index_t>
void spread_planar(const scalar_t* pooled, const index_t* indices, scalar_t* image, const Windows& windows,
                   int64_t planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const Axis &y_axis = windows.y, &x_axis = windows.x;
  const int64_t height = y_axis.input, width = x_axis.input, columns = x_axis.output;
  const int64_t stride = x_axis.stride;
  const int64_t in_phase = round_up(ceil_divide(width, stride));
  // Pixel q * stride + r is tap kw of window q - shift(kw, r), wherever that is a whole number.
  const auto distance = [&](int64_t kw, int64_t r) { return kw * x_axis.dilation - x_axis.padding - r; };
  const int64_t before = std::max<int64_t>(0, ceil_divide((x_axis.kernel - 1) * x_axis.dilation, stride));
  const int64_t after = ceil_divide(x_axis.padding + stride, stride);
  const int64_t room = before + std::max(columns, in_phase) + after + kLanes;
  const bool streamed = worth_streaming<scalar_t>(planes * height * width);
  const int64_t slices = slice_count(planes * height, ceil_divide(8192, width));
  parallel_slices(planes * height, slices, [&](int64_t, int64_t begin, int64_t end) {
    KeptRows<compute_t> values(covering_rows(y_axis), room, 0);
    KeptRows<int32_t> labels(covering_rows(y_axis), room, kNowhere);
    std::vector<compute_t> phase(in_phase), pixels(round_up(width));
    std::vector<Cover<compute_t>> covers;
    RowWriter<scalar_t> writer(width, streamed);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / height, y = row % height;
      for (int64_t r = 0; r < std::min(stride, width); ++r) {
        covers.clear();
        for (int64_t kh = y_axis.kernel - 1; kh >= 0; --kh) {
          const int64_t oy = y_axis.window_of(y, kh);
          if (oy < 0) continue;
          const int64_t from = plane * y_axis.output + oy;
          const compute_t* row_values = values.get(
              from, [&](compute_t* to) { read_row(pooled + from * columns, columns, to + before); });
          const int32_t* row_labels = labels.get(from, [&](int32_t* to) {
            read_labels(indices + from * columns, columns, windows, oy, 0, 1, to + before);
          });
          for (int64_t kw = x_axis.kernel - 1; kw >= 0; --kw) {
            if (distance(kw, r) % stride != 0) continue;
            const int64_t at = before - distance(kw, r) / stride;
            covers.push_back({row_values + at, row_labels + at, windows.label(kh, kw)});
          }
        }
        const int64_t count = ceil_divide(width - r, stride);
        const auto load = [](const compute_t* at) { return simd::load(at); };
        if (stride == 1) {
          collect<combine_t>(covers, count, pixels.data(), load);
          continue;
        }
        collect<combine_t>(covers, count, phase.data(), load);
        for (int64_t q = 0; q < count; ++q) pixels[q * stride + r] = phase[q];
      }
      writer.write(image + row * width, pixels.data(), width);
    }
    simd::stream_fence();
  });
}

// pooled and indices [images, rows, columns, C], image [images, H, W, C]
template <typename combine_t, typename scalar_t, typename index_t>
void spread_interleaved(const scalar_t* pooled, const index_t* indices, scalar_t* image, const Windows& windows,
                        const Planes& planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const Axis &y_axis = windows.y, &x_axis = windows.x;
  const int64_t height = y_axis.input, width = x_axis.input, channels = planes.channels;
  const int64_t length = x_axis.output * channels;
  const int64_t run = std::min(width, ceil_divide(kRunElements, channels));  // pixels written at a time
  const scalar_t* past_end = pooled + planes.images * y_axis.output * length;
  const bool streamed = worth_streaming<scalar_t>(planes.images * height * width * channels);
  const int64_t slices = slice_count(planes.images * height, ceil_divide(8192, width * channels));
  parallel_slices(planes.images * height, slices, [&](int64_t, int64_t begin, int64_t end) {
    KeptRows<int32_t> labels(covering_rows(y_axis), length + kLanes, kNowhere);
    std::vector<compute_t> pixels(round_up(run * channels) + kLanes);
    std::vector<Cover<scalar_t>> covers;
    RowWriter<scalar_t> writer(run * channels, streamed);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image_number = row / height, y = row % height;
      for (int64_t x = 0; x < width; ++x) {
        covers.clear();
        for (int64_t kh = y_axis.kernel - 1; kh >= 0; --kh) {
          const int64_t oy = y_axis.window_of(y, kh);
          if (oy < 0) continue;
          const int64_t from = image_number * y_axis.output + oy;
          const int32_t* row_labels = labels.get(from, [&](int32_t* to) {
            for (int64_t i = 0; i < length; i += channels) {
              read_labels(indices + from * length + i, channels, windows, oy, i / channels, 0, to + i);
            }
          });
          for (int64_t kw = x_axis.kernel - 1; kw >= 0; --kw) {
            const int64_t ox = x_axis.window_of(x, kw);
            if (ox < 0) continue;
            covers.push_back(
                {pooled + from * length + ox * channels, row_labels + ox * channels, windows.label(kh, kw)});
          }
        }
        const int64_t at = x % run * channels;
        collect<combine_t>(covers, channels, pixels.data() + at,
                           [&](const scalar_t* values) { return load_before(values, past_end); });
        if (x % run == run - 1 || x == width - 1) {
          writer.write(image + (row * width + x - x % run) * channels, pixels.data(), at + channels);
        }
      }
    }
    simd::stream_fence();
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
