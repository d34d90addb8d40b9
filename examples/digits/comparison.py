"""A stock network and loss before and after `fastseg.accelerate`: equal results, less time and memory."""

import copy
import statistics
import time
from functools import partial

import torch
from torch import nn

import fastseg
from benchmarks.memory import peak_extra
from examples.digits.scenes import CLASSES, IGNORE, Scenes, normalised
from fastseg.testing import allowed_error, assert_within_policy, max_error


class StockTraining(nn.Module):
    """A network and its loss in ``torch.nn``."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss(ignore_index=IGNORE)

    def forward(self, images, labels):
        return self.loss(self.net(images), labels)


def stock_upsampling_network(classes):
    """A small network of strided convolutions that scores an eighth of the pixels and upsamples the scores."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, classes, 1),
        nn.Upsample(scale_factor=8, mode="bilinear"),
    )


class StockUnpoolingNetwork(nn.Module):
    """A small network that pools with indices and unpools with them, as SegNet does."""

    def __init__(self, classes):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, classes, 3, padding=1)
        self.pool = nn.MaxPool2d(2, ceil_mode=True, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)

    def forward(self, images):
        full = torch.relu(self.down1(images))
        half, full_indices = self.pool(full)
        half = torch.relu(self.down2(half))
        quarter, half_indices = self.pool(half)
        decoded = torch.relu(self.up2(self.unpool(quarter, half_indices, half.shape)))
        return self.up1(self.unpool(decoded, full_indices, full.shape))


def fuse_by_hand(model):
    """The proposal in the report of `fastseg.accelerate` for the Upsample at the end of the network."""
    model.net = model.net[:-1]
    model.loss = fastseg.nn.UpsampleCrossEntropyLoss(ignore_index=IGNORE)
    return model


def make_indices_flat_by_hand(model):
    """Eight bytes per index, as in torch, instead of one byte after `fastseg.accelerate`."""
    model.net.pool.index_format = "flat"
    return model


def loss_and_gradients(model, images, labels):
    model.zero_grad()
    loss = model(images, labels)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def prove_equal(name, ours, stock, exact):
    """Print the largest error of all values relative to the error that the policy of `fastseg.testing` allows."""
    shares = []
    for what, value in ours.items():
        assert_within_policy(value, stock[what], exact[what], what)
        shares.append(max_error(value, exact[what]) / allowed_error(stock[what], exact[what]))
    print(f"  {name}: the loss and {len(ours) - 1} gradients are within the policy;")
    print(f"    the largest error is {max(shares):.0%} of what it allows")


def compare(stock_network, by_hand, change_by_hand, batch, side, repetitions):
    """Stock, accelerated and further changed training steps on the same scenes: equality, time and peak memory.

    ``stock_network(classes)`` builds the network; ``change_by_hand(model)`` makes a change to the accelerated one
    that the text ``by_hand`` describes.
    """
    images, labels = Scenes(training=True, seed=0).make(batch, side, side)
    images, labels = normalised(images), labels.long()
    torch.manual_seed(0)
    stock = StockTraining(stock_network(len(CLASSES))).to(memory_format=torch.channels_last)
    accelerated = copy.deepcopy(stock)
    print(fastseg.accelerate(accelerated))
    models = {
        "stock torch.nn": stock,
        "fastseg.accelerate": accelerated,
        by_hand: change_by_hand(copy.deepcopy(accelerated)),
    }

    print("\nEqual to stock, measured against fp64 (at most twice stock's own error plus one rounding):")
    results = {name: loss_and_gradients(model, images, labels) for name, model in models.items()}
    exact = loss_and_gradients(copy.deepcopy(stock).double(), images.double(), labels)
    for name in list(models)[1:]:
        prove_equal(name, results[name], results["stock torch.nn"], exact)

    times = {name: [] for name in models}
    for _ in range(repetitions):  # interleaved, so that a disturbance affects all of them
        for name, model in models.items():
            begin = time.perf_counter()
            loss_and_gradients(model, images, labels)
            times[name].append(time.perf_counter() - begin)
    print(f"\nOne training step of the whole network on {batch} scenes of {side} x {side}, medians:")
    stock_time = statistics.median(times["stock torch.nn"])
    for name, model in models.items():
        median = statistics.median(times[name])
        peak = peak_extra(partial(loss_and_gradients, model, images, labels), "cpu")
        memory = "unknown here" if peak is None else f"{peak / 2**20:6.1f} MiB"
        print(f"  {name:<21} {median * 1e3:7.1f} ms ({stock_time / median:.2f}x), peak extra memory {memory}")
