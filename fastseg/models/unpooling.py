"""Networks that pool with indices on the way down and unpool by them on the way up."""

import torch.nn.functional as F
from torch import nn

from fastseg.models.vgg import BLOCKS, check_image, copy_tensors, scaled_width, torchvision_keys
from fastseg.nn import MaxPool2d, MaxUnpool2d

FIRST_DROPOUT_STAGE = 3
BATCH_NORM_SHIFT = 1e-3  # where Caffe's training files start the shift; the scale starts at 1


class UnpoolingNetwork(nn.Module):
    """What `SegNet`, `SegNetBasic` and `DeconvNet` share: the walk down and up, its arguments and errors.

    Stage s = 1, 2, ... of the encoder ends with the 2x2 pooling ``pool<s>``, which rounds odd sizes up as
    Caffe does. Stage s of the decoder begins with ``unpool<s>``, which puts every value back to where
    ``pool<s>`` found it, in a map of the size that ``pool<s>`` was given: so any image size comes back.

    A subclass lists the layers of each stage with `_add_layer` in the order in which they run.
    """

    smallest_image = 1  # rows and columns

    def __init__(self, stages, num_classes, in_channels, width_multiplier, dropout, batch_norm_eps):
        super().__init__()
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{self._name}: {argument} is {value}; allowed: 1 or more")
        for argument, value in (("width_multiplier", width_multiplier), ("batch_norm_eps", batch_norm_eps)):
            if not value > 0:
                raise ValueError(f"{self._name}: {argument} is {value}; allowed: above 0")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.width_multiplier = width_multiplier
        self.batch_norm_eps = batch_norm_eps
        self._encoder = {stage: [] for stage in range(1, stages + 1)}
        self._bottom = []
        self._decoder = {stage: [] for stage in range(stages, 0, -1)}
        self._batch_norm_of = {}
        self._has_relu = set()
        for stage in self._encoder:
            pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=True, index_format="compact")
            self.add_module(f"pool{stage}", pool)
            self.add_module(f"unpool{stage}", MaxUnpool2d(2, 2))
            if dropout != 0 and stage >= FIRST_DROPOUT_STAGE:
                self.add_module(f"encdrop{stage}", nn.Dropout(dropout))
                self.add_module(f"decdrop{stage}", nn.Dropout(dropout))

    @property
    def _name(self):
        return f"fastseg.models.{type(self).__name__}"

    def _width(self, channels):
        return scaled_width(channels, self.width_multiplier)

    def _add_layer(self, stage, name, layer, batch_norm=None, relu=True):
        """Append ``layer`` to ``stage`` (a list of names), followed by a BatchNorm2d named ``batch_norm``."""
        stage.append(name)
        self.add_module(name, layer)
        if batch_norm is not None:
            norm = nn.BatchNorm2d(layer.out_channels, eps=self.batch_norm_eps)
            nn.init.constant_(norm.bias, BATCH_NORM_SHIFT)
            self.add_module(batch_norm, norm)
            self._batch_norm_of[name] = batch_norm
        if relu:
            self._has_relu.add(name)

    def forward(self, image):
        check_image(self._name, image, self.in_channels, self.smallest_image)
        pooled = {}
        for stage, names in self._encoder.items():
            image = self._run(names, image)
            size = image.shape[2:]
            image, indices = self.get_submodule(f"pool{stage}")(image)
            image = self._drop(f"encdrop{stage}", image)
            pooled[stage] = indices, size
        image = self._run(self._bottom, image)
        for stage, names in self._decoder.items():
            indices, size = pooled.pop(stage)
            image = self.get_submodule(f"unpool{stage}")(image, indices, output_size=size)
            image = self._run(names, image)
            image = self._drop(f"decdrop{stage}", image)
        return image

    def _run(self, names, image):
        for name in names:
            image = self.get_submodule(name)(image)
            if name in self._batch_norm_of:
                image = self.get_submodule(self._batch_norm_of[name])(image)
            if name in self._has_relu:
                image = F.relu(image, inplace=True)
        return image

    def _drop(self, name, image):
        return self.get_submodule(name)(image) if name in self._modules else image


class VGG16UnpoolingNetwork(UnpoolingNetwork):
    """The encoder is the convolutional part of VGG16 with a batch normalisation after every convolution."""

    def __init__(self, num_classes, in_channels, width_multiplier, dropout, batch_norm_eps):
        super().__init__(len(BLOCKS), num_classes, in_channels, width_multiplier, dropout, batch_norm_eps)
        channels = in_channels
        for block, layers, block_channels in BLOCKS:
            for index in range(1, layers + 1):
                layer = nn.Conv2d(channels, self._width(block_channels), 3, padding=1)
                initialise_he_(layer)
                self._add_layer(
                    self._encoder[block], f"conv{block}_{index}", layer, self._encoder_norm(block, index)
                )
                channels = layer.out_channels

    def _encoder_norm(self, block, index):
        """What the batch normalisation of ``conv<block>_<index>`` is called."""
        raise NotImplementedError

    def load_vgg16(self, state_dict):
        """Copy the weights of torchvision's ``vgg16`` or ``vgg16_bn`` into the layers of the same name.

        `vgg16` has no batch normalisation: that of this network then stays as it is. The ImageNet output
        ``classifier.6`` is ignored, and so are the fully connected layers where this network has none.
        torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        batch_norm = "features.1.weight" in state_dict  # index 1 is a ReLU in vgg16
        sources = {}
        for name, key in torchvision_keys(batch_norm).items():
            if name not in self._modules:
                continue
            sources |= {f"{name}.{kind}": f"{key}.{kind}" for kind in ("weight", "bias")}
            if batch_norm and key.startswith("features"):
                own_norm = self._batch_norm_of[name]
                index = int(key.removeprefix("features.")) + 1
                for kind in ("weight", "bias", "running_mean", "running_var"):
                    sources[f"{own_norm}.{kind}"] = f"features.{index}.{kind}"
        copy_tensors(self, f"{self._name}.load_vgg16", state_dict, sources)
        return self


def initialise_he_(layer):
    """He's normal initialisation (fan in, ReLU gain; Caffe's "msra") and zero biases."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
