// Binds the launchers of cuda.cu to torch.ops.fastseg._confusion_matrix on CUDA.
#include "cuda/host.h"

#include "confusion_matrix/cuda.h"
#include "fastseg/layout.h"

namespace fastseg::cuda {
namespace {

constexpr const char* op = "_confusion_matrix";

bool holds_labels(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Byte || type == ScalarType::Int || type == ScalarType::Long;
}

// Calls body(data pointer of the label map's type).
template <typename Body>
cudaError_t with_labels(const Tensor& labels, const Body& body) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte: return body(labels.const_data_ptr<uint8_t>());
    case ScalarType::Int: return body(labels.const_data_ptr<int32_t>());
    case ScalarType::Long: return body(labels.const_data_ptr<int64_t>());
    default: fail("fastseg::", op, ": labels must be uint8, int32 or int64");
  }
}

template <typename Body>
cudaError_t with_logits(const Tensor& logits, const Body& body) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return body(logits.const_data_ptr<float>());
    case ScalarType::Double: return body(logits.const_data_ptr<double>());
    case ScalarType::Half: return body(logits.const_data_ptr<c10::Half>());
    case ScalarType::BFloat16: return body(logits.const_data_ptr<c10::BFloat16>());
    default: fail("fastseg::", op, ": input must hold labels or a floating dtype");
  }
}

void forward(const Tensor& input, const Tensor& target, int64_t num_classes, int64_t ignore_index, Tensor counts) {
  check_device(input, op, "input");
  check_device(target, op, "target");
  const bool from_labels = holds_labels(input);
  FASTSEG_CHECK(num_classes >= 1 && num_classes <= 32767, "fastseg::", op, ": num_classes out of range");
  FASTSEG_CHECK(from_labels || (input.dim() >= 2 && input.size(1) == num_classes), "fastseg::", op,
                ": logits must be (N, num_classes, *spatial)");
  FASTSEG_CHECK(input.numel() == target.numel() * (from_labels ? 1 : num_classes), "fastseg::", op,
                ": input and target differ in size");
  FASTSEG_CHECK(input.get_device_index() == target.get_device_index(), "fastseg::", op,
                ": input and target are on different devices");
  check_device(counts, op, "counts");
  FASTSEG_CHECK(counts.get_device_index() == input.get_device_index() && counts.is_contiguous() &&
                    counts.scalar_type() == ScalarType::Long && counts.numel() == num_classes * num_classes,
                "fastseg::", op, ": counts must be int64 (num_classes, num_classes) on the device of input");
  const OnDeviceOf device(input);
  torch::stable::zero_(counts);
  const int64_t pixels = target.numel();
  if (pixels == 0) return;
  const int classes = static_cast<int>(num_classes);
  const Tensor truth = torch::stable::contiguous(target);
  const bool channels_last = !from_labels && !input.is_contiguous() && is_channels_last(input);
  const Tensor source = channels_last ? input : torch::stable::contiguous(input);
  auto* totals = reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>());

  const cudaError_t error = with_labels(truth, [&](const auto* labels) {
    if (from_labels) {
      return with_labels(source, [&](const auto* prediction) {
        return launch_confusion_matrix_of_labels(prediction, labels, pixels, classes, ignore_index, totals,
                                                 device.stream());
      });
    }
    const int64_t images = input.size(0);
    return with_logits(source, [&](const auto* logits) {
      return launch_confusion_matrix_of_logits(logits, labels, images, pixels / images, classes, channels_last,
                                               ignore_index, totals, device.stream());
    });
  });
  check_launch(error, op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_confusion_matrix", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda
