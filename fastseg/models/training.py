"""How the networks of the literature are trained: learning rates by parameter and by step."""

from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

from fastseg.models.network import Network


def poly_schedule(optimizer: optim.Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """The learning rates times ``(1 - step / steps) ** power``: the "poly" policy of DeepLab and PSPNet.

    Call its ``step()`` after each of the `steps` steps of the optimiser.

    Raises:
        ValueError: `steps` below 1.
    """
    if steps < 1:
        raise ValueError(f"fastseg.models.poly_schedule: steps is {steps}; allowed: 1 or more")
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** power)


def parameter_groups(
    network: Network,
    lr: float,
    weight_decay: float = 0.0,
    *,
    head_factor: float = 10.0,
    bias_factor: float = 1.0,
    decay_depthwise: bool = True,
) -> list[dict]:
    """Groups for an optimiser: what is not in ``network.backbone`` learns `head_factor` times as fast.

    Args:
        network: one whose trunk is its ``backbone``; others have only the groups of heads, at `lr`.
        lr: learning rate of the trunk's weights.
        weight_decay: of weights; biases of convolutions have none if `bias_factor` is not 1, as in the Caffe releases.
        head_factor: of the learning rate of heads.
        bias_factor: of the learning rate of the convolutions' biases, often 2.
        decay_depthwise: False for no weight decay of depthwise weights, as TensorFlow's DeepLab trains Xception.

    Returns:
        [{"params": [...], "lr": ..., "weight_decay": ...}, ...], without parameters that are not trained.
    """
    backbone = getattr(network, "backbone", None)
    in_backbone = {id(value) for value in backbone.parameters()} if backbone is not None else set()
    biases, depthwise = set(), set()
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            biases.add(id(layer.bias))
            if 1 < layer.groups == layer.in_channels:
                depthwise.add(id(layer.weight))
    groups: dict[tuple[float, float], list] = {}
    for value in network.parameters():
        if value.requires_grad:
            rate = lr if backbone is None or id(value) in in_backbone else lr * head_factor
            decay = weight_decay
            if bias_factor != 1 and id(value) in biases:
                rate, decay = rate * bias_factor, 0.0
            if not decay_depthwise and id(value) in depthwise:
                decay = 0.0
            groups.setdefault((rate, decay), []).append(value)
    return [{"params": values, "lr": rate, "weight_decay": decay} for (rate, decay), values in groups.items()]
