"""Cached images are those of the files; a cache is whole or not there, and never of other files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2.data import DataError, Wanted, build_finetune_datasets, build_pretrain_dataset, open_source
from convnextv2.data import cache as cache_module
from convnextv2.data.batches import Samples
from convnextv2.data.cache import CachedSource, cached
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.names import name_of
from convnextv2.data.sources import FileSource


def files(root: Path, in_chans: int = 3) -> FileSource:
    return FileSource(sorted(root.rglob("*.png")), in_chans)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("resizer", ["pillow", "torchvision"])
def test_samples_are_the_same_with_and_without(
    image_folder: Callable[..., Path], tmp_path: Path, in_chans: int, resizer: str
) -> None:
    images = build_pretrain_dataset(image_folder({"": 10}), (32, 32), in_chans, seed=3)
    expected = torch.stack([Samples(images, resizer=resizer)[i] for i in range(10)])
    whole = images[4]
    images.source = cached(images.source, tmp_path / "cache", 1000)
    samples = pickle.loads(pickle.dumps(Samples(images, resizer=resizer)))
    assert torch.equal(torch.stack([samples[i] for i in range(10)]), expected)
    assert torch.equal(images[4], whole)
    assert name_of(images.source, 4).endswith("004.png")


def test_larger_images_are_shrunk_and_smaller_ones_kept(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = files(image_folder({"": 2}, size=(40, 30)))
    shrunk = cached(source, tmp_path / "cache", 15)
    assert [shrunk.array(i).shape for i in range(2)] == [(15, 20, 3)] * 2
    kept = cached(source, tmp_path / "cache", 30)
    assert np.array_equal(kept.array(1), np.asarray(source.load(1)))
    assert len(entries(tmp_path / "cache")) == 2


def test_parts_of_one_folder_share_a_cache(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    lines: list[str] = []
    for seed in (0, 1):
        for part in build_finetune_datasets(image_folder({"a": 6, "b": 6}, f"set{seed}"), (32, 32), seed=seed):
            expected = [np.asarray(part.source.load(i)) for i in range(len(part))]
            source = cached(part.source, tmp_path / "cache", 99, lines.append)
            assert all(np.array_equal(source.array(i), pixels) for i, pixels in enumerate(expected))
    assert [line.split()[:3] for line in lines] == [["caching", "12", "images"]] * 2


def test_what_it_is_made_of_decides(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root, place = image_folder({"": 3}), tmp_path / "cache"
    source = files(root)
    cached(source, place, 99)
    cached(source, place, 99)
    assert len(entries(place)) == 1
    Image.new("RGB", (8, 8), "red").save(root / "001.png")
    assert cached(source, place, 99).array(1).tolist() == [[[255, 0, 0]] * 8] * 8
    (root / "001.png").touch()
    os.utime(root / "001.png", ns=(1, 1))
    cached(source, place, 99)
    cached(FileSource(source.paths[:2], 3), place, 99)
    cached(FileSource(source.paths, 3, Wanted(10_000)), place, 99)
    cached(files(root, 1), place, 99)
    assert len(entries(place)) == 6


def test_bad_images_stay_bad(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = image_folder({"": 4})
    images = build_pretrain_dataset(root, (32, 32))
    (root / "001.png").write_bytes(b"no image")
    (root / "002.png").unlink()
    images.source = cached(images.source, tmp_path / "cache", 99)
    assert isinstance(images.source, CachedSource)
    with pytest.raises(UnreadableImageError, match="not an image"):
        images.source.array(1)
    samples = Samples(images)
    assert torch.equal(images.plain_transform(images.load(1)[1]), images.examples(4)[3])
    samples[1]
    assert images.replaced == [1, 2]
    for path in root.iterdir():
        path.unlink()
    samples[0]  # is not read from there
    images.source = cached(FileSource(images.source.paths, 3), tmp_path / "empty", 99)
    with pytest.raises(DataError, match="none of the 4 images"):
        Samples(images)[0]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    digits = open_source("digits", in_chans=1).train.by_number
    for source in (digits, FileSource([tmp_path / "a.npy"], 5)):
        with pytest.raises(ValueError, match=r"^`cache` is for images in files"):
            cached(source, tmp_path / "cache", 99)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "no about", "nonsense", "no index"])
def test_a_damaged_cache_is_built_anew(image_folder: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    source, place = files(image_folder({"": 3})), tmp_path / "cache"
    folder = cached(source, place, 99).folder
    if damage == "cut":
        os.truncate(folder / "pixels.bin", 100)
    elif damage == "no index":
        (folder / "index.npy").unlink()
    elif damage == "no about":
        (folder / "about.json").unlink()
    else:
        (folder / "about.json").write_text("[")
    lines: list[str] = []
    again = cached(source, place, 99, lines.append)
    assert len(lines) == 1
    assert np.array_equal(again.array(2), np.asarray(source.load(2)))


def test_a_full_disk_is_told_in_a_line(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source, place = files(image_folder({"": 3})), tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(cache_module.os, "fsync", full)
        with pytest.raises(OSError, match="cannot be used as `cache`: the disk is full") as told:
            cached(source, place, 99)
    assert "\n" not in str(told.value)
    assert entries(place) == []
    cached(source, place, 99)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: cannot be used as `cache`: (File exists|Not a directory)"):
        cached(source, tmp_path / "file", 99)


PROGRAM = """
import os, sys, time
from pathlib import Path
from convnextv2.data import cache
from convnextv2.data.sources import FileSource
load = FileSource.load
def slow(self, index):
    os.write(1, b"loading\\n")  # in one piece: several threads load
    time.sleep(60)
FileSource.load = slow
cache.cached(FileSource(sorted(Path(sys.argv[1]).rglob("*.png")), 3), sys.argv[2], 99)
"""


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root, place = image_folder({"": 3}), tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(root), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        assert [name.partition(".")[2] for name in entries(place)] == ["part"]
        process.send_signal(signal.SIGKILL)
    source = files(root)
    assert np.array_equal(cached(source, place, 99).array(0), np.asarray(source.load(0)))
    assert len(entries(place)) == 1


def build(root: Path, place: Path, queue: Any) -> None:
    load = FileSource.load

    def slow(self: FileSource, index: int) -> Any:
        time.sleep(0.02)
        return load(self, index)

    FileSource.load = slow  # type: ignore[method-assign]  # of this process
    lines: list[str] = []
    source = cached(files(root), place, 99, lines.append)
    queue.put((len(lines), int(source.array(5).sum())))


def test_several_processes_build_once(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = image_folder({"": 12})
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=build, args=(root, tmp_path / "cache", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(built for built, _ in found) == [0, 0, 1]
    assert len({total for _, total in found}) == 1
