"""`make demo`: what is installed, what `fastseg.accelerate` brings, and a network trained on real images.

Nothing is downloaded: the images come with scikit-learn and scikit-image.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fastseg
import fastseg.info
from examples.digits import comparison, picture, training
from examples.digits.scenes import CLASSES, IGNORE, Scenes

SIDE = 128  # pixels of a scene


def heading(text):
    print(f"\n=== {text} ===\n", flush=True)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="scenes per training step")
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes")
    parser.add_argument("--test-scenes", type=int, default=150, help="held-out scenes")
    parser.add_argument("--width", type=float, default=0.125, help="width of the network; 1 is VGG16's")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--compare-side", type=int, default=512, help="image size of the comparison")
    parser.add_argument("--compare-repetitions", type=int, default=7, help="timed steps per variant")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the picture")
    return parser.parse_args()


def main():
    options = arguments()
    begin = time.perf_counter()
    fastseg.tune_allocator()  # stock and ours alike: keep freed memory instead of page-faulting it anew
    torch.manual_seed(0)

    heading("1. What is installed (python -m fastseg.info)")
    fastseg.info.main()

    heading("2. A stock network, before and after fastseg.accelerate")
    comparison.compare(4, options.compare_side, options.compare_repetitions)

    heading("3. FCN-8s learns to find and read handwritten digits in photographs")
    train_images, train_labels = make_scenes("training scenes", options.scenes, training=True)
    test_images, test_labels = make_scenes("test scenes", options.test_scenes, training=False)
    network = training.build_network(options.width)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters; {options.steps} steps of {options.batch} scenes", flush=True)

    def report(step):
        measured = training.evaluate(network, test_images, test_labels)
        tqdm.write(f"step {step:4d}: held-out scenes: {training.summary(measured)}")

    training.train(
        network,
        train_images,
        train_labels,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        report=report,
    )

    heading("4. Result")
    measured = training.evaluate(network, test_images, test_labels)
    print(f"{len(test_images)} scenes of held-out digits on held-out parts of the photographs:")
    background = (test_labels == 0).sum() / (test_labels != IGNORE).sum()
    print(f"{training.summary(measured)} (background everywhere: pixel accuracy {background:.3f})")
    for name, iou in zip(CLASSES, measured["iou"].tolist()):
        print(f"  IoU of {name:<10} {iou:.3f}")
    shown = slice(0, 6)  # the first ones, whatever they look like
    predictions = training.predict(network, test_images[shown])
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "digits.png"
    title = f"fastseg: FCN-8s after {options.steps} steps on held-out scenes: {training.summary(measured)}"
    picture.draw(path, test_images[shown], test_labels[shown], predictions, title)
    print(f"\npicture: {path}    whole demo: {time.perf_counter() - begin:.0f} s")


def make_scenes(what, count, training):
    scenes = Scenes(training, seed=0 if training else 1)
    return scenes.make(count, SIDE, SIDE, lambda items: tqdm(items, desc=what, unit="scene"))


if __name__ == "__main__":
    main()
