"""Error messages: the argument and the allowed values, never a source file; and the text of `explain`."""

import pytest
import torch

import fastseg
from fastseg import _library, ops
from fastseg._op import NATIVE_SCHEMAS
from fastseg.info import explain
from tests.test_other_sizes import CALLS, LANDSCAPE, data

IMAGE, LABELS = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
MAP = torch.zeros(2, 1, 8, 8)
MASKS = torch.zeros(2, 8, 8, dtype=torch.bool)
PACKED = ops.pack_masks(MASKS)


def _hostile(kind, shape, dtype):
    """A value of a schema's type."""
    if kind.startswith("Tensor"):
        return torch.zeros(shape, dtype=dtype)
    if kind.startswith(("int[]", "float[]")):
        return [2, 2]
    return {"int": 1, "int?": None, "bool": False, "float": 1.0, "float?": None, "ScalarType": torch.int32}[kind]


@pytest.mark.sanitized
@pytest.mark.parametrize("schema", NATIVE_SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_kernels_name_no_file_of_the_build(schema):
    """Called with unchecked tensors."""
    name, _, arguments = schema.partition("(")
    kinds = [part.split()[0] for part in arguments.partition(") -> ")[0].split(", ")]
    messages = []
    for shape in ((2, 3, 4, 5), (2, 3), (3,), ()):
        for dtype in (torch.float32, torch.int16, torch.complex64, torch.int64):
            try:
                getattr(torch.ops.fastseg, name)(*[_hostile(kind, shape, dtype) for kind in kinds])
            except (RuntimeError, IndexError) as error:
                messages.append(str(error))
    assert messages
    for message in messages:
        assert "/" not in message and ".h" not in message and ".cpp" not in message, message


BOOLEANS = {
    "cross_entropy": ["zero_if_empty"],
    "focal_loss": ["zero_if_empty"],
    "dice_loss": ["include_background", "squared", "per_image"],
    "cross_entropy_dice": ["include_background", "squared", "per_image", "zero_if_empty"],
    "binary_cross_entropy_dice": ["squared", "per_image", "zero_if_empty"],
    "upsample_cross_entropy": ["align_corners", "zero_if_empty"],
    "upsample_cross_entropy_dice": ["align_corners", "include_background", "squared", "per_image", "zero_if_empty"],
    "upsample_argmax": ["align_corners", "return_probability"],
    "max_pool2d": ["ceil_mode", "return_indices"],
    "mask_iou": ["pairs"],
    "masks_to_rle": ["compressed"],
    "roi_align": ["aligned"],
    "multiscale_roi_align": ["aligned"],
}
SECOND = {"upsample_argmax": 8, "max_pool2d": 2, "binary_cross_entropy_dice": torch.zeros(2, 3, 8, 8)}
BOXES = torch.zeros(1, 5)
CALLED_WITH = {"roi_align": (IMAGE, BOXES, 2), "multiscale_roi_align": ([IMAGE], BOXES, 2, [1.0])}
LOSSES = [name for name in ops.__all__ if name.endswith(("cross_entropy", "dice", "_loss"))]


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_are_booleans(name):
    for argument in BOOLEANS[name]:
        for value in (1, "bilinear", None):
            with pytest.raises(TypeError, match=f"fastseg.ops.{name}: {argument}=.*; allowed: True or False"):
                arguments = (MASKS,) if "mask" in name else CALLED_WITH.get(name, (IMAGE, SECOND.get(name, LABELS)))
                getattr(ops, name)(*arguments, **{argument: value})


def test_a_mode_is_no_align_corners():
    with pytest.raises(TypeError, match="align_corners='bilinear'; allowed: True or False"):
        ops.upsample_cross_entropy(IMAGE, LABELS, (8, 8), None, "bilinear")


def test_every_boolean_is_listed():
    import inspect

    for name in ops.__all__:
        given = inspect.signature(getattr(ops, name)).parameters.values()
        assert BOOLEANS.get(name, []) == [one.name for one in given if isinstance(one.default, bool)], name


WITH_IGNORED = [name for name in (*LOSSES, "confusion_matrix") if name != "sigmoid_focal_loss"]
MODULES = ["CrossEntropyLoss", "DiceLoss", "CrossEntropyDiceLoss", "FocalLoss", "ClassBalancedCrossEntropyLoss",
           "UpsampleCrossEntropyLoss"]  # fmt: skip


@pytest.mark.parametrize("name", [*WITH_IGNORED, *MODULES])
def test_ignore_index(name):
    """None, like any number that is not a label, ignores nothing; other types are refused."""

    def run(**options):
        if name in MODULES:
            return getattr(fastseg.nn, name)(**options)(IMAGE, LABELS)
        return getattr(ops, name)(IMAGE, SECOND.get(name, LABELS), **options)

    usual = run()
    for value in (None, 2**70, -(2**70), -(2**63), torch.tensor(77)):
        assert torch.equal(run(ignore_index=value), usual)
    for value in (255.0, "255", True):
        with pytest.raises(TypeError, match=f"ignore_index={value!r}; allowed: an integer, or None for no label"):
            run(ignore_index=value)


ABSURD = [
    (lambda: ops.upsample_argmax(IMAGE, 2**40), "size=1099511627776; allowed: .* at most 2\\^50 pixels"),
    (lambda: ops.upsample_argmax(IMAGE, 2**70), "size=.*; allowed"),
    (lambda: ops.upsample_argmax(IMAGE, scale_factor=1e30), "scale_factor=1e\\+30 makes"),
    (lambda: ops.upsample_cross_entropy(IMAGE, LABELS, 2**70), "size=.*; allowed"),
    (lambda: ops.upsample_cross_entropy_dice(IMAGE, LABELS, scale_factor=1e30), "scale_factor=1e\\+30 makes"),
    (lambda: ops.confusion_matrix(IMAGE, LABELS, 2**70), "num_classes=.*; allowed: 1 to 32767"),
    (lambda: ops.dice_loss(IMAGE, LABELS, smooth="1"), "smooth='1'; allowed: a number"),
    (lambda: ops.focal_loss(IMAGE, LABELS, gamma=None), "gamma=None; allowed: a number"),
    (lambda: ops.cross_entropy_dice(IMAGE, LABELS, ce_weight=[1]), "ce_weight=\\[1\\]; allowed: a number"),
    (lambda: ops.sigmoid_focal_loss(IMAGE, IMAGE, alpha="0.25"), "alpha='0.25'; allowed: a number"),
    (lambda: ops.cross_entropy(IMAGE, LABELS, torch.ones(3).half()), "allowed: float32$"),  # not float32, float32
]


@pytest.mark.parametrize("call, message", ABSURD)
def test_absurd_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"fastseg.ops.\\w+: .*{message}"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("function", [ops.upsample_cross_entropy, ops.upsample_cross_entropy_dice])
def test_an_empty_batch_has_a_gradient(function, dtype):
    input, target = torch.randn(0, 3, 4, 4, dtype=dtype, requires_grad=True), LABELS[:0]
    loss = function(input, target)
    assert loss.isnan() and torch.autograd.grad(loss, input)[0].shape == input.shape


NO_LOSSES = (
    "max_", "mask", "matrix_nms", "pack_", "unpack_", "paste_", "upsample_masks", "nms", "batched_nms", "soft_nms",
    "roi_", "multiscale_", "upsample_argmax", "upsample_bilinear2d", "confusion", "dilated_conv2d", "conv_transpose2d",
)  # fmt: skip
LOSS_CALLS = [name for name in CALLS if not name.startswith(NO_LOSSES)]


@pytest.mark.parametrize("name", LOSS_CALLS)
def test_a_backward_needs_the_logits_as_they_were(name):
    """As the docstrings and the README say; PyTorch's check of versions raises."""
    logits, labels = data(name, LANDSCAPE)
    loss = CALLS[name][0](logits, labels).sum()
    with torch.no_grad():
        logits.sigmoid_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


# --- fastseg.info.explain ---

EXPLAINED = {
    "cross_entropy": (IMAGE, LABELS),
    "focal_loss": (IMAGE, LABELS),
    "dice_loss": (IMAGE, LABELS),
    "cross_entropy_dice": (IMAGE, LABELS),
    "binary_cross_entropy_dice": (IMAGE, IMAGE.sigmoid()),
    "sigmoid_focal_loss": (IMAGE, IMAGE.sigmoid()),
    "upsample_cross_entropy": (IMAGE, torch.zeros(2, 16, 16, dtype=torch.int64)),
    "upsample_cross_entropy_dice": (IMAGE, torch.zeros(2, 16, 16, dtype=torch.int64)),
    "upsample_argmax": (IMAGE, 16),
    "upsample_bilinear2d": (IMAGE, 16),
    "confusion_matrix": (IMAGE, LABELS),
    "max_pool2d": (IMAGE, 2),
    "dilated_conv2d": (IMAGE, torch.ones(4, 3, 3, 3)),
    "conv_transpose2d": (IMAGE, torch.ones(3, 4, 3, 3)),
    "pack_masks": (MASKS,),
    "unpack_masks": (PACKED,),
    "masks_to_boxes": (MASKS,),
    "mask_iou": (PACKED,),
    "mask_nms": (PACKED, torch.zeros(2), 0.5),
    "matrix_nms": (PACKED, torch.zeros(2)),
    "masks_to_rle": (PACKED,),
    "rle_to_masks": ({"size": [8, 8], "counts": [64]},),
    "paste_masks": (torch.zeros(2, 3, 3), torch.zeros(2, 4), (8, 8)),
    "upsample_masks": (torch.zeros(2, 3, 3), (8, 8)),
    "nms": (torch.zeros(2, 4), torch.zeros(2), 0.5),
    "batched_nms": (torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, dtype=torch.int64), 0.5),
    "soft_nms": (torch.zeros(2, 4), torch.zeros(2)),
    "max_unpool2d": (IMAGE, torch.arange(64).view(8, 8).expand(2, 3, 8, 8).contiguous(), 2),
    "roi_align": (IMAGE, BOXES, 2),
    "roi_pool": (IMAGE, BOXES, 2),
    "multiscale_roi_align": ([IMAGE], BOXES, 2, [1.0]),
}


