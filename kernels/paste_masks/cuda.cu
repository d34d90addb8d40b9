// Soft masks interpolated to the size of an image, on CUDA: a lane takes a column of pixels, a warp writes their bits
// as words. See README.md.
#include "paste_masks/cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fastseg::cuda {
namespace {

using namespace paste_masks;

constexpr int tile_rows = 64;
constexpr int tile_warps = 8;

// How the pixels of an image sample its mask. `border`: rows and columns of zeros around a mask, which indices include.

struct BoxSampling {
  static constexpr int taps = 2, border = 1;
  static constexpr bool covers_image = false;
  const float* boxes;  // [images, 4]
  Convention convention;

  struct Axis {
    BoxAxis axis;
    int first, end;

    __device__ bool sample(int pixel, Taps<2>& at) const {
      return pixel >= first && pixel < end && axis.sample(pixel, at);
    }
  };

  __device__ Axis axis(int64_t image, int side, int64_t cells, int64_t size) const {
    const float* box = boxes + 4 * image + side;
    Axis found{BoxAxis::make(convention, box[0], box[2], static_cast<int>(cells)), 0, 0};
    found.axis.reach(static_cast<int>(size), found.first, found.end);
    return found;
  }
  __device__ Axis across(int64_t image, const Problem& problem) const {
    return axis(image, 0, problem.columns, problem.width);
  }
  __device__ Axis down(int64_t image, const Problem& problem) const {
    return axis(image, 1, problem.rows, problem.height);
  }
};

template <int count>
struct ResizeSampling {
  static constexpr int taps = count, border = 0;
  static constexpr bool covers_image = true;
  ResizeAxis rows, columns;

  struct Axis {
    ResizeAxis axis;
    int first, end;

    __device__ bool sample(int pixel, Taps<count>& at) const {
      if (pixel >= end) return false;
      at = axis.sample<count>(pixel);
      return true;
    }
  };

  __device__ Axis across(int64_t, const Problem& problem) const {
    return {columns, 0, static_cast<int>(problem.width)};
  }
  __device__ Axis down(int64_t, const Problem& problem) const { return {rows, 0, static_cast<int>(problem.height)}; }
};

template <int border, typename scalar_t>
__device__ float element(const scalar_t* mask, const Problem& problem, int row, int column) {
  const int64_t y = row - border, x = column - border;
  if (border > 0 && (y < 0 || y >= problem.rows || x < 0 || x >= problem.columns)) return 0.0f;
  return static_cast<float>(mask[y * problem.columns + x]);
}

// Mixes the rows at each column of the mask first, as on the CPU.
template <int border, int count, typename scalar_t>
__device__ float value_at(const scalar_t* mask, const Problem& problem, const Taps<count>& down,
                          const Taps<count>& across) {
  float value = 0.0f;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    float mixed = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float from = element<border>(mask, problem, down.index[i], across.index[k]);
      const float part = multiply(from, down.weight[i]);
      mixed = i == 0 ? part : mixed + part;
    }
    const float part = multiply(across.weight[k], mixed);
    value = k == 0 ? part : value + part;
  }
  return value;
}

// A block takes a tile of 32 x 64 pixels, of one image after the other. Pixels without samples are already 0.
template <typename Sampling, typename scalar_t>
__global__ void __launch_bounds__(32 * tile_warps)
    sample_kernel(Problem problem, Sampling sampling,
                  const scalar_t* __restrict__ masks,  // [images, rows, columns]
                  int64_t words, void* __restrict__ output) {
  constexpr int taps = Sampling::taps;
  FASTSEG_SHARED(Taps<taps>, row_taps, [tile_rows]);
  FASTSEG_SHARED(bool, row_is_sampled, [tile_rows]);
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int word = static_cast<int>(blockIdx.x % words), x = word * word_pixels + lane;
  const int first_row = static_cast<int>(blockIdx.x / words) * tile_rows;
  for (int64_t image = blockIdx.y; image < problem.images; image += gridDim.y) {
    const auto across = sampling.across(image, problem), down = sampling.down(image, problem);
    const bool apart = across.first >= (word + 1) * word_pixels || across.end <= word * word_pixels ||
                       down.first >= first_row + tile_rows || down.end <= first_row;
    if (apart) continue;
    __syncthreads();  // the taps of the image before have been read
    for (int row = warp * 32 + lane; row < tile_rows; row += 32 * tile_warps) {
      row_is_sampled[row] = down.sample(first_row + row, row_taps[row]);
    }
    __syncthreads();
    Taps<taps> column_taps;
    const bool is_sampled = x < problem.width && across.sample(x, column_taps);
    const scalar_t* mask = masks + image * problem.rows * problem.columns;
    for (int row = warp; row < tile_rows; row += tile_warps) {
      if (!row_is_sampled[row]) continue;
      const int64_t line = image * problem.height + first_row + row;
      const float value = is_sampled ? value_at<Sampling::border>(mask, problem, row_taps[row], column_taps) : 0.0f;
      const bool belongs = is_sampled && value > problem.limit;
      if (problem.form == Form::packed) {
        const unsigned bits = __ballot_sync(~0u, belongs);
        if (lane == 0) static_cast<unsigned*>(output)[line * words + word] = bits;
      } else if (problem.form == Form::boolean) {
        if (is_sampled) static_cast<uint8_t*>(output)[line * problem.width + x] = belongs;
      } else if (is_sampled) {
        static_cast<float*>(output)[line * problem.width + x] = value;
      }
    }
  }
}

template <typename Sampling, typename scalar_t>
cudaError_t launch(const Problem& problem, const Sampling& sampling, const scalar_t* masks, void* output,
                   cudaStream_t stream) {
  if (problem.images == 0) return cudaSuccess;
  if (!Sampling::covers_image) {
    const int64_t elements = problem.images * problem.height * problem.row_size();
    const size_t bytes = static_cast<size_t>(elements) * (problem.form == Form::boolean ? 1 : 4);
    if (cudaError_t error = cudaMemsetAsync(output, 0, bytes, stream)) return error;
  }
  constexpr int64_t most_images = 65535;
  const int64_t words = (problem.width + word_pixels - 1) / word_pixels;
  const int64_t tiles = words * ((problem.height + tile_rows - 1) / tile_rows);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(problem.images < most_images ? problem.images : most_images));
  FASTSEG_LAUNCH((sample_kernel<Sampling, scalar_t>), grid, dim3(32, tile_warps), 0, stream, problem, sampling, masks,
                 words, output);
  return cudaGetLastError();
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_paste_masks(const Problem& problem, const scalar_t* masks, const float* boxes, Convention convention,
                               void* output, cudaStream_t stream) {
  return launch(problem, BoxSampling{boxes, convention}, masks, output, stream);
}

template <typename scalar_t>
cudaError_t launch_upsample_masks(const Problem& problem, const scalar_t* logits, const ResizeAxis& down,
                                  const ResizeAxis& across, void* output, cudaStream_t stream) {
  if (down.is_single() && across.is_single()) {
    return launch(problem, ResizeSampling<2>{down, across}, logits, output, stream);
  }
  return launch(problem, ResizeSampling<4>{down, across}, logits, output, stream);
}

#define INSTANTIATE(scalar_t)                                                                                       \
  template cudaError_t launch_paste_masks(const Problem&, const scalar_t*, const float*, Convention, void*,         \
                                          cudaStream_t);                                                            \
  template cudaError_t launch_upsample_masks(const Problem&, const scalar_t*, const ResizeAxis&, const ResizeAxis&, \
                                             void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)

}  // namespace fastseg::cuda
