"""fastseg.integrations.torchvision on a fake with the same look-ups; with the real torchvision: tests/interop."""

import importlib
import inspect
import pickle
import sys
import threading

import pytest
import torch

from fastseg import integrations, ops
from fastseg.integrations.torchvision import install, uninstall
from tests.integrations import fake_torchvision

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
]

PACKAGES = ("torchvision", "detector")
DEFINED = (
    "torchvision.ops.boxes.nms", "torchvision.ops.boxes.batched_nms", "torchvision.ops.boxes.masks_to_boxes",
    "torchvision.ops.roi_align.roi_align", "torchvision.ops.roi_pool.roi_pool",
    "torchvision.ops.poolers._multiscale_roi_align", "torchvision.models.detection.roi_heads.paste_masks_in_image",
)  # fmt: skip
IMPORTED = (
    "torchvision.ops.nms", "torchvision.ops.batched_nms", "torchvision.ops.masks_to_boxes", "torchvision.ops.roi_align",
    "torchvision.ops.roi_pool", "torchvision.ops.poolers.roi_align", "torchvision.models.detection.roi_heads.roi_align",
    "torchvision.models.detection.transform.paste_masks_in_image",
)  # fmt: skip


def in_package(name):
    return name.partition(".")[0] in PACKAGES


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Imports the fake torchvision; undoes everything after the test."""
    real = {name: module for name, module in sys.modules.items() if in_package(name)}
    for name in real:
        del sys.modules[name]

    def start(has_ops=True):
        fake_torchvision.write(tmp_path, has_ops)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("torchvision")

    monkeypatch.setattr(integrations.torchvision, "_fragments", fragments := [])
    yield start
    uninstall()
    for fragment in fragments:
        fragment._destroy()
    for name in [name for name in sys.modules if in_package(name)]:
        del sys.modules[name]
    sys.modules.update(real)


@pytest.fixture
def torchvision(imported):
    return imported()


def names():
    """{name: object} for every name in every module of the packages."""
    modules = {name: module for name, module in sys.modules.items() if in_package(name)}
    return {f"{name}.{key}": id(value) for name, module in modules.items() for key, value in vars(module).items()}


def some_boxes(count=6):
    corner, size = torch.rand(count, 2) * 8, torch.rand(count, 2) * 6
    return torch.cat([corner, corner + size], 1)


def some_rois():
    return torch.cat([torch.tensor([0.0, 1, 1, 0, 0, 1])[:, None], some_boxes()], 1)


def test_every_place_is_found_and_given_back(torchvision):
    before = names()
    installation = install()
    after = names()
    assert sorted(installation.places) == sorted([*DEFINED, *IMPORTED])
    assert {name for name in before if before[name] != after[name]} == {*DEFINED, *IMPORTED}
    assert str(installation).startswith("fastseg.integrations.torchvision: 15 places\n  torchvision.")
    uninstall()
    assert names() == before


def test_a_second_time_is_harmless(torchvision):
    uninstall()
    before = names()
    install()
    once = names()
    assert install().places == () and names() == once
    uninstall()
    uninstall()
    assert names() == before
    assert install().places and names() != before  # installs again


def test_for_a_while(torchvision):
    before = names()
    with pytest.raises(ZeroDivisionError):
        with install() as installation:
            assert installation.places and names() != before
            with install():
                pass
            assert names() != before  # the outer installation is still in force
            raise ZeroDivisionError
    assert names() == before


def test_modules_imported_later(torchvision):
    install()
    late, detector = importlib.import_module("torchvision.models.late"), importlib.import_module("detector")
    assert late.suppress is torchvision.ops.nms is detector.nms and late.roi_align is detector.align
    assert late.suppress(some_boxes(), torch.rand(6), 0.5).dtype == torch.int64
    uninstall()
    assert late.suppress is torchvision.ops.nms is detector.nms and late.roi_align is detector.align
    assert late.suppress(some_boxes(), torch.rand(6), 0.5) == "stock nms"


def test_other_packages_where_they_are_named(torchvision):
    detector = importlib.import_module("detector")
    stock, stock_align = detector.nms, detector.align
    with install():
        assert detector.nms is stock
        assert install("detector").places == ("detector.nms", "detector.align")
        assert detector.nms is torchvision.ops.nms is not stock
    assert detector.nms is stock and detector.align is stock_align


def test_what_others_put_there_stays(torchvision, monkeypatch):
    install()
    monkeypatch.setattr(torchvision.ops, "nms", theirs := lambda *_: "theirs")
    uninstall()
    assert torchvision.ops.nms is theirs and torchvision.ops.boxes.nms(None, None, 0.5) == "stock nms"


def test_a_reloaded_module_is_replaced_by_the_next_install(torchvision):
    install()
    boxes = importlib.reload(torchvision.ops.boxes)
    assert boxes.nms is not torchvision.ops.nms
    stock = boxes.nms
    assert "torchvision.ops.boxes.nms" in install().places
    uninstall()
    assert boxes.nms is stock and torchvision.ops.nms(None, None, 0.5) == "stock nms"


def test_functions_keep_name_signature_and_documentation(torchvision):
    stock = torchvision.ops.nms
    with install():
        ours = torchvision.ops.nms
        assert ours.__wrapped__ is stock and ours.__doc__ == "Stock's own words."
        assert inspect.signature(ours) == inspect.signature(stock)
        assert pickle.loads(pickle.dumps(ours)) is ours
        assert ours(iou_threshold=0.5, boxes=some_boxes(), scores=torch.rand(6)).dim() == 1
        with pytest.raises(TypeError, match="iou_threshold"):
            ours(some_boxes(), torch.rand(6))


def test_values_of_every_function(torchvision):
    vision, detection = torchvision.ops, torchvision.models.detection
    image, rois, boxes, scores = torch.randn(2, 3, 10, 12), some_rois(), some_boxes(), torch.rand(6)
    labels, masks = torch.randint(2, (6,)), torch.rand(6, 1, 5, 5)
    modules = vision.RoIAlign(), vision.RoIPool(), vision.MultiScaleRoIAlign()  # made before the installation
    pyramid, listed = [image, image[:, :, ::2, ::2]], [boxes[:2], boxes[2:]]
    install()
    pairs = {
        "RoIAlign": (modules[0](image, rois), ops.roi_align(image, rois, 2, 0.5, 2, True)),
        "RoIPool": (modules[1](image, rois), ops.roi_pool(image, rois, 2, 0.5)),
        "MultiScaleRoIAlign": (modules[2](pyramid, listed),
                               ops.multiscale_roi_align(pyramid, listed, 2, [0.25, 0.125], 2)),
        "roi_align": (detection.roi_heads.roi_align(image, listed, (2, 3), aligned=True),
                      ops.roi_align(image, listed, (2, 3), aligned=True)),
        "nms": (vision.nms(boxes, scores, 0.1), ops.nms(boxes, scores, 0.1)),
        "batched_nms": (detection.roi_heads.filter_detections(boxes, scores, labels),
                        ops.batched_nms(boxes, scores, labels, 0.5)),
        "masks_to_boxes": (vision.masks_to_boxes(masks[:, 0] > 0.9), ops.masks_to_boxes(masks[:, 0] > 0.9)),
        "paste": (detection.transform.postprocess(masks, boxes),
                  ops.paste_masks(masks, boxes, (9, 12), convention="torchvision", output="soft")[:, None]),
    }  # fmt: skip
    for name, (given, expected) in pairs.items():
        assert torch.equal(given, expected), name


def test_gradients(torchvision):
    image = torch.randn(2, 3, 10, 12, requires_grad=True)
    with install():
        torchvision.ops.RoIAlign()(image, some_rois()).sum().backward()
    assert image.grad.abs().sum() > 0


def test_lists_of_more_or_fewer_tensors_than_images(torchvision):
    install()
    image, boxes = torch.randn(2, 3, 10, 12), some_boxes().half()
    rows = torch.cat([torch.zeros(6, 1), boxes.float()], 1)
    for listed in ([boxes], [boxes, boxes[:0], boxes[:0]]):
        assert torch.equal(torchvision.ops.roi_align(image, listed, 2), ops.roi_align(image, rows, 2))
    with pytest.raises(IndexError, match="batch index 2"):
        torchvision.ops.roi_pool(image, [boxes] * 3, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.uint16, torch.float32, torch.float16, torch.float64])
def test_classes_of_any_dtype(torchvision, dtype):
    install()
    boxes, scores = torch.tensor([0.0, 0, 4, 4]).repeat(5, 1), torch.tensor([5.0, 4, 3, 2, 1])
    classes = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    assert torchvision.ops.batched_nms(boxes, scores, classes, 0.5).tolist() == [0, 1]
    if dtype.is_floating_point:
        classes = torch.tensor([0, 0.5, -0.0, 1, 0.5]).to(dtype)
        assert torchvision.ops.batched_nms(boxes, scores, classes, 0.5).tolist() == [0, 1, 3]


def test_masks_of_any_dtype(torchvision):
    install()
    masks = torch.rand(3, 6, 7) > 0.8
    for dtype in (torch.int64, torch.int8, torch.float16, torch.uint8):
        assert torch.equal(torchvision.ops.masks_to_boxes(masks.to(dtype)), ops.masks_to_boxes(masks))


def left_to_stock():
    """Calls that ours do not support: (reason, function, arguments)."""
    image, rois, boxes, scores = torch.randn(2, 3, 10, 12), some_rois(), some_boxes(), torch.rand(6)
    labels, masks = torch.randint(2, (6,)), torch.rand(6, 1, 5, 5)
    quantized = torch.quantize_per_tensor(image, 0.1, 0, torch.quint8)
    nan = float("nan")
    return [
        ("quantized", "roi_align", (quantized, rois, 2)),
        ("no image", "roi_align", (None, rois, 2)),
        ("integer image", "roi_align", (image.long(), rois, 2)),
        ("no channel", "roi_align", (image[:, :0], rois, 2)),
        ("integer boxes", "roi_align", (image, rois.long(), 2)),
        ("boxes of another type", "roi_align", (image, "boxes", 2)),
        ("meta", "roi_align", (image.to("meta"), rois.to("meta"), 2)),
        ("no bin", "roi_align", (image, rois, (0, 2))),
        ("scale", "roi_align", (image, rois, 2, -1.0)),
        ("many samples", "roi_align", (image, rois, 2, 1.0, 1025)),
        ("scale of another type", "roi_align", (image, rois, 2, "1")),
        ("samples of another type", "roi_align", (image, rois, 2, 1.0, None)),
        ("size of another type", "roi_align", (image, rois, 2.0)),
        ("scale", "roi_pool", (image, rois, 2, 0.0)),
        ("threshold", "nms", (boxes, scores, 1.5)),
        ("threshold", "nms", (boxes, scores, -0.5)),
        ("threshold", "nms", (boxes, scores, nan)),
        ("threshold of another type", "nms", (boxes, scores, "0.5")),
        ("integers", "nms", (boxes.long(), scores, 0.5)),
        ("threshold", "batched_nms", (boxes, scores, labels, 2)),
        ("one class for all", "batched_nms", (boxes, scores, labels[:1], 0.5)),
        ("no boxes", "batched_nms", (boxes.flatten()[:0], scores[:0], labels[:0], 0.5)),
        ("two dimensions", "masks_to_boxes", (masks[0, 0],)),
        ("no pixel", "masks_to_boxes", (masks[:, 0, :0],)),
        ("padding", "paste_masks_in_image", (masks, boxes, (9, 12), 2)),
        ("not square", "paste_masks_in_image", (masks[..., 1:], boxes, (9, 12))),
        ("differentiated", "paste_masks_in_image", (masks.clone().requires_grad_(), boxes, (9, 12))),
        ("float64", "paste_masks_in_image", (masks.double(), boxes, (9, 12))),
        ("boxes of another precision", "paste_masks_in_image", (masks, boxes.double(), (9, 12))),
        ("no image", "paste_masks_in_image", (masks, boxes, (0, 12))),
    ]


def test_calls_that_ours_do_not_take_go_to_torchvision(torchvision):
    install()
    for why, function, args in left_to_stock():
        module = torchvision.models.detection.roi_heads if function == "paste_masks_in_image" else torchvision.ops
        assert getattr(module, function)(*args) == f"stock {function}", why


@pytest.mark.parametrize("why", ["dtypes", "images", "levels", "epsilon", "scales"])
def test_pyramids_that_ours_do_not_take_go_through_torchvisions_loop(torchvision, why):
    pool, image, boxes = torchvision.ops.MultiScaleRoIAlign(), torch.randn(2, 3, 10, 12), [some_boxes()] * 2
    maps = [image, image]
    if why == "dtypes":
        maps[1] = image.double()
    elif why == "images":
        boxes = boxes[:1]
    elif why == "levels":
        pool.mapper = torchvision.ops.poolers.LevelMapper(2, 5)
    elif why == "epsilon":
        pool.mapper = torchvision.ops.poolers.LevelMapper(2, 3)
        pool.mapper.eps = 0.1
    else:
        pool.scales = None
    with install():
        told, pooled = pool(maps, boxes)
    rows = torch.cat([torch.nn.functional.pad(own, (1, 0), value=place) for place, own in enumerate(boxes)])
    assert told == "stock loop" and torch.equal(pooled, ops.roi_align(image, rows, (2, 2), 0.5, 2))


def test_programs_hold_torchvisions_own_functions(torchvision):
    install()
    boxes, scores, seen = some_boxes(), torch.rand(6), []

    def function(boxes, scores):
        seen.append(torchvision.ops.nms(boxes, scores, 0.5))
        return boxes + 1

    torch.jit.trace(function, (boxes, scores), check_trace=False)
    torch.fx.symbolic_trace(function)
    function(boxes, scores)
    assert seen[:2] == ["stock nms"] * 2 and isinstance(seen[2], torch.Tensor)


@pytest.mark.skipif(hasattr(torch.ops.torchvision, "nms"), reason="torchvision is loaded, compiled ops and all")
def test_without_torchvisions_compiled_ops(imported):
    with pytest.raises(RuntimeError, match="operator torchvision::nms does not exist"):
        imported(has_ops=False)
    install()
    vision = importlib.import_module("torchvision").ops
    boxes, scores = some_boxes(), torch.rand(6)
    assert torch.equal(vision.nms(boxes, scores, 0.5), ops.nms(boxes, scores, 0.5))
    image, rois = torch.randn(2, 3, 10, 12), some_rois()
    assert torch.equal(vision.RoIAlign()(image, rois), ops.roi_align(image, rois, 2, 0.5, 2, True))
    assert vision.roi_pool(image.to("meta"), rois.to("meta"), 2).shape == (6, 3, 2, 2)
    with pytest.raises(ValueError, match="fastseg.ops.nms: iou_threshold=1.5; allowed: 0 to 1"):
        vision.nms(boxes, scores, 1.5)
    traced = torch.jit.trace(lambda boxes, scores: vision.nms(boxes, scores, 0.5), (boxes, scores))
    assert torch.equal(traced(boxes, scores), ops.nms(boxes, scores, 0.5))
    assert vision.masks_to_boxes(torch.ones(0, 2, 2)) == "stock masks_to_boxes"
    uninstall()
    with pytest.raises(AssertionError):  # as before
        vision.nms(boxes, scores, 0.5)


def test_errors_of_an_import_stay(tmp_path, imported, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for error, text in ((RuntimeError, "raise RuntimeError('mine')"), (ImportError, "import no_such_module")):
        (tmp_path / "torchvision" / "__init__.py").write_text(text)
        importlib.invalidate_caches()
        with pytest.raises(error, match="mine|No module named 'no_such_module'"):
            install()


def test_without_torchvision(imported):
    sys.modules["torchvision"] = None
    with pytest.raises(ImportError, match="torchvision is not installed: `pip install torchvision`"):
        integrations.torchvision.install()
    uninstall()


def test_packages_that_are_none(torchvision):
    before = names()
    with pytest.raises(ImportError, match="there is no package 'no_such_package'"):
        install("no_such_package")
    with pytest.raises(TypeError, match="packages holds 3; allowed: str"):
        install(3)
    assert names() == before
    install("__main__")


def test_many_threads_install_and_uninstall(torchvision):
    before, failures = names(), []

    def work():
        try:
            for _ in range(20):
                install()
                found = torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
                assert isinstance(found, torch.Tensor) or found == "stock nms"
                uninstall()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and names() == before
