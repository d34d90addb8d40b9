// Max pooling with indices on CUDA. See README.md, and pooling/cuda_shape.h for layouts and formats of indices.
#include "max_pool2d/cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/accumulate.h"
#include "max_pool2d/cuda_windows.h"
#include "max_unpool2d/cuda.h"

namespace fastseg::cuda {
namespace {

constexpr int scatter_threads = 256;

// The first maximum so far, or the last NaN.
template <typename value_t>
struct Maximum {
  value_t value = -INFINITY;
  int tap = -1;  // none yet

  __device__ void offer(value_t candidate, int candidate_tap) {
    if (tap < 0 || candidate > value || candidate != candidate) {
      value = candidate;
      tap = candidate_tap;
    }
  }
};

// The index of a tap of the window that starts at (top, left).
template <typename index_t, typename RowAxis, typename ColumnAxis>
__device__ index_t index_of_tap(int tap, int top, int left, const RowAxis& rows, const ColumnAxis& columns) {
  if constexpr (std::is_same_v<index_t, uint8_t>) {
    return static_cast<uint8_t>(tap);
  } else {
    const int row_tap = tap / columns.kernel_size(), column_tap = tap - row_tap * columns.kernel_size();
    const int64_t row = top + row_tap * rows.spread();
    return row * columns.size + left + column_tap * columns.spread();
  }
}

// Windows of any geometry: a thread takes one window of `width` neighbouring channels (1 in contiguous tensors).
template <typename scalar_t, typename index_t, int width, int fixed_kernel, int fixed_stride>
__global__ void __launch_bounds__(cell_threads)
    max_pool2d_forward_kernel(CellGrid grid,                       // over [outer, PH, PW, inner / width]
                              const scalar_t* __restrict__ input,  // [outer, H, W, inner]
                              scalar_t* __restrict__ output,       // [outer, PH, PW, inner]
                              index_t* __restrict__ indices,       // [outer, PH, PW, inner]
                              Axis row_axis, Axis column_axis, int inner) {
  using value_t = accumulate_t<scalar_t>;
  constexpr int unrolled = fixed_kernel > 0 ? fixed_kernel : 1;
  const WindowAxis<fixed_kernel, fixed_stride> rows(row_axis), columns(column_axis);
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t channel = static_cast<int64_t>(at.group) * width;
    const int top = rows.start(at.row), left = columns.start(at.column);
    const int64_t plane = at.outer * rows.size * columns.size;
    Maximum<value_t> best[width];
#pragma unroll unrolled
    for (int i = 0; i < rows.kernel_size(); ++i) {
      const int row = top + i * rows.spread();
      if (!rows.holds(row)) continue;
      const int64_t line = plane + static_cast<int64_t>(row) * columns.size;
#pragma unroll unrolled
      for (int j = 0; j < columns.kernel_size(); ++j) {
        const int column = left + j * columns.spread();
        if (!columns.holds(column)) continue;
        const auto values = load_pack<width>(input + (line + column) * inner + channel);
        const int tap = i * columns.kernel_size() + j;
#pragma unroll
        for (int k = 0; k < width; ++k) best[k].offer(static_cast<value_t>(values.values[k]), tap);
      }
    }
    // If no tap of a dilated window lies in a small plane, torch gives -inf and the first tap after the padding.
    const int no_tap = rows.first_tap(top) * columns.kernel_size() + columns.first_tap(left);
    Pack<scalar_t, width> values;
    Pack<index_t, width> index;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      values.values[k] = static_cast<scalar_t>(best[k].value);
      index.values[k] = index_of_tap<index_t>(best[k].tap < 0 ? no_tap : best[k].tap, top, left, rows, columns);
    }
    const int64_t window = (at.outer * rows.windows + at.row) * columns.windows + at.column;
    store_pack<width>(output + window * inner + channel, values);
    store_pack<width>(indices + window * inner + channel, index);
  }
}

