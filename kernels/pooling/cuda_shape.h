// The shape of a pooling, an argument of the launchers of max_pool2d and max_unpool2d.
//
// Both layouts have one form: [outer, rows, columns, inner] is (N * C, H, W, 1) for contiguous tensors and (N, H, W, C)
// for channels_last ones. Indices are int64 positions y * W + x in the plane, as torch's ("flat"), or uint8 taps
// kernel_row * KW + kernel_column of the window ("compact").
#pragma once

#include <cstdint>

namespace fastseg::cuda {

// One spatial axis. Tap t of window w lies at w * stride - padding + t * dilation.
struct Axis {
  int size;                               // of the plane that is pooled, or unpooled to
  int windows;                            // size of the pooled plane
  int kernel, stride, padding, dilation;  // kernel 0: no windows are known
};

struct PoolShape {
  int64_t outer;
  Axis rows, columns;
  int inner;
  bool channels_last;

  int64_t element_count() const { return static_cast<int64_t>(rows.size) * columns.size; }  // of a plane
  int64_t window_count() const { return static_cast<int64_t>(rows.windows) * columns.windows; }

  bool has_windows() const { return rows.kernel > 0 && columns.kernel > 0; }

  bool is_window(int kernel, int stride) const {
    const auto fits = [&](const Axis& axis) {
      return axis.kernel == kernel && axis.stride == stride && axis.dilation == 1;
    };
    return fits(rows) && fits(columns);
  }

  // 2 x 2 windows without overlap or gap, by far the most common pooling.
  bool is_tiled_by_two() const {
    const auto fits = [](const Axis& axis) { return axis.padding == 0 && axis.windows <= (axis.size + 1) / 2; };
    return is_window(2, 2) && fits(rows) && fits(columns);
  }

  // The same on contiguous planes whose columns all lie in whole windows.
  bool has_whole_rows_of_two() const {
    return is_tiled_by_two() && !channels_last && columns.size == 2 * static_cast<int64_t>(columns.windows);
  }

  // Whether the channels of a pixel can be cut into packs of `width`.
  template <int width>
  bool has_packs() const {
    return channels_last && inner % width == 0;
  }
};

}  // namespace fastseg::cuda
