// Launchers of cuda.cu, free of torch: instantiated there for float, double, c10::Half and c10::BFloat16, with
// int64 (flat) and uint8 (compact) indices. [outer, H, W, inner] and both kinds of index: see pooling/cuda_shape.h.
#pragma once

#include "cuda/cuda_compat.h"
#include "pooling/cuda_shape.h"

namespace fastseg::cuda {

// The first maximum of every window, or its last NaN; the padding does not count.
template <typename scalar_t, typename index_t>
cudaError_t launch_max_pool2d_forward(const scalar_t* input,  // [outer, H, W, inner]
                                      scalar_t* output,       // [outer, PH, PW, inner]
                                      index_t* indices,       // [outer, PH, PW, inner]
                                      const PoolShape& shape, cudaStream_t stream);

// For every element the sum of the gradients whose index is the element, in fp32 (double: double) and in row-major
// order. An index outside of its own window does not count, unless the shape has no windows: then any flat index does.
template <typename scalar_t, typename index_t>
cudaError_t launch_max_pool2d_backward(const scalar_t* grad_output,  // [outer, PH, PW, inner]
                                       const index_t* indices,       // [outer, PH, PW, inner]
                                       scalar_t* grad_input,         // [outer, H, W, inner]
                                       const PoolShape& shape, cudaStream_t stream);

}  // namespace fastseg::cuda
