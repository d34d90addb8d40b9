"""Networks by name, the table of docs/models.md, and the errors of checkpoints that do not fit."""

import re
from pathlib import Path

import pytest
import torch

import fastseg.models.__main__ as page
from fastseg import models
from fastseg.models import checkpoints
from fastseg.models.network import Network
from fastseg.models.registry import MODELS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
NARROW = dict(width_multiplier=1 / 32)


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_builds_with_its_number_of_parameters(name):
    with torch.device("meta"):
        network = models.build(name)
    assert type(network) is MODELS[name].network
    assert sum(value.numel() for value in network.parameters()) == MODELS[name].parameters


def test_every_network_has_an_entry():
    classes = {value for value in vars(models).values() if isinstance(value, type) and issubclass(value, Network)}
    assert classes == {entry.network for entry in MODELS.values()}


def test_lists_the_names():
    assert models.list_models() == list(MODELS)
    assert {"fcn32s_vgg16", "fcn16s_vgg16", "fcn8s_vgg16", "fcn_resnet101", "segnet_basic"} < set(models.list_models())


def test_arguments_replace_the_published_ones():
    with torch.device("meta"):
        network = models.build("fcn_resnet101", num_classes=7, layers=50, auxiliary=False)
    assert (network.num_classes, len(network.backbone.layer3), network.aux_classifier) == (7, 6, None)


@pytest.mark.parametrize("name, closest", [("fcn8s_vgg", "fcn8s_vgg16"), ("SEGNET", "segnet"), ("?", "deconvnet")])
def test_an_unknown_name_gives_the_closest(name, closest):
    with pytest.raises(ValueError, match=rf"build: name is '{re.escape(name)}'; allowed: .*\b{closest}\b") as error:
        models.build(name)
    assert ("fcn_resnet50" in str(error.value)) == (name == "?")  # which is close to none: the message lists all


def test_the_page_shows_the_table():
    text = DOCS.read_text()
    assert page.with_table(text) == text, "run `python -m fastseg.models --write docs/models.md`"
    assert "old" not in page.with_table(f"above\n{page.MARKERS[0]}old{page.MARKERS[1]}\nbelow")


def test_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fastseg.models"])
    page.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MODELS) + 1
    assert [line.split()[0] for line in lines[1:]] == list(MODELS)


def test_records_the_ops_that_a_network_calls():
    assert page.ops_used("segnet") == ("cross_entropy", "max_pool2d", "max_unpool2d", "upsample_argmax")
    assert "upsample_cross_entropy" in page.ops_used("fcn_resnet50")


# --- checkpoints ---


def message_of(network, state_dict):
    with pytest.raises(RuntimeError) as error:
        network.load_state_dict(state_dict)
    return str(error.value)


@pytest.mark.parametrize("prefix, origin", [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")])
def test_a_prefix_of_all_keys_is_named(prefix, origin):
    network = models.SegNetBasic(**NARROW)
    prefixed = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    message = message_of(network, prefixed)
    assert (
        f"keys begin with '{prefix}'" in message and origin in message and 'Missing key(s) in state_dict: "' in message
    )
    network.load_state_dict({key.removeprefix(prefix): value for key, value in prefixed.items()})
    assert "closest known release" in message_of(network, {**network.state_dict(), f"{prefix}conv1.weight": None})


@pytest.mark.parametrize("given", ["fcn_resnet101", "segnet_basic", "fcn8s_vgg16", "deconvnet"])
def test_the_keys_of_another_network_are_recognised(given):
    network = models.SegNet(**NARROW) if given != "segnet_basic" else models.FCN8s(**NARROW)
    state_dict = models.build(given, **NARROW).state_dict()
    message = message_of(network, state_dict)
    assert f'closest known release: fastseg.models.build("{given}"), of whose {len(state_dict)} keys' in message
    assert f"{len(state_dict)} are given" in message
    assert "Missing key(s)" in message and "Unexpected key(s)" in message


def test_of_two_releases_with_the_same_common_keys_the_smaller_one_is_closest(monkeypatch):
    releases = {"large": frozenset("abcd"), "small": frozenset("abc")}
    monkeypatch.setattr(checkpoints, "_releases", lambda: releases)
    assert checkpoints.closest_release("ab") == ("small", 2, 3)


def test_a_missing_and_an_unexpected_key_are_named():
    network = models.SegNet(**NARROW)
    state_dict = network.state_dict()
    state_dict["conv9_9.weight"] = state_dict.pop("conv1_1.weight")
    message = message_of(network, state_dict)
    assert 'Missing key(s) in state_dict: "conv1_1.weight"' in message
    assert 'Unexpected key(s) in state_dict: "conv9_9.weight"' in message
    keys = len(state_dict)
    assert (
        f'closest known release: fastseg.models.build("segnet"), of whose {keys} keys {keys - 1} are given' in message
    )


def test_weights_inside_a_checkpoint_are_found():
    network = models.SegNetBasic(**NARROW)
    message = message_of(network, {"epoch": 3, "model": network.state_dict()})
    assert "the weights are in the entry 'model': load state_dict['model']" in message


def test_imagenet_weights_name_the_method_that_loads_them():
    network = models.FCNResNet(**NARROW)
    trunk = {key: torch.zeros(1) for key in (*network.backbone.state_dict(), "fc.weight", "fc.bias")}
    message = message_of(network, trunk)
    assert "torchvision's resnet50, of whose 320 keys 320" in message and "FCNResNet.load_imagenet loads it" in message
    vgg16 = {f"features.{number}.weight": torch.zeros(1) for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
    message = message_of(models.FCN8s(**NARROW), vgg16)
    assert "torchvision's vgg16, of whose 32 keys 13" in message and "FCN8s.load_imagenet loads it" in message


def test_foreign_keys_and_wrong_shapes():
    network = models.SegNetBasic(**NARROW)
    assert "no key is one of fastseg.models.SegNetBasic" in message_of(network, {"anything": torch.zeros(1)})
    message = message_of(network, models.SegNetBasic(num_classes=5, **NARROW).state_dict())
    assert "size mismatch for conv_classifier.weight" in message and "closest" not in message
