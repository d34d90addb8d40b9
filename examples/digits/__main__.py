"""`make demo`: shows what is installed and what `fastseg.accelerate` gains, and trains a network on real images.

Nothing is downloaded: the images come with scikit-learn and scikit-image.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fastseg
import fastseg.info
from examples import heading
from examples.digits import comparison, picture, training
from examples.digits.networks import NAMES, choice_of
from examples.digits.scenes import CLASSES, SIDE, Scenes


def arguments():
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument(
        "--net", choices=NAMES, default="fcn", metavar="NAME", help="the network to train: " + ", ".join(NAMES)
    )
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes")
    parser.add_argument("--test-scenes", type=int, default=150, help="held-out scenes")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--batch", type=int, help="scenes per training step")
    parser.add_argument("--width", type=float, help="width of the network; 1 is the published one")
    parser.add_argument("--learning-rate", type=float, help="highest learning rate")
    parser.add_argument("--compare-side", type=int, default=512, help="image size of the comparison")
    parser.add_argument("--compare-repetitions", type=int, default=7, help="timed steps per variant")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the picture")
    options = parser.parse_args()
    for name in ("steps", "batch", "width", "learning_rate"):
        if getattr(options, name) is None:  # the default depends on the network
            setattr(options, name, getattr(choice_of(options.net), name))
    return options


def main():
    options = arguments()
    choice = choice_of(options.net)
    begin = time.perf_counter()
    fastseg.tune_allocator()  # for stock and ours: keep freed memory, which avoids page faults
    torch.manual_seed(0)

    heading("1. What is installed (python -m fastseg.info)")
    fastseg.info.main()

    heading("2. A stock network, before and after fastseg.accelerate")
    comparison.compare(*choice.comparison, 4, options.compare_side, options.compare_repetitions)

    heading(f"3. {choice.title} learns to find and read handwritten digits in photographs")
    train_images, train_labels = make_scenes("training scenes", options.scenes, training=True)
    test_images, test_labels = make_scenes("test scenes", options.test_scenes, training=False)
    network = choice.build(options.width).to(memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters; {options.steps} steps of {options.batch} scenes", flush=True)

    def measure():
        predictions = training.predict(network, choice.predict, test_images)
        return predictions, training.evaluate(predictions, test_labels)

    def report(step):
        tqdm.write(f"step {step:4d}: held-out scenes: {training.summary(measure()[1])}")

    training.train(
        network,
        choice.loss,
        train_images,
        train_labels,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        report=report,
    )

    heading("4. Result")
    predictions, measured = measure()
    print(f"{len(test_images)} scenes of held-out digits on held-out parts of the photographs:")
    background = training.evaluate(torch.zeros_like(test_labels), test_labels)
    print(f"{training.summary(measured)} (background everywhere: {training.summary(background)})")
    for name, iou in zip(CLASSES, measured["iou"].tolist()):
        print(f"  IoU of {name:<10} {iou:.3f}")
    shown = slice(0, 6)  # the first ones, without selection
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / choice.picture
    title = f"fastseg: {choice.title} after {options.steps} steps on held-out scenes: "
    title += training.summary(measured)
    picture.draw(path, test_images[shown], test_labels[shown], predictions[shown], title)
    print(f"\npicture: {path}    whole demo: {time.perf_counter() - begin:.0f} s")


def make_scenes(what, count, training):
    scenes = Scenes(training, seed=0 if training else 1)
    return scenes.make(count, SIDE, SIDE, lambda items: tqdm(items, desc=what, unit="scene"))


if __name__ == "__main__":
    main()
