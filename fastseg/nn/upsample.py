"""`Upsample` and `UpsamplingBilinear2d`, drop-ins for torch's; bilinear modes run our kernels."""

from torch import nn

from fastseg import ops
from fastseg.nn._drop_in import drop_in


def _is_image(input):
    return input.dim() == 4 and input.is_floating_point()


def _upsampled(module, input):
    recompute = module.recompute_scale_factor
    return ops.upsample_bilinear2d(
        input,
        module.size,
        module.scale_factor,
        module.align_corners,
        None if recompute is None else bool(recompute),  # the stock module takes any truth value
    )


def _why_not(upsample):
    return None if upsample.mode == "bilinear" else f"mode={upsample.mode!r}; only 'bilinear' has a kernel here"


def _note(upsample):
    return "if it feeds a cross-entropy and nothing else, fastseg.nn.UpsampleCrossEntropyLoss does both faster"


@drop_in(nn.Upsample, why_not=_why_not, note=_note)
class Upsample(nn.Upsample):
    """``torch.nn.Upsample``, with ``mode="bilinear"`` through `fastseg.ops.upsample_bilinear2d`, where shapes and
    errors are documented.

    Other modes, and images of integers, run stock's code.
    """

    def forward(self, input):
        return _upsampled(self, input) if self.mode == "bilinear" and _is_image(input) else super().forward(input)


@drop_in(nn.UpsamplingBilinear2d, note=_note)
class UpsamplingBilinear2d(nn.UpsamplingBilinear2d):
    """``torch.nn.UpsamplingBilinear2d`` through `fastseg.ops.upsample_bilinear2d`, with aligned corners."""

    def forward(self, input):
        return _upsampled(self, input) if _is_image(input) else super().forward(input)
