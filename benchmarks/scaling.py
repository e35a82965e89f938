"""How far pre-training scales: a small model of its steps on 1 to 512 GPUs, and its check against steps measured here.

python benchmarks/scaling.py                        the model's tables, as in docs/scaling.md; nothing is measured
python benchmarks/scaling.py --check --json FILE    steps of one and of two processes on this machine, beside the model

Multiply-adds are counted (convnextv2.models.summary), bytes follow from parameters, cells and channels. What a GPU and
its links reach is assumed, and named in Assumptions; nothing of the tables was measured on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import add_options, check_options, hardware, print_facts, write_report
from match import peak_activation_bytes
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from convnextv2 import create_fcmae
from convnextv2.models.config import VARIANTS, encoder_config
from convnextv2.models.masking import keep_count
from convnextv2.models.summary import layers
from convnextv2.training.optim import create_optimizer, parameter_groups

GPUS = (1, 2, 8, 32, 128, 512)
BATCH = 4096
"""Of an update, as published, shared by all GPUs."""
SIDES = (8, 4, 2, 1)
"""Cells a patch side in the four stages."""
KEPT = 6
"""Numbers a cell and channel that a block keeps for its backward pass: its input, that of its pointwise half, and the
hidden layer."""
TRAFFIC = 210
"""Bytes a cell and channel that the kernels of a block move, forward and backward, if each moves each of its tensors
once: counted in stages 1 and 2 of tiny (benchmarks/results/2026-11-28-counts-triton-sm90.md), as are the launches."""
LAUNCHES = 20
STATE_BYTES = 16
"""A parameter: weight, gradient and AdamW's two moments in float32."""
PATIENCE = timedelta(minutes=5)
"""With the other process of a check."""
LOADING = {
    "default": 1.35,
    "--resize torchvision": 0.96,
    "--cache --resize torchvision": 0.33,
    "--cache --augment-on device": 0.085,
}
"""Processor milliseconds a sample of one core: middles of the table in docs/scaling.md, of small photographs."""


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here: H100 SXM, 8 to a node, bfloat16.

    Args:
        peak: multiply-adds a second: half of the data sheet's 989 TFLOP/s.
        bandwidth: bytes a second of its memory, of the data sheet.
        share: of both that kernels reach. Their times are added, as if nothing overlapped.
        launch: seconds from one kernel to the next where Python launches them; no step is shorter than its launches.
        node: bytes a second of an all-reduce within a node, of NVLink's 450 GB/s a direction.
        network: the same between nodes, of eight cards of 400 Gbit/s a node.
        hidden: share of the backward pass, two thirds of a step, behind which an all-reduce can hide.
        memory: bytes of a GPU.
        usable: share of them; the rest is for the allocator, workspaces and the copies of gradients that are sent.
        kept_bytes: of a kept number.
    """

    peak: float = 989e12 / 2
    bandwidth: float = 3.35e12
    share: float = 0.6
    launch: float = 10e-6
    node: float = 300e9
    network: float = 200e9
    hidden: float = 0.8
    memory: float = 80e9
    usable: float = 0.8
    kept_bytes: int = 2


@dataclass(frozen=True)
class Sizes:
    """What one image and one update cost, wherever they run.

    Args:
        parameters: of the masked autoencoder.
        multiply_adds: of one image, forward.
        blocks: of encoder and decoder.
        numbers: cells times channels, of the inputs of all blocks together.
        kept: numbers that are kept for the backward pass.
        largest: parameters of the largest block.
    """

    model: str
    parameters: int
    multiply_adds: int
    blocks: int
    numbers: int
    kept: int
    largest: int = 0

    @property
    def step_multiply_adds(self) -> int:
        """Of one image, forward and backward: of every product two more, for its input and for its weight."""
        return 3 * self.multiply_adds

    def sent(self, gpus: int) -> float:
        """Bytes that a GPU sends in an update: a ring's all-reduce of float32 gradients."""
        return 2 * (gpus - 1) / gpus * 4 * self.parameters

    def sharded_bytes(self, gpus: int) -> float:
        """Of what depends on parameters alone, in a GPU with ``--sharding full``: its shards, two gathered blocks and
        the gradients of two, and the copies in 16 bits of all weights, which autocast keeps for the backward pass."""
        return STATE_BYTES * self.parameters / gpus + 4 * 4 * self.largest + 2 * self.parameters

    def sharded_sent(self, gpus: int) -> float:
        """Bytes that a GPU sends with ``--sharding full``, once a pass: weights twice, and gradients."""
        return 1.5 * self.sent(gpus)


