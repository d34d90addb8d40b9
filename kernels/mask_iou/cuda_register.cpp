// Binds the launchers of cuda.cu to torch.ops.fastseg._mask_iou on CUDA.
#include <optional>

#include "cuda/mask_arguments.h"
#include "mask_iou/cuda.h"

namespace fastseg::cuda {
namespace {

void forward(const Tensor& words_a, const Tensor& area_a, const Tensor& boxes_a, const Tensor& words_b,
             const Tensor& area_b, const Tensor& boxes_b, std::optional<Tensor> crowd, int64_t denominator, bool pairs,
             const Tensor& iou) {
  constexpr const char* op = "_mask_iou";
  const KnownMasks a = known_masks(op, words_a, area_a, boxes_a), b = known_masks(op, words_b, area_b, boxes_b);
  FASTSEG_CHECK(words_a.get_device_index() == words_b.get_device_index() && a.height == b.height &&
                    a.pitch == b.pitch && (!pairs || a.count == b.count),
                "fastseg::_mask_iou: the masks of a and b differ in device, size or number");
  if (crowd) check_list(op, words_a, *crowd, "crowd", ScalarType::Bool, b.count);
  check_list(op, words_a, iou, "iou", ScalarType::Float, pairs ? a.count : a.count * b.count);
  if (iou.numel() == 0) return;
  const OnDeviceOf device(words_a);
  const bool same = a.words == b.words && a.areas == b.areas && a.boxes == b.boxes && a.count == b.count;
  const IouOptions options{crowd ? crowd->const_data_ptr<bool>() : nullptr, denominator != 0, same && !crowd};
  float* to = iou.mutable_data_ptr<float>();
  check_launch(pairs ? launch_mask_iou_of_pairs(a, b, options, to, device.stream())
                     : launch_mask_iou(a, b, options, to, device.stream()),
               op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_mask_iou", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda
