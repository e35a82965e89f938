"""Shards that a command writes: kept once, never half, the same as from files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convnextv2.data import DataError, build_pretrain_dataset, open_source
from convnextv2.data.shard_writing import write_shards
from convnextv2.data.tar_index import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder("spool")


@pytest.fixture
def shards(image_folder: Callable[..., Path], tmp_path: Path) -> Path:
    write_shards(image_folder({"blue": 5, "red": 4}), tmp_path / "shards", samples=3)
    return tmp_path / "shards"


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def test_the_same_as_from_files_and_run_once(shards: Path, tmp_path: Path, cache: Path) -> None:
    spec = f"pipe:echo x >> {tmp_path}/count; cat {shards}/{{000000..000002}}.tar"
    piped, files = (build_pretrain_dataset(data, (16, 16)) for data in (spec, shards))
    assert len(piped) == len(files) == 9
    for number in range(9):
        assert piped[number].equal(files[number])
    opened = open_source(spec, labelled=True)
    assert (opened.train.labels, opened.classes) == ([0] * 5 + [1] * 4, ["0", "1"])
    assert (tmp_path / "count").read_text() == "x\n" * 3
    assert len(kept(cache)) == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat nothing.tar", "cat: nothing.tar: No such file or directory; ended with status 1"),
        ("head -c 30000 SHARD; exit 22", "ended with status 22"),
        ("true", "writes no tar with images: 0 bytes in all"),
        ("cat", "writes no tar with images: 0 bytes in all"),  # nothing comes from standard input
        ("echo '<html>not found</html>'", "writes no tar with images: 23 bytes"),
        ("kill -9 $$", "ended with status -9"),
        ("", "writes no tar with images"),
        ("no-such-command-" + "x" * 600, "ended with status 127"),
    ],
)
def test_a_command_that_fails_is_told_in_a_line_and_not_kept(
    shards: Path, cache: Path, command: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_source("pipe:" + command.replace("SHARD", f"{shards}/000000.tar"))
    assert "\n" not in str(error.value)
    assert kept(cache) == []


def test_a_broken_shard_costs_its_samples(shards: Path) -> None:
    spec = f"pipe:head -c $((1{{00000..00001}} == 100001 ? 4000 : 10000000)) {shards}/000001.tar"
    opened = open_source(spec)
    assert 3 < len(opened.train.by_number) < 6
    assert any("cannot be read on after" in reason for _, reason in opened.train.skipped)
    opened = open_source(f"pipe:cat {shards}/{{000001..000003}}.tar")
    assert len(opened.train.by_number) == 6
    assert [reason[-19:] for _, reason in opened.train.skipped] == ["ended with status 1"]


def test_what_was_not_asked_for_in_a_month_is_deleted(shards: Path, cache: Path) -> None:
    open_source(f"pipe:cat {shards}/000000.tar")
    (old,) = kept(cache)
    changed, month = old.stat().st_mtime_ns, time.time_ns() - 31 * 86_400 * 10**9
    os.utime(old, ns=(month, month))
    (cache / ".x.0123abcd.tmp.tar").write_bytes(b"of a killed process")
    os.utime(cache / ".x.0123abcd.tmp.tar", ns=(month, month))
    open_source(f"pipe:cat {shards}/000000.tar")  # asked for
    assert old.stat().st_mtime_ns == month != changed
    open_source(f"pipe:cat {shards}/000001.tar")
    assert old in kept(cache)
    assert len(kept(cache)) == 2
    os.utime(old, ns=(month, month))
    open_source(f"pipe:cat {shards}/000002.tar")
    assert old not in kept(cache)


def test_an_interrupted_command_ends_and_leaves_nothing(
    shards: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convnextv2.data import piped

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(piped, "check_free", stop)
    with pytest.raises(KeyboardInterrupt):
        open_source(f"pipe:cat {shards}/000000.tar; sleep 1; touch {tmp_path}/went-on")
    assert kept(cache) == []
    time.sleep(1.5)
    assert not (tmp_path / "went-on").exists()


def test_names_are_read_as_they_are(shards: Path) -> None:
    opened = open_source(f"pipe:cat {shards}/000000.tar")
    assert opened.train.images.name(0).endswith("00000000-000.png")  # type: ignore[union-attr]
    assert np.asarray(opened.train.by_number.load(0)).shape == (30, 40, 3)
