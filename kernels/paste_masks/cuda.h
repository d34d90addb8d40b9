// Launchers of cuda.cu, free of torch: instantiated there for every type of masks.
#pragma once

#include "cuda/cuda_compat.h"
#include "paste_masks/sampling.h"

namespace fastseg::cuda {

// Output: uint32 [images, height, words], or uint8 or float [images, height, width], by the form of the problem.

template <typename scalar_t>
cudaError_t launch_paste_masks(const paste_masks::Problem& problem,
                               const scalar_t* masks,  // [images, rows, columns]
                               const float* boxes,     // [images, 4]
                               paste_masks::Convention convention, void* output, cudaStream_t stream);

template <typename scalar_t>
cudaError_t launch_upsample_masks(const paste_masks::Problem& problem,
                                  const scalar_t* logits,  // [images, rows, columns]
                                  const paste_masks::ResizeAxis& down, const paste_masks::ResizeAxis& across,
                                  void* output, cudaStream_t stream);

}  // namespace fastseg::cuda
