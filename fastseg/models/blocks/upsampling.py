"""Bilinear upsampling by an integer factor: transposed convolution (fixed or learned) or interpolation."""

from fastseg.nn import BilinearUpsample2d, Upsample

MODES = ("fixed", "learned", "interp")


def upsampling_layer(channels, stride, padding, mode, kernel_size=None):
    """A layer that upsamples ``(N, channels, h, w)`` by ``stride``.

    ``mode``: ``"learned"`` is a bias-free transposed convolution, by default with kernel ``2 stride``, started from
    bilinear taps; ``"fixed"`` is the same layer with ``requires_grad=False``: it is not trained, but stays in
    checkpoints; ``"interp"`` is bilinear interpolation with half-pixel centres
    (``align_corners=False``), which has no parameters. With ``padding = stride / 2`` all three start on the
    same sampling grid and differ only within ``stride / 2`` pixels of the border, where a transposed
    convolution fades to zero.
    """
    if mode == "interp":
        return Upsample(scale_factor=stride, mode="bilinear", align_corners=False)
    return BilinearUpsample2d(channels, stride, padding, kernel_size=kernel_size, learned=mode == "learned")


def upsampled(layer, scores, offsets, size):
    """The part of ``layer(scores)`` of the given (height, width) that begins at ``offsets``, (top, left)."""
    (top, left), (height, width) = offsets, size
    if isinstance(layer, BilinearUpsample2d):
        return layer(scores, crop=(top, left, height, width))
    return layer(scores)[..., top : top + height, left : left + width]


def with_skip(layer, scores, skip, offset):
    """``layer(scores)`` plus ``skip`` from ``offset`` on, as large as both allow.

    With "pad100" ``skip`` is the larger map; with "same" the scores may be larger by one row or column, where
    pooling rounded an odd size up.
    """
    if isinstance(layer, BilinearUpsample2d):
        return layer(scores, skip=skip, skip_offset=offset)
    scores = layer(scores)
    skip = skip[..., offset : offset + scores.shape[-2], offset : offset + scores.shape[-1]]
    return scores[..., : skip.shape[-2], : skip.shape[-1]] + skip
