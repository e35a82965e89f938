"""Gives hostile checkpoints to the scripts, each in a process forked off this one, and tells what came of it.

Arguments: a folder to work in, which has ``photos/`` and ``run/`` (a run to resume), and entries of :data:`ENTRIES`.
The files are written beside that folder.
Prints a line of JSON for each entry and file: both names, exit status, seconds, most memory in MB, what it said, wrote.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import hostile
import torch
from PIL import Image

from convnextv2.commands import _cli, convert, evaluate, finetune, predict, pretrain, visualize
from convnextv2.data.opening import source_kinds
from sparse_ops import registry

RUN = ["--device", "cpu", "--workers", "0", "--data", "photos", "--img-size", "32", "--epochs", "1"]
CUSTOM = ["--depths", "1", "1", "1", "1", "--dims", "8", "16", "16", "24", "--patch-size", "16"]
ENTRIES = {
    "convert": (convert, lambda file: [file, "out.pth"]),
    "predict": (predict, lambda file: [file, "photos", "--device", "cpu", "--output", "out.csv"]),
    "evaluate": (evaluate, lambda file: ["knn", file, "photos", "--device", "cpu", "--output", "out.json"]),
    "visualize": (visualize, lambda file: [file, "photos", "--device", "cpu", "--output", "out.png"]),
    "pretrain": (pretrain, lambda file: [*RUN, *CUSTOM, "--decoder-dim", "16", "--init", file, "--output", "out"]),
    "finetune": (finetune, lambda file: [*RUN, "--init", file, "--output", "out"]),
    # All epochs are done: the run ends when it is restored.
    "resume": (pretrain, lambda file: ["--output", "resumed", "--resume", "--epochs", "1"]),
}
LAZY = (
    *("accelerate", "attrs", "jsonargparse", "matplotlib.figure"),
    *("sparse_ops.conformance_block", "convnextv2.training.pretraining"),
    *("convnextv2.training.finetuning", "convnextv2.segmentation.training", "convnextv2.evaluation.frozen"),
    *("convnextv2.evaluation.prediction", "convnextv2.evaluation.linear", "convnextv2.export.writing"),
    *("convnextv2.weights.checkpoint", "convnextv2.weights.reading", "convnextv2.weights.verify"),
    *("timm.data", "torchvision.transforms.v2"),
)
"""What the scripts import once they need it, which takes longer than what they then do."""
SECONDS = 60


def child(entry: str, file: Path, log: int) -> None:
    """Run the script; never returns."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    module, arguments = ENTRIES[entry]
    sys.argv = [f"{entry}.py", *map(str, arguments(file))]
    status = 99
    try:
        _cli.run(module.main)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(entry: str, name: str, file: Path) -> dict[str, object]:
    """One script on one file."""
    if entry == "resume":
        shutil.copytree("run", "resumed")
        state = Path("resumed/checkpoints/state")
        shutil.copy(file, state / ("model.safetensors" if file.suffix == ".safetensors" else "optimizer.bin"))
    before = {path for path in Path().rglob("*") if "resumed" not in path.parts}
    log = os.open("log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        child(entry, file.absolute(), log)
    while time.monotonic() - start < SECONDS:
        done, code, usage = os.wait4(process, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(process, 9)
        _, code, usage = os.wait4(process, 0)
    seconds = time.monotonic() - start
    os.close(log)
    written = sorted(str(path) for path in set(Path().rglob("*")) - before if "resumed" not in path.parts)
    shutil.rmtree("resumed", ignore_errors=True)
    shutil.rmtree("out", ignore_errors=True)
    for extra in ("out.pth", "out.csv", "out.png", "out.json"):
        Path(extra).unlink(missing_ok=True)
    return {
        "entry": entry,
        "name": name,
        "status": os.waitstatus_to_exitcode(code),
        "seconds": round(seconds, 2),
        "megabytes": usage.ru_maxrss // 1024,
        "lines": Path("log").read_text(errors="replace").splitlines(),
        "written": [path for path in written if path != "log"],
    }


def main() -> None:
    place, *entries = sys.argv[1:]
    torch.set_num_threads(1)
    os.chdir(place)
    for name in LAZY:
        importlib.import_module(name)
    registry()
    source_kinds()  # imports all of convnextv2.data
    Image.init()
    Path("log").touch()
    for entry in entries:
        base = hostile.classifier if entry == "predict" else hostile.fcmae
        folder = Path("..", f"files-{base.__name__}")
        if not folder.exists():  # those of an earlier entry do
            hostile.write_all(folder, base)
        for file in sorted(folder.glob("*/a.*")):
            sys.stdout.write(json.dumps(run(entry, file.parent.name, file)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
