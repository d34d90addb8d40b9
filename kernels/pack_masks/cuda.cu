// Packing and unpacking of masks on CUDA: the lanes of a warp are the pixels of a word. See README.md.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "pack_masks/cuda.h"

#include "cuda/packed_masks.h"

namespace fastseg::cuda {
namespace {

constexpr int words_per_warp = 8;  // whose pixels are loaded before the first is used

template <typename pixel_t>
using compared_t = std::conditional_t<std::is_same_v<pixel_t, uint8_t>, int,
                                      std::conditional_t<std::is_same_v<pixel_t, double>, double, float>>;

template <typename pixel_t>
__global__ void __launch_bounds__(mask_threads) pack_masks_kernel(Pixels<pixel_t> pixels, compared_t<pixel_t> threshold,
                                                                  unsigned* __restrict__ words,  // [rows, pitch]
                                                                  long long rows, long long height, long long pitch) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const long long groups = (pitch + words_per_warp - 1) / words_per_warp;
  for (long long item = warp_of_grid(); item < rows * groups; item += warps_of_grid()) {
    const long long row = item / groups, first = item % groups * words_per_warp;
    const pixel_t* from = pixels.data + row / height * pixels.mask_stride + row % height * pixels.row_stride;
    bool inside[words_per_warp];
#pragma unroll
    for (int k = 0; k < words_per_warp; ++k) {
      const long long x = (first + k) * mask_word + lane;
      inside[k] = x<pixels.width&& static_cast<compared_t<pixel_t>>(from[x])> threshold;
    }
#pragma unroll
    for (int k = 0; k < words_per_warp; ++k) {
      const unsigned bits = __ballot_sync(all_lanes, inside[k]);
      if (lane == k && first + k < pitch) words[row * pitch + first + k] = bits;
    }
  }
}

template <typename pixel_t>
__global__ void __launch_bounds__(mask_threads)
    unpack_masks_kernel(const unsigned* __restrict__ words,  // [rows, pitch]
                        long long rows, long long width, long long pitch,
                        pixel_t* __restrict__ masks) {  // [rows, width]
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  for (long long item = warp_of_grid(); item < rows * pitch; item += warps_of_grid()) {
    const long long row = item / pitch, x = item % pitch * mask_word + lane;
    const unsigned bits = words[item];
    if (x < width) masks[row * width + x] = static_cast<pixel_t>(static_cast<float>(bits >> lane & 1));
  }
}

}  // namespace

template <typename pixel_t>
cudaError_t launch_pack_masks(const Pixels<pixel_t>& pixels, double threshold, unsigned* words, long long masks,
                              long long height, cudaStream_t stream) {
  const long long pitch = words_in_row(pixels.width);
  const long long warps = masks * height * ((pitch + words_per_warp - 1) / words_per_warp);
  FASTSEG_LAUNCH((pack_masks_kernel<pixel_t>), dim3(blocks_for_warps(warps)), dim3(mask_threads), 0, stream, pixels,
                 static_cast<compared_t<pixel_t>>(threshold), words, masks * height, height, pitch);
  return cudaGetLastError();
}

template <typename pixel_t>
cudaError_t launch_unpack_masks(const unsigned* words, long long rows, long long width, pixel_t* masks,
                                cudaStream_t stream) {
  const long long pitch = words_in_row(width);
  FASTSEG_LAUNCH((unpack_masks_kernel<pixel_t>), dim3(blocks_for_warps(rows * pitch)), dim3(mask_threads), 0, stream,
                 words, rows, width, pitch, masks);
  return cudaGetLastError();
}

#define INSTANTIATE(pixel_t)                                                                              \
  template cudaError_t launch_pack_masks(const Pixels<pixel_t>&, double, unsigned*, long long, long long, \
                                         cudaStream_t);                                                   \
  template cudaError_t launch_unpack_masks(const unsigned*, long long, long long, pixel_t*, cudaStream_t);
INSTANTIATE(uint8_t)
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)

}  // namespace fastseg::cuda
