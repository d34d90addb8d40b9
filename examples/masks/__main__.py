"""`make demo NET=masks`: overlapping handwritten digits as packed masks, with pasting, NMS and AP.

Nothing is downloaded or trained: the proposals are the truth with random errors (`examples.masks.proposals`).
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fastseg
from examples import heading
from examples.masks import comparison, picture
from examples.masks.proposals import propose, rate
from examples.masks.scenes import OverlappingScenes

THRESHOLD = 0.5
COLUMNS = 3  # scenes of the picture
FIGURES = ("AP", "AP50", "AP75", "AR@100")


def everything(proposals, masks, scores):
    return scores.argsort(descending=True), None


def box_nms(proposals, masks, scores):
    return fastseg.ops.batched_nms(proposals.boxes, scores, proposals.labels, THRESHOLD), None


def box_nms_of_all(proposals, masks, scores):
    return fastseg.ops.nms(proposals.boxes, scores, THRESHOLD), None


def mask_nms(proposals, masks, scores):
    return fastseg.ops.mask_nms(masks, scores, THRESHOLD, proposals.labels), None


def mask_nms_of_all(proposals, masks, scores):
    return fastseg.ops.mask_nms(masks, scores, THRESHOLD), None


def matrix_nms(proposals, masks, scores):
    return fastseg.ops.matrix_nms(masks, scores, proposals.labels)


# Each takes proposals, pasted masks and scores. It returns the indices to keep, best first, and their scores if it
# changes these.
METHODS = {
    "before NMS": everything,
    "box NMS": box_nms,
    "mask NMS": mask_nms,
    "box NMS of all digits": box_nms_of_all,
    "mask NMS of all digits": mask_nms_of_all,
    "matrix NMS": matrix_nms,
}
SHOWN = "mask NMS of all digits"


def arguments():
    parser = argparse.ArgumentParser(prog="python -m examples.masks", description=__doc__)
    parser.add_argument("--scenes", type=int, default=40, help="number of scenes")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), help="height and width of a scene")
    parser.add_argument("--proposals", type=int, default=8, help="proposals for each digit")
    parser.add_argument("--compare-size", type=int, nargs=2, default=(480, 640), help="image size of the comparison")
    parser.add_argument("--compare-masks", type=int, default=200, help="proposals of the comparison")
    parser.add_argument("--compare-repetitions", type=int, default=4, help="timed calls, the first not counted")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the picture")
    return parser.parse_args()


def main():
    options = arguments()
    begin = time.perf_counter()
    fastseg.tune_allocator()  # for stock and ours: keep freed memory, which avoids page faults
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the scenes are small

    heading("1. Soft 28 x 28 masks of overlapping digits, pasted to bits and suppressed")
    size = tuple(options.size)
    evaluators = {name: fastseg.metrics.CocoEvaluator("segm") for name in METHODS}
    left = dict.fromkeys(METHODS, 0)
    maker, generator = OverlappingScenes(seed=0), torch.Generator().manual_seed(0)
    instances, shown = 0, []
    for _ in tqdm(range(options.scenes), desc="scenes", unit="scene"):
        scene = maker.scene(*size)
        proposals = propose(scene, options.proposals, generator)
        masks = fastseg.ops.paste_masks(proposals.masks, proposals.boxes, size)
        scores = rate(proposals, masks, scene.masks, generator)
        truth = {"labels": scene.labels, "masks": scene.masks}
        for name, method in METHODS.items():
            kept, decayed = method(proposals, masks, scores)
            found = {"masks": masks[kept], "labels": proposals.labels[kept]}
            evaluators[name].update([found | {"scores": scores[kept] if decayed is None else decayed}], [truth])
            left[name] += len(kept)
        instances += len(scene.labels)
        if len(shown) < COLUMNS:
            shown.append((scene, proposals, scores, METHODS[SHOWN](proposals, masks, scores)[0]))

    heading("2. COCO's average precision of the masks, before and after")
    print(
        f"{instances} digits in {options.scenes} scenes of {size[0]} x {size[1]}, {options.proposals} proposals for "
        "each; no network: the truth, disturbed"
    )
    results = {name: evaluator.compute() for name, evaluator in evaluators.items()}
    print(f"  {'':<23} {'masks':>6}" + "".join(f"{figure:>8}" for figure in FIGURES))
    for name, result in results.items():
        print(f"  {name:<23} {left[name]:>6}" + "".join(f"{result[figure]:8.3f}" for figure in FIGURES))

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "masks.png"
    before, after = (results[name]["AP"] for name in ("before NMS", SHOWN))
    title = f"fastseg: mask NMS keeps {left[SHOWN]} of {left['before NMS']} proposals for {instances} digits: "
    title += f"AP {before:.3f} before, {after:.3f} after (drawn: scores of {picture.LOWEST_SCORE} or more)"
    picture.draw(path, shown, title)
    print(f"\npicture: {path}")

    heading("3. The same in stock PyTorch: paste to (N, H, W) floats, IoU by matrix product")
    torch.set_num_threads(threads)
    comparison.compare(
        options.compare_masks, tuple(options.compare_size), options.proposals, THRESHOLD, options.compare_repetitions
    )
    print(f"\nwhole demo: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
