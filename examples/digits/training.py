"""Trains a network on the digit scenes and measures it on held-out ones."""

import torch
from torch import nn
from tqdm import tqdm

import fastseg
from examples.digits.scenes import CLASSES, IGNORE, normalised


def train(network, loss_of, images, labels, steps, batch, learning_rate, report):
    """Minimise ``loss_of(network, images, labels)`` over random batches.

    Calls ``report(step)`` five times on the way.
    """
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, steps, pct_start=0.15)
    network.train()
    bar = tqdm(range(1, steps + 1), desc="training", unit="step")
    for step in bar:
        chosen = torch.randint(len(images), (batch,))
        loss = loss_of(network, normalised(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % max(1, steps // 5) == 0:
            report(step)
            network.train()


@torch.no_grad()
def predict(network, prediction_of, images, batch=32):
    """The most probable class of every pixel by ``prediction_of(network, images)``: uint8 ``(N, H, W)``."""
    network.eval()
    return torch.cat([prediction_of(network, normalised(part)) for part in images.split(batch)])


def evaluate(predictions, labels):
    """Every metric of `fastseg.metrics` by its name, over all the images."""
    metrics = fastseg.metrics.SegmentationMetrics(len(CLASSES), ignore_index=IGNORE)
    metrics.update(predictions, labels)
    return metrics.compute()


def summary(measured):
    return f"pixel accuracy {measured['pixel_accuracy']:.3f}, mIoU {measured['mean_iou']:.3f}"