@functools.cache
def sizes(model: str, img_size: tuple[int, int] = (224, 224), mask_ratio: float = 0.6) -> Sizes:
    """Counted on the meta device, in a network of one block a stage, which counts as often as there are such blocks;
    ``kept`` is by the formula that the check compares with what autograd keeps."""
    whole = encoder_config(model)
    with torch.device("meta"):
        network = create_fcmae(replace(whole, depths=(1, 1, 1, 1)), img_size=img_size, mask_ratio=mask_ratio)
    config, depths, dims = network.config, whole.depths, whole.dims
    rows = [
        (depths[int(found[1])] if (found := re.fullmatch(r"encoder\.stages\.(\d)\.0", row.name)) else 1, row)
        for row in layers(network, img_size)
    ]
    patches = config.grid_size[0] * config.grid_size[1]
    visible, pixels = keep_count(patches, mask_ratio), config.encoder.in_chans * config.encoder.patch_size**2
    cells = [visible * side**2 for side in SIDES]
    numbers = sum(depth * n * dim for depth, n, dim in zip(depths, cells, dims, strict=True))
    numbers += config.decoder_depth * patches * config.decoder_dim
    kept = KEPT * numbers + visible * pixels + cells[0] * dims[0]  # the stem, too
    kept += sum(2 * n * dim for n, dim in zip(cells[:3], dims[:3], strict=True))  # downsampling
    kept += visible * dims[3] + (patches - visible) * (config.decoder_dim + 2 * pixels)  # prediction and target
    parameters = sum(times * row.parameters for times, row in rows)
    largest = max(row.parameters for _, row in rows if ".stages." in row.name)
    multiply_adds = sum(times * row.multiply_adds for times, row in rows)
    return Sizes(model, parameters, multiply_adds, sum(depths) + config.decoder_depth, numbers, kept, largest)


@dataclass(frozen=True)
class Step:
    """An update on some GPUs: how it is made up, and how long it would take.

    Args:
        micro: images a GPU and pass; ``accum`` passes make its part of the update.
        seconds: of the update; ``compute`` of them computing.
    """

    gpus: int
    micro: int
    accum: int
    compute: float
    seconds: float
    images: int

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return self.images / self.seconds


def largest_batch(size: Sizes, given: Assumptions) -> int:
    """Images a GPU and pass that memory holds, a power of two; 0 where not even the weights fit."""
    free = given.usable * given.memory - STATE_BYTES * size.parameters
    images = free / (size.kept * given.kept_bytes)
    return 0 if images < 1 else 2 ** (int(images).bit_length() - 1)


