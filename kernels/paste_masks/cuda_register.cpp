// Binds the launchers of cuda.cu to torch.ops.fastseg._paste_masks and _upsample_masks on CUDA.
#include "paste_masks/cuda.h"

#include <vector>

#include "cuda/host.h"
#include "paste_masks/arguments.h"

namespace fastseg::cuda {
namespace {

void paste(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, double threshold, bool torchvision,
           int64_t form, Tensor output) {
  constexpr const char* op = "_paste_masks";
  check_device(masks, op, "masks");
  const auto problem = paste_masks::make_problem(op, masks, height, width, threshold, !torchvision, form, output);
  check_list(op, masks, boxes, "boxes", ScalarType::Float, 4 * problem.images);
  const auto convention = torchvision ? paste_masks::Convention::torchvision : paste_masks::Convention::detectron2;
  const OnDeviceOf device(masks);
  const cudaError_t error = paste_masks::with_mask_type<c10::Half, c10::BFloat16>(op, masks, [&](auto zero) {
    return launch_paste_masks(problem, masks.const_data_ptr<decltype(zero)>(), boxes.const_data_ptr<float>(),
                              convention, output.mutable_data_ptr(), device.stream());
  });
  check_launch(error, op);
}

void upsample(const Tensor& logits, std::vector<int64_t> padded, std::vector<int64_t> input, int64_t height,
              int64_t width, double threshold, int64_t form, Tensor output) {
  constexpr const char* op = "_upsample_masks";
  check_device(logits, op, "logits");
  FASTSEG_CHECK(padded.size() == 2 && input.size() == 2, "fastseg::", op, ": sizes must be (height, width)");
  const auto problem = paste_masks::make_problem(op, logits, height, width, threshold, false, form, output);
  const auto down = paste_masks::make_axis(op, problem.rows, padded[0], input[0], height);
  const auto across = paste_masks::make_axis(op, problem.columns, padded[1], input[1], width);
  const OnDeviceOf device(logits);
  const cudaError_t error = paste_masks::with_mask_type<c10::Half, c10::BFloat16>(op, logits, [&](auto zero) {
    return launch_upsample_masks(problem, logits.const_data_ptr<decltype(zero)>(), down, across,
                                 output.mutable_data_ptr(), device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_paste_masks", TORCH_BOX(&paste));
  m.impl("_upsample_masks", TORCH_BOX(&upsample));
}

}  // namespace fastseg::cuda
