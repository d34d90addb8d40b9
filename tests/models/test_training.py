"""Learning rates by parameter and by step."""

import pytest
import torch

from fastseg.models import DeepLabV3PlusXception, FCN8s, FCNResNet, parameter_groups, poly_schedule


def test_poly_schedule():
    """The policy of DeepLab: lr (1 - step / steps) ** 0.9, for every group, and 0 after the last step."""
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.1}])
    schedule = poly_schedule(optimizer, 4)
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    factors = [1, 0.75**0.9, 0.5**0.9, 0.25**0.9, 0, 0]
    assert rates == [pytest.approx([0.01 * factor, 0.1 * factor]) for factor in factors]
    linear = poly_schedule(torch.optim.SGD([first], lr=1.0), 2, power=1)
    linear.optimizer.step()
    linear.step()
    assert linear.get_last_lr() == [0.5]
    with pytest.raises(ValueError, match="steps is 0; allowed: 1 or more"):
        poly_schedule(optimizer, 0)


def by_name(network, groups):
    """{key: (lr, weight_decay)}; every trained parameter is in one group."""
    names = {id(value): name for name, value in network.named_parameters()}
    found = [(names[id(value)], (group["lr"], group["weight_decay"])) for group in groups for value in group["params"]]
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert len(found) == len(trained) and {name for name, _ in found} == trained
    return dict(found)


def test_heads_learn_faster():
    network = FCNResNet(5, layers=50, width_multiplier=1 / 16)
    for name, group in by_name(network, parameter_groups(network, 0.01, 1e-4)).items():
        assert group == (pytest.approx(0.01 if name.startswith("backbone.") else 0.1), 1e-4), name
    network = FCN8s(5, width_multiplier=1 / 16)  # without a backbone, with layers that are not trained
    assert set(by_name(network, parameter_groups(network, 0.01, 1e-4)).values()) == {(0.01, 1e-4)}


def test_biases_learn_faster_and_do_not_decay():
    network = FCN8s(5, width_multiplier=1 / 16)
    for name, group in by_name(network, parameter_groups(network, 0.01, 1e-4, bias_factor=2)).items():
        assert group == ((0.02, 0.0) if name.endswith("bias") else (0.01, 1e-4)), name


def test_depthwise_weights_may_not_decay():
    network = DeepLabV3PlusXception(5, width_multiplier=1 / 16)
    groups = by_name(network, parameter_groups(network, 0.01, 1e-4, decay_depthwise=False))
    depthwise = {f"{name}.weight" for name, layer in network.named_modules() if getattr(layer, "groups", 1) > 1}
    assert depthwise and {name for name, (_, decay) in groups.items() if decay == 0} == depthwise
    assert {decay for _, decay in by_name(network, parameter_groups(network, 0.01, 1e-4)).values()} == {1e-4}