// Contiguous planes tiled by 2 x 2 windows: a thread loads two rows of 2 * width elements as two packs. Where H is
// odd, the last windows of ceil mode have one row.
template <typename scalar_t, typename index_t, int width>
__global__ void __launch_bounds__(cell_threads)
    max_pool2d_forward_rows_kernel(CellGrid grid,                       // over [planes, PH, 1, PW / width]
                                   const scalar_t* __restrict__ input,  // [planes, H, 2 * PW]
                                   scalar_t* __restrict__ output,       // [planes, PH, PW]
                                   index_t* __restrict__ indices,       // [planes, PH, PW]
                                   Axis row_axis, Axis column_axis) {
  using value_t = accumulate_t<scalar_t>;
  const WindowAxis<2, 2> rows(row_axis), columns(column_axis);
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int first_window = at.group * width, top = 2 * at.row;
    const scalar_t* line =
        input + (at.outer * rows.size + top) * (2 * static_cast<int64_t>(columns.windows)) + 2 * first_window;
    const bool two_rows = top + 1 < rows.size;
    const auto upper = load_pack<2 * width>(line);
    const auto lower = two_rows ? load_pack<2 * width>(line + 2 * static_cast<int64_t>(columns.windows)) : upper;
    Pack<scalar_t, width> values;
    Pack<index_t, width> index;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      Maximum<value_t> best;
      best.offer(static_cast<value_t>(upper.values[2 * k]), 0);
      best.offer(static_cast<value_t>(upper.values[2 * k + 1]), 1);
      if (two_rows) {
        best.offer(static_cast<value_t>(lower.values[2 * k]), 2);
        best.offer(static_cast<value_t>(lower.values[2 * k + 1]), 3);
      }
      values.values[k] = static_cast<scalar_t>(best.value);
      index.values[k] = index_of_tap<index_t>(best.tap, top, 2 * (first_window + k), rows, columns);
    }
    const int64_t window = (at.outer * rows.windows + at.row) * columns.windows + first_window;
    store_pack<width>(output + window, values);
    store_pack<width>(indices + window, index);
  }
}

// Flat indices that may point anywhere in or outside the plane: a block takes a plane, clears it and adds the gradients
// in row-major order, one per thread and round. If threads of a round have the same target, the first adds all.
template <typename scalar_t>
__global__ void __launch_bounds__(scatter_threads)
    scatter_sums_kernel(const scalar_t* __restrict__ grad_output,  // [outer, sources, inner]
                        const int64_t* __restrict__ indices,       // [outer, sources, inner]
                        scalar_t* grad_input,                      // [outer, targets, inner]
                        int64_t outer, int64_t sources, int64_t targets, int inner) {
  using value_t = accumulate_t<scalar_t>;
  FASTSEG_SHARED(int64_t, round_targets, [scatter_threads]);
  FASTSEG_SHARED(value_t, round_values, [scatter_threads]);
  const int self = threadIdx.x;
  for (int64_t plane = blockIdx.x; plane < outer * inner; plane += gridDim.x) {
    const int64_t image = plane / inner, channel = plane - image * inner;
    const int64_t first_source = image * sources * inner + channel;
    scalar_t* to = grad_input + image * targets * inner + channel;
    for (int64_t i = self; i < targets; i += scatter_threads) to[i * inner] = static_cast<scalar_t>(0.0f);
    for (int64_t first = 0; first < sources; first += scatter_threads) {
      int64_t target = -1;
      if (first + self < sources) {
        const int64_t source = first_source + (first + self) * inner;
        target = indices[source];
        if (target >= targets) target = -1;
        round_values[self] = static_cast<value_t>(grad_output[source]);
      }
      round_targets[self] = target;
      __syncthreads();
      bool adds = target >= 0;
      for (int i = 0; i < self && adds; ++i) adds = round_targets[i] != target;
      if (adds) {
        value_t total = static_cast<value_t>(to[target * inner]);
        for (int i = self; i < scatter_threads; ++i) {
          if (round_targets[i] == target) total += round_values[i];
        }
        to[target * inner] = static_cast<scalar_t>(total);
      }
      __syncthreads();
    }
  }
}

// ---- launches ----

template <int width, typename scalar_t, typename index_t>
cudaError_t launch_forward_windows(const scalar_t* input, scalar_t* output, index_t* indices, const PoolShape& shape,
                                   cudaStream_t stream) {
  const Cells cells{shape.outer, shape.rows.windows, shape.columns.windows, shape.inner / width};
  auto kernel = max_pool2d_forward_kernel<scalar_t, index_t, width, 0, 0>;
  if (shape.is_window(2, 2)) kernel = max_pool2d_forward_kernel<scalar_t, index_t, width, 2, 2>;
  if (shape.is_window(3, 2)) kernel = max_pool2d_forward_kernel<scalar_t, index_t, width, 3, 2>;
  return launch_over_cells(cells, stream, kernel, input, output, indices, shape.rows, shape.columns, shape.inner);
}

