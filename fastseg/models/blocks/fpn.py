"""Feature pyramid network on a ResNet (Lin et al. 2017), and Panoptic FPN's semantic branch; keys are detectron2's."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import layer_block
from fastseg.models.blocks.resnet import ResNet
from fastseg.nn import Conv2d, Upsample

FIRST_LEVEL = 2  # of stride 4; each level doubles the stride
LEVELS = 4
SIZE_DIVISOR = 32  # of images, so that each level is twice as large as the next one
CHANNELS_PER_GROUP = 4  # of the group normalisation: 32 groups of 128 channels


class FPN(nn.Module):
    """Maps of strides 4, 8, 16 and 32 with the same number of channels: P2 to P5.

    A 1x1 convolution of each stage of the trunk is added to the coarser level, enlarged by repeating pixels; a 3x3
    convolution follows. Weights start from Xavier's uniform initialisation (fan in), biases 0.

    Args:
        bottom_up: the trunk.
        channels: of every level.
        p6: whether there is a level of stride 64, every second pixel of P5, for region proposals.
    """

    def __init__(self, bottom_up: ResNet, channels: int, *, p6: bool = False):
        super().__init__()
        self.bottom_up, self.p6 = bottom_up, p6
        for level, stage_channels in enumerate(bottom_up.channels, FIRST_LEVEL):
            self.add_module(f"fpn_lateral{level}", _initialise_xavier_(Conv2d(stage_channels, channels, 1)))
            self.add_module(f"fpn_output{level}", _initialise_xavier_(Conv2d(channels, channels, 3, padding=1)))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The levels, finest first. The rows and columns of the image are multiples of 32."""
        levels: tuple[Tensor, ...] = ()
        merged = None
        for level, stage in reversed([*enumerate(self.bottom_up(image), FIRST_LEVEL)]):
            lateral = self.get_submodule(f"fpn_lateral{level}")(stage)
            merged = lateral if merged is None else lateral + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            levels = (self.get_submodule(f"fpn_output{level}")(merged), *levels)
        if self.p6:
            levels += (levels[-1][..., ::2, ::2],)
        return levels


class SemanticBranch(nn.Module):
    """Scores of stride 4 from P2 to P5: each level is convolved and doubled until it has stride 4; then they are added.

    A step is a 3x3 convolution, group normalisation and a ReLU. Convolutions start from He's normal initialisation
    (fan out).

    Args:
        in_channels: of every level.
        channels: of the sum.
        num_classes: classes that are scored.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        for level in range(FIRST_LEVEL, FIRST_LEVEL + LEVELS):
            steps = nn.Sequential()
            for step in range(max(1, level - FIRST_LEVEL)):
                layer = Conv2d(channels if step else in_channels, channels, 3, padding=1, bias=False)
                norm = nn.GroupNorm(_groups(channels), channels)
                steps.append(layer_block(_initialise_he_fan_out_(layer), norm=norm))
                if level > FIRST_LEVEL:
                    steps.append(Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.add_module(f"p{level}", steps)
        self.predictor = _initialise_he_fan_out_(nn.Conv2d(channels, num_classes, 1))

    def forward(self, levels: tuple[Tensor, ...]) -> Tensor:
        total = None
        for level, image in enumerate(levels[:LEVELS], FIRST_LEVEL):
            image = self.get_submodule(f"p{level}")(image)
            total = image if total is None else total + image
        return self.predictor(total)


def detectron2_names(backbone: FPN, head: SemanticBranch) -> dict[str, str]:
    """{path of a module: its name in detectron2}, for an `FPN` called "backbone" and a branch called "sem_seg_head".

    There a normalisation belongs to its convolution, whose name it continues by ``.norm``.
    """
    trunk = "backbone.bottom_up"
    names = {f"{trunk}.conv1": f"{trunk}.stem.conv1", f"{trunk}.bn1": f"{trunk}.stem.conv1.norm"}
    for path, layer in backbone.bottom_up.named_modules():
        if path.startswith("layer") and next(layer.children(), None) is None:
            stage, block, kind = path.removeprefix("layer").split(".", 2)
            kind = kind.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            if kind.startswith("bn"):
                kind = f"conv{kind.removeprefix('bn')}.norm"
            names[f"{trunk}.{path}"] = f"{trunk}.res{int(stage) + 1}.{block}.{kind}"
    for path, _ in head.named_modules(prefix="sem_seg_head"):
        if path.endswith(".layer"):
            names[path] = path.removesuffix(".layer")
    return names


def _groups(channels: int) -> int:
    """As many as there are with at least `CHANNELS_PER_GROUP` channels each."""
    return next(groups for groups in range(max(1, channels // CHANNELS_PER_GROUP), 0, -1) if channels % groups == 0)


def _initialise_xavier_(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _initialise_he_fan_out_(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
