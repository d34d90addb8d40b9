"""FCN on ResNet: torchvision's parameters and keys, and its auxiliary loss."""

import torch
import torch.nn.functional as F

from fastseg.models import FCNResNet
from tests.models.contract import CLASSES, Contract, he_but_for_scores, same_keys
from tests.models.stock_fcn_resnet import StockFCNResNet

WIDTH = 1 / 16


class Scores(StockFCNResNet):
    """Its scores alone."""

    def forward(self, image):
        return super().forward(image)["out"]


def stock_loss(stock, image, target):
    scores = StockFCNResNet.forward(stock, image)
    main, auxiliary = (F.cross_entropy(scores[name], target, ignore_index=255) for name in ("out", "aux"))
    return main + 0.5 * auxiliary


def full_size_keys():
    with torch.device("meta"):
        return list(StockFCNResNet().state_dict())


CONTRACTS = [
    Contract(
        FCNResNet,
        lambda classes=CLASSES, width=WIDTH: Scores(classes, width, dropout=0.0),
        sizes=((64, 96), (45, 73)),
        arguments=dict(width_multiplier=WIDTH),
        keys_of_stock=same_keys,
        stock_loss=stock_loss,
        summed_alike=False,
        parameters=(
            (dict(layers=50), 35_322_218),
            (dict(layers=50, auxiliary=False), 32_957_013),
            (dict(layers=101), 54_314_346),
            (dict(layers=101, auxiliary=False), 51_949_141),
        ),
        keys=full_size_keys(),
        deviation=he_but_for_scores("classifier.4", "aux_classifier.4"),
        bad_arguments=(
            (dict(layers=18), "layers is 18; allowed: 50, 101, 152"),
            (dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),
        ),
    )
]


def test_torchvisions_entries():
    with torch.device("meta"):
        assert len(FCNResNet(layers=101).state_dict()) == 640
