// Binds the launchers of cuda.cu to torch.ops.fastseg._roi_align and _roi_align_backward on CUDA.
#include <initializer_list>
#include <optional>
#include <vector>

#include "roi_align/cuda_arguments.h"

namespace fastseg::cuda {
namespace {

using Numbers = std::vector<double>;
using Level = std::optional<Tensor>;

template <typename element_t>
Pyramid<element_t> pyramid_of(const Expected& expected, std::initializer_list<const Tensor*> tensors,
                              const Numbers& scales, const Numbers& areas) {
  FASTSEG_CHECK(!scales.empty() && scales.size() <= tensors.size() && areas.size() + 1 == scales.size(),
                "fastseg::", expected.op, ": levels, scales and areas must fit each other");
  Pyramid<element_t> pyramid{};
  pyramid.levels = static_cast<int>(scales.size());
  pyramid.images = static_cast<int>(expected.images);
  pyramid.channels = static_cast<int>(expected.channels);
  for (int level = 0; level < pyramid.levels; ++level) {
    const Tensor* tensor = tensors.begin()[level];
    FASTSEG_CHECK(tensor != nullptr, "fastseg::", expected.op, ": a level is missing");
    pyramid.maps[level] = view_of<element_t>(expected, *tensor, "a level");
    FASTSEG_CHECK(tensor->size(2) > 0 && tensor->size(3) > 0, "fastseg::", expected.op, ": a level has no cells");
    pyramid.scales[level] = static_cast<float>(scales[level]);
    if (level > 0) pyramid.areas[level - 1] = areas[level - 1];
  }
  return pyramid;
}

BoxSampling sampling_of(const Tensor& boxes, int64_t sampling_ratio, bool aligned) {
  return {boxes.size(0), static_cast<int>(sampling_ratio), aligned};
}

void forward(const Tensor& input, Level input1, Level input2, Level input3, Level input4, const Tensor& boxes,
             std::vector<int64_t> /*output_size*/, Numbers spatial_scales, Numbers level_areas, int64_t sampling_ratio,
             bool aligned, bool /*channels_last*/, Tensor output) {
  constexpr const char* op = "_roi_align";
  FASTSEG_CHECK(input.dim() == 4 && boxes.dim() == 2, "fastseg::", op, ": tensors do not fit");
  if (output.numel() == 0) return;
  const Expected maps{op, input, input.size(0), input.size(1), input.scalar_type()};
  const Expected pooled{op, input, boxes.size(0), input.size(1), input.scalar_type()};
  const float* box_values = boxes_of(op, boxes, input, boxes.size(0));
  const auto pointer = [](const Level& level) { return level ? &*level : nullptr; };
  const OnDeviceOf device(input);
  const cudaError_t error = with_gpu_type(op, input, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto pyramid =
        pyramid_of<const scalar_t>(maps, {&input, pointer(input1), pointer(input2), pointer(input3), pointer(input4)},
                                   spatial_scales, level_areas);
    return launch_roi_align_forward(pyramid, box_values, view_of<scalar_t>(pooled, output, "output"),
                                    sampling_of(boxes, sampling_ratio, aligned), device.stream());
  });
  check_launch(error, op);
}

void backward(const Tensor& grad_output, const Tensor& boxes, std::vector<int64_t> /*sizes*/, Numbers spatial_scales,
              Numbers level_areas, int64_t sampling_ratio, bool aligned, bool /*channels_last*/, Tensor grad_input,
              Tensor grad_input1, Tensor grad_input2, Tensor grad_input3, Tensor grad_input4) {
  constexpr const char* op = "_roi_align_backward";
  FASTSEG_CHECK(grad_output.dim() == 4 && grad_input.dim() == 4 && boxes.dim() == 2, "fastseg::", op,
                ": tensors do not fit");
  if (grad_input.numel() == 0) return;
  const int64_t channels = grad_output.size(1);
  const Expected maps{op, grad_output, grad_input.size(0), channels, grad_output.scalar_type()};
  const Expected pooled{op, grad_output, boxes.size(0), channels, grad_output.scalar_type()};
  const float* box_values = boxes_of(op, boxes, grad_output, boxes.size(0));
  const OnDeviceOf device(grad_output);
  const cudaError_t error = with_gpu_type(op, grad_output, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto pyramid = pyramid_of<scalar_t>(
        maps, {&grad_input, &grad_input1, &grad_input2, &grad_input3, &grad_input4}, spatial_scales, level_areas);
    return launch_roi_align_backward(view_of<const scalar_t>(pooled, grad_output, "grad_output"), box_values, pyramid,
                                     sampling_of(boxes, sampling_ratio, aligned), device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_roi_align", TORCH_BOX(&forward));
  m.impl("_roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace fastseg::cuda
