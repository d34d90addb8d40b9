// Binds the launcher of cuda.cu to torch.ops.fastseg._matrix_decay on CUDA.
#include <optional>

#include "cuda/mask_arguments.h"
#include "matrix_nms/cuda.h"

namespace fastseg::cuda {
namespace {

void forward(const Tensor& iou, const Tensor& order, std::optional<Tensor> labels, bool gaussian, double sigma,
             const Tensor& decay) {
  constexpr const char* op = "_matrix_decay";
  const int64_t count = order.numel();
  check_list(op, iou, iou, "iou", ScalarType::Float, count * count);
  check_list(op, iou, order, "order", ScalarType::Long, count);
  if (labels) check_list(op, iou, *labels, "labels", ScalarType::Long, count);
  check_list(op, iou, decay, "decay", ScalarType::Float, count);
  if (count == 0) return;
  const OnDeviceOf device(iou);
  const Ranking ranking{iou.const_data_ptr<float>(), longs_of(order), labels ? longs_of(*labels) : nullptr, count};
  const Tensor covered = torch::stable::new_empty(iou, {count}, ScalarType::Float);
  check_launch(launch_matrix_decay(ranking, gaussian, static_cast<float>(sigma), covered.mutable_data_ptr<float>(),
                                   decay.mutable_data_ptr<float>(), device.stream()),
               op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_matrix_decay", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda
