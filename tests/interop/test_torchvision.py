"""torchvision's detectors with fastseg.integrations.torchvision and without it: values, gradients, programs."""

import copy
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastseg import ops
from fastseg.integrations.torchvision import install, uninstall
from fastseg.testing import assert_within_policy

torchvision = pytest.importorskip("torchvision")
tv_tensors = importlib.import_module("torchvision.tv_tensors")
detection, vision = torchvision.models.detection, torchvision.ops
ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = dict(
    weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, box_detections_per_img=20,
    rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=50,
)  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def _uninstalled():
    yield
    uninstall()


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions of fastseg.ops that were called."""
    seen = []
    for name in ("roi_align", "multiscale_roi_align", "batched_nms", "paste_masks"):

        def run(*args, name=name, function=getattr(ops, name), **options):
            seen.append(name)
            return function(*args, **options)

        monkeypatch.setattr(ops, name, run)
    return seen


def images(dtype):
    return [torch.rand(3, 60, 90).to(dtype), torch.rand(3, 70, 64).to(dtype)]


def targets(dtype):
    boxes = torch.tensor([[5.0, 8, 40, 50], [20, 3, 60, 30], [30, 30, 62, 58]], dtype=dtype)
    masks = torch.zeros(3, 70, 90, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist()):
        mask[top:bottom, left:right] = 1
    sizes = [tuple(image.shape[1:]) for image in images(dtype)]
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks[:, :height, :width].clone()}
        for height, width in sizes
    ]


def losses_and_gradients(model, dtype):
    torch.manual_seed(1)  # for the random samples of the detector
    model = copy.deepcopy(model).train()
    losses = model(images(dtype), targets(dtype))
    sum(losses.values()).backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


DETECTORS = {
    "fasterrcnn_resnet50_fpn": ["multiscale_roi_align", "batched_nms"],
    "maskrcnn_resnet50_fpn": ["multiscale_roi_align", "batched_nms", "roi_align"],  # roi_align crops the targets
}


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_gradients(name, calls):
    """In double precision, so that rounding does not change which boxes are kept."""
    model = getattr(detection, name)(**SMALL).double()
    expected, expected_gradients = losses_and_gradients(model, torch.float64)
    assert not calls
    with install():
        losses, gradients = losses_and_gradients(model, torch.float64)
    assert {*calls} == {*DETECTORS[name]}
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    for parameter, gradient in gradients.items():
        difference = (gradient - expected_gradients[parameter]).abs().max()
        assert difference <= 1e-8 * expected_gradients[parameter].abs().max(), parameter


@pytest.mark.parametrize("name", DETECTORS)
def test_detections(name, calls):
    model, batch = getattr(detection, name)(**SMALL).double().eval(), images(torch.float64)
    with torch.no_grad():
        expected = model(batch)
        with install():
            found = model(batch)
    assert calls.count("batched_nms") == 4  # for proposals and for detections, in two images
    assert all(len(image["boxes"]) for image in expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_losses_in_single_precision():
    model = detection.maskrcnn_resnet50_fpn(**SMALL)
    expected, _ = losses_and_gradients(model, torch.float32)
    with install():
        losses, _ = losses_and_gradients(model, torch.float32)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_masks_are_pasted(calls):
    """In single precision, as in the last transform of a detector."""
    boxes = torch.tensor([[3.0, 4, 30, 28], [0, 0, 40, 40], [10, 10, 10, 20]])
    found = [{"boxes": boxes, "masks": torch.rand(3, 1, 28, 28), "labels": torch.arange(3), "scores": torch.rand(3)}]
    transform = detection.transform.GeneralizedRCNNTransform(32, 48, [0.5] * 3, [0.5] * 3).eval()

    def pasted(dtype=torch.float32):
        result = [{**found[0], "masks": found[0]["masks"].to(dtype)}]
        return transform.postprocess(result, [(32, 48)], [(64, 96)])[0]["masks"]

    stock, exact = pasted(), pasted(torch.float64)
    with install():
        ours = pasted()
        assert calls == ["paste_masks"] and ours.shape == (3, 1, 64, 96)
        assert_within_policy(ours, stock, exact)
        masks = torch.rand(3, 1, 8, 8, requires_grad=True)
        detection.roi_heads.paste_masks_in_image(masks, boxes, (40, 50)).sum().backward()
    assert masks.grad.abs().sum() > 0 and calls == ["paste_masks"]


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_one_stage_detectors(name, calls):
    model = getattr(detection, name)(weights=None, weights_backbone=None, min_size=64, max_size=96).double().eval()
    with torch.no_grad():
        expected = model(images(torch.float64))
        with install():
            found = model(images(torch.float64))
    assert {*calls} == {"batched_nms"}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_tensors_of_torchvisions_own_types():
    boxes = torch.rand(50, 4) * 30
    boxes[:, 2:] += boxes[:, :2]
    scores, masks = torch.rand(50), torch.rand(5, 9, 9) > 0.9
    wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 60))
    expected = vision.nms(wrapped, scores, 0.5), vision.masks_to_boxes(tv_tensors.Mask(masks))
    with install():
        found = vision.nms(wrapped, scores, 0.5), vision.masks_to_boxes(tv_tensors.Mask(masks))
    assert [type(value) for value in found] == [type(value) for value in expected]
    assert all(torch.equal(*pair) for pair in zip(found, expected))


# --- programs ---


class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        self.align, self.pool = vision.RoIAlign((2, 2), 0.5, 2), vision.RoIPool((2, 2), 0.5)

    def forward(self, image, rois):
        return self.align(image, rois) + self.pool(image, rois)


def pools_arguments():
    return torch.randn(2, 3, 16, 16), torch.tensor([[0.0, 1, 1, 9, 9], [1, 2, 3, 12, 14]])


def suppressed(boxes, scores, classes):
    return vision.batched_nms(boxes, scores, classes, 0.5)


def suppressed_arguments():
    boxes = torch.rand(40, 4) * 50
    boxes[:, 2:] += boxes[:, :2]
    return boxes, torch.rand(40), torch.randint(3, (40,))


@pytest.mark.parametrize("make", [torch.jit.script, torch.jit.trace], ids=["script", "trace"])
@pytest.mark.parametrize("model, arguments", [(Pools(), pools_arguments), (suppressed, suppressed_arguments)])
def test_torchscript_holds_torchvisions_ops(make, model, arguments):
    args = arguments()
    expected = model(*args)
    with install():
        program = torch.jit.script(model) if make is torch.jit.script else torch.jit.trace(model, args)
    assert "torchvision::" in str(program.inlined_graph) and "fastseg::" not in str(program.inlined_graph)
    torch.testing.assert_close(program(*args), expected)


def test_a_detector_is_scripted():
    model = detection.maskrcnn_resnet50_fpn(**SMALL).eval()
    with install():
        graph = str(torch.jit.script(model).inlined_graph)
    assert "torchvision::roi_align" in graph and "torchvision::nms" in graph and "fastseg::" not in graph


def test_compiled_programs_follow():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    model, args = torch.compile(Pools(), backend=keep, fullgraph=True), pools_arguments()
    expected = model(*args)
    with install():
        torch.testing.assert_close(model(*args), expected)
    model(*args)
    assert len(graphs) == 2 and "fastseg.roi_align" in graphs[1] and "fastseg" not in graphs[0]


def test_compiled_gradients():
    torch._dynamo.reset()
    image, rois = pools_arguments()
    gradients = []
    for run in (Pools(), torch.compile(Pools(), backend="aot_eager", fullgraph=True)):
        leaf = image.clone().requires_grad_()
        with install():
            run(leaf, rois).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_compiled_suppression():
    torch._dynamo.reset()
    boxes, scores, classes = suppressed_arguments()
    expected = suppressed(boxes, scores, classes)
    with install(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(suppressed, backend="aot_eager", fullgraph=True)
        for dtype in (torch.int64, torch.float32):
            assert torch.equal(compiled(boxes, scores, classes.to(dtype)), expected)


def test_exported_programs_hold_ours():
    args = pools_arguments()
    with install():
        program = torch.export.export(Pools(), args)
    assert "fastseg.roi_align" in str(program.graph) and "torchvision" not in str(program.graph)
    torch.testing.assert_close(program.module()(*args), Pools()(*args))


WITHOUT_OPS = """
import torch
from fastseg.integrations.torchvision import install
try:
    import torchvision
except RuntimeError as error:
    assert "operator torchvision::nms does not exist" in str(error)
else:
    raise AssertionError
install()
import torchvision
assert not torchvision.extension._has_ops()
boxes, scores = torch.tensor([[0., 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12]]), torch.tensor([.9, .8, .7])
assert torchvision.ops.nms(boxes, scores, .5).tolist() == [0, 2]
options = dict(weights=None, weights_backbone=None, min_size=64, max_size=96)
model = torchvision.models.detection.maskrcnn_resnet50_fpn(**options)
with torch.no_grad():
    (found,) = model.eval()([torch.rand(3, 60, 90)])
assert len(found["boxes"]) and found["masks"].shape[1:] == (1, 60, 90)
"""


def test_where_torchvisions_compiled_ops_are_absent(tmp_path):
    source = Path(torchvision.__file__).parent
    shutil.copytree(source, tmp_path / "torchvision", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_OPS], env=environment, cwd=tmp_path, check=True)
