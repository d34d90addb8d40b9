// Launcher of cuda.cu, free of torch.
#pragma once

#include "cuda/known_masks.h"

namespace fastseg::cuda {

cudaError_t launch_mask_statistics(const unsigned* words,  // [masks, height, pitch]
                                   long long masks, long long height, long long pitch,
                                   long long* area,  // [masks]
                                   Box* boxes,       // [masks]
                                   cudaStream_t stream);

}  // namespace fastseg::cuda
