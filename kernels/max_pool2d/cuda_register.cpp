// Binds the launchers of cuda.cu to torch.ops.fastseg._max_pool2d and _max_pool2d_backward on CUDA.
#include "max_pool2d/cuda.h"

#include "pooling/cuda_arguments.h"

namespace fastseg::cuda {
namespace {

using List = std::vector<int64_t>;

// Calls body(a value of the storage type).
template <typename Body>
cudaError_t with_floating_type(const char* op, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(c10::Half{});
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    default: fail("fastseg::", op, ": dtype must be float32, float64, float16 or bfloat16");
  }
}

void forward(const Tensor& input, List kernel_size, List stride, List padding, List dilation, bool /*ceil_mode*/,
             bool /*return_indices*/, bool /*compact*/, Tensor output, Tensor indices) {
  if (output.numel() == 0) return;
  constexpr const char* op = "_max_pool2d";
  const PoolShape shape = make_shape(op, {kernel_size, stride, padding, dilation}, {"input", input},
                                     {{"output", output}, {"indices", indices}});
  const bool compact = holds_compact_indices(op, indices);
  check_windows(op, shape);
  check_taps(op, shape, compact);
  check_same_dtype(op, {"output", output}, {"input", input});
  const OnDeviceOf device(input);
  const cudaError_t error = with_floating_type(op, input, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto* from = input.const_data_ptr<scalar_t>();
    auto* to = output.mutable_data_ptr<scalar_t>();
    return compact ? launch_max_pool2d_forward(from, to, indices.mutable_data_ptr<uint8_t>(), shape, device.stream())
                   : launch_max_pool2d_forward(from, to, indices.mutable_data_ptr<int64_t>(), shape, device.stream());
  });
  check_launch(error, op);
}

void backward(const Tensor& grad_output, const Tensor& indices, List kernel_size, List stride, List padding,
              List dilation, List /*size*/, Tensor grad_input) {
  if (grad_input.numel() == 0) return;
  constexpr const char* op = "_max_pool2d_backward";
  const PoolShape shape = make_shape(op, {kernel_size, stride, padding, dilation}, {"grad_input", grad_input},
                                     {{"grad_output", grad_output}, {"indices", indices}});
  const bool compact = holds_compact_indices(op, indices);
  check_geometry(op, shape, compact);
  check_same_dtype(op, {"grad_input", grad_input}, {"grad_output", grad_output});
  const OnDeviceOf device(grad_output);
  const cudaError_t error = with_floating_type(op, grad_output, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto* from = grad_output.const_data_ptr<scalar_t>();
    auto* to = grad_input.mutable_data_ptr<scalar_t>();
    return compact ? launch_max_pool2d_backward(from, indices.const_data_ptr<uint8_t>(), to, shape, device.stream())
                   : launch_max_pool2d_backward(from, indices.const_data_ptr<int64_t>(), to, shape, device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_max_pool2d", TORCH_BOX(&forward));
  m.impl("_max_pool2d_backward", TORCH_BOX(&backward));
}

}  // namespace fastseg::cuda
