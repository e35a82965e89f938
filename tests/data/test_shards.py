"""Tar shards: written and read, by WebDataset too; damaged ones; behind an address; the same run as from the folder."""

from __future__ import annotations

import http.server
import io
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from convnextv2.data import DataError, build_finetune_datasets, build_pretrain_dataset, open_source
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.remote import RemoteFile
from convnextv2.data.shard_writing import write_shards
from convnextv2.data.shards import expanded
from convnextv2.data.tar_index import SUFFIX, cache_folder, index_of, read_index
from convnextv2.outputs import OutputError
from convnextv2.training import PretrainOptions, pretrain

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def photos(image_folder: Folder) -> Path:
    return image_folder({"blue": 5, "red": 4}, name="photos")


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_shards_hold_what_the_folder_holds(photos: Path, tmp_path: Path) -> None:
    _, written = write_shards(photos, tmp_path / "shards", samples=4)
    assert [path.name for path in written] == ["000000.tar", "000001.tar", "000002.tar"]
    folder, shards = (open_source(one, labelled=True) for one in (photos, tmp_path / "shards"))
    assert shards.classes == folder.classes == ["blue", "red"]
    assert shards.train.labels == folder.train.labels == [0] * 5 + [1] * 4
    for number in range(9):
        pairs = (np.asarray(one.train.by_number.load(number)) for one in (folder, shards))
        np.testing.assert_array_equal(*pairs)
    assert shards.train.images.name(4).endswith("000001.tar: 00000004-004.png")  # type: ignore[union-attr]
    by_name = open_source(f"{tmp_path}/shards/{{000000..000002}}.tar", labelled=True)
    assert (len(by_name.train.by_number), by_name.classes) == (9, ["blue", "red"])


def test_parts_of_the_folder_are_parts_of_the_shards(image_folder: Folder, tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        image_folder({"a": count, "b": count}, name=f"data/{part}")
    write_shards(tmp_path / "data", tmp_path / "shards")
    train, val = build_finetune_datasets(tmp_path / "shards", (16, 16))
    assert (len(train), len(val), list(train.classes)) == (6, 4, ["a", "b"])
    assert len(build_pretrain_dataset(tmp_path / "shards", (16, 16))) == 6


def test_a_run_is_the_same_as_from_the_folder(photos: Path, tmp_path: Path) -> None:
    write_shards(photos, tmp_path / "shards", samples=2)
    options = {"img_size": (32, 32), "patch_size": 16, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "workers": 0}
    options |= {
        "decoder_dim": 8,
        "batch_size": 3,
        "epochs": 2,
        "device": "cpu",
        "tracker": "none",
        "warmup_epochs": 0.0,
    }
    losses = []
    for data, workers in ((photos, 0), (tmp_path / "shards", 2)):
        output = tmp_path / f"run{workers}"
        run = pretrain(PretrainOptions(data=str(data), output=str(output), **options | {"workers": workers}))
        losses.append([row["loss"] for row in run.metrics])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_webdataset_reads_ours_and_we_read_theirs(photos: Path, tmp_path: Path) -> None:
    write_shards(photos, tmp_path / "shards", samples=9)
    theirs = webdataset.WebDataset(str(tmp_path / "shards/000000.tar"), shardshuffle=False).decode("pil")
    found = [(np.asarray(image), label) for image, label in theirs.to_tuple("png", "cls")]
    ours = open_source(photos, labelled=True).train
    assert [label for _, label in found] == ours.labels
    for number, (image, _) in enumerate(found):
        np.testing.assert_array_equal(image, np.asarray(ours.by_number.load(number)))
    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "theirs/part-%02d.tar"), maxcount=4, verbose=0) as sink:
        for number, (image, label) in enumerate(found):
            sink.write({"__key__": f"deep/er/{number:03d}", "png": Image.fromarray(image), "cls": label, "json": {}})
    back = open_source(f"{tmp_path}/theirs/part-{{00..02}}.tar", labelled=True)
    assert back.train.labels == ours.labels
    assert back.classes == ["0", "1"]
    np.testing.assert_array_equal(np.asarray(back.train.by_number.load(8)), found[8][0])


