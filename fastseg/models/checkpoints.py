"""What a state dict that does not fit a network is: the hint in the error of `Network.load_state_dict`."""

from collections.abc import Collection, Mapping
from functools import cache

import torch

from fastseg.models.blocks.resnet import BLOCKS, ResNet
from fastseg.models.blocks.vgg16 import torchvision_keys
from fastseg.models.network import Network
from fastseg.models.registry import MODELS, build

PREFIXES = {  # of keys, and what adds them
    "module.": "DataParallel and DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "model.": "a class around the network",
    "network.": "a class around the network",
}
_NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def hint(network: Network, state_dict: Mapping) -> str:
    """One sentence on where keys that do not fit `network` come from: what to change, or the closest release."""
    for name, part in state_dict.items():
        if isinstance(part, Mapping) and set(part) & set(network.state_dict()):
            return f"the weights are in the entry {name!r}: load state_dict[{name!r}]"
    own, keys = set(network.state_dict()), set(state_dict)
    for prefix, origin in PREFIXES.items():
        if all(key.startswith(prefix) for key in keys) and {key.removeprefix(prefix) for key in keys} & own:
            return (
                f"the keys begin with {prefix!r}, which {origin} adds: remove it, "
                f"{{key.removeprefix({prefix!r}): value for key, value in state_dict.items()}}"
            )
    release, common, length = closest_release(keys)
    if not common:
        return f"no key is one of {network.name} or of another release that fastseg.models knows"
    found = f"closest known release: {release}, of whose {length} keys {common} are given"
    if release.startswith("torchvision's") and hasattr(network, "load_imagenet"):
        return f"{found}; {network.name}.load_imagenet loads it"
    return found


def closest_release(keys: Collection[str]) -> tuple[str, int, int]:
    """The release with the largest part of all keys, its own and the given ones, in common with `keys`.

    Returns:
        its name, the number of common keys, and the number of its keys.
    """
    given = set(keys)
    releases = _releases()
    best = max(releases, key=lambda name: len(given & releases[name]) / len(given | releases[name]))
    return best, len(given & releases[best]), len(releases[best])


@cache
def _releases() -> dict[str, frozenset[str]]:
    """The keys of the networks of fastseg.models, and of torchvision's files of ImageNet weights."""
    found = {}
    with torch.device("meta"):  # keys only: no memory is taken
        for name in MODELS:
            found[f'fastseg.models.build("{name}")'] = frozenset(build(name).state_dict())
        for layers in BLOCKS:
            keys = {*ResNet(layers).state_dict(), "fc.weight", "fc.bias"}
            found[f"torchvision's resnet{layers}"] = frozenset(keys)
    for name, batch_norm in (("vgg16", False), ("vgg16_bn", True)):
        convolutions = [*torchvision_keys(batch_norm).values(), "classifier.6"]
        keys = {f"{path}.{kind}" for path in convolutions for kind in ("weight", "bias")}
        if batch_norm:
            for path in convolutions[:-3]:
                norm = int(path.removeprefix("features.")) + 1
                keys |= {f"features.{norm}.{kind}" for kind in _NORM_KEYS}
        found[f"torchvision's {name}"] = frozenset(keys)
    return found
