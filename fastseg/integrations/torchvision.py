"""Makes torchvision use our kernels: `install()` and `uninstall()`, or for one block

    with fastseg.integrations.torchvision.install():
        losses = torchvision.models.detection.maskrcnn_resnet50_fpn()(images, targets)

These functions of torchvision are replaced, and with them the modules that call them:

    ops.roi_align, RoIAlign                              fastseg.ops.roi_align
    ops.roi_pool, RoIPool                                fastseg.ops.roi_pool
    ops.poolers._multiscale_roi_align,
      the loop of MultiScaleRoIAlign                     fastseg.ops.multiscale_roi_align
    ops.nms                                              fastseg.ops.nms
    ops.batched_nms                                      fastseg.ops.batched_nms
    ops.masks_to_boxes                                   fastseg.ops.masks_to_boxes
    models.detection.roi_heads.paste_masks_in_image      fastseg.ops.paste_masks, soft masks of (N, 1, H, W)

Results have torchvision's shapes, dtypes and conventions. They differ where ours are better: gradients are the same on
every run; half types are summed in fp32, and bfloat16 works on CPU; channels_last is kept; boxes that are not finite
and batch indices without an image never read outside the input; `batched_nms` compares classes, where torchvision
offsets boxes by class, which rounds; of equal scores it takes the first. A box within a rounding of the limit between
two levels may go to the other level.

Calls that ours do not support, or for which there is no kernel on the device (RoI align of float64 on a GPU; mps), run
torchvision's own function: quantized tensors, thresholds outside [0, 1], more than 1024 samples along a bin, paddings
other than 1, masks to paste that are not square, are float64 or require grad. So do calls recorded in a program of
torchvision's ops: torch.jit.script, torch.jit.trace, torch.onnx.export. Programs of torch.compile and torch.export
contain our ops; torch.ops.torchvision is not changed.

If torchvision's own compiled ops are missing, as in a build for another PyTorch, ours always run, and raise for calls
that they do not support. `import torchvision`, which otherwise fails there with "operator torchvision::nms does not
exist", works after `install`.
"""

import functools
import importlib
import importlib.util
import math
import sys
import threading
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import ops
from fastseg._backend import Backend
from fastseg._dtypes import FLOATING, HALF
from fastseg._op import REGISTRY
from fastseg._private_api import has_kernel
from fastseg.nn._drop_in import must_be_stock
from fastseg.ops.masks.pack_masks import UNPACKED
from fastseg.ops.nms import CLASSES
from fastseg.ops.roi_align import MOST_LEVELS, MOST_SAMPLES

# --- replacements; parameters: `stock` (the function replaced, or None if it cannot run), then those of `stock` ---


