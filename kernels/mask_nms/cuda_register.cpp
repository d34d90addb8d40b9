// Binds the launchers of cuda.cu to torch.ops.fastseg._mask_nms on CUDA.
#include <optional>

#include "cuda/mask_arguments.h"
#include "mask_nms/cuda.h"

namespace fastseg::cuda {
namespace {

void forward(const Tensor& words, const Tensor& area, const Tensor& boxes, const Tensor& order,
             std::optional<Tensor> labels, double iou_threshold, std::optional<int64_t> max_output, const Tensor& keep,
             const Tensor& count) {
  constexpr const char* op = "_mask_nms";
  const KnownMasks masks = known_masks(op, words, area, boxes);
  check_list(op, words, order, "order", ScalarType::Long, masks.count);
  if (labels) check_list(op, words, *labels, "labels", ScalarType::Long, masks.count);
  const int64_t room = keep.numel();
  FASTSEG_CHECK(room >= (max_output ? 0 : masks.count), "fastseg::_mask_nms: keep has no room for all masks");
  check_list(op, words, keep, "keep", ScalarType::Long, room);
  check_list(op, words, count, "count", ScalarType::Long, 1);
  const OnDeviceOf device(words);
  const int64_t tiles = (masks.count + 31) / 32;
  // One tensor: a bit for every ordered pair, and one more row for the sweep.
  const Tensor scratch = torch::stable::new_empty(words, {masks.count + 1, tiles}, ScalarType::Int);
  auto* suppressed = reinterpret_cast<unsigned*>(scratch.mutable_data_ptr<int32_t>());
  if (masks.count > 0) {
    check_launch(launch_find_suppressed(masks, longs_of(order), labels ? longs_of(*labels) : nullptr, iou_threshold,
                                        suppressed, device.stream()),
                 op);
  }
  check_launch(launch_sweep(suppressed, longs_of(order), masks.count, room, suppressed + masks.count * tiles,
                            long_output(keep), long_output(count), device.stream()),
               op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_mask_nms", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda
