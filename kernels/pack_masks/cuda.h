// Launchers of cuda.cu, free of torch.
#pragma once

#include "cuda/known_masks.h"

namespace fastseg::cuda {

// Masks of any strides, except that the pixels of a row are contiguous.
template <typename pixel_t>
struct Pixels {
  const pixel_t* data;
  long long width, mask_stride, row_stride;
};

// A pixel belongs to its mask if it is above the threshold: an integer from -1 to 255 for uint8, else a value of the
// masks' type.
template <typename pixel_t>
cudaError_t launch_pack_masks(const Pixels<pixel_t>& pixels, double threshold,
                              unsigned* words,  // [masks, height, ceil(width / 32)]
                              long long masks, long long height, cudaStream_t stream);

template <typename pixel_t>
cudaError_t launch_unpack_masks(const unsigned* words,  // [rows, ceil(width / 32)]
                                long long rows, long long width,
                                pixel_t* masks,  // [rows, width]
                                cudaStream_t stream);

}  // namespace fastseg::cuda