def _roi_align(stock, input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    if stock and not _takes_rois("roi_align", input, boxes, output_size, spatial_scale, sampling_ratio):
        return stock(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)
    return ops.roi_align(input, _rois(boxes, input), output_size, spatial_scale, sampling_ratio, aligned)


def _roi_pool(stock, input, boxes, output_size, spatial_scale=1.0):
    if stock and not _takes_rois("roi_pool", input, boxes, output_size, spatial_scale):
        return stock(input, boxes, output_size, spatial_scale)
    return ops.roi_pool(input, _rois(boxes, input), output_size, spatial_scale)


def _multiscale_roi_align(stock, x_filtered, boxes, output_size, sampling_ratio, scales, mapper):
    takes = (
        scales is not None
        and mapper is not None
        and mapper.eps == 1e-6
        and mapper.k_max - mapper.k_min + 1 == len(scales) == len(x_filtered) <= MOST_LEVELS
        and all(_maps_match(x_filtered[0], level) for level in x_filtered)
        and all(
            _takes_rois("roi_align", level, boxes, output_size, scale, sampling_ratio)
            for level, scale in zip(x_filtered, scales)
        )
        and len(boxes) == x_filtered[0].shape[0]
    )
    if not takes:
        return stock(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
    return ops.multiscale_roi_align(
        x_filtered, boxes, output_size, scales, sampling_ratio,
        canonical_scale=mapper.s0, canonical_level=mapper.lvl0, min_level=mapper.k_min,
    )  # fmt: skip


def _nms(stock, boxes, scores, iou_threshold):
    if stock and not (_has_kernel("nms", boxes) and _is_between_0_and_1(iou_threshold)):
        return stock(boxes, scores, iou_threshold)
    return ops.nms(boxes, scores, iou_threshold)


def _batched_nms(stock, boxes, scores, idxs, iou_threshold):
    takes = (
        _has_kernel("nms", boxes)
        and isinstance(scores, Tensor)
        and isinstance(idxs, Tensor)
        and boxes.dim() == 2
        and idxs.shape == scores.shape  # torchvision broadcasts one class to all boxes
        and idxs.device == boxes.device
        and _is_between_0_and_1(iou_threshold)
    )
    if stock and not takes:
        return stock(boxes, scores, idxs, iou_threshold)
    return ops.batched_nms(boxes, scores, _classes(idxs), iou_threshold)


def _masks_to_boxes(stock, masks):
    if not isinstance(masks, Tensor) or masks.dim() != 3 or masks.numel() == 0:
        return stock(masks)
    binary = masks if masks.dtype in UNPACKED else masks.bool()
    return ops.masks_to_boxes(binary) if _has_kernel("pack_masks", binary) else stock(masks)


def _paste_masks_in_image(stock, masks, boxes, img_shape, padding=1):
    takes = (
        padding == 1
        and _has_kernel("paste_masks", masks)
        and masks.dim() == 4
        and masks.shape[1] >= 1  # torchvision takes the first of several
        and masks.shape[2] == masks.shape[3] >= 1
        and not (masks.requires_grad and torch.is_grad_enabled())
        and isinstance(boxes, Tensor)
        and boxes.dtype == torch.float32  # ours computes the position of the mask in fp32
        and boxes.shape == (masks.shape[0], 4)
        and boxes.device == masks.device
        and min(img_shape) >= 1
    )
    if not takes:
        return stock(masks, boxes, img_shape, padding)
    return ops.paste_masks(masks[:, 0], boxes, img_shape, convention="torchvision", output="soft")[:, None]


# --- calls that ours support ---

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # dispatch keys of PyTorch
_KERNELS = {
    name: {
        backend.name: backend.dtypes
        for backend in REGISTRY[name].backends
        if isinstance(backend, Backend)
        and backend.is_native()
        and has_kernel(REGISTRY[name].native_name, _KEYS[backend.name])
    }
    for name in ("roi_align", "roi_pool", "nms", "pack_masks", "paste_masks")
}


def _has_kernel(op: str, first) -> bool:
    """True if there is a kernel for calls with this first tensor; else torchvision's function is faster."""
    return (
        isinstance(first, Tensor)
        and not first.is_quantized
        and first.dtype in (_KERNELS[op].get(first.device.type) or ())
    )


def _takes_rois(op: str, input, boxes, output_size, spatial_scale, sampling_ratio=0) -> bool:
    listed = [boxes] if isinstance(boxes, Tensor) else boxes
    sizes = [output_size] if isinstance(output_size, int) else output_size
    return (
        _has_kernel(op, input)
        and input.dim() == 4
        and input.shape[1:].numel() > 0
        and isinstance(listed, (list, tuple))
        and all(isinstance(own, Tensor) and own.dtype in FLOATING for own in listed)
        and isinstance(sizes, (list, tuple))
        and all(isinstance(size, int) and size >= 1 for size in sizes)
        and isinstance(spatial_scale, (float, int))
        and 0 < spatial_scale < math.inf
        and isinstance(sampling_ratio, int)
        and sampling_ratio <= MOST_SAMPLES
    )


def _is_between_0_and_1(threshold) -> bool:
    return isinstance(threshold, (float, int)) and 0 <= threshold <= 1


def _maps_match(first: Tensor, level: Tensor) -> bool:
    """True if both maps have the same dtype, device, N and C; under autocast dtypes may differ."""
    return level.dtype == first.dtype and level.device == first.device and level.shape[:2] == first.shape[:2]


def _rois(boxes, input: Tensor):
    """`boxes`, or rows (batch index, x1, y1, x2, y2) if there are more or fewer tensors than images, as torchvision
    allows.
    """
    if isinstance(boxes, Tensor) or len(boxes) in (0, input.shape[0]):
        return boxes
    return torch.cat([F.pad(own.float() if own.dtype in HALF else own, (1, 0), value=i) for i, own in enumerate(boxes)])


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _classes(idxs: Tensor) -> Tensor:
    """Classes of any dtype as integers; equal classes give equal integers."""
    if idxs.dtype in FLOATING:
        return idxs.masked_fill(idxs == 0, 0).view(_BITS[idxs.element_size()])  # -0 becomes 0
    return idxs if idxs.dtype in CLASSES else idxs.long()


# --- installation ---

# Module, function, whether it needs torchvision's compiled ops, and ours.
_FUNCTIONS = (
    ("torchvision.ops.roi_align", "roi_align", True, _roi_align),
    ("torchvision.ops.roi_pool", "roi_pool", True, _roi_pool),
    ("torchvision.ops.poolers", "_multiscale_roi_align", False, _multiscale_roi_align),
    ("torchvision.ops.boxes", "nms", True, _nms),
    ("torchvision.ops.boxes", "batched_nms", True, _batched_nms),
    ("torchvision.ops.boxes", "masks_to_boxes", False, _masks_to_boxes),
    ("torchvision.models.detection.roi_heads", "paste_masks_in_image", False, _paste_masks_in_image),
)

_lock = threading.Lock()
_installed: list[tuple[Callable, Callable]] = []  # (torchvision's function, its replacement)
_fragments: list[torch.library.Library] = []  # schemas of torchvision's compiled ops, if it lacks them


class Installation:
    """What `install` did; prints as a list. As a context manager it calls `uninstall` at the end of the block, unless
    an earlier `install` was in force.

    places: where a function was replaced, e.g. "torchvision.ops.boxes.nms".
    """

    def __init__(self, places: Iterable[str], first: bool):
        self.places = tuple(places)
        self._first = first

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *error) -> None:
        if self._first:
            uninstall()

    def __str__(self) -> str:
        lines = [f"fastseg.integrations.torchvision: {len(self.places)} places", *self.places]
        return "\n  ".join(lines)


def install(*packages: str) -> Installation:
    """Make the detection functions of torchvision that the docstring of this file lists run our kernels.

    Replaces each function under every name in every module of torchvision, and so in modules that import it from there
    later. Existing models use ours, too: they look functions up when they run. Programs of torch.compile are compiled
    again.

    Args:
        packages: further packages, already imported, that have names of their own for functions of torchvision:
            `install("detectron2", "mmdet", "__main__")`. Packages imported after `install`, or that call
            `torchvision.ops.nms` by this name, need not be given.

    Returns:
        Installation: where functions were replaced, to be printed, or used in a `with` statement.

    Raises:
        ImportError: torchvision or one of the packages is not installed.
        TypeError: a name that is not a str.
    """
    for name in packages:
        if not isinstance(name, str):
            raise TypeError(f"fastseg.integrations.torchvision.install: packages holds {name!r}; allowed: str")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ImportError(f"fastseg.integrations.torchvision.install: there is no package {name!r}")
    _import_torchvision()
    extension = importlib.import_module("torchvision.extension")
    with _lock:
        first = not _installed
        for module, name, compiled, ours in _FUNCTIONS:
            stock = vars(importlib.import_module(module))[name]
            if all(stock is not function for _, function in _installed):
                runs = stock if not compiled or extension._has_ops() else None
                _installed.append((stock, _replacement_of(stock, runs, ours)))
        return Installation(_rebind(_installed, _loaded("torchvision", *packages)), first)


def uninstall() -> None:
    """Restore the functions of torchvision, the same objects, in all modules: also in those that imported ours.

    Functions that other code has replaced since `install` stay.
    """
    with _lock:
        _rebind([(ours, stock) for stock, ours in _installed], _loaded())
        _installed.clear()


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(
            "fastseg.integrations.torchvision.install: torchvision is not installed: `pip install torchvision`, "
            f"of the version made for torch {torch.__version__}"
        ) from error
    except RuntimeError as error:
        if _fragments or "operator torchvision::nms does not exist" not in str(error):
            raise
        # Without its compiled ops, torchvision fails when it registers fakes for these two: it needs their schemas.
        _fragments.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _fragments[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_torchvision()


def _replacement_of(stock: Callable, runs: Callable | None, ours: Callable) -> Callable:
    """A function with the name, module and signature of `stock`; runs: `stock`, or None if it cannot run."""

    @functools.wraps(stock)
    def function(*args, **options):
        if runs is not None and must_be_stock((*args, *options.values())):
            return stock(*args, **options)
        return ours(runs, *args, **options)

    function.__prepare_scriptable__ = lambda: stock  # type: ignore[attr-defined]  # what torch.jit.script compiles
    return function


def _loaded(*packages: str) -> list[tuple[str, ModuleType]]:
    """The imported modules of these packages, or of all."""
    found = []
    for name, module in list(sys.modules.items()):
        inside = not packages or any(name == package or name.startswith(f"{package}.") for package in packages)
        if inside and isinstance(module, ModuleType):
            found.append((name, module))
    return found


def _rebind(pairs: list[tuple[Callable, Callable]], modules: list[tuple[str, ModuleType]]) -> list[str]:
    """Replaces the first function of each pair by the second, under every name in `modules`; returns these names."""
    others = {id(one): other for one, other in pairs}
    places = []
    for module_name, module in modules:
        names = vars(module)
        for name, value in list(names.items()):
            if id(value) in others:
                names[name] = others[id(value)]
                places.append(f"{module_name}.{name}")
    return places
