// Binds the launcher of cuda.cu to torch.ops.fastseg._mask_statistics on CUDA.
#include "cuda/mask_arguments.h"
#include "masks_to_boxes/cuda.h"

namespace fastseg::cuda {
namespace {

void statistics(const Tensor& words, const Tensor& area, const Tensor& boxes) {
  constexpr const char* op = "_mask_statistics";
  const KnownMasks masks = known_masks(op, words, area, boxes);
  if (masks.count == 0) return;
  const OnDeviceOf device(words);
  auto* found = reinterpret_cast<Box*>(boxes.mutable_data_ptr<int32_t>());
  check_launch(launch_mask_statistics(masks.words, masks.count, masks.height, masks.pitch, long_output(area), found,
                                      device.stream()),
               op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_mask_statistics", TORCH_BOX(&statistics)); }

}  // namespace fastseg::cuda