@pytest.mark.parametrize("name", [name for name in ops.__all__ if not isinstance(getattr(ops, name), type)])
def test_explain_every_public_op(name):
    arguments = [value.clone() if isinstance(value, torch.Tensor) else value for value in EXPLAINED[name]]
    constant = "upsample_argmax", "confusion_matrix", "multiscale_roi_align", "matrix_nms"
    if name not in constant and "mask" not in name:
        arguments[0].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        text = explain(name, *arguments)
    assert text.splitlines()[0].endswith(": cpu runs")
    for backend in ("stock", "cpu", "cuda", "triton", "reference"):
        assert f"\n  {backend}: " in text
    ran = {event.key for event in profile.key_averages()}
    assert not [key for key in ran if key.startswith("fastseg::") or "softmax" in key or "pool" in key], ran


def test_explain_names_stock_where_auto_takes_it(monkeypatch):
    monkeypatch.undo()  # removes conftest.py's patch, which leaves no calls to stock
    for name in ("cross_entropy", "max_pool2d"):
        assert explain(name, *EXPLAINED[name]).splitlines()[0].endswith(": stock runs")


# --- torch built for AMD's GPUs ---


def test_triton_needs_no_nvidia_gpu(monkeypatch):
    """A ROCm torch has torch.version.hip, and calls its devices "cuda", too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _library.missing.__wrapped__("triton") is None
    monkeypatch.setattr(torch.version, "hip", None)
    assert "has no CUDA" in _library.missing.__wrapped__("triton")
