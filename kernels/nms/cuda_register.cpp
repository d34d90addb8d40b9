// Binds the launcher of cuda.cu to torch.ops.fastseg._nms on CUDA.
#include "nms/cuda.h"

#include <optional>

#include "nms/cuda_arguments.h"

namespace fastseg::cuda {
namespace {

constexpr const char* op = "_nms";

// The indices of boxes by descending score; equal scores by index.
Tensor order_of(const Tensor& scores) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(scores), from(std::optional<bool>(true)), from(int64_t{0}), from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // frees the sorted scores, which are not needed
  return torch::stable::detail::to<Tensor>(stack[1]);
}

void forward(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> idxs, double iou_threshold, int64_t most,
             Tensor indices, Tensor found) {
  const int64_t count = check_boxes(op, boxes, scores, idxs);
  check_list(op, boxes, indices, "indices", ScalarType::Long, most);
  check_list(op, boxes, found, "count", ScalarType::Long, 1);
  const OnDeviceOf device(boxes);
  const Tensor order = order_of(scores);
  const Tensor sorted = torch::stable::new_empty(boxes, {count, 4});
  const Tensor classes = torch::stable::new_empty(boxes, {idxs ? count : 0}, ScalarType::Long);
  const int64_t words = nms_words(count);
  const Tensor bits = torch::stable::new_empty(boxes, {std::min(count, nms_strip), words}, ScalarType::Long);
  const Tensor removed = torch::stable::new_empty(boxes, {words}, ScalarType::Long);
  const auto words_of = [](const Tensor& tensor) {
    return static_cast<unsigned long long*>(tensor.mutable_data_ptr());
  };
  const cudaError_t error = with_real_type(boxes, [&](auto zero) {
    using real_t = decltype(zero);
    return launch_nms(boxes.const_data_ptr<real_t>(), order.const_data_ptr<int64_t>(),
                      idxs ? idxs->const_data_ptr<int64_t>() : nullptr, count, iou_threshold,
                      sorted.mutable_data_ptr<real_t>(), idxs ? classes.mutable_data_ptr<int64_t>() : nullptr,
                      words_of(bits), words_of(removed), most, indices.mutable_data_ptr<int64_t>(),
                      found.mutable_data_ptr<int64_t>(), device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_nms", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda
