"""Where stock PyTorch is faster: the `Stock` rows of the convolutions."""

from fastseg._backend import Stock
from fastseg.kernels.convolution import torch_calls

CONVOLUTION = Stock(torch_calls.dilated_conv2d, below={"any": 0})
TRANSPOSED = Stock(torch_calls.conv_transpose2d, below={"any": 0})
GRAD_WEIGHT = Stock(torch_calls.conv2d_grad_weight, below={"any": 0})
DEPTHWISE = Stock(torch_calls.dilated_conv2d, below={"any": 0})
DEPTHWISE_TRANSPOSED = Stock(torch_calls.conv_transpose2d, below={"any": 0})
DEPTHWISE_GRAD_WEIGHT = Stock(torch_calls.conv2d_grad_weight, below={"any": 0})
