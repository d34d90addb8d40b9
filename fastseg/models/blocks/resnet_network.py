"""What networks on a ResNet have in common."""

from typing import Self

from torch import Tensor, nn

from fastseg.models.blocks.normalisation import NORMS
from fastseg.models.blocks.resnet import BLOCKS, ResNet
from fastseg.models.coarse import CoarseNetwork
from fastseg.models.network import Network


def check_resnet_arguments(network: Network, *, layers: int, width_multiplier: float, norm: str) -> None:
    """Raises ValueError, in the name of `network`, if an argument is out of its range."""
    network.check_positive(width_multiplier=width_multiplier)
    network.check_one_of(tuple(BLOCKS), layers=layers)
    network.check_one_of(NORMS, norm=norm)


def check_multi_grid(network: Network, multi_grid: tuple[int, int, int]) -> None:
    """Raises ValueError, in the name of `network`, if `multi_grid` is not three factors of dilations."""
    if len(multi_grid) != 3 or min(multi_grid) < 1:
        raise ValueError(f"{network.name}: multi_grid is {multi_grid}; allowed: three integers, each 1 or more")


def names_below(module: nn.Module, path: str, release: str) -> dict[str, str]:
    """`Network.release_names` of all parts of ``module``: ``path`` is replaced by ``release``."""
    return {f"{path}{part}": f"{release}{part}" for part, _ in module.named_modules() if part}


class ResNetNetwork(CoarseNetwork):
    """The base class of coarse networks whose trunk, ``backbone``, is torchvision's ResNet."""

    backbone: ResNet
    backbone_keys = "backbone."  # the beginning of the trunk's keys in the release

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> Self:
        """Copies the trunk of torchvision's ``resnet50``, ``resnet101`` or ``resnet152``; ``fc`` is ignored.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        self.copy_tensors("load_imagenet", state_dict, self.backbone.torchvision_sources(self.backbone_keys))
        return self


class TorchvisionNetwork(ResNetNetwork):
    """The base class of torchvision's networks: ``classifier`` on the last stage, ``aux_classifier`` on the third."""

    classifier: nn.Module
    aux_classifier: nn.Module | None
    auxiliary_weights = (0.5,)  # as in torchvision's recipe

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        _, _, stage3, stage4 = self.backbone(image)
        scores = self.classifier(stage4)
        if self.training and self.aux_classifier is not None:
            return scores, self.aux_classifier(stage3)
        return (scores,)
