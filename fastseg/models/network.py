"""The base class of all networks: arguments, checks, errors, and the key names of the original releases."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastseg import ops

IGNORED_LABEL = 255  # of PASCAL VOC and Cityscapes; counts for nothing in losses


class Network(nn.Module):
    """A network that maps images ``(N, in_channels, H, W)`` to class scores ``(N, num_classes, H, W)``.

    A subclass is composed of modules. `release_names` gives the names that the original release has for them; state
    dicts have the release's keys, for saving and for loading.

    Args:
        num_classes: number of classes to score.
        in_channels: channels of the image.

    Raises:
        ValueError: an argument that is below 1.
    """

    smallest_image = 1  # rows and columns

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.check_at_least_one(num_classes=num_classes, in_channels=in_channels)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.register_state_dict_post_hook(_to_release)
        self.register_load_state_dict_pre_hook(_from_release)
        self.register_load_state_dict_post_hook(_name_as_release)

    @property
    def name(self) -> str:
        """The name in error messages."""
        return f"fastseg.models.{type(self).__name__}"

    def release_names(self) -> dict[str, str]:
        """{path of a module: its name in the release}, for the modules whose names differ."""
        return {}

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Cross entropy of the scores, the mean over the labelled pixels unless `options` say otherwise.

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8; 255 is ignored.
            options: those of `fastseg.ops.cross_entropy`, such as weight, pixel_weight, ignore_index and reduction.
        """
        return ops.cross_entropy(self(images), targets, **{"ignore_index": IGNORED_LABEL, **options})

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        """The label of the highest score at each pixel, (N, H, W) in `dtype`, uint8 or int64."""
        return cast(Tensor, ops.upsample_argmax(self(images), images.shape[2:], dtype=dtype))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As torch's; the error about missing or unexpected keys also says what release the keys are closest to."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if set(state_dict) == set(self.state_dict()):  # shapes that do not fit, for which torch's message is enough
                raise
            from fastseg.models.checkpoints import hint  # it imports all networks

            raise RuntimeError(f"{error}\n\t{self.name}: {hint(self, state_dict)}") from None

    def check_at_least_one(self, **arguments: int) -> None:
        for argument, value in arguments.items():
            if value < 1:
                raise ValueError(f"{self.name}: {argument} is {value}; allowed: 1 or more")

    def check_positive(self, **arguments: float) -> None:
        for argument, value in arguments.items():
            if not value > 0:
                raise ValueError(f"{self.name}: {argument} is {value}; allowed: above 0")

    def check_one_of(self, choices: tuple, **arguments) -> None:
        for argument, value in arguments.items():
            if value not in choices:
                raise ValueError(f"{self.name}: {argument} is {value!r}; allowed: {', '.join(map(str, choices))}")

    def check_image(self, image: Tensor) -> None:
        """Raises RuntimeError unless `image` is (N, in_channels, H, W) with H and W at least `smallest_image`."""
        if image.dim() != 4 or image.shape[1] != self.in_channels or min(image.shape[2:]) < self.smallest_image:
            raise RuntimeError(
                f"{self.name}: image has shape {tuple(image.shape)}; "
                f"allowed: (N, {self.in_channels}, H, W) with H and W at least {self.smallest_image}"
            )

    def check_targets(self, images: Tensor, targets: Tensor) -> None:
        """Raises RuntimeError unless `targets` are (N, H, W), as many and as large as `images`."""
        expected = (images.shape[0], *images.shape[2:])
        if targets.shape != expected:
            raise RuntimeError(
                f"{self.name}.loss: targets have shape {tuple(targets.shape)}; allowed: {tuple(expected)}, "
                "the size of the images"
            )

    @torch.no_grad()
    def copy_tensors(self, method: str, state_dict: dict[str, Tensor], sources: dict[str, str]) -> None:
        """Copies ``state_dict[source]`` to the own key ``target`` for each ``target: source``; nothing if one fails.

        A linear layer over a flattened map (C, k, k) is the convolution with its weight viewed as (O, C, k, k), so a
        matrix (O, C k k) is accepted for such a convolution; nothing is transposed.

        Raises:
            RuntimeError: a missing key or a tensor of another shape; the message names `method`.
        """
        missing = sorted(source for source in sources.values() if source not in state_dict)
        if missing:
            raise RuntimeError(f"{self.name}.{method}: state_dict lacks {', '.join(missing)}")
        own = self.state_dict(keep_vars=True)
        for target, source in sources.items():
            given, shape = state_dict[source].shape, own[target].shape
            allowed = [tuple(shape)]
            if source.startswith("classifier.") and len(shape) == 4:
                allowed.append((shape[0], shape[1:].numel()))
            if tuple(given) not in allowed:
                raise RuntimeError(
                    f"{self.name}.{method}: {source} has shape {tuple(given)}; "
                    f"allowed for {target}: {' or '.join(map(str, allowed))}"
                )
        for target, source in sources.items():
            own[target].copy_(state_dict[source].reshape(own[target].shape))


def renamed(key: str, prefix: str, names: dict[str, str]) -> str:
    """The key of a parameter or buffer below `prefix`, with the path of its module replaced as `names` says."""
    path, dot, value = key.removeprefix(prefix).rpartition(".")
    return f"{prefix}{names.get(path, path)}{dot}{value}"


def _rename(state_dict: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    """Renames keys in place and keeps their order."""
    values = [(key, state_dict.pop(key)) for key in list(state_dict) if key.startswith(prefix)]
    for key, value in values:
        state_dict[renamed(key, prefix, names)] = value


def _to_release(network: Network, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    _rename(state_dict, prefix, network.release_names())


def _from_release(network: Network, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    _rename(state_dict, prefix, {release: own for own, release in network.release_names().items()})


def _name_as_release(network: Network, keys) -> None:
    """Renames the keys in load errors to the release's names, also if the network is part of another one."""
    for own, release in network.release_names().items():
        for found in (keys.missing_keys, keys.unexpected_keys):
            for place, key in enumerate(found):
                path, dot, value = key.rpartition(".")
                if path == own or path.endswith(f".{own}"):
                    found[place] = f"{path.removesuffix(own)}{release}{dot}{value}"
