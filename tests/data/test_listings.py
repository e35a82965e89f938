"""Large folders are listed once, their headers read once, and again what has changed; the rest is seen beside a run."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convnextv2.data import folders, listings
from convnextv2.data.decoding import Wanted
from convnextv2.data.folders import scan_images
from convnextv2.data.listings import ListingCheck
from convnextv2.data.paths import PathList
from convnextv2.data.tar_index import cache_folder


@pytest.fixture
def photos(image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "LEAST", 5)
    root = image_folder({"a": 3, "b": 3})
    (root / "a/notes.txt").write_text("words")
    return root


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers were read."""
    names, why_unusable = list[str](), folders.why_unusable

    def counted(path: Path, *rest: object) -> str | None:
        names.append(f"{path.parent.name}/{path.name}")
        return why_unusable(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(folders, "why_unusable", counted)
    return names


def scan(root: Path, checked: list[str], wanted: Wanted | None = None) -> tuple[int, list[str], list[str]]:
    checked.clear()
    opened = scan_images(root, check="header", wanted=wanted or Wanted())
    return len(opened.train.by_number), [path.name for path, _ in opened.train.skipped], sorted(checked)


def test_only_what_is_new_or_was_unusable_is_read_again(photos: Path, checked: list[str]) -> None:
    everything = [f"{name}/{number:03d}.png" for name in "ab" for number in range(3)]
    assert scan(photos, checked) == (6, ["notes.txt"], [*everything[:3], "a/notes.txt", *everything[3:]])
    assert scan(photos, checked) == (6, ["notes.txt"], ["a/notes.txt"])
    (photos / "b/001.png").write_bytes(b"x")
    (photos / "b/new.png").write_bytes((photos / "a/000.png").read_bytes())
    again = ["a/notes.txt", "b/001.png", "b/new.png"]
    assert scan(photos, checked) == (6, ["notes.txt", "001.png"], again)
    assert scan(photos, checked) == (6, ["notes.txt", "001.png"], again[:2])
    os.utime(photos / "a/002.png", (5, 5))
    assert scan(photos, checked)[2] == ["a/002.png", *again[:2]]
    with pytest.raises(ValueError, match="`max_pixels` 100"):
        scan(photos, checked, Wanted(max_pixels=100))  # another wish, of which nothing is known


@pytest.mark.parametrize("damage", [b"", b"x" * 300, None])
def test_what_is_kept_is_not_needed(photos: Path, checked: list[str], damage: bytes | None) -> None:
    scan(photos, checked)
    (kept,) = cache_folder("listings").glob("*.npy")
    if damage is None:
        shutil.rmtree(kept.parent)
        kept.parent.write_text("no folder")
    else:
        kept.write_bytes(damage)
    found, _, read = scan(photos, checked)
    assert (found, len(read)) == (6, 7)
    if damage is not None:
        assert len(scan(photos, checked)[2]) == 1


def test_small_folders_leave_nothing(photos: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "LEAST", 100)
    for _ in range(2):
        assert len(scan(photos, checked)[2]) == 7
    assert not cache_folder("listings").exists()


@pytest.fixture
def settled(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, listed, as if it had been written long before."""
    monkeypatch.setattr(listings, "SETTLED_NS", -(10**12))
    scan_images(photos, check="header")
    return photos


def names(root: Path) -> list[str]:
    return [path.name for path in scan_images(root, check="header").train.images.paths]


def test_a_listing_is_taken_until_a_folder_changes(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks, walk = list[Path](), listings._walk
    monkeypatch.setattr(listings, "_walk", lambda root: (walks.append(root), walk(root))[1])
    first = scan_images(settled, check="header").train
    assert not walks
    assert (len(first.by_number), first.labels) == (6, [0, 0, 0, 1, 1, 1])
    assert [path.name for path, _ in first.skipped] == ["notes.txt"]
    (settled / "b/new.png").write_bytes((settled / "a/000.png").read_bytes())
    assert names(settled)[-1] == "new.png"
    assert len(walks) == 1
    (settled / "b/new.png").rename(settled / "b/newer.png")
    assert names(settled)[-1] == "newer.png"
    shutil.rmtree(settled / "a")
    assert [path.parent.name for path in scan_images(settled, check="header").train.images.paths] == ["b"] * 4
    assert len(walks) == 3


def test_what_changed_just_before_is_listed_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_images(photos, check="header")
    walks, walk = list[Path](), listings._walk
    monkeypatch.setattr(listings, "_walk", lambda root: (walks.append(root), walk(root))[1])
    names(photos)
    assert len(walks) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes", "counts", "format"])
def test_a_damaged_listing_is_made_anew(settled: Path, damage: str) -> None:
    (kept,) = cache_folder("listings").glob("*.npz")
    content = kept.read_bytes()
    with np.load(kept) as found:
        arrays = dict(found)
    if damage == "counts":
        np.savez(kept, **arrays | {"marks": arrays["marks"][:-1]})
    elif damage == "format":
        np.savez(kept, **arrays | {"about": np.frombuffer(b'{"format": 0, "skipped": [], "size": 1}', np.uint8)})
    else:
        kept.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "bytes": b"x" * 999}[damage])
    expected = [path.name for path in sorted(settled.glob("*/*.png"))]
    assert names(settled) == expected
    assert kept.stat().st_size == len(content)


def test_what_only_every_file_tells_is_told_beside_a_run(settled: Path) -> None:
    def told() -> list[str]:
        check = ListingCheck([scan_images(settled, check="header").train.images])
        check.begin()
        return check.end()

    assert told() == []
    (settled / "a/001.png").write_bytes(b"no image now")
    (line,) = told()
    assert "1 file(s) are new or have changed, 1 are gone or have changed" in line
    assert told() == []
    found = scan_images(settled, check="header").train
    assert len(found.by_number) == 5
    assert [path.name for path, _ in found.skipped] == ["001.png", "notes.txt"]
    check = ListingCheck([found.images])
    shutil.rmtree(settled)
    check.begin()
    assert "no such folder" in check.end()[0]
    assert check.end() == []


def test_paths_are_a_list_of_paths(tmp_path: Path) -> None:
    written = ["a/x.png", "b/\udcff y.png", "ä.png"]
    paths = PathList(tmp_path, written)
    assert [*paths] == [tmp_path / name for name in written]
    assert paths[-1] == tmp_path / "ä.png"
    assert [*paths[1:]] == [*paths][1:]
    assert [*pickle.loads(pickle.dumps(paths))] == [*paths]
    assert paths.names() == written
    assert (len(PathList(tmp_path, [])), [*PathList(tmp_path, [])]) == (0, [])
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            paths[wrong]
