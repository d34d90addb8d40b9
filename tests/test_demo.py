"""The demo runs from end to end at a tiny size, prints what it promises and writes its picture."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from examples.digits import picture, training
from examples.digits.scenes import CELL, CLASSES, IGNORE, Scenes, normalised

ROOT = Path(__file__).resolve().parent.parent
TINY = "--steps 2 --batch 2 --scenes 4 --test-scenes 6 --width 0.03 --compare-side 64 --compare-repetitions 1"


def test_demo_runs_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "examples.digits", *TINY.split(), "--output", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for expected in (
        "CPU library",
        "loss   CrossEntropyLoss -> fastseg.nn.CrossEntropyLoss",
        "fastseg.accelerate: the loss and 8 gradients are within the policy",
        "and upsampling fused: the loss and 8 gradients are within the policy",
        "peak extra memory",
        "IoU of background",
    ):
        assert expected in finished.stdout
    assert re.search(r"pixel accuracy 0\.\d{3}, mIoU 0\.\d{3}", finished.stdout)
    with Image.open(tmp_path / "digits.png") as sheet:
        assert sheet.format == "PNG" and len(sheet.convert("RGB").getcolors(2**24)) > 100


def test_scenes_are_labelled_reproducible_and_split():
    images, labels = Scenes(training=True, seed=0).make(4, 2 * CELL, 3 * CELL)
    again = Scenes(training=True, seed=0).make(4, 2 * CELL, 3 * CELL)
    assert images.shape == (4, 3, 2 * CELL, 3 * CELL) and labels.shape == (4, 2 * CELL, 3 * CELL)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    found = set(labels.unique().tolist())
    assert {0, IGNORE} < found <= {*range(len(CLASSES)), IGNORE}

    training_scenes, test_scenes = Scenes(training=True, seed=0), Scenes(training=False, seed=0)
    assert len(training_scenes.glyphs) + len(test_scenes.glyphs) == 1797
    for left, right in zip(training_scenes.photographs, test_scenes.photographs, strict=True):
        assert left.shape[:2] == right.shape[:2]
        assert left.shape[2] >= 2 * right.shape[2] - 2


def test_normalised_images_are_about_standard():
    images, _ = Scenes(training=True, seed=0).make(8, 64, 64)
    values = normalised(images)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert abs(values.mean()) < 1 and 0.3 < values.std() < 2


def test_predictions_have_the_size_of_the_images():
    images, _ = Scenes(training=False, seed=0).make(3, 64, 96)
    predictions = training.predict(training.build_network(0.03), images, batch=2)
    assert predictions.shape == (3, 64, 96) and predictions.dtype == torch.uint8


def test_every_class_has_a_colour_of_its_own():
    assert len({*picture.PALETTE, picture.IGNORED}) == len(CLASSES) + 1
