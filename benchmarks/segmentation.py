"""Does pre-training on the same images help segmentation? mIoU from an FCMAE encoder and from scratch, few masks.

Draws a set of its own: discs, squares, triangles and rings in colours of any kind, told apart by their shape alone, on
ground of several textures. All training images are pre-trained on; some of them have masks. Both ways get the same
masks, steps and seeds, and are measured on images that neither has seen, after the last epoch: the best one would be
chosen on them. A second call goes on where one was ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.segmentation import SegmentOptions, segment
from convnextv2.training import PretrainOptions, pretrain

NAMES = ("ground", "disc", "square", "triangle", "ring")


def texture(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Gray ``[side, side]`` around 0: stripes of any direction and noise of any grain."""
    rows, columns = np.mgrid[:side, :side]
    angle, wave = rng.uniform(0, np.pi), rng.uniform(4, 20)
    stripes = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / wave + rng.uniform(0, 6))
    grain = int(rng.integers(1, 5))
    noise = rng.normal(size=(side // grain + 1, side // grain + 1)).repeat(grain, 0).repeat(grain, 1)[:side, :side]
    return rng.uniform(5, 25) * stripes + rng.uniform(5, 25) * noise


def drawn(rng: np.random.Generator, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels ``[side, side, 3]`` and classes ``[side, side]``."""
    rows, columns = np.mgrid[:side, :side]
    pixels = rng.uniform(40, 215, 3) + texture(rng, side)[..., None]
    mask = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.integers(3, 6))):
        shape, radius = int(rng.integers(1, len(NAMES))), rng.uniform(side / 12, side / 6)
        y, x, angle = rows - rng.uniform(0, side), columns - rng.uniform(0, side), rng.uniform(0, 2 * np.pi)
        y, x = y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)
        distance = np.hypot(y, x)
        inside = {
            1: distance < radius,
            2: np.maximum(abs(y), abs(x)) < 0.9 * radius,
            3: (y > -0.5 * radius) & (y + 1.732 * abs(x) < radius),
            4: (distance < radius) & (distance > 0.55 * radius),
        }[shape]
        mask[inside] = shape
        pixels[inside] = (rng.uniform(40, 215, 3) + texture(rng, side)[..., None])[inside]
    return pixels.clip(0, 255).astype(np.uint8), mask


def make_set(root: Path, images: int, masks: int, held_out: int, side: int) -> None:
    """``root/all`` to pre-train on, and ``root/masked`` with ``train`` and ``val``."""
    rng = np.random.default_rng(0)
    folders = (
        root / "all",
        *(root / "masked" / part / kind for part in ("train", "val") for kind in ("images", "masks")),
    )
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(images + held_out):
        pixels, mask = drawn(rng, side)
        if number < images:
            Image.fromarray(pixels).save(root / "all" / f"{number:05d}.png")
        if number < masks or number >= images:
            part = root / "masked" / ("train" if number < masks else "val")
            Image.fromarray(pixels).save(part / "images" / f"{number:05d}.png")
            Image.fromarray(mask).save(part / "masks" / f"{number:05d}.png")
    (root / "masked" / "classes.json").write_text(json.dumps(NAMES))


def main() -> None:
    """Draw, pre-train, train twice for every seed, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for images and runs")
    parser.add_argument("--images", type=int, default=250, help="to pre-train on")
    parser.add_argument("--masks", type=int, default=32, help="images of those that have masks")
    parser.add_argument("--held-out", type=int, default=48, help="images to measure on")
    parser.add_argument("--side", type=int, default=80, help="pixels of an image")
    parser.add_argument("--pretrain-epochs", type=int, default=24, help="passes over all images")
    parser.add_argument("--steps", type=int, default=192, help="updates of segmentation, at least")
    parser.add_argument("--epochs", type=int, default=2, help="parts that they are made in, each measured")
    parser.add_argument("--decoder", default="fpn", help="of the network")
    parser.add_argument("--blr", type=float, default=0.032, help="base learning rate of segmentation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of segmentation")
    options = parser.parse_args()
    if not options.output.exists():
        make_set(options.output, options.images, options.masks, options.held_out, options.side)
    common: dict[str, Any] = {
        "img_size": options.side,
        "patch_size": 16,
        "workers": 0,
        "tracker": "none",
        "resume": "auto",
    }
    first = pretrain(
        PretrainOptions(
            data=options.output / "all", output=options.output / "pretrain", epochs=options.pretrain_epochs,
            batch_size=16, blr=16e-3, decoder_dim=128, reconstruct_every=0, warmup_epochs=4, **common,
        ),
        log=print,
    )  # fmt: skip
    found: dict[str, list[float]] = {"FCMAE": [], "scratch": []}
    for seed in options.seeds:
        for name, scores in found.items():
            run = SegmentOptions(
                data=options.output / "masked", output=options.output / f"{name}-{options.steps}-{seed}", seed=seed,
                init=first.folder if name == "FCMAE" else None, blr=options.blr, epochs=options.epochs,
                min_steps=options.steps, decoder=options.decoder, decoder_width=64, batch_size=8, **common,
            )  # fmt: skip
            scores.append(segment(run, log=print).metrics[-1]["val_miou"])
            print(f"{name}, seed {seed}: mIoU {scores[-1]:.2f} %", flush=True)
    for name, scores in found.items():
        print(f"| {name} | {statistics.mean(scores):.2f} | {' '.join(f'{score:.2f}' for score in scores)} |")


if __name__ == "__main__":
    main()
