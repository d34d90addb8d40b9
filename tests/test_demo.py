"""The demo runs from end to end at a tiny size, prints its results and writes its picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.digits import picture, training
from examples.digits.networks import CHOICES
from examples.digits.scenes import CELL, CLASSES, IGNORE, Scenes, normalised

ROOT = Path(__file__).resolve().parent.parent
TINY = "--steps 2 --batch 2 --scenes 4 --test-scenes 6 --width 0.03 --compare-side 64 --compare-repetitions 1"


@pytest.mark.parametrize("net", CHOICES)
def test_demo_runs_from_end_to_end(tmp_path, net):
    command = [sys.executable, "-m", "examples.digits", "--net", net, *TINY.split(), "--output", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for expected in (
        "CPU library",
        "CrossEntropyLoss -> fastseg.nn.CrossEntropyLoss",
        "fastseg.accelerate: the loss and 8 gradients are within the policy",
        f"{CHOICES[net].comparison[1]}: the loss and 8 gradients are within the policy",
        "peak extra memory",
        f"{CHOICES[net].title} learns to find and read handwritten digits",
        "IoU of background",
        "(background everywhere: pixel accuracy 0.",
    ):
        assert expected in finished.stdout
    if net == "segnet_basic":
        for stock in ("MaxPool2d", "MaxUnpool2d"):
            assert f"{stock} -> fastseg.nn.{stock}" in finished.stdout
    assert re.search(r"pixel accuracy 0\.\d{3}, mIoU 0\.\d{3}", finished.stdout)
    with Image.open(tmp_path / CHOICES[net].picture) as sheet:
        assert sheet.format == "PNG" and len(sheet.convert("RGB").getcolors(2**24)) > 100


def test_make_passes_the_network_on():
    for arguments, net in (([], "fcn"), (["NET=segnet_basic"], "segnet_basic")):
        command = ["make", "--dry-run", "demo", *arguments]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert f"-m examples.digits --net {net}" in finished.stdout, finished.stderr
        assert net in CHOICES


@pytest.mark.parametrize("net", CHOICES)
def test_networks_learn_a_scene_by_heart(net):
    """A few steps on one scene: `build`, `loss` and `predict` of a choice fit together."""
    choice = CHOICES[net]
    images, labels = Scenes(training=True, seed=0).make(1, CELL, CELL)
    torch.manual_seed(0)
    network = choice.build(choice.width)
    before = choice.loss(network.train(), normalised(images), labels).item()
    training.train(network, choice.loss, images, labels, 30, 2, choice.learning_rate, lambda step: None)
    assert choice.loss(network, normalised(images), labels).item() < 0.5 * before
    predictions = training.predict(network.train(), choice.predict, images)
    assert not network.training
    measured = training.evaluate(predictions, labels)
    assert measured["pixel_accuracy"] > 0.5


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


@pytest.mark.parametrize("net", CHOICES)
def test_predictions_have_the_size_of_the_images(net):
    images, _ = Scenes(training=False, seed=0).make(3, 64, 96)
    predictions = training.predict(CHOICES[net].build(0.03), CHOICES[net].predict, images, batch=2)
    assert predictions.shape == (3, 64, 96) and predictions.dtype == torch.uint8


def test_no_picture_overwrites_another():
    assert len({choice.picture for choice in CHOICES.values()}) == len(CHOICES)


def test_every_class_has_a_colour_of_its_own():
    assert len({*picture.PALETTE, picture.IGNORED}) == len(CLASSES) + 1
