"""The demo of masks runs from end to end at a tiny size; properties of its scenes, proposals and picture."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

import fastseg
from examples.masks.__main__ import FIGURES, METHODS
from examples.masks.picture import outline, overlay
from examples.masks.proposals import CELLS, propose, rate
from examples.masks.scenes import OverlappingScenes

ROOT = Path(__file__).resolve().parent.parent
TINY = "--scenes 3 --size 96 128 --compare-size 96 128 --compare-masks 20 --compare-repetitions 2"
SIZE = 96, 130


def test_demo_runs_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "examples.masks", *TINY.split(), "--output", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    numbers = r"\s+(\d+)" + r"\s+(\d\.\d{3})" * len(FIGURES)
    rows = {name: re.search(rf"^  {name}{numbers}$", finished.stdout, re.MULTILINE).groups() for name in METHODS}
    assert float(rows["mask NMS"][1]) > float(rows["before NMS"][1])
    assert int(rows["mask NMS of all digits"][0]) < int(rows["mask NMS"][0]) < int(rows["before NMS"][0])
    assert "equal: the same" in finished.stdout and "peak extra memory" in finished.stdout
    with Image.open(tmp_path / "masks.png") as sheet:
        assert sheet.format == "PNG" and len(sheet.convert("RGB").getcolors(2**24)) > 100


def test_make_reaches_the_demo():
    command = ["make", "--dry-run", "demo", "NET=masks"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.search(r"-m examples\.masks *$", finished.stdout, re.MULTILINE), finished.stdout + finished.stderr


def test_scenes_are_reproducible_and_their_digits_visible():
    scene, again = (OverlappingScenes(seed=3).scene(*SIZE) for _ in range(2))
    assert torch.equal(scene.image, again.image) and torch.equal(scene.masks, again.masks)
    assert scene.image.shape == (3, *SIZE) and scene.masks.shape == (len(scene.labels), *SIZE)
    assert len(scene.labels) > 4 and 0 <= scene.labels.min() and scene.labels.max() <= 9
    assert scene.masks.sum(0).max() == 1, "each pixel is that of one digit"
    boxes = fastseg.ops.pack_masks(scene.masks).boxes.float()
    assert fastseg.ops.nms(boxes, torch.rand(len(boxes)), 0.0).numel() < len(boxes), "they overlap"


def test_proposals_are_disturbed_truths():
    scene = OverlappingScenes(seed=0).scene(*SIZE)
    generator = torch.Generator().manual_seed(0)
    proposals = propose(scene, 5, generator)
    count = 5 * len(scene.labels)
    assert proposals.masks.shape == (count, CELLS, CELLS) and proposals.boxes.shape == (count, 4)
    assert 0 <= proposals.masks.min() and proposals.masks.max() <= 1
    assert proposals.owners.bincount().tolist() == [5] * len(scene.labels)
    right = proposals.labels == scene.labels[proposals.owners]
    assert torch.equal(right, ~proposals.misread)

    masks = fastseg.ops.paste_masks(proposals.masks, proposals.boxes, SIZE)
    quality = fastseg.ops.mask_iou(masks, fastseg.ops.pack_masks(scene.masks)[proposals.owners], pairs=True)
    assert quality[~proposals.clutter].mean() > 0.6 > quality[proposals.clutter].mean()
    scores = rate(proposals, masks, scene.masks, generator)
    plain = ~proposals.clutter & ~proposals.misread
    assert 0 < scores.min() and scores.max() < 1 and (scores[plain] - quality[plain]).abs().max() < 0.07


def test_outlines_stay_inside_and_close_at_the_border():
    square = torch.ones(5, 6, dtype=torch.bool)
    expected = square.clone()
    expected[1:-1, 1:-1] = False
    assert torch.equal(outline(square, 1), expected)
    assert not outline(~square, 1).any()


def test_proposals_without_a_pixel_are_drawn_as_nothing():
    scene = OverlappingScenes(seed=0).scene(*SIZE)
    proposals = propose(scene, 1, torch.Generator().manual_seed(0))
    proposals.masks.zero_()
    none, all_of_them = torch.zeros(0, dtype=torch.int64), torch.arange(len(scene.labels))
    assert overlay(scene, proposals, none).tobytes() == overlay(scene, proposals, all_of_them).tobytes()
