// Launcher of cuda.cu, free of torch.
#pragma once

#include "cuda/known_masks.h"

namespace fastseg::cuda {

struct IouOptions {
  const bool* crowd;        // [b.count] or null: divide by the area of the mask of a
  const long long* labels;  // [a.count] or null, only if a is b: masks of different labels count as disjoint
  bool over_smaller;        // divide by the smaller area instead of the union's
  bool symmetric;           // a is b: each pair is compared once
};

// value_t: float, or int64_t for the intersection alone.
template <typename value_t>
cudaError_t launch_mask_iou(const KnownMasks& a, const KnownMasks& b, const IouOptions& options,
                            value_t* iou,  // [a.count, b.count]
                            cudaStream_t stream);

// The IoU of mask i of a and mask i of b.
template <typename value_t>
cudaError_t launch_mask_iou_of_pairs(const KnownMasks& a, const KnownMasks& b, const IouOptions& options,
                                     value_t* iou,  // [a.count]
                                     cudaStream_t stream);

}  // namespace fastseg::cuda
