"""Where the scripts write: no input is lost, whatever the output is called or already is."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forked
import numpy as np
import pytest
from PIL import Image

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig
from convnextv2.outputs import Kind, OutputError, check_output
from convnextv2.report.page import START
from convnextv2.weights.checkpoint import load_checkpoint, save_checkpoint

ENCODER = EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24), patch_size=16)
SCRIPTS = Path(__file__).parents[2] / "scripts"


class Place(NamedTuple):
    """A folder with photographs and checkpoints, and each script as a command without its output."""

    root: Path
    commands: dict[str, Callable[[object], list[object]]]
    suffix: dict[str, str]

    script: Callable[..., Any]

    def run(self, name: str, output: object, *more: object) -> Any:
        """In this process."""
        return self.script(name, *self.commands[name](output), *more)

    def call(self, name: str, output: object, stdout: Path) -> subprocess.CompletedProcess[str]:
        """In a process of its own, for what concerns its descriptors, with a pipe or the end of a file as the first."""
        before = partial(redirect, stdout)
        return forked.run(SCRIPTS / f"{name}.py", *self.commands[name](output), cwd=self.root, before=before)

    def digests(self) -> dict[str, str]:
        files = sorted(path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def redirect(path: Path) -> None:
    """Standard output to a pipe, or behind what a file holds."""
    descriptor = os.open(path, os.O_WRONLY)
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.lseek(descriptor, 0, os.SEEK_END)
    os.dup2(descriptor, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # the old one takes a pipe for what it was made for


@contextmanager
def pipe(path: Path) -> Iterator[list[bytes]]:
    """A pipe of that name, and afterwards what came through it."""
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()
    yield read
    reader.join(30)


@pytest.fixture
def place(tmp_path, image_folder, script, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    photos = image_folder({"a": 2, "b": 2}, name="photos")
    Image.open(photos / "a" / "000.png").save(photos / "a" / "photo.jpg")
    metadata = {"mean": [0.5] * 3, "std": [0.25] * 3, "img_size": [32, 32]}
    fcmae = create_fcmae(ENCODER, img_size=32, decoder_dim=16)
    save_checkpoint(tmp_path / "pre/checkpoints/last.safetensors", fcmae, fcmae.config, metadata)
    classifier = ConvNeXtV2(ClassifierConfig(ENCODER, 2, class_names=("a", "b")))
    save_checkpoint(tmp_path / "fine/checkpoints/best.safetensors", classifier, classifier.config, metadata)
    cpu = "--device", "cpu"
    commands = {
        "predict": lambda output: ["fine", "photos", *cpu, "--output", output],
        "visualize": lambda output: ["pre", "photos", *cpu, "--backend", "reference", "--output", output],
        "convert_sparse_to_dense": lambda output: ["pre", output],
        "evaluate": lambda output: ["linear", "pre", "photos", *cpu, "--output", output],
        "report": lambda output: ["pre", "fine", "--output", output],
        "embed": lambda output: ["pre", "photos", *cpu, "--output", output],
    }
    return Place(
        tmp_path, commands, dict(zip(commands, (".csv", ".png", ".pth", ".json", ".html", ".npz"), strict=True)), script
    )


NAMES = ("predict", "visualize", "convert_sparse_to_dense", "evaluate", "report", "embed")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_refused(place, name):
    """Inputs, checkpoints, folders, devices and files of others: one line, status 2, and nothing changes."""
    suffix = place.suffix[name]
    (place.root / f"other{suffix}").write_text("the work of a week")
    (place.root / f"link{suffix}").symlink_to(place.root / "photos" / "a" / "photo.jpg")
    (place.root / "fine" / f"notes{suffix}").write_text("mine")
    os.mknod(place.root / f"disk{suffix}", stat.S_IFBLK | 0o600, os.makedev(259, 4095))
    outputs = [
        "photos/a/photo.jpg", "photos/a/000.png", "pre/checkpoints/last.safetensors",
        "fine/checkpoints/best.safetensors", "photos", f"other{suffix}", f"link{suffix}", f"disk{suffix}",
        "/dev/sda", f"result{suffix}.exe", "fine" if name == "predict" else "pre", f"photos/a/photo.jpg/x{suffix}",
    ]  # fmt: skip
    before = place.digests()
    for output in outputs:
        if output == "/dev/sda" and not Path(output).exists():
            continue
        result = place.run(name, output)
        errors = [line for line in result.err.splitlines() if not line.startswith(("usage", " "))]
        assert result.status == 2, (output, result)
        assert len(errors) == 1, (output, errors)
        assert "error: " in errors[0], errors
        assert place.digests() == before, output
    assert stat.S_ISBLK((place.root / f"disk{suffix}").stat().st_mode)
    assert (place.root / f"link{suffix}").is_symlink()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_written(place, name):
    """New files, files of the same kind, links, pipes and standard output; ``--overwrite`` lets go of the rest."""
    suffix, before = place.suffix[name], place.digests()

    def good(content: bytes) -> bool:
        if suffix == ".csv":
            rows = list(csv.reader(io.StringIO(content.decode())))
            return len(rows) == 6 and rows[0][:2] == ["file", "predicted_class"]
        if suffix == ".json":
            return json.loads(content)["evaluation"] == "linear"
        if suffix == ".html":
            return content.startswith(START.encode()) and content.endswith(b"</html>")
        if suffix == ".npz":
            return np.load(io.BytesIO(content))["features"].shape == (5, 24)
        if suffix == ".png":
            return Image.open(io.BytesIO(content)).size[0] > 100
        (place.root / "copy.pth").write_bytes(content)
        return "converted_from" in load_checkpoint(place.root / "copy.pth").metadata

    new = place.root / f"new folder/result{suffix}"
    assert place.run(name, new).status == 0
    first = new.read_bytes()
    assert good(first)
    assert place.run(name, new).status == 0, "an earlier result of its own kind is replaced"

    (target := place.root / f"elsewhere{suffix}").write_bytes(first)
    target.chmod(0o640)
    (link := place.root / f"link{suffix}").symlink_to(target.name)
    assert place.run(name, link).status == 0
    assert link.is_symlink()
    assert good(target.read_bytes())
    assert stat.S_IMODE(target.stat().st_mode) == 0o640

    (other := place.root / f"other{suffix}").write_text("unimportant")
    assert place.run(name, other).status == 2
    assert place.run(name, other, "--overwrite").status == 0
    assert good(other.read_bytes())

    for number, standard in enumerate(("-", "/dev/stdout")):
        with pipe(place.root / f"pipe{number}") as read:
            result = place.call(name, standard, place.root / f"pipe{number}")
        assert result.returncode == 0
        assert good(read[0])
        assert result.stderr
    fifo = place.root / f"fifo{suffix}"
    with pipe(fifo) as read:
        assert place.run(name, fifo).status == 0
    assert good(read[0])
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert place.run(name, "/dev/null").status == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    (place.root / "redirected").write_bytes(b"before\n")
    assert place.call(name, "/dev/stdout", place.root / "redirected").returncode == 0
    head, _, rest = (place.root / "redirected").read_bytes().partition(b"\n")
    assert head == b"before"
    assert good(rest)
    after = place.digests()
    assert {file: after[file] for file in before} == before


def test_formulas_do_not_reach_a_spreadsheet(script, place):
    Image.new("RGB", (32, 32)).save("=1+1.png")
    classifier = ConvNeXtV2(ClassifierConfig(ENCODER, 2, class_names=("=cmd|' /C calc'!A0", "@b")))
    save_checkpoint("evil.pth", classifier, classifier.config, {"img_size": [32, 32]})
    result = script("predict", "evil.pth", "=1+1.png", "--device", "cpu", "--output", "r.csv")
    assert result.status == 0, result.err
    _, row = csv.reader(Path("r.csv").read_text().splitlines())
    assert row[0] == "./=1+1.png"
    assert Path(row[0]).is_file()
    assert row[1].startswith(("'=", "'@"))
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row)


def test_an_input_is_safe_from_overwrite_too(tmp_path):
    kind = Kind("a table", (".csv",), lambda path: False)
    (tmp_path / "in.csv").write_text("1")
    (tmp_path / "hard.csv").hardlink_to(tmp_path / "in.csv")
    for output in ("in.csv", "hard.csv"):
        with pytest.raises(OutputError, match="one of the inputs"):
            check_output(tmp_path / output, kind, inputs=[tmp_path / "in.csv"], overwrite=True)
    with pytest.raises(OutputError, match="lies among the inputs"):
        check_output(tmp_path / "in.csv", kind, inputs=[tmp_path], overwrite=True)
    check_output(tmp_path / "in.csv", kind, overwrite=True)
    check_output(tmp_path / "new.csv", kind, inputs=[tmp_path])
