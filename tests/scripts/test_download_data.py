"""``scripts/download_data.py`` on archives that the tests make: whole, checked, unpacked into its folder alone."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from convnextv2.commands import download_data


def entry(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


WHOLE = [
    entry("flower_photos/LICENSE.txt", b"by many"),
    entry("flower_photos/roses/1.png", picture()),
    entry("flower_photos/tulips/1.png", picture()),
]
HOSTILE = {
    "a path upwards": [*WHOLE, entry("flower_photos/../../evil", b"x")],
    "an absolute path": [*WHOLE, entry("/evil", b"x")],
    "a link out": [*WHOLE, entry("flower_photos/link", type=tarfile.SYMTYPE, linkname="../../..")],
    "a hard link out": [*WHOLE, entry("flower_photos/hard", type=tarfile.LNKTYPE, linkname="../../evil")],
    "a device": [*WHOLE, entry("flower_photos/disk", type=tarfile.BLKTYPE)],
    "two folders": [*WHOLE, entry("other/1.png", picture())],
    "a file alone": [entry("flower_photos", b"x")],
    "a link alone": [entry("flower_photos", type=tarfile.SYMTYPE, linkname="nowhere")],
    "nothing": [],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in; archives lie beside it."""
    (folder := tmp_path / "place").mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Makes an archive, and lets the script know its checksum; its path."""

    def make(entries, cut: int | None = None) -> Path:
        path = tmp_path / "archive.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for info, content in entries:
                tar.addfile(info, io.BytesIO(content))
        path.write_bytes(path.read_bytes()[:cut])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        known = download_data.ARCHIVES["flower_photos"]._replace(url=path.as_uri(), sha256=digest)
        monkeypatch.setitem(download_data.ARCHIVES, "flower_photos", known)
        return path

    return make


def left(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


def test_it_is_unpacked_and_not_fetched_again(place, archive, script):
    path = archive(WHOLE)
    result = script("download_data", "flower_photos")
    assert (result.status, left(place)) == (0, [info.name for info, _ in WHOLE])
    assert f"{place / 'flower_photos'}: 2 files of 2 classes (roses, tulips)" in result.out
    assert "Creative Commons" in result.out
    assert [item.name for item in place.iterdir()] == ["flower_photos"]
    path.unlink()
    assert "there already, nothing fetched" in script("download_data", "flower_photos").out


def test_another_folder_and_another_place(place, archive, script):
    path = archive(WHOLE)
    moved = path.rename(path.with_name("moved.tgz"))
    assert script("download_data", "flower_photos").status == 2
    result = script("download_data", "flower_photos", "--url", moved.as_uri(), "--output", "in/here")
    assert (result.status, len(left(place / "in/here"))) == (0, 3)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_leads_out_of_the_folder_is_refused(name, place, archive, script):
    archive(HOSTILE[name])
    before = sorted(place.parent.iterdir())
    result = script("download_data", "flower_photos")
    assert (result.status, list(place.iterdir()), sorted(place.parent.iterdir())) == (2, [], before)
    assert result.err.splitlines()[-1].startswith("error: flower_photos.tgz: ")


@pytest.mark.parametrize("wrong", ["changed", "cut", "cut and known", "missing", "no archive"])
def test_what_is_not_the_file_is_one_line(wrong, place, archive, script):
    path = archive(WHOLE, 100 if wrong == "cut and known" else None)
    if wrong in ("changed", "cut"):
        path.write_bytes(path.read_bytes()[:-1] + (b"x" if wrong == "changed" else b""))
    elif wrong == "missing":
        path.unlink()
    elif wrong == "no archive":
        path.write_text("<html>")
    result = script("download_data", "flower_photos")
    assert (result.status, list(place.iterdir())) == (2, [])
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", ["file", "empty folder", "link"])
def test_what_is_in_the_way_stays(kind, place, archive, script):
    archive(WHOLE)
    target = place / "flower_photos"
    {"file": target.touch, "empty folder": target.mkdir, "link": lambda: target.symlink_to("nowhere")}[kind]()
    result = script("download_data", "flower_photos")
    assert result.status == 2
    assert "name another" in result.err
    assert [item.name for item in place.iterdir()] == ["flower_photos"]


def test_the_known_archives_are_stated_whole():
    for known in download_data.ARCHIVES.values():
        assert known.url.startswith("https://")
        assert len(bytes.fromhex(known.sha256)) == 32
