"""Programs made from one call accept inputs of other sizes: torch.jit.trace, torch.compile, torch.export."""

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

from fastseg import ops

LANDSCAPE, PORTRAIT = (2, 3, 20, 32), (2, 3, 32, 20)
SIZES = (LANDSCAPE, PORTRAIT, (2, 3, 40, 24), (2, 3, 100, 180), (2, 3, 8, 6))


def positive(image):
    return (image > 0).to(image.dtype)


def wide(image):
    """Packed rows have several words: one word per row, a size of 1, would need another program."""
    return image.flatten(0, 1).repeat_interleave(12, 2)


DENSE = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

BOXES = torch.tensor([[1.0, 2, 7, 6], [0, 0, 5, 4], [-3, 1, 4, 90], [2, 2, 3, 3], [4.5, 0, 90, 5], [9, 9, 9, 9]])


def boxes_of(image):
    """As many boxes as the image has columns."""
    low = image[0, :2, 0].T
    return torch.cat([low, low + image[0, :2, 1].T.abs() + 1], 1)


RECORDED = (
    "nms",
    "batched_nms",
    "soft_nms",
    "mask_nms",
)  # torch.jit.trace records our ops: their references loop over boxes
ROIS = torch.tensor([[0, 1, 1, 5.3, 4.2], [1, 0, 2, 7.1, 9], [1, 2, 2, 4, 3]])