// Uses the widest packs for which rows and pointers are aligned.
template <int width, typename scalar_t, typename index_t>
cudaError_t launch_forward_rows(const scalar_t* input, scalar_t* output, index_t* indices, const PoolShape& shape,
                                cudaStream_t stream) {
  const bool aligned = shape.columns.windows % width == 0 && holds_packs<2 * width>(input) &&
                       holds_packs<width>(output) && holds_packs<width>(indices);
  if (aligned) {
    const Cells cells{shape.outer, shape.rows.windows, 1, shape.columns.windows / width};
    return launch_over_cells(cells, stream, max_pool2d_forward_rows_kernel<scalar_t, index_t, width>, input, output,
                             indices, shape.rows, shape.columns);
  }
  if constexpr (width > 1) return launch_forward_rows<width / 2>(input, output, indices, shape, stream);
  else return launch_forward_windows<1>(input, output, indices, shape, stream);
}

template <int width, typename scalar_t, typename index_t>
cudaError_t launch_sums(const scalar_t* grad_output, const index_t* indices, scalar_t* grad_input,
                        const PoolShape& shape, cudaStream_t stream) {
  const Cells cells{shape.outer, shape.rows.size, shape.columns.size, shape.inner / width};
  auto kernel = gather_kernel<scalar_t, index_t, width, 0, 0>;
  if (shape.is_window(3, 2)) kernel = gather_kernel<scalar_t, index_t, width, 3, 2>;
  return launch_over_cells(cells, stream, kernel, grad_output, indices, grad_input, shape.rows, shape.columns,
                           shape.inner);
}

template <typename scalar_t>
cudaError_t launch_scatter_sums(const scalar_t* grad_output, const int64_t* indices, scalar_t* grad_input,
                                const PoolShape& shape, cudaStream_t stream) {
  return launch_over_planes(shape.outer * shape.inner, scatter_threads, stream, scatter_sums_kernel<scalar_t>,
                            grad_output, indices, grad_input, shape.outer, shape.window_count(), shape.element_count(),
                            shape.inner);
}

// Without sums, elements are copied as bits.
template <int bytes>
struct bits;
template <>
struct bits<2> {
  using type = uint16_t;
};
template <>
struct bits<4> {
  using type = uint32_t;
};
template <>
struct bits<8> {
  using type = uint64_t;
};

}  // namespace

template <typename scalar_t, typename index_t>
cudaError_t launch_max_pool2d_forward(const scalar_t* input, scalar_t* output, index_t* indices, const PoolShape& shape,
                                      cudaStream_t stream) {
  constexpr int width = 16 / sizeof(scalar_t);
  if (shape.has_packs<width>() && holds_packs<width>(input) && holds_packs<width>(output) &&
      holds_packs<width>(indices)) {
    return launch_forward_windows<width>(input, output, indices, shape, stream);
  }
  if (shape.has_whole_rows_of_two()) {
    return launch_forward_rows<width / 2>(input, output, indices, shape, stream);
  }
  return launch_forward_windows<1>(input, output, indices, shape, stream);
}

template <typename scalar_t, typename index_t>
cudaError_t launch_max_pool2d_backward(const scalar_t* grad_output, const index_t* indices, scalar_t* grad_input,
                                       const PoolShape& shape, cudaStream_t stream) {
  if constexpr (std::is_same_v<index_t, int64_t>) {
    if (!shape.has_windows()) return launch_scatter_sums(grad_output, indices, grad_input, shape, stream);
  }
  if (shape.is_tiled_by_two()) {
    using bits_t = typename bits<sizeof(scalar_t)>::type;
    return launch_max_unpool2d_forward(reinterpret_cast<const bits_t*>(grad_output), indices,
                                       reinterpret_cast<bits_t*>(grad_input), shape, nullptr, stream);
  }
  constexpr int width = 16 / sizeof(scalar_t);
  if (shape.has_packs<width>() && holds_packs<width>(grad_output) && holds_packs<width>(grad_input) &&
      holds_packs<width>(indices)) {
    return launch_sums<width>(grad_output, indices, grad_input, shape, stream);
  }
  return launch_sums<1>(grad_output, indices, grad_input, shape, stream);
}

#define INSTANTIATE_FOR(scalar_t, index_t)                                                                      \
  template cudaError_t launch_max_pool2d_forward(const scalar_t*, scalar_t*, index_t*, const PoolShape&,        \
                                                 cudaStream_t);                                                 \
  template cudaError_t launch_max_pool2d_backward(const scalar_t*, const index_t*, scalar_t*, const PoolShape&, \
                                                  cudaStream_t);
#define INSTANTIATE(scalar_t)        \
  INSTANTIATE_FOR(scalar_t, int64_t) \
  INSTANTIATE_FOR(scalar_t, uint8_t)
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)

}  // namespace fastseg::cuda