def step(size: Sizes, gpus: int, given: Assumptions, batch: int = BATCH) -> Step:
    """An update of ``batch`` images on ``gpus`` GPUs; ValueError if no image fits into one."""
    part = batch // gpus
    micro = min(part, largest_batch(size, given))
    if micro < 1:
        raise ValueError(f"{size.model} does not fit into {given.memory / 1e9:.0f} GB")
    accum = -(-part // micro)
    an_image = size.step_multiply_adds / given.peak + TRAFFIC * size.numbers / given.bandwidth
    once = max(micro * an_image / given.share, LAUNCHES * size.blocks * given.launch)
    link = given.node if gpus <= 8 else min(given.node, given.network)
    reduced = size.sent(gpus) / link
    behind = given.hidden * 2 / 3 * once  # of the last of the accumulated passes alone
    return Step(gpus, micro, accum, accum * once, accum * once + max(0.0, reduced - behind), part * gpus)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of text in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(model: str) -> str:
    """A variant without the family's name."""
    return model.removeprefix("convnextv2_")


def tables(given: Assumptions) -> str:
    """The tables of docs/scaling.md."""
    every = [sizes(model) for model in VARIANTS]
    lone = [step(size, 1, given) for size in every]
    costs = [
        {
            "variant": short(size.model),
            "parameters, M": f"{size.parameters / 1e6:.1f}",
            "G multiply-adds an image": f"{size.step_multiply_adds / 1e9:.2f}",
            "weights, gradients, AdamW, GB": f"{STATE_BYTES * size.parameters / 1e9:.2f}",
            "kept, MB an image": f"{given.kept_bytes * size.kept / 1e6:.1f}",
            "images that fit": f"{largest_batch(size, given):,}",
            "images/s": f"{one.images_per_s:,.0f}",
        }
        for size, one in zip(every, lone, strict=True)
    ]
    shares = [
        {"variant": short(size.model)}
        | {
            f"{gpus} GPUs".replace("1 GPUs", "1 GPU"): f"{BATCH // gpus * size.step_multiply_adds / 1e12:.3g} T, "
            f"{size.sent(gpus) / 1e6:,.0f} MB"
            for gpus in GPUS
        }
        for size in every
    ]
    paces = [
        {"variant": short(size.model)}
        | {
            f"{gpus} GPUs": f"{found.images_per_s:,.0f} ({found.images_per_s / one.images_per_s / gpus:.0%})"
            for gpus in GPUS[1:]
            for found in [step(size, gpus, given)]
        }
        for size, one in zip(every, lone, strict=True)
    ]
    cores = [
        {"variant": short(size.model)} | {way: f"{one.images_per_s * ms / 1e3:.1f}" for way, ms in LOADING.items()}
        for size, one in zip(every, lone, strict=True)
    ]
    shards = [
        {"variant": short(size.model), "without": f"{(STATE_BYTES + 2) * size.parameters / 1e9:.1f}"}
        | {f"{gpus} GPUs": f"{size.sharded_bytes(gpus) / 1e9:.1f}" for gpus in (2, 4, 8, 32)}
        | {"sent by each of 8, a pass": f"{size.sharded_sent(8) / 1e9:.1f}"}
        for size in every[-3:]
    ]
    return "\n\n".join(
        [
            f"An image, and a GPU of {given.memory / 1e9:.0f} GB:\n\n{table(costs)}",
            f"An update of {BATCH:,} images, multiply-adds and bytes sent of each GPU:\n\n{table(shares)}",
            f"Images a second of all, and how much that is of as many times one GPU's:\n\n{table(paces)}",
            f"Cores that load for one GPU:\n\n{table(cores)}",
            f"GB that go with the parameters, of a GPU with `--sharding full`:\n\n{table(shards)}",
        ]
    )


WAYS = ALONE, SILENT, TALKING = "alone", "side by side", "sharing gradients"


@dataclass
class Check:
    """A step of each of some processes on this machine, beside what the model says of it.

    Milliseconds are of the median step; the prediction for processes that share gradients is the step of those that do
    not, and what cannot hide behind it of an all-reduce of as many bytes by itself. ``peak_mb`` is what forward and
    backward pass need besides weights and gradients: kept numbers, and what the backward pass works with.
    """

    model: str
    processes: int
    way: str
    batch: int
    step_ms: float
    step_ms_min: float
    step_ms_max: float
    step_ms_predicted: float | None
    reduce_ms: float | None
    multiply_adds_per_s: float
    kept_mb: float
    kept_mb_predicted: float
    peak_mb: float
    sent_mb: float
    sent_mb_predicted: float


def kept_bytes(model: torch.nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, each memory once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, return_pred=False).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own)