# function of images and labels, how many times larger the labels are, the function in stock PyTorch if there is one
CALLS = {
    "cross_entropy": (ops.cross_entropy, 1, F.cross_entropy),
    "cross_entropy, pixels": (lambda x, y: ops.cross_entropy(x, y, reduction="none", pixel_weight=y.float()), 1, None),
    "probabilities": (lambda x, y: ops.cross_entropy(x, x.cos().softmax(1)), 1,
                      lambda x, y: F.cross_entropy(x, x.cos().softmax(1))),
    "probabilities, weighted": (lambda x, y: ops.cross_entropy(x, x.cos().softmax(1), pixel_weight=y.float()), 1, None),
    "focal_loss": (ops.focal_loss, 1, None),
    "dice_loss": (ops.dice_loss, 1, None),
    "cross_entropy_dice": (lambda x, y: ops.cross_entropy_dice(x, y, per_image=True), 1, None),
    "binary_cross_entropy_dice": (lambda x, y: ops.binary_cross_entropy_dice(x, positive(x)), 1, None),
    "sigmoid_focal_loss": (lambda x, y: ops.sigmoid_focal_loss(x, positive(x), reduction="mean"), 1, None),
    "upsample_cross_entropy": (ops.upsample_cross_entropy, 2,
                               lambda x, y: F.cross_entropy(F.interpolate(x, y.shape[1:], mode="bilinear"), y)),
    "upsample_cross_entropy, scaled": (lambda x, y: ops.upsample_cross_entropy(x, y, scale_factor=2), 2, None),
    "upsample_cross_entropy, pixels": (lambda x, y: ops.upsample_cross_entropy(x, y, reduction="none"), 2, None),
    "upsample_cross_entropy_dice": (ops.upsample_cross_entropy_dice, 2, None),
    "upsample_argmax": (lambda x, y: ops.upsample_argmax(x, y.shape[1:]), 3,
                        lambda x, y: F.interpolate(x, y.shape[1:], mode="bilinear").argmax(1)),
    "upsample_argmax, scaled": (lambda x, y: ops.upsample_argmax(x, scale_factor=2), 1,
                                lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear").argmax(1)),
    "upsample_argmax, odd scale": (lambda x, y: ops.upsample_argmax(x, scale_factor=(1.5, 2.3)), 1,
                                   lambda x, y: F.interpolate(x, scale_factor=(1.5, 2.3), mode="bilinear").argmax(1)),
    "upsample_argmax, probability": (lambda x, y: ops.upsample_argmax(x, scale_factor=2, return_probability=True)[1],
                                     1, None),
    # Factors with an inverse that is exact in float32: for others torch's coordinates have an error.
    "upsample_bilinear2d": (lambda x, y: ops.upsample_bilinear2d(x, y.shape[1:]), 2,
                            lambda x, y: F.interpolate(x, y.shape[1:], mode="bilinear")),
    "upsample_bilinear2d, scaled": (lambda x, y: ops.upsample_bilinear2d(x, scale_factor=4), 1,
                                    lambda x, y: F.interpolate(x, scale_factor=4, mode="bilinear")),
    "upsample_bilinear2d, odd scale": (lambda x, y: ops.upsample_bilinear2d(x, scale_factor=(1.6, 2.56)), 1,
                                       lambda x, y: F.interpolate(x, scale_factor=(1.6, 2.56), mode="bilinear")),
    "upsample_bilinear2d, recomputed": (
        lambda x, y: ops.upsample_bilinear2d(x, scale_factor=(2, 0.5), recompute_scale_factor=True), 1, None),
    "confusion_matrix": (ops.confusion_matrix, 1, None),
    "dilated_conv2d": (lambda x, y: ops.dilated_conv2d(x, DENSE, padding=2, dilation=2), 1,
                       lambda x, y: F.conv2d(x, DENSE, padding=2, dilation=2)),
    "dilated_conv2d, same": (lambda x, y: ops.dilated_conv2d(x, DENSE[..., :2, :2], padding="same", dilation=3), 1,
                             lambda x, y: F.conv2d(x, DENSE[..., :2, :2], padding="same", dilation=3)),
    "dilated_conv2d, epilogue": (
        lambda x, y: ops.dilated_conv2d(x, DENSE, stride=2, padding=1, residual=x[..., ::2, ::2], activation="relu"), 1,
        lambda x, y: F.relu(F.conv2d(x, DENSE, stride=2, padding=1) + x[..., ::2, ::2])),
    "dilated_conv2d, depthwise": (lambda x, y: ops.dilated_conv2d(x, DENSE[:, :1], padding=4, dilation=4, groups=3), 1,
                                  lambda x, y: F.conv2d(x, DENSE[:, :1], padding=4, dilation=4, groups=3)),
    "conv_transpose2d": (lambda x, y: ops.conv_transpose2d(x, DENSE, stride=2, padding=1, output_padding=1), 2,
                         lambda x, y: F.conv_transpose2d(x, DENSE, stride=2, padding=1, output_padding=1)),
    "conv_transpose2d, depthwise": (lambda x, y: ops.conv_transpose2d(x, DENSE[:, :1], stride=2, groups=3), 2,
                                    lambda x, y: F.conv_transpose2d(x, DENSE[:, :1], stride=2, groups=3)),
    "conv_transpose2d, x8": (lambda x, y: ops.conv_transpose2d(x, WIDE, stride=8, padding=4), 8,
                             lambda x, y: F.conv_transpose2d(x, WIDE, stride=8, padding=4)),
    "conv_transpose2d, skip": (
        lambda x, y: ops.conv_transpose2d(x, DENSE, stride=2, skip=torch.cat([x, x, x], 2).repeat(1, 1, 1, 3),
                                          skip_offset=1, crop=(0, 0, *x.shape[2:])), 1,
        lambda x, y: F.conv_transpose2d(x, DENSE, stride=2)[..., : x.shape[2], : x.shape[3]]
        + torch.cat([x, x, x], 2).repeat(1, 1, 1, 3)[..., 1 : 1 + x.shape[2], 1 : 1 + x.shape[3]]),
    "pack_masks": (lambda x, y: ops.pack_masks(wide(x), 0).area, 1, None),
    "unpack_masks": (lambda x, y: ops.unpack_masks(ops.pack_masks(wide(x), 0), torch.float32), 1, None),
    "masks_to_boxes": (lambda x, y: ops.masks_to_boxes(wide(x)), 1, None),
    "mask_iou": (lambda x, y: ops.mask_iou(wide(x) > 0), 1, None),
    "mask_nms": (
        lambda x, y: ops.mask_nms(wide(x) > 0, x.mean((2, 3)).flatten(), 0.3, max_output=5)[0], 1, None),
    "matrix_nms": (
        lambda x, y: ops.matrix_nms(wide(x) > 0, x.mean((2, 3)).flatten(), max_output=5)[1], 1, None),
    "nms": (lambda x, y: ops.nms(boxes_of(x), x[1, 0, 0], 0.3, max_output=9)[0], 1, None),
    "batched_nms": (lambda x, y: ops.batched_nms(boxes_of(x), x[1, 0, 0], y[0, 0], 0.3, max_output=9)[0], 1, None),
    "soft_nms": (lambda x, y: ops.soft_nms(boxes_of(x), x[1, 0, 0], max_output=9)[1], 1, None),
    "paste_masks": (lambda x, y: ops.unpack_masks(ops.paste_masks(x.flatten(0, 1), BOXES, y.shape[1:])), 16, None),
    "upsample_masks": (lambda x, y: ops.unpack_masks(ops.upsample_masks(x.flatten(0, 1), y.shape[1:])), 16, None),
    "max_pool2d": (lambda x, y: ops.max_pool2d(x, 3, 2, 1), 1, lambda x, y: F.max_pool2d(x, 3, 2, 1)),
    "max_pool2d, one image": (lambda x, y: ops.max_pool2d(x[0], 2), 1, lambda x, y: F.max_pool2d(x[0], 2)),
    "max_pool2d, indices": (lambda x, y: ops.max_pool2d(x, 2, return_indices=True)[1], 1, None),
    "max_unpool2d": (lambda x, y: ops.max_unpool2d(*ops.max_pool2d(x, 2, return_indices=True), 2), 1, None),
    "max_unpool2d, compact": (
        lambda x, y: ops.max_unpool2d(*ops.max_pool2d(x, 2, return_indices=True, index_format="compact")), 1, None),
    "roi_align": (lambda x, y: ops.roi_align(x, ROIS, 3, 0.5, 2), 1, None),
    "roi_align, adaptive": (lambda x, y: ops.roi_align(x, ROIS, (2, 3), aligned=True), 1, None),
    "multiscale_roi_align": (
        lambda x, y: ops.multiscale_roi_align([x, x[..., ::2, ::2]], ROIS, 2, [1.0, 0.5], canonical_scale=8,
                                              canonical_level=1), 1, None),
    "roi_pool": (lambda x, y: ops.roi_pool(x, ROIS, 2), 1, None),
}  # fmt: skip


def data(name, size, layout=torch.contiguous_format):
    images, classes, height, width = size
    factor = CALLS[name][1]
    image = torch.randn(size).contiguous(memory_format=layout)
    return image.requires_grad_(), torch.randint(classes, (images, factor * height, factor * width))


def check_other_sizes(name, program):
    for size in SIZES:
        image, labels = data(name, size)
        found, expected = program(image, labels), (CALLS[name][2] or CALLS[name][0])(image, labels)
        assert found.shape == expected.shape
        if found.is_floating_point():
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        else:  # except for near ties of two classes
            assert (found == expected).double().mean() > 0.999


def test_every_public_function_is_called():
    names = {name.partition(",")[0] for name in CALLS}
    lists = {"masks_to_rle", "rle_to_masks"}  # lists of dictionaries cannot be part of a program
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert names == {*functions, "probabilities"} - lists


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CALLS)
def test_trace(name):
    """The trace has PyTorch's own ops only, and can be differentiated."""
    traced = torch.jit.trace(CALLS[name][0], data(name, LANDSCAPE))
    ours = [node for node in traced.inlined_graph.nodes() if "fastseg" in node.kind()]
    assert len(ours) == (name in RECORDED)
    check_other_sizes(name, traced)
    image, labels = data(name, PORTRAIT)
    expected = CALLS[name][0](image, labels)
    if expected.requires_grad:
        gradients = [torch.autograd.grad(loss.sum(), image)[0] for loss in (traced(image, labels), expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_programs(name, dynamic, monkeypatch):
    """One program, and with dynamic=None a first one of fixed sizes: no others for orientations or size thresholds."""
    monkeypatch.undo()  # removes conftest.py's patch, which leaves no calls to stock
    torch._dynamo.reset()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    check_other_sizes(name, torch.compile(CALLS[name][0], backend=backend, dynamic=dynamic, fullgraph=True))
    assert len(programs) == (1 if dynamic else 2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_export(name, strict):
    function, factor, _ = CALLS[name]

    class Module(torch.nn.Module):
        def forward(self, image, labels):
            return function(image, labels)

    height, width = Dim("height", min=4, max=4096), Dim("width", min=4, max=4096)
    shapes = {2: height, 3: width}, {1: factor * height, 2: factor * width}
    program = torch.export.export(Module(), data(name, LANDSCAPE), dynamic_shapes=shapes, strict=strict)
    check_other_sizes(name, program.module())
