"""Encoders that pool with indices and decoders that unpool by them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseg.models.network import Network
from fastseg.nn import MaxPool2d, MaxUnpool2d

FIRST_DROPOUT_STAGE = 3
BATCH_NORM_SHIFT = 1e-3  # the initial shift in Caffe's training files; the scale starts at 1


class EncoderStage(nn.Module):
    """``layers``, then a 2x2 pooling that rounds odd sizes up as Caffe does, then dropout."""

    def __init__(self, layers: nn.Module, dropout: nn.Module):
        super().__init__()
        self.layers = layers
        self.pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=True, index_format="compact")
        self.dropout = dropout

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """The pooled map, the indices of its values, and the size of the map before pooling."""
        image = self.layers(image)
        pooled, indices = self.pool(image)
        return self.dropout(pooled), indices, image.shape[2:]


class DecoderStage(nn.Module):
    """Unpools with the indices, to the size before the pooling, then ``layers`` and dropout."""

    def __init__(self, layers: nn.Module, dropout: nn.Module):
        super().__init__()
        self.unpool = MaxUnpool2d(2, 2)
        self.layers = layers
        self.dropout = dropout

    def forward(self, image: Tensor, indices: Tensor, size: torch.Size) -> Tensor:
        return self.dropout(self.layers(self.unpool(image, indices, output_size=size)))


class UnpoolingNetwork(Network):
    """The base class of `SegNet`, `SegNetBasic` and `DeconvNet`: the scores have the size of the image, for any size.

    A subclass calls `build` with its layers.
    """

    def __init__(self, num_classes, in_channels, width_multiplier, batch_norm_eps):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier, batch_norm_eps=batch_norm_eps)
        self.width_multiplier, self.batch_norm_eps = width_multiplier, batch_norm_eps

    def build(
        self,
        encoder: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        *,
        bottom: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        """encoder, decoder: the layers of each stage, in execution order. dropout: of all stages but the finest two."""

        def drop(stage):
            return nn.Dropout(dropout) if dropout and stage >= FIRST_DROPOUT_STAGE else nn.Identity()

        numbers = range(1, len(encoder) + 1)
        self.encoder = nn.ModuleList(EncoderStage(layers, drop(stage)) for stage, layers in zip(numbers, encoder))
        self.bottom = nn.Identity() if bottom is None else bottom
        self.decoder = nn.ModuleList(
            DecoderStage(layers, drop(stage)) for stage, layers in zip(reversed(numbers), decoder)
        )

    def batch_norm(self, channels: int) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(channels, eps=self.batch_norm_eps)
        nn.init.constant_(norm.bias, BATCH_NORM_SHIFT)
        return norm

    def forward(self, image: Tensor) -> Tensor:
        self.check_image(image)
        pooled = []
        for stage in self.encoder:
            image, *found = stage(image)
            pooled.append(found)
        image = self.bottom(image)
        for stage in self.decoder:
            image = stage(image, *pooled.pop())
        return image
