// Launchers of cuda.cu, free of torch. Unpooling copies elements as bits: instantiated for uint16_t,
// uint32_t and uint64_t, with int64 (flat) and uint8 (compact) indices. Layouts and indices: pooling/cuda_shape.h.
#pragma once

#include "cuda/cuda_compat.h"
#include "pooling/cuda_shape.h"

namespace fastseg::cuda {

// Every element of the output becomes the last input, in row-major order, whose index is the element, or zero.
//
// For 2 x 2 windows without overlap one pass suffices if every index lies inside its own window. Flat indices may point
// elsewhere in the plane: the pass then sets *misplaced, and a second kernel, which otherwise returns at once, computes
// the output again. Null `misplaced`: indices outside of their window are not detected. With other windows, or none,
// only the second kernel runs.
template <typename element_t, typename index_t>
cudaError_t launch_max_unpool2d_forward(const element_t* input,  // [outer, PH, PW, inner]
                                        const index_t* indices,  // [outer, PH, PW, inner]
                                        element_t* output,       // [outer, H, W, inner]
                                        const PoolShape& shape,
                                        unsigned* misplaced,  // scratch: one word of device memory, or null
                                        cudaStream_t stream);

// The gradient of every element is the one at its index, or zero if that is not in the plane.
template <typename element_t, typename index_t>
cudaError_t launch_max_unpool2d_backward(const element_t* grad_output,  // [outer, H, W, inner]
                                         const index_t* indices,        // [outer, PH, PW, inner]
                                         element_t* grad_input,         // [outer, PH, PW, inner]
                                         const PoolShape& shape, cudaStream_t stream);

}  // namespace fastseg::cuda