def test_what_is_damaged_costs_its_samples_and_is_told(tmp_path: Path) -> None:
    members = {f"{number}.{ending}": png(number) if ending == "png" else b"1" for number in range(4)
               for ending in ("png", "cls")}  # fmt: skip
    shards = tmp_path / "shards"
    shards.mkdir()
    whole = tar(shards / "0.tar", members)
    cut = whole.read_bytes()
    (shards / "1.tar").write_bytes(cut[: cut.index(b"3.png") + 540])
    (shards / "2.tar").write_bytes(b"no tar " * 200)
    (shards / "3.tar").write_bytes(b"")
    tar(shards / "4.tar", {"x.txt": b"words", "y.jpg": b"no image", "y.cls": b"0", "z.png": png(), "z.cls": b"-3"})
    opened = open_source(shards)
    told = {f"{path.name}": reason for path, reason in opened.train.skipped}
    assert "after 2.png (unexpected end of data)" in told["1.tar"]
    assert "at its beginning" in told["2.tar"]
    assert "at its beginning" in told["3.tar"]
    assert told["4.tar: x"] == "holds no image"
    assert told["4.tar: z.cls"] == "is no whole number from 0 on"
    assert len(opened.train.by_number) == 4 + 3 + 2
    with pytest.raises(UnreadableImageError):
        opened.train.by_number.load(7)
    dataset = build_pretrain_dataset(shards, (8, 8))
    assert torch.stack([dataset[number] for number in range(9)]).isfinite().all()
    assert dataset.replaced == [7]
    labelled = open_source(shards, labelled=True)
    assert labelled.train.labels == [1, 1, 1, 1, 1, 1, 1, 0]
    assert ("4.tar: z.png", "has no label (.cls)") in [(path.name, reason) for path, reason in labelled.train.skipped]
    (shards / "0.tar").write_bytes(cut[:700])
    with pytest.raises(UnreadableImageError, match="cut after it had been indexed"):
        opened.train.by_number.load(3)
    (shards / "0.tar").unlink()
    with pytest.raises(UnreadableImageError, match="its shard cannot be read"):
        opened.train.by_number.load(3)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar_and_only_files(tmp_path: Path, form: int) -> None:
    long = "folder/" + "n" * 90
    path = tar(tmp_path / "a.tar", {f"./{long}.PNG": png(), f"./{long}.cls": b" 2\n", ".hidden.png": png()}, form)
    with tarfile.open(path, "a", format=form) as file:
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.DIRTYPE, "folder.png"),
            (tarfile.CHRTYPE, "dev.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    found = index_of(path)
    assert [name.removeprefix("./") for name in found.names] == [f"{long}.PNG"]
    assert found.labels == (2,)
    assert not found.skipped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "found no usable image in 1 shard"),
        ({"a.png": png(), "a.cls": b"7"}, r"names 2 classes, but there is the label 7"),
        ({"a.png": png(), "a.cls": b"999999999"}, "expected numbers of classes"),
    ],
)
def test_one_line_for_what_cannot_be_used(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    tar(tmp_path / "a.tar", content)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=message) as error:
        open_source(tmp_path / "a.tar", labelled=True)
    assert "\n" not in str(error.value)


def test_ranges() -> None:
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{9..10}-{0..1}.tar") == ["9-0.tar", "9-1.tar", "10-0.tar", "10-1.tar"]
    assert expanded("a.tar") == ["a.tar"]
    for wrong in ("{3..1}.tar", "{0..999}-{0..9999}.tar", "{0..99999999999999999999}.tar"):
        with pytest.raises(DataError, match="counts upwards"):
            expanded(wrong)
    with pytest.raises(DataError, match=r"missing\.tar: No such file"):
        open_source("missing.tar")


def test_a_folder_of_images_beside_its_archive_is_a_folder_of_images(photos: Path, tmp_path: Path) -> None:
    tar(photos / "photos.tar", {"a.png": png()})
    assert len(open_source(photos).train.by_number) == 9
    for path in photos.glob("*/*"):
        path.rename(photos / f"{path.parent.name}{path.name}")
    for folder in ("blue", "red"):
        (photos / folder).rmdir()
    assert len(open_source(photos).train.by_number) == 9


def test_indices_are_kept_and_never_trusted_blindly(photos: Path, tmp_path: Path, cache: Path) -> None:
    _, (shard,) = write_shards(photos, tmp_path / "shards")
    beside = shard.with_name(shard.name + SUFFIX)
    assert index_of(shard).names == read_index(beside.read_text(), shard.stat().st_size).names  # type: ignore[union-attr]
    assert not cache.exists()
    good = beside.read_text()
    for old, new in (("512", "-512"), ("512", str(2**40)), ('"size": ', '"size": 1'), ('"names": [', '"names": ["x",'),
                     ('"labels": [', '"labels": [0,'), (good, ""), (good, "{}"), (good, "[" * 9000)):  # fmt: skip
        wrong = good.replace(old, new)
        assert wrong != good
        beside.write_text(wrong)
        assert len(index_of(shard).names) == 9
    assert len(list(cache.iterdir())) == 1
    (kept,) = cache.iterdir()
    kept.write_text(good.replace("blue", "x").replace("00000000-", "kept-"))
    assert index_of(shard).names[0].startswith("kept-")
    os.utime(shard, (1, 1))  # another shard, for all that is known
    assert not index_of(shard).names[0].startswith("kept-")
    kept.unlink()
    beside.write_text(good)
    os.utime(beside, (0, 0))  # older than its shard
    cache.rename(cache.with_name("other"))
    cache.write_text("no folder")
    assert len(index_of(shard).names) == 9


