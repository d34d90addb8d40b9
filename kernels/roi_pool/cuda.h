// Launchers of cuda.cu, free of torch: instantiated there for float, c10::Half and c10::BFloat16.
#pragma once

#include "roi_align/cuda.h"

namespace fastseg::cuda {

// The last NaN, else the first maximum, of each bin, and its place y * W + x; 0 and -1 for bins without a cell and for
// boxes whose image does not exist.
template <typename scalar_t>
cudaError_t launch_roi_pool_forward(const Pyramid<const scalar_t>& input,  // of one level
                                    const float* boxes,                    // [K, 5]
                                    const MapView<scalar_t>& output,       // [K, C, PH, PW]
                                    const MapView<int32_t>& argmax,        // [K, C, PH, PW]
                                    int64_t count, cudaStream_t stream);

// Writes every cell once: the sum, in the order of the boxes, of the gradients whose place it is.
template <typename scalar_t>
cudaError_t launch_roi_pool_backward(const MapView<const scalar_t>& grad_output,  // [K, C, PH, PW]
                                     const MapView<const int32_t>& argmax,        // [K, C, PH, PW]
                                     const float* boxes,                          // [K, 5]
                                     const Pyramid<scalar_t>& grad_input,         // of one level
                                     int64_t count, cudaStream_t stream);

}  // namespace fastseg::cuda
