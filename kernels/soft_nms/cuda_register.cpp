// Binds the launcher of cuda.cu to torch.ops.fastseg._soft_nms on CUDA.
#include "soft_nms/cuda.h"

#include "cuda/pack.h"
#include "nms/cuda_arguments.h"

namespace fastseg::cuda {
namespace {

constexpr const char* op = "_soft_nms";

void forward(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> idxs, double iou_threshold, bool gaussian,
             double sigma, double min_score, int64_t most, Tensor picked_scores, Tensor indices, Tensor found) {
  const int64_t count = check_boxes(op, boxes, scores, idxs);
  check_list(op, boxes, indices, "indices", ScalarType::Long, most);
  check_list(op, boxes, picked_scores, "picked_scores", boxes.scalar_type(), most);
  check_list(op, boxes, found, "count", ScalarType::Long, 1);
  const OnDeviceOf device(boxes);
  // A view may begin at any address.
  const Tensor corners = is_aligned(boxes.const_data_ptr(), 16) ? boxes : torch::stable::clone(boxes);
  const Tensor current = torch::stable::new_empty(boxes, {count});
  const cudaError_t error = with_real_type(boxes, [&](auto zero) {
    using real_t = decltype(zero);
    const auto by = soft_nms::Decay<real_t>::make(iou_threshold, gaussian, sigma);
    return launch_soft_nms(corners.const_data_ptr<real_t>(), scores.const_data_ptr<real_t>(),
                           idxs ? idxs->const_data_ptr<int64_t>() : nullptr, count, by, min_score,
                           current.mutable_data_ptr<real_t>(), most, indices.mutable_data_ptr<int64_t>(),
                           picked_scores.mutable_data_ptr<real_t>(), found.mutable_data_ptr<int64_t>(),
                           device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_soft_nms", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda
