"""Bad arguments of dilated_conv2d and conv_transpose2d: the message says what is allowed."""

import re

import pytest
import torch

from fastseg import ops
from fastseg._bilinear import bilinear_kernel

IMAGE, WEIGHT, ACROSS = torch.ones(1, 4, 6, 6), torch.ones(8, 4, 3, 3), torch.ones(4, 8, 3, 3)

CONVOLUTION = {
    "dilation=0; allowed: 1 or more": dict(dilation=0),
    "groups=0; allowed: 1 or more": dict(groups=0),
    "groups=-1; allowed: 1 or more": dict(groups=-1),
    "groups=3": dict(groups=3, weight=torch.ones(7, 4, 3, 3)),
    "stride=(1, 0); allowed: 1 or more": dict(stride=(1, 0)),
    "padding=-1; allowed: 0 or more": dict(padding=-1),
    "padding='full'; allowed: 'same', 'valid', int": dict(padding="full"),
    "padding='same' with stride=(2, 2); allowed: stride 1": dict(padding="same", stride=2),
    "a window of (11, 11) on an input of (6, 6), padded (6, 6)": dict(dilation=5),
    "stride=(1, 2, 3); allowed: one int, or one each": dict(stride=(1, 2, 3)),
    "allowed: at most 2^50 pixels": dict(padding=2**31 - 1),
    "padding=2147483648; allowed: at most 2147483647": dict(padding=2**31),
    "weight has shape (8, 3, 3, 3) and groups=1 for 4 channels of input": dict(weight=torch.ones(8, 3, 3, 3)),
    "weight has shape (8, 4, 3, 3) and groups=2 for 4 channels of input": dict(groups=2),
    "weight has shape (8, 4, 3); allowed: four dimensions": dict(weight=torch.ones(8, 4, 3)),
    "weight has shape (0, 4, 3, 3)": dict(weight=torch.ones(0, 4, 3, 3)),
    "bias has shape (7,); allowed: (8)": dict(bias=torch.ones(7)),
    "bias has dtype float64; allowed: float32": dict(bias=torch.ones(8).double()),
    "weight has dtype float64; allowed: float32": dict(weight=WEIGHT.double()),
    "input has shape (6, 6); allowed: (N, C, H, W) or (C, H, W)": dict(input=IMAGE[0, 0]),
    "input has shape (1, 4, 0, 6)": dict(input=IMAGE[:, :, :0], padding=3),
    "residual has shape (1, 8, 4, 5)": dict(residual=torch.ones(1, 8, 4, 5)),
    "residual has dtype int64": dict(residual=torch.ones(1, 8, 4, 4).long()),
    "out has shape (1, 8, 6, 6); allowed: (1, 8, 4, 4)": dict(out=torch.ones(1, 8, 6, 6)),
    "out has dtype float64; allowed: float32": dict(out=torch.ones(1, 8, 4, 4).double()),
}
OTHER_KINDS = {
    "input is list; allowed: torch.Tensor": (TypeError, dict(input=[1.0])),
    "bias is list; allowed: torch.Tensor": (TypeError, dict(bias=[1.0])),
    "residual is float; allowed: torch.Tensor": (TypeError, dict(residual=1.0)),
    "stride=1.0, float; allowed: int": (TypeError, dict(stride=1.0)),
    "padding=True, bool; allowed: int": (TypeError, dict(padding=True)),
    "groups='2', str; allowed: int": (TypeError, dict(groups="2")),
    "activation='tanh'; allowed: None, 'relu'": (ValueError, dict(activation="tanh")),
    "out is list; allowed: torch.Tensor": (TypeError, dict(out=[])),
}
TRANSPOSED = {
    "dilation=0; allowed: 1 or more": dict(dilation=0),
    "groups=0; allowed: 1 or more": dict(groups=0),
    "stride=0; allowed: 1 or more": dict(stride=0),
    "padding=-1; allowed: 0 or more": dict(padding=-1),
    "output_padding=-1; allowed: 0 or more": dict(output_padding=-1),
    "output_padding=(1, 1); allowed: less than stride=(1, 1) or dilation=(1, 1)": dict(output_padding=1),
    "output_padding=(2, 2); allowed: less than": dict(output_padding=2, stride=2),
    "gives an output of (0, 0); allowed: at least (1, 1)": dict(padding=4),
    "the output would be 5000000003x5000000003; allowed: at most 2^50": dict(stride=10**9),
    "weight has shape (3, 8, 3, 3) and groups=1 for 4 channels of input": dict(weight=ACROSS[:3]),
    "weight has shape (4, 8, 3, 3) and groups=3 for 4 channels": dict(groups=3),
    "bias has shape (4,); allowed: (8)": dict(bias=torch.ones(4)),
    "input has shape (1, 4, 0, 6)": dict(input=IMAGE[:, :, :0]),
    "crop=(0, 0, 9, 8); allowed: a part of the output of (8, 8)": dict(crop=(0, 0, 9, 8)),
    "crop=(-1, 0, 4, 4); allowed: a part": dict(crop=(-1, 0, 4, 4)),
    "crop=(0, 0, 0, 4); allowed: a part": dict(crop=(0, 0, 0, 4)),
    "crop=(1, 2); allowed: (top, left, height, width)": dict(crop=(1, 2)),
    "skip has shape (1, 8, 4, 4), skip_offset=(4, 0)": dict(skip=torch.ones(1, 8, 4, 4), skip_offset=(4, 0)),
    "skip has shape (4, 4)": dict(skip=torch.ones(4, 4)),
    "skip has shape (1, 8, 7, 8), skip_offset=(0, 0) for an output of (8, 8)": dict(
        skip=torch.ones(1, 8, 7, 8), crop=(0, 0, 8, 8)
    ),
    "skip has shape (1, 3, 8, 8); allowed: (1, 8, 8, 8)": dict(skip=torch.ones(1, 3, 8, 8)),
}


def check(function, kind, message, arguments):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        function(**arguments)
    assert str(caught.value).startswith(f"fastseg.ops.{function.__name__}: ")


@pytest.mark.parametrize("message", CONVOLUTION)
def test_convolution(message):
    check(ops.dilated_conv2d, RuntimeError, message, dict(input=IMAGE, weight=WEIGHT) | CONVOLUTION[message])


@pytest.mark.parametrize("message", OTHER_KINDS)
def test_other_kinds(message):
    kind, arguments = OTHER_KINDS[message]
    check(ops.dilated_conv2d, kind, message, dict(input=IMAGE, weight=WEIGHT) | arguments)


@pytest.mark.parametrize("message", TRANSPOSED)
def test_transposed(message):
    check(ops.conv_transpose2d, RuntimeError, message, dict(input=IMAGE, weight=ACROSS) | TRANSPOSED[message])


def test_a_skip_or_weight_of_another_dtype_is_refused_on_the_separable_way_too():
    weight = torch.zeros(4, 4, 4, 4)
    weight[range(4), range(4)] = bilinear_kernel(4)
    for arguments, message in (
        (dict(weight=weight, skip=torch.ones(1, 4, 14, 14).double()), "skip has dtype float64; allowed: float32"),
        (dict(weight=weight.double()), "weight has dtype float64; allowed: float32"),
    ):
        check(ops.conv_transpose2d, RuntimeError, message, dict(input=IMAGE, stride=2) | arguments)


def test_padding_by_name_is_none_of_a_transposed_convolution():
    with pytest.raises(TypeError, match="padding='same'"):
        ops.conv_transpose2d(IMAGE, ACROSS, padding="same")


def test_an_op_called_by_itself_is_checked():
    numbers = [1, 1], [0, 0], [1, 1], 1, [4, 4], False
    with pytest.raises(RuntimeError, match="weight has shape"):
        torch.ops.fastseg.dilated_conv2d(IMAGE, ACROSS, None, None, *numbers)
    with pytest.raises(RuntimeError, match="residual has shape"):
        torch.ops.fastseg.dilated_conv2d(IMAGE, WEIGHT, None, torch.ones(1, 8, 1, 1), *numbers)
    with pytest.raises(RuntimeError, match="groups=3"):
        torch.ops.fastseg.conv2d_grad_weight(IMAGE, torch.ones(1, 8, 4, 4), *numbers[:3], 3, [3, 3], False)
