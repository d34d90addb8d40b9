// Launchers of cuda.cu, free of torch. Unpooling copies elements without looking at them: instantiated for uint16_t,
// uint32_t and uint64_t, with int64 (flat) and uint8 (compact) indices. Layouts and indices: pooling/cuda_shape.h.
#pragma once

#include "cuda/cuda_compat.h"
#include "pooling/cuda_shape.h"

namespace fastseg::cuda {

// Every element of the output becomes the last input, in row-major order, whose index points at it, or zero.
//
// With 2 x 2 windows side by side it is done in one pass, which takes every index to lie inside its own window. Flat
// indices may point anywhere: that pass raises *misplaced when it meets one elsewhere in the plane, and a second
// kernel, which else returns at once, then does it all over. Null `misplaced`: indices outside their window are not
// looked for. With other windows, or none, the second kernel does it at once.
template <typename element_t, typename index_t>
cudaError_t launch_max_unpool2d_forward(const element_t* input,  // [outer, PH, PW, inner]
                                        const index_t* indices,  // [outer, PH, PW, inner]
                                        element_t* output,       // [outer, H, W, inner]
                                        const PoolShape& shape,
                                        unsigned* misplaced,  // scratch: one word of device memory, or null
                                        cudaStream_t stream);

// Every element's gradient is the one at its index, or zero where that is not in the plane.
template <typename element_t, typename index_t>
cudaError_t launch_max_unpool2d_backward(const element_t* grad_output,  // [outer, H, W, inner]
                                         const index_t* indices,        // [outer, PH, PW, inner]
                                         element_t* grad_input,         // [outer, PH, PW, inner]
                                         const PoolShape& shape, cudaStream_t stream);

}  // namespace fastseg::cuda
