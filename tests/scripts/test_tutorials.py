"""The tutorials and the README: commands run as they stand, in their order, on the smallest images and networks.

Blocks after ``<!-- not run: REASON -->`` are not. The notebooks are executed as they are.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import tifffile
import torch
from jupyter_client.manager import start_new_kernel

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.commands import dispatch
from convnextv2.weights import read_weights, write_layout

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "tutorials").glob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"(<!-- not run: .* -->\n)?^```\n(.*?)^```$", re.M | re.S)
NETWORK = ["--depths", "1", "1", "1", "1", "--dims", "8", "8", "16", "16"]
SMALL = {
    "pretrain": [*NETWORK, "--img-size", "32", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "4"],
    "finetune": [
        "--img-size",
        "32",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0.5",
        "--min-steps",
        "0",
        "--batch-size",
        "4",
    ],
}
"""Options that make a run small, after those of the page."""
WORKERS = {"pretrain", "finetune", "predict", "evaluate", "embed"}


def photographs(make_images: Callable[..., Path]) -> None:
    for part in ("train", "val"):
        make_images({"daisy": 4, "rose": 4}, name=f"place/photos/{part}")


def measured(root: Path, shape: tuple[int, ...], **options: object) -> None:
    draw = np.random.default_rng(0)
    for kind, low in (("first", 300), ("second", 2000)):
        (root / kind).mkdir(parents=True)
        for number in range(5):
            values = draw.integers(low, low + 1500, shape, dtype=np.uint16)
            values[..., :6, :6] = 0
            tifffile.imwrite(root / kind / f"{number}.tif", values, **options)


def official(path: Path) -> None:
    torch.manual_seed(0)
    model = create_fcmae(EncoderConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), img_size=64)
    torch.save({"model": write_layout(read_weights(model.state_dict()), "sparse-official")}, path)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every command that is to be run."""
    found = []
    for left_out, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if not left_out and "conda" not in block:  # that one is of the environment
            lines = block.replace("\\\n", " ").splitlines()
            found += [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["fcmae"]]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(
    page: Path, image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    photographs(image_folder)
    measured(place / "slides", (48, 48))
    measured(place / "fields", (6, 48, 48), planarconfig="separate", photometric="minisblack")
    official(place / "sparse.pth")
    done = []
    for name, *arguments in commands(page):
        small = SMALL.get(name, []) + (["--workers", "0"] if name in WORKERS else [])
        if "continued" in arguments:
            small = [*small, "--img-size", "64"]
        assert not dispatch([name, *arguments, *small]), (name, *arguments)
        done.append(name)
    assert {"photographs": 10, "microscopy": 6, "satellite": 4, "minkowski": 4, "README": 5}[page.stem] == len(done)
    for output in re.findall(r"(?:--output|--picture|--map|--tiff) (\S+)", page.read_text(encoding="utf-8")):
        assert output == "runs/continued" or Path(output).exists(), output


def cells_printed(sources: list[str]) -> list[str]:
    """What the cells of a notebook print, one after the other in a kernel.

    Its client waits on sockets: those of nbclient, in asyncio, can miss a message until the time for a cell is over.
    """
    manager, client = start_new_kernel(startup_timeout=300)
    printed = list[str]()

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    try:
        for source in sources:
            reply = client.execute_interactive(source, timeout=1200, output_hook=take)["content"]
            assert reply["status"] == "ok", "\n".join(reply["traceback"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    printed = "".join(cells_printed([cell.source for cell in notebook.cells if cell.cell_type == "code"]))
    expected = {
        "folder_to_classifier": r"of 359 images that were not seen",
        "what_masking_does": "largest difference: 0.0\n",
    }
    assert re.search(expected[path.stem], printed), printed[-2000:]
