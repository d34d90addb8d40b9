"""A fake torchvision whose modules look functions up as the real ones do; the functions record their calls."""

from pathlib import Path

MODULES = {
    "__init__": """
        import torch

        from torchvision import extension, ops, models

        if not (HAS_OPS or hasattr(torch.ops.torchvision, "nms")):
            raise RuntimeError("operator torchvision::nms does not exist")
    """,
    "extension": """
        def _has_ops():
            return HAS_OPS
    """,
    "ops/__init__": """
        from torchvision.ops.boxes import batched_nms, masks_to_boxes, nms
        from torchvision.ops.poolers import MultiScaleRoIAlign
        from torchvision.ops.roi_align import RoIAlign, roi_align
        from torchvision.ops.roi_pool import RoIPool, roi_pool
    """,
    "ops/boxes": """
        from torchvision.extension import _has_ops

        def nms(boxes, scores, iou_threshold):
            "Stock's own words."
            assert _has_ops()
            return "stock nms"

        def batched_nms(boxes, scores, idxs, iou_threshold):
            assert _has_ops()
            return "stock batched_nms"

        def masks_to_boxes(masks):
            return "stock masks_to_boxes"
    """,
    "ops/roi_align": """
        from torchvision.extension import _has_ops

        def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
            assert _has_ops()
            return "stock roi_align"

        class RoIAlign:
            def __call__(self, input, rois):
                return roi_align(input, rois, 2, 0.5, 2, True)
    """,
    "ops/roi_pool": """
        from torchvision.extension import _has_ops

        def roi_pool(input, boxes, output_size, spatial_scale=1.0):
            assert _has_ops()
            return "stock roi_pool"

        class RoIPool:
            def __call__(self, input, rois):
                return roi_pool(input, rois, 2, 0.5)
    """,
    "ops/poolers": """
        from torchvision.ops.roi_align import roi_align

        class LevelMapper:
            s0, lvl0, eps = 224, 4, 1e-6

            def __init__(self, k_min, k_max):
                self.k_min, self.k_max = k_min, k_max

        def _multiscale_roi_align(x_filtered, boxes, output_size, sampling_ratio, scales, mapper):
            return "stock loop", roi_align(x_filtered[0], boxes, output_size, 0.5, sampling_ratio)

        class MultiScaleRoIAlign:
            scales, mapper = [0.25, 0.125], LevelMapper(2, 3)

            def __call__(self, maps, boxes):
                return _multiscale_roi_align(maps, boxes, (2, 2), 2, self.scales, self.mapper)
    """,
    "models/__init__": "from torchvision.models import detection",
    "models/detection/__init__": "from torchvision.models.detection import roi_heads, transform",
    "models/detection/roi_heads": """
        from torchvision.ops import boxes as box_ops, roi_align

        def paste_masks_in_image(masks, boxes, img_shape, padding=1):
            return "stock paste_masks_in_image"

        def filter_detections(boxes, scores, labels):
            return box_ops.batched_nms(boxes, scores, labels, 0.5)
    """,
    "models/detection/transform": """
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        def postprocess(masks, boxes):
            return paste_masks_in_image(masks, boxes, (9, 12))
    """,
    "models/late": """
        from torchvision.ops import nms as suppress
        from torchvision.ops import roi_align
    """,
}


def write(folder: Path, has_ops: bool = True) -> None:
    """Writes the package into `folder`, and a package `detector` that has own names for two of its functions."""
    for name, text in MODULES.items():
        path = folder / "torchvision" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").replace("HAS_OPS", str(has_ops)).splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        path.write_text("\n".join(line[indent:] for line in lines))
    (folder / "detector").mkdir()
    (folder / "detector" / "__init__.py").write_text("from torchvision.ops import nms, roi_align as align")
