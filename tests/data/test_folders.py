import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_helpers import Folder, save
from PIL import Image

from convnextv2.data import folders, images
from convnextv2.data.folders import scan_images
from convnextv2.data.sources import DataError


def bad_files(folder: Path) -> dict[str, str]:
    """Unusable files, and a word of the reason for each."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
    for suffix in ("jpg", "png"):
        save(noise, folder / f"cut.{suffix}")
        content = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    broken = bytearray((folder / "cut.png").read_bytes())
    broken[60:90] = bytes(30)
    (folder / "corrupt.png").write_bytes(broken)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00nonsense")
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    crc = zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + header + crc + bytes(4) + b"IDAT" + bytes(4)
    )
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "loop").symlink_to(folder)
    (folder / "self.png").symlink_to(folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "corrupt.png": "",
        "empty.jpg": "empty",
        "text.png": "not an image",
        "notes.txt": "not an image",
        "bad.npy": "npy",
        "objects.npy": "npy",
        "bomb.png": "bomb",
        "dangling.png": "broken link",
        "loop": "link",
        "self.png": "link",
        "pipe.png": "regular file",
    }


def test_scan_skips_and_explains(image_folder: Folder) -> None:
    root = image_folder({"": 2})
    expected = bad_files(root)
    listing = scan_images(root)
    assert [path.name for path in listing.train.images.paths] == ["000.png", "001.png"]
    reasons = {path.name: reason for path, reason in listing.train.skipped}
    assert reasons.keys() == expected.keys()
    for name, word in expected.items():
        assert word in reasons[name], (name, reasons[name])
        assert reasons[name].strip()


def test_scan_finds_everything_that_is_an_image(image_folder: Folder) -> None:
    root = image_folder({"": 1})
    image = Image.new("RGB", (4, 4), "red")
    (root / "deep" / "er").mkdir(parents=True)
    (root / "folder.jpg").mkdir()
    (root / ".hidden").mkdir()
    for name in ("a b.png", "日本 é.png", "deep/er/x.png", "folder.jpg/y.png", ".hidden/z.png", ".h.png"):
        save(image, root / name)
    save(image, root / "really_png.jpg", format="PNG")
    save(image, root / "nameless", format="PNG")
    found = {path.relative_to(root).as_posix() for path in scan_images(root).train.images.paths}
    assert found == {
        "000.png", "a b.png", "日本 é.png", "deep/er/x.png", "folder.jpg/y.png", "really_png.jpg", "nameless",
    }  # fmt: skip
    assert scan_images(root).train.labels is None


def test_scan_labels_and_sorts(image_folder: Folder) -> None:
    root = image_folder({"b": 2, "a": 1})
    (root / "none").mkdir()
    listing = scan_images(root)
    assert (listing.classes, listing.train.labels) == (["a", "b"], [0, 1, 1])
    assert listing.train.skipped == []
    save(Image.new("L", (3, 3)), root / "stray.png")
    labelled = scan_images(root, labelled=True)
    assert labelled.train.labels == [0, 1, 1]
    assert {path.name: reason for path, reason in labelled.train.skipped} == {
        "stray.png": "lies outside of the class folders",
        "none": "class folder without a usable image",
    }


def test_unreadable_folder_is_skipped(image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder({"a": 1, "b": 1})
    scandir = os.scandir

    def denied(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", denied)
    listing = scan_images(root)
    assert len(listing.train.images.paths) == 1
    assert listing.train.skipped == [(root / "b", "Permission denied")]


def test_scan_errors_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found no usable one"):
        scan_images(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"x\.txt \(not an image"):
        scan_images(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        scan_images(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="check must be"):
        scan_images(tmp_path, check="perhaps")


def test_1200_nested_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Image.new("L", (3, 3)), tmp_path / "x.png")
    for _ in range(1200):
        Path("d").mkdir()
        os.chdir("d")
    save(Image.new("L", (3, 3)), Path("y.png"))
    assert [len(path.relative_to(tmp_path).parts) for path in scan_images(tmp_path).train.images.paths] == [1201, 1]
    for _ in range(1200):  # what cleans up after the tests is recursive
        os.chdir("..")
        (Path("d") / "y.png").unlink(missing_ok=True)
        Path("d").rmdir()


def test_folders_that_link_to_each_other_are_read_once(image_folder: Folder) -> None:
    names = [f"{number}" for number in range(9)]
    root = image_folder(dict.fromkeys(names, 1))
    for name in names:
        for other in names:
            if other != name:
                (root / name / f"to-{other}").symlink_to(root / other)
    listing = scan_images(root)
    assert [path.relative_to(root).as_posix() for path in listing.train.images.paths] == [f"{n}/000.png" for n in names]
    assert len(listing.train.skipped) == 72
    assert {path.name: reason for path, reason in listing.train.skipped}["to-3"] == f"the same folder as {root / '3'}"


def test_a_folders_own_name_comes_before_links_to_it(image_folder: Folder, tmp_path: Path) -> None:
    root = image_folder({"b": 2, "z": 1})
    outside = image_folder({"deep": 1}, "outside")
    (root / "a").symlink_to(root / "z")
    (root / "m").symlink_to(outside)
    (root / "n").symlink_to(outside / "deep")
    (outside / "deep" / "up").symlink_to(outside)
    listing = scan_images(root)
    found = [path.relative_to(root).as_posix() for path in listing.train.images.paths]
    assert found == ["b/000.png", "b/001.png", "m/deep/000.png", "z/000.png"]
    assert listing.train.skipped == [
        (root / "a", f"the same folder as {root / 'z'}"),
        (root / "m" / "deep" / "up", "link to a folder that contains it"),
        (root / "n", f"the same folder as {root / 'm' / 'deep'}"),
    ]


def test_a_folder_that_vanishes_between_listing_and_reading(
    image_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"a": 1, "b": 1, "c": 1})
    scandir = os.scandir

    def vanishing(path: Path) -> object:
        if Path(path) == root / "a":
            (root / "b" / "000.png").unlink()
            (root / "b").rmdir()
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", vanishing)
    listing = scan_images(root)
    assert [path.parent.name for path in listing.train.images.paths] == ["a", "c"]
    assert listing.train.skipped == [(root / "b", "No such file or directory")]


def test_large_images_are_not_decoded_side_by_side(image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root, running, most = image_folder({"": 12}), set[int](), []

    def slow(*_: object) -> None:
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.01)
        running.discard(threading.get_ident())

    monkeypatch.setattr(images, "load_image", slow)
    scan_images(root)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(images, "LARGE", 10)
    scan_images(root)
    assert (max(most), len(most)) == (1, 12)