def work(rank: int, processes: int, args: argparse.Namespace, name: str, folder: str) -> None:
    """One process of a check; writes what it found into ``folder``. Ways take turns: a drift hits them alike."""
    torch.set_num_threads(args.threads or 1)
    torch.manual_seed(args.seed + rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=PATIENCE
    )
    model = create_fcmae(name, img_size=args.img_size, mask_ratio=args.mask_ratio)
    together = DistributedDataParallel(copy.deepcopy(model))
    images, sent = torch.randn(args.batch_size, 3, *args.img_size), list[int]()
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))

    def send(group, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and takes no text for one
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    together.register_comm_hook(dist.group.WORLD, send)

    def stepping(network: torch.nn.Module) -> Callable[[], None]:
        optimizer = create_optimizer(parameter_groups(network, 0.05), 1e-6, (0.9, 0.95), "adamw", fused=True)

        def run() -> None:
            sent.clear()
            network(images, return_pred=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    own = stepping(model)
    calls: dict[str, Callable[[], Any]] = {ALONE: own, SILENT: own, TALKING: stepping(together)}
    calls["reduce"] = functools.partial(dist.all_reduce, gradients)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(args.warmup + args.repeats):
        for way, call in calls.items():
            dist.barrier()
            if rank and way == ALONE:
                continue
            start = time.perf_counter()
            call()
            times[way].append(1e3 * (time.perf_counter() - start))
    found: dict[str, Any] = {"times": times, "sent": sum(sent), "kept": kept_bytes(model, images)}

    def passes() -> None:
        model(images, return_pred=False).loss.backward()

    passes()  # the gradients are there from now on
    found["peak"] = peak_activation_bytes(passes, torch.device("cpu"))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def check(args: argparse.Namespace, name: str, processes: int = 2) -> list[Check]:
    """Measure one process, as many side by side, and as many that share their gradients."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (processes, args, name, folder), processes)
        return rows_of(args, name, [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)])


def rows_of(args: argparse.Namespace, name: str, found: Sequence[dict[str, Any]]) -> list[Check]:
    """What the processes of a check found, beside the model. A step is as long as that of the slowest process."""
    size, batch, first, rows = sizes(name, args.img_size, args.mask_ratio), args.batch_size, found[0], list[Check]()
    for way in WAYS:
        lists = [one["times"][way][args.warmup :] for one in found if one["times"][way]]
        steps = [max(times) for times in zip(*lists, strict=True)]
        middle, talking, predicted = statistics.median(steps), way == TALKING, None
        reduced = statistics.median(first["times"]["reduce"][args.warmup :])
        if talking:
            predicted = rows[-1].step_ms + max(0.0, reduced - Assumptions().hidden * 2 / 3 * rows[-1].step_ms)
        row = Check(
            model=name,
            processes=len(lists),
            way=way,
            batch=batch,
            step_ms=middle,
            step_ms_min=min(steps),
            step_ms_max=max(steps),
            step_ms_predicted=predicted,
            reduce_ms=reduced if talking else None,
            multiply_adds_per_s=1e3 * batch * size.step_multiply_adds / middle,
            kept_mb=first["kept"] / 1e6,
            kept_mb_predicted=4 * batch * size.kept / 1e6,
            peak_mb=first["peak"] / 1e6,
            sent_mb=2 * (len(lists) - 1) / len(lists) * first["sent"] / 1e6 if talking else 0.0,
            sent_mb_predicted=size.sent(len(lists)) / 1e6 if talking else 0.0,
        )
        rows.append(row)
    return rows


def line(row: Check) -> str:
    """What was measured, and in brackets what the model says."""
    step_ms = "" if row.step_ms_predicted is None else f" ({row.step_ms_predicted:.0f})"
    return (
        f"{row.model}, {row.way}: step {row.step_ms:.0f} ms{step_ms}, {row.step_ms_min:.0f}-{row.step_ms_max:.0f}; "
        f"{row.multiply_adds_per_s / 1e9:.1f} G multiply-adds/s a process; MB kept {row.kept_mb:.1f} "
        f"({row.kept_mb_predicted:.1f}), at the peak {row.peak_mb:.1f}, "
        f"sent {row.sent_mb:.1f} ({row.sent_mb_predicted:.1f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["atto", "tiny"], batch_size=16)
    parser.add_argument("--check", action="store_true", help="measure one and two processes on this processor")
    args = parser.parse_args(argv)
    check_options(parser, args)
    if not args.check:
        if args.json is not None:
            parser.error("--json is for what is measured: with --check")
        print(tables(Assumptions()))
        return 0
    if args.device != "cpu":
        parser.error("--check runs on processors; it has nothing for --device")
    facts, results = hardware(torch.device("cpu")), list[Check]()
    print_facts(facts)
    for name in args.models:
        results += check(args, name)
        print("\n".join(map(line, results[-3:])))
        write_report(facts, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
