"""cross_entropy and focal_loss: contract cases, golden values, hostile input, strides, levels."""

import torch
import torch.nn.functional as F

import fastseg
from tests.contract import Case, Contract


def focal_definition(input, target, alpha=None, gamma=2.0, ignore_index=-100, reduction="mean"):
    """Spec 15.8, straight from the formula."""
    valid = target != ignore_index
    label = torch.where(valid, target, 0).long()
    log_p = input.log_softmax(1).gather(1, label.unsqueeze(1)).squeeze(1)
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    if alpha is not None:
        loss = loss * alpha[label]
    loss = torch.where(valid, loss, 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / valid.sum()}[reduction]


CONTRACTS = [
    Contract(
        function=fastseg.ops.cross_entropy,
        stock=F.cross_entropy,
        cases=[
            Case("maps", lambda make: dict(input=make.floating(2, 5, 4, 6), target=make.labels(2, 4, 6, classes=5, ignored=-100))),
            Case("rows", lambda make: dict(input=make.floating(7, 11), target=make.labels(7, classes=11))),
            Case("one_row", lambda make: dict(input=make.floating(6), target=make.labels(classes=6))),
        ],
    ),
]