def test_what_is_there_is_not_written_over(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("x")
    for wrong, message in ((tmp_path / "there", "exists"), (photos / "shards", "lies in"), (photos, "exists")):
        with pytest.raises(OutputError, match=message):
            write_shards(photos, wrong)
    with pytest.raises(DataError, match="made of image files"):
        write_shards("digits", tmp_path / "digits")
    (photos / "blue/000.png").chmod(0)

    def stop(numbers: object) -> Iterator[int]:
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(photos, tmp_path / "new", progress=stop)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*new*"))


def test_deep_images_keep_their_bits_in_shards_and_lists(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for number in range(3):
        np.save(tmp_path / f"deep/{number}.npy", np.roll(values, number))
    write_shards(tmp_path / "deep", tmp_path / "shards", in_chans=1)
    (tmp_path / "list.txt").write_text("deep/0.npy\ndeep/1.npy\ndeep/2.npy\n")
    for data in (tmp_path / "deep", tmp_path / "shards", tmp_path / "list.txt"):
        opened = open_source(data, in_chans=1)
        assert opened.description.endswith("native pixels")
        assert len(np.unique(opened.train.by_number.load(2).values)) == 4096  # type: ignore[union-attr]
    runs = [build_pretrain_dataset(tmp_path / name, (32, 32), 1)[1] for name in ("deep", "shards", "list.txt")]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, which Python's server does not; with ``whole``, files whole, whatever is asked for."""

    whole = False

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not path.is_file() or asked is None or self.whole:
            super().do_GET()
            return
        content = path.read_bytes()
        part = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("whole", [False, True])
def test_shards_behind_an_address(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    write_shards(photos, tmp_path / "shards", samples=5)
    monkeypatch.setattr(Ranges, "whole", whole)
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        spec = f"http://127.0.0.1:{server.server_port}/shards/{{000000..000002}}.tar"
        opened = open_source(spec, labelled=True)
        assert [reason for _, reason in opened.train.skipped] != []  # there is no third
        assert (opened.classes, opened.train.labels) == (["blue", "red"], [0] * 5 + [1] * 4)
        local = open_source(photos).train.by_number
        for number in (0, 4, 8):
            pair = (np.asarray(one.load(number)) for one in (local, opened.train.by_number))
            np.testing.assert_array_equal(*pair)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UnreadableImageError, match="its shard cannot be read"):
        opened.train.by_number.load(0)


def test_any_file_system_of_fsspec(photos: Path, tmp_path: Path) -> None:
    write_shards(photos, tmp_path / "shards")
    memory = fsspec.filesystem("memory")
    memory.pipe("/shards/a.tar", (tmp_path / "shards/000000.tar").read_bytes())
    opened = open_source("memory://shards/a.tar", labelled=True)
    assert (len(opened.train.by_number), opened.classes) == (9, ["0", "1"])
    assert opened.train.by_number.load(0).size == (40, 30)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="what fsspec needs"):
        open_source("nothing://shards/a.tar")
    assert str(RemoteFile("https://me:secret@host/a.tar")) == "https://host/a.tar"


def test_script(script: Callable[..., object], photos: Path, tmp_path: Path) -> None:
    (photos / "blue/broken.png").write_bytes(b"x")
    done = script("make_shards", photos, tmp_path / "out", "--samples", 2, "--shuffle", 1)
    assert done.status == 0  # type: ignore[attr-defined]
    assert "9 images in 5 shard(s)" in done.out  # type: ignore[attr-defined]
    assert "broken.png" in done.err  # type: ignore[attr-defined]
    again = script("make_shards", photos, tmp_path / "out")
    assert (again.status, again.err.count("\n")) == (2, 1)  # type: ignore[attr-defined]
    opened = open_source(tmp_path / "out", labelled=True)
    assert sorted(opened.train.labels or ()) == [0] * 5 + [1] * 4
    assert opened.train.labels != [0] * 5 + [1] * 4


@pytest.mark.parametrize("name", ["val.tar", "labels.parquet"])
def test_an_archive_beside_the_parts_is_not_the_data(image_folder: Folder, tmp_path: Path, name: str) -> None:
    """As the one that they were extracted from."""
    for part, count in (("train", 3), ("val", 2)):
        image_folder({"blue": count, "red": count}, name=f"photos/{part}")
    (tmp_path / "photos" / name).write_bytes(b"not read")
    assert len(open_source(tmp_path / "photos").train.by_number) == 6


def test_that_no_labels_are_written_is_told(photos: Path, tmp_path: Path, script: Callable[..., Any]) -> None:
    (photos / "blue" / "000.png").rename(photos / "stray.png")
    done = script("make_shards", photos, tmp_path / "shards")
    assert done.status == 0, done.err
    assert "without labels: not every image lies in the folder of a class" in done.out


def test_a_name_of_a_class_is_a_line(photos: Path, tmp_path: Path) -> None:
    (photos / "red").rename(photos / "new\nline")
    write_shards(photos, tmp_path / "shards")
    assert len(open_source(tmp_path / "shards", labelled=True).classes) == 2
