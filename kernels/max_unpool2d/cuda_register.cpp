// Binds the launchers of cuda.cu to torch.ops.fastseg._max_unpool2d and _max_unpool2d_backward on CUDA.
#include "max_unpool2d/cuda.h"

#include "pooling/cuda_arguments.h"

namespace fastseg::cuda {
namespace {

using List = std::vector<int64_t>;

// Calls body(an unsigned value of the tensor's element size): elements are only copied.
template <typename Body>
cudaError_t with_element_type(const char* op, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(uint32_t{});
    case ScalarType::Double: return body(uint64_t{});
    case ScalarType::Half:
    case ScalarType::BFloat16: return body(uint16_t{});
    default: fail("fastseg::", op, ": dtype must be float32, float64, float16 or bfloat16");
  }
}

void forward(const Tensor& input, const Tensor& indices, List kernel_size, List stride, List padding, List dilation,
             List /*size*/, Tensor output) {
  if (output.numel() == 0) return;
  constexpr const char* op = "_max_unpool2d";
  const PoolShape shape = make_shape(op, {kernel_size, stride, padding, dilation}, {"output", output},
                                     {{"input", input}, {"indices", indices}});
  const bool compact = holds_compact_indices(op, indices);
  check_geometry(op, shape, compact);
  check_same_dtype(op, {"output", output}, {"input", input});
  const OnDeviceOf device(input);
  const cudaError_t error = with_element_type(op, input, [&](auto element) {
    using element_t = decltype(element);
    const auto* from = static_cast<const element_t*>(input.const_data_ptr());
    auto* to = static_cast<element_t*>(output.mutable_data_ptr());
    if (compact) {
      return launch_max_unpool2d_forward(from, indices.const_data_ptr<uint8_t>(), to, shape, nullptr, device.stream());
    }
    const Tensor misplaced = torch::stable::new_empty(input, {1}, ScalarType::Int);
    return launch_max_unpool2d_forward(from, indices.const_data_ptr<int64_t>(), to, shape,
                                       static_cast<unsigned*>(misplaced.mutable_data_ptr()), device.stream());
  });
  check_launch(error, op);
}

void backward(const Tensor& grad_output, const Tensor& indices, List kernel_size, List stride, List padding,
              List dilation, Tensor grad_input) {
  if (grad_input.numel() == 0) return;
  constexpr const char* op = "_max_unpool2d_backward";
  const PoolShape shape = make_shape(op, {kernel_size, stride, padding, dilation}, {"grad_output", grad_output},
                                     {{"grad_input", grad_input}, {"indices", indices}});
  const bool compact = holds_compact_indices(op, indices);
  check_geometry(op, shape, compact);
  check_same_dtype(op, {"grad_input", grad_input}, {"grad_output", grad_output});
  const OnDeviceOf device(grad_output);
  const cudaError_t error = with_element_type(op, grad_output, [&](auto element) {
    using element_t = decltype(element);
    const auto* from = static_cast<const element_t*>(grad_output.const_data_ptr());
    auto* to = static_cast<element_t*>(grad_input.mutable_data_ptr());
    return compact ? launch_max_unpool2d_backward(from, indices.const_data_ptr<uint8_t>(), to, shape, device.stream())
                   : launch_max_unpool2d_backward(from, indices.const_data_ptr<int64_t>(), to, shape, device.stream());
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_max_unpool2d", TORCH_BOX(&forward));
  m.impl("_max_unpool2d_backward", TORCH_BOX(&backward));
}

}  // namespace fastseg::cuda
