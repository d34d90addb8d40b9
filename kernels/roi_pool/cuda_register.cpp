// Binds the launchers of cuda.cu to torch.ops.fastseg._roi_pool and _roi_pool_backward on CUDA.
#include "roi_pool/cuda.h"

#include <vector>

#include "roi_align/cuda_arguments.h"

namespace fastseg::cuda {
namespace {

// The map as a pyramid of one level.
template <typename element_t>
Pyramid<element_t> pyramid_of(const Expected& expected, const Tensor& map, double scale) {
  Pyramid<element_t> pyramid{};
  pyramid.levels = 1;
  pyramid.images = static_cast<int>(expected.images);
  pyramid.channels = static_cast<int>(expected.channels);
  pyramid.maps[0] = view_of<element_t>(expected, map, "the map");
  pyramid.scales[0] = static_cast<float>(scale);
  FASTSEG_CHECK(pyramid.maps[0].pixels() > 0 && pyramid.maps[0].pixels() < INT32_MAX, "fastseg::", expected.op,
                ": planes must have 1 to 2^31 - 1 cells");
  return pyramid;
}

struct Arguments {
  Expected map, pooled, places;
  const float* boxes;
  int64_t count;
};

Arguments arguments_of(const char* op, const Tensor& map, const Tensor& pooled, const Tensor& argmax,
                       const Tensor& boxes) {
  FASTSEG_CHECK(map.dim() == 4 && pooled.dim() == 4 && argmax.dim() == 4 && boxes.dim() == 2, "fastseg::", op,
                ": tensors do not fit");
  const int64_t count = boxes.size(0), channels = map.size(1);
  FASTSEG_CHECK(argmax.size(2) == pooled.size(2) && argmax.size(3) == pooled.size(3) &&
                    argmax.is_contiguous() == pooled.is_contiguous(),
                "fastseg::", op, ": argmax must have the size and layout of output");
  return {{op, map, map.size(0), channels, map.scalar_type()},
          {op, map, count, channels, map.scalar_type()},
          {op, map, count, channels, ScalarType::Int},
          boxes_of(op, boxes, map, count),
          count};
}

void forward(const Tensor& input, const Tensor& boxes, std::vector<int64_t> /*output_size*/, double spatial_scale,
             bool /*channels_last*/, Tensor output, Tensor argmax) {
  constexpr const char* op = "_roi_pool";
  if (output.numel() == 0) return;
  const Arguments given = arguments_of(op, input, output, argmax, boxes);
  const OnDeviceOf device(input);
  const cudaError_t error = with_gpu_type(op, input, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return launch_roi_pool_forward(pyramid_of<const scalar_t>(given.map, input, spatial_scale), given.boxes,
                                   view_of<scalar_t>(given.pooled, output, "output"),
                                   view_of<int32_t>(given.places, argmax, "argmax"), given.count, device.stream());
  });
  check_launch(error, op);
}

void backward(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes, std::vector<int64_t> /*size*/,
              double spatial_scale, bool /*channels_last*/, Tensor grad_input) {
  constexpr const char* op = "_roi_pool_backward";
  if (grad_input.numel() == 0) return;
  const Arguments given = arguments_of(op, grad_input, grad_output, argmax, boxes);
  const OnDeviceOf device(grad_output);
  const cudaError_t error = with_gpu_type(op, grad_output, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return launch_roi_pool_backward(view_of<const scalar_t>(given.pooled, grad_output, "grad_output"),
                                    view_of<const int32_t>(given.places, argmax, "argmax"), given.boxes,
                                    pyramid_of<scalar_t>(given.map, grad_input, spatial_scale), given.count,
                                    device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_roi_pool", TORCH_BOX(&forward));
  m.impl("_roi_pool_backward", TORCH_BOX(&backward));
}

}  // namespace fastseg::cuda
