"""``scripts/download_weights.py``: the list, several names, mirrors, folders, exit statuses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import folder_server

from convnextv2.weights import addresses, names, zoo
from convnextv2.weights.checkpoint import CheckpointError

ATTO, NANO = "convnextv2_atto_1k_224_ema", "convnextv2_nano_22k_384_ema"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("CONVNEXTV2_MIRROR", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in (ATTO, NANO):
        path = tmp_path / "files" / zoo.get(name).path
        path.parent.mkdir(parents=True)
        torch.save({"model": {"x": torch.arange(400_000.0)}}, path)
    return tmp_path / "files"


@pytest.fixture
def mirror(files: Path, hub: Path) -> Iterator[str]:
    with folder_server(files) as address:
        yield address


def test_the_list_is_the_table(script: Any, hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / f"{ATTO}.pt").write_bytes(bytes(3 * 2**20))
    (hub / f"{NANO}.pt.partial").write_bytes(bytes(2**20))
    result = script("download_weights", "--list")
    assert result.status == 0
    header, *lines = result.out.splitlines()
    rows = [re.split(r"\s{2,}", line) for line in lines[:26]]
    assert re.split(r"\s{2,}", header) == ["name", "what", "pixels", "parameters", "FLOPs", "top-1", "cached"]
    assert [row[0] for row in rows] == list(zoo.PUBLISHED)
    by_name = {row[0]: row[2:] for row in rows}
    assert by_name[ATTO] == ["224", "3.7 M", "0.55 G", "76.7 %", "3 MiB"]
    assert by_name[NANO] == ["384", "15.6 M", "7.21 G", "83.4 %", "1 MiB of it"]
    assert by_name["convnextv2_huge_22k_512_ema"] == ["512", "660 M", "600.8 G", "88.9 %", "–"]
    assert by_name["convnextv2_base_1k_224_fcmae"] == ["224", "89 M", "–", "–", "–"]
    assert "CC-BY-NC 4.0, not for commercial use" in lines[-1] and lines[-1].endswith(str(hub))


def test_several_names_from_a_mirror_into_a_folder(script: Any, mirror: str, hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    arguments = [ATTO, NANO, ATTO, "--mirror", mirror, "--output", folder]
    result = script("download_weights", *arguments)
    assert result.status == 0, result.err
    assert result.out.splitlines() == [f"{name}: {folder / name}.pt" for name in (ATTO, NANO)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.pt{suffix}" for name in (ATTO, NANO) for suffix in ("", ".sha256")
    )
    assert not hub.exists()
    again = script("download_weights", *arguments[:-4], "--output", folder)  # without a server
    assert (again.status, again.out) == (0, result.out)


def test_the_others_are_fetched_where_one_fails(script: Any, mirror: str, hub: Path) -> None:
    result = script("download_weights", "convnextv2_tiny_1k_224_ema", ATTO, "--mirror", mirror)
    assert result.status == 2
    assert result.out == f"{ATTO}: {hub / ATTO}.pt\n"
    (line,) = result.err.splitlines()
    assert line.startswith(f"error: cannot download {mirror}/im1k/convnextv2_tiny_1k_224_ema.pt (HTTP Error 404")


def test_a_mirror_may_be_a_folder_and_an_address_a_name(script: Any, mirror: str, files: Path, hub: Path) -> None:
    assert script("download_weights", ATTO, "--mirror", files.as_uri()).out == f"{ATTO}: {hub / ATTO}.pt\n"
    url = f"{mirror}/im22k/{NANO}.pt?key=hidden"
    result = script("download_weights", url)
    path = names.place_of_address(url)
    assert (result.status, result.out) == (0, f"{mirror}/im22k/{NANO}.pt?…: {path}\n")
    assert path.is_file() and path.parent.parent == hub
    assert names.resolve_path(url) == path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name what to download, or say --list"),
        ([ATTO, "--list"], "name what to download, or say --list"),
        ([ATTO, "convnextv2_atto_1k_224_emma"], f"did you mean {ATTO}"),
        (["nonsense"], "no published checkpoint 'nonsense'; choose one of"),
        (["../../etc/passwd"], "no published checkpoint"),
        (["ftp://host/x"], "no published checkpoint"),
        ([ATTO, "--mirror", "host/x"], "expected http://"),
        (["hf-hub:org/name", "--output", "x"], "leave out --output"),
    ],
)
def test_what_is_wrong_is_told_at_once(script: Any, hub: Path, arguments: list[str], told: str) -> None:
    result = script("download_weights", *arguments)
    assert result.status == 2
    assert told in result.err.splitlines()[-1]
    assert not hub.exists()


def test_a_folder_that_cannot_be_written(script: Any, files: Path, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = script("download_weights", ATTO, "--mirror", files.as_uri(), "--output", tmp_path / "file" / "x")
    assert result.status == 2
    assert result.err == f"error: {tmp_path / 'file' / 'x'}: Not a directory\n"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://h/a/b.pt", "b.pt"),
        ("https://h/a/b%2F..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("https://h/a/..", "checkpoint"),
        ("https://h/a/.hidden.pt", "hidden.pt"),
        ("https://h/", "checkpoint"),
        ("https://h", "checkpoint"),
        ("https://h/a%5C..%5Cb c\0é.pt?x=/y", "b_c__.pt"),
        (f"https://h/{'x' * 300}.pt", "x" * 97 + ".pt"),
    ],
)
def test_no_address_names_a_file_elsewhere(address: str, name: str) -> None:
    assert addresses.file_name(address) == name


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://a:b@h/x.pt?k=1#f", "https://h/x.pt?…"),
        ("https://a:b@c@h/x.pt", "https://h/x.pt"),
        ("https:/a:b@h/x.pt", "https:/h/x.pt"),
        ("https://h/a@b.pt", "https://h/a@b.pt"),
        ("runs/a?b@c", "runs/a?b@c"),
        ("hf-hub:a/b@v1", "hf-hub:a/b@v1"),
    ],
)
def test_what_is_shown_of_an_address(address: str, shown: str) -> None:
    assert addresses.shown(address) == shown


def test_the_same_name_at_other_places_is_another_file(hub: Path) -> None:
    places = {
        names.place_of_address(url) for url in ("http://a/x.pt", "http://b/x.pt", "http://a/x.pt?v=2", "https://a/x.pt")
    }
    assert len(places) == 4
    assert names.place_of_address("http://u:p@a/x.pt") == names.place_of_address("http://a/x.pt")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("http://", "expected http://, https:// or file://"),
        ("http://[::1/x.pt", "^http://\\[::1/x.pt: Invalid IPv6 URL$"),
        ("http://127.0.0.1:x/x.pt", "nonnumeric port"),
        ("http://127.0.0.1:1/a\r\nX: y", "Connection refused"),
        ("http:/127.0.0.1:1/x", "^cannot download http://127.0.0.1:1/x "),
        ("file:///nowhere/x.pt", "^/nowhere/x.pt: no such file or folder$"),
        ("file://host/x.pt", "^file://host/x.pt: is a file of host; write file:///path"),
        ("s3://bucket/x.pt", "weights come by http:// and https://, not by s3:$"),
        ("hf:org/name", "; write hf-hub:org/name$"),
        ("fifo", "^fifo: no such file or folder$"),
        ("link", "^link: no such file or folder$"),
        (f"{ATTO}.pt", f"; the published checkpoint is named {ATTO}$"),
        (f" {ATTO}", f"did you mean {ATTO}"),
        ("weights/convnextv2_atto_1k_224_em.pt", "^weights/convnextv2_atto_1k_224_em.pt: no such file or folder$"),
    ],
)
def test_what_stands_for_nothing(hub: Path, tmp_path: Path, monkeypatch: Any, given: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=told) as caught:
        names.resolve_path(given)
    assert "\n" not in str(caught.value)
    assert not hub.exists() or not list(hub.iterdir())
