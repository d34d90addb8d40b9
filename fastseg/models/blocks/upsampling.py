"""Bilinear upsampling by an integer factor: transposed convolution (fixed or learned) or interpolation."""

from fastseg.nn import BilinearUpsample2d, Upsample

MODES = ("fixed", "learned", "interp")


def upsampling_layer(channels, stride, padding, mode):
    """A layer that upsamples ``(N, channels, h, w)`` by ``stride``.

    ``mode``: ``"learned"`` is a bias-free transposed convolution with kernel ``2 stride``, started from
    bilinear taps; ``"fixed"`` is the same layer with ``requires_grad=False``: it is not trained, but stays in
    checkpoints; ``"interp"`` is bilinear interpolation with half-pixel centres
    (``align_corners=False``), which has no parameters. With ``padding = stride / 2`` all three start on the
    same sampling grid and differ only within ``stride / 2`` pixels of the border, where a transposed
    convolution fades to zero.
    """
    if mode == "interp":
        return Upsample(scale_factor=stride, mode="bilinear", align_corners=False)
    return BilinearUpsample2d(channels, stride, padding, learned=mode == "learned")
