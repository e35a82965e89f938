"""Downloads that go on where they stopped, from servers that do all they can to make that go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import folder_server, serving

from convnextv2.weights import transfer, zoo
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.download import cached

NAME = "convnextv2_atto_1k_224_fcmae"
KEPT = [f"{NAME}.pt.partial", f"{NAME}.pt.partial.json"]
WHOLE = [f"{NAME}.pt", f"{NAME}.pt.sha256"]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ranges of ``content`` with ``tag`` as its version, and does what the next of ``deeds`` says."""

    protocol_version = "HTTP/1.1"
    content: bytes
    tag: str | None
    deeds: list[str]
    seen: list[tuple[str | None, str | None]]

    def do_GET(self) -> None:
        self.close_connection = True
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        self.seen.append((asked, condition))
        deed = self.deeds.pop(0) if self.deeds else ""
        if deed.isdigit():
            self.send_response(int(deed))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, size = 0, len(self.content)
        if asked and condition == self.tag and deed != "no ranges":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.content[start:]
        if deed == "a little":
            body = body[: len(body) // 3]
        shift = 1 if deed == "another range" else 0
        self.send_response(206 if start else 200)
        if start:
            last = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start + shift}-{last + shift}/{size + (deed == 'grown')}")
        if deed in ("chunks", "chunks cut"):
            self.send_header("Transfer-Encoding", "chunked")
        elif deed != "no length":
            self.send_header("Content-Length", str(size - start if deed != "a little" else len(body)))
        if self.tag:
            self.send_header("ETag", '"other"' if deed == "another tag" else self.tag)
        self.end_headers()
        if deed in ("cut", "chunks cut"):
            body = body[: len(body) // 2]
        if deed.startswith("chunks"):
            body = b"%x\r\n%s\r\n" % (len(body), body) + (b"" if deed.endswith("cut") else b"0\r\n\r\n")
        if deed == "hang":
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if deed == "hang":
            time.sleep(1.5)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "whole.pt"
    torch.save({"model": {"x": torch.arange(20_000.0)}}, path)
    return path.read_bytes()


@pytest.fixture
def start(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., type[Server]]]:
    """Starts a server that does some deeds, and makes it the mirror."""
    monkeypatch.setattr(transfer, "PAUSES", (0.0, 0.0))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with contextlib.ExitStack() as servers:

        def begin(*deeds: str, tag: str | None = '"one"', content: bytes = content) -> type[Server]:
            about: dict[str, Any] = {"content": content, "tag": tag, "deeds": [*deeds], "seen": []}
            handler = type("Server", (Server,), about)
            monkeypatch.setenv("CONVNEXTV2_MIRROR", servers.enter_context(serving(handler)))
            return handler

        yield begin


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def fetch() -> Path:
    return zoo.fetch(NAME, progress=False)


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def half_way(start: Any, hub: Path, content: bytes) -> tuple[type[Server], int]:
    """A server, and how many bytes of its file are here."""
    server = start("cut", "500", "500", "500")
    with pytest.raises(
        CheckpointError, match=r"HTTP Error 500.*; the [\d,]+ bytes that came are kept for the next try"
    ):
        fetch()
    assert entries(hub) == KEPT
    size = (hub / KEPT[0]).stat().st_size
    assert (hub / KEPT[0]).read_bytes() == content[:size]
    assert size == len(content) // 2
    server.seen.clear()
    server.deeds.clear()
    return server, size


def offsets(server: type[Server]) -> list[int]:
    return [0 if asked is None else int(asked.removeprefix("bytes=").removesuffix("-")) for asked, _ in server.seen]


@pytest.mark.parametrize("deed", ["cut", "hang", "chunks cut"])
def test_a_connection_that_is_cut_is_taken_up_again(start, hub, content, monkeypatch, deed):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    server = start(deed, "cut", "503", "cut", "a little")
    assert fetch().read_bytes() == content
    half = len(content) // 2
    found = offsets(server)
    assert found[:3] == [0, half, half + (len(content) - half) // 2]
    assert found[3] == found[2]  # what failed brought nothing
    assert found == sorted(found) and len(found) == 6
    assert {condition for asked, condition in server.seen if asked} == {'"one"'}
    assert entries(hub) == WHOLE


def test_the_next_try_goes_on(start, hub, content):
    server, size = half_way(start, hub, content)
    assert fetch().read_bytes() == content
    assert server.seen == [(f"bytes={size}-", '"one"')]
    assert entries(hub) == WHOLE


def test_offline_what_came_is_kept(start, hub, content, monkeypatch):
    server, size = half_way(start, hub, content)
    mirror = os.environ["CONVNEXTV2_MIRROR"]
    monkeypatch.setenv("CONVNEXTV2_MIRROR", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match="Connection refused"):
        fetch()
    # Of another address, of which nothing had come, though it be the same file.
    monkeypatch.setenv("CONVNEXTV2_MIRROR", mirror)
    assert fetch().read_bytes() == content
    assert offsets(server) == [size]


@pytest.mark.parametrize("deed", ["no ranges", "another range", "another tag", "grown", "no length", "chunks"])
def test_a_server_that_does_not_go_on_sends_all_of_it(start, hub, content, deed):
    server, size = half_way(start, hub, content)
    server.deeds.append(deed)
    assert fetch().read_bytes() == content
    whole = {"no ranges": [size], "no length": [size], "chunks": [size]}.get(deed, [size, 0])
    assert offsets(server) == whole
    assert entries(hub) == WHOLE


def test_another_version_is_not_mixed_with_the_old(start, hub, content, tmp_path):
    server, size = half_way(start, hub, content)
    torch.save({"model": {"x": torch.arange(20_000.0) + 1}}, tmp_path / "new.pt")
    server.content, server.tag = (tmp_path / "new.pt").read_bytes(), '"two"'
    assert fetch().read_bytes() == server.content
    assert server.seen == [(f"bytes={size}-", '"one"')]


def test_a_file_that_has_become_shorter(start, hub, content, tmp_path):
    server, size = half_way(start, hub, content)
    torch.save({"model": {"x": torch.arange(9.0)}}, tmp_path / "new.pt")
    server.content = (tmp_path / "new.pt").read_bytes()
    assert len(server.content) < size
    assert fetch().read_bytes() == server.content
    assert offsets(server) == [size, 0]


def test_a_server_that_never_goes_on_is_given_up(start, hub, content):
    server, _ = half_way(start, hub, content)
    server.deeds += ["another tag", "cut", "another tag"]
    with pytest.raises(CheckpointError, match="parts of different files"):
        fetch()
    assert fetch().read_bytes() == content


@pytest.mark.parametrize("tag", [None, 'W/"weak"', "no quotes"])
def test_bytes_of_no_known_version_are_not_kept(start, hub, content, tag):
    server = start("cut", tag=tag)
    with pytest.raises(CheckpointError, match=r"ended after [\d,]+ of [\d,]+ bytes|IncompleteRead") as caught:
        fetch()
    assert "kept" not in str(caught.value)
    assert entries(hub) == []
    assert fetch().read_bytes() == content
    assert offsets(server) == [0, 0]


def test_a_process_that_was_killed_behind_the_last_byte(start, hub, content):
    server, _ = half_way(start, hub, content)
    (hub / KEPT[0]).write_bytes(content)
    assert fetch().read_bytes() == content
    assert server.seen == []


@pytest.mark.parametrize(
    "about",
    [
        "", "[]", "null", '{"validator": 3}', '{"validator": "\\r\\nX: y"}', '{"validator": "é"}', "\0", "[" * 10**5,
        '{"address": "1", "validator": "\\"one\\"", "size": 9}',
    ],
)  # fmt: skip
def test_what_is_known_of_the_bytes_may_be_anything(start, hub, content, about):
    server, _ = half_way(start, hub, content)
    (hub / KEPT[1]).write_text(about)
    assert fetch().read_bytes() == content
    assert server.seen == [(None, None)]
    assert entries(hub) == WHOLE


def test_bytes_that_were_changed_meanwhile_are_found(start, hub, content):
    _, size = half_way(start, hub, content)
    (hub / KEPT[0]).write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match="is not a torch checkpoint"):
        fetch()
    assert entries(hub) == []
    assert fetch().read_bytes() == content


def test_a_page_in_the_place_of_the_file_is_not_gone_on_from(start, hub, content):
    start("", content=b"<!DOCTYPE html><p>log in</p>")
    with pytest.raises(CheckpointError, match="is a web page"):
        fetch()
    assert entries(hub) == []


def test_another_file_than_at_first_is_refused(start, hub, content, tmp_path, caplog):
    server = start()
    path = fetch()
    torch.save({"model": {"x": torch.zeros(3)}}, tmp_path / "new.pt")
    server.content = (tmp_path / "new.pt").read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"not the file any more whose sha256 is in {path}\.sha256; delete that"):
        fetch()
    assert entries(hub) == WHOLE
    path.with_name(f"{path.name}.sha256").unlink()
    assert fetch().read_bytes() == server.content


@pytest.mark.parametrize("place", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"])
def test_no_redirect_leads_to_another_kind_of_place(hub, place, monkeypatch):
    class Leading(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", place)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Leading) as address:
        monkeypatch.setenv("CONVNEXTV2_MIRROR", address)
        with pytest.raises(CheckpointError, match=r"not allowed|is not followed|HTTP Error 404"):
            fetch()
    assert entries(hub) == []


def test_from_a_secure_server_none_leads_to_an_open_one():
    request = transfer.request_of("https://example.org/x")
    with pytest.raises(ConnectionError, match=r"from https:// to http://example\.org/y\?…, which is not followed"):
        transfer._Redirects().redirect_request(request, None, 302, "", None, "http://a:b@example.org/y?key=1")
    followed = transfer._Redirects().redirect_request(request, None, 302, "", None, "https://example.org/y")
    assert followed.full_url == "https://example.org/y"


def test_user_and_password_are_sent_once_and_never_shown(start, hub, content, monkeypatch, tmp_path, caplog):
    seen: list[tuple[str, str | None]] = []

    class Asking(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(302)
            self.send_header("Location", f"{other}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = start("404")
    other = os.environ["CONVNEXTV2_MIRROR"]
    headers: list[str | None] = []
    monkeypatch.setattr(server, "send_response", lambda self, code: (
        headers.append(self.headers["Authorization"]), http.server.BaseHTTPRequestHandler.send_response(self, code)
    ))  # fmt: skip
    with serving(Asking) as address:
        url = address.replace("//", "//anna:p%40ss@") + "/x.pt?key=hidden"
        with pytest.raises(CheckpointError, match="HTTP Error 404") as caught:
            cached(url, tmp_path / "x.pt", progress=False)
        assert address + "/x.pt?…" in str(caught.value)
        assert not re.search("anna|p%40ss|p@ss|hidden", str(caught.value) + caplog.text)
        assert cached(url, tmp_path / "x.pt", progress=False).read_bytes() == content
    assert seen == [("/x.pt?key=hidden", "Basic YW5uYTpwQHNz")] * 2
    assert headers == [None, None]
    assert "hidden" not in "".join(path.read_text(errors="replace") for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize(("free", "told"), [(10, "there is room for 10"), (10**9, None)])
def test_a_file_that_has_no_room_is_not_begun(start, hub, content, monkeypatch, free, told):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    start()
    if told is None:
        assert fetch().read_bytes() == content
        return
    with pytest.raises(CheckpointError, match=told):
        fetch()
    assert entries(hub) == []


@pytest.mark.parametrize("deed", ["", "no length", "chunks"])
def test_a_file_without_an_end_is_cut_off(start, hub, content, monkeypatch, deed):
    monkeypatch.setattr(transfer, "MOST_BYTES", 5000)
    start(*[deed] * 9)
    with pytest.raises(CheckpointError, match=r"announces [\d,]+ bytes, more than|without an end"):
        fetch()
    assert entries(hub) == []


def interrupting(add: Callable[[transfer.Partial, bytes], None]) -> Callable[[transfer.Partial, bytes], None]:
    def interrupted(partial: transfer.Partial, chunk: bytes) -> None:
        add(partial, chunk[:1000])
        raise KeyboardInterrupt

    return interrupted


def test_an_interruption_keeps_what_came(start, hub, content, monkeypatch):
    server = start()
    with monkeypatch.context() as patch:
        patch.setattr(transfer.Partial, "add", interrupting(transfer.Partial.add))
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert entries(hub) == KEPT
    assert "one" in json.loads((hub / KEPT[1]).read_text())["validator"]
    assert fetch().read_bytes() == content
    assert offsets(server) == [0, 1000]


def test_the_standard_librarys_server_sends_all_of_it_again(hub, content, tmp_path, monkeypatch):
    """It has a date for a version, and no ranges."""
    (tmp_path / "files" / "pt_only").mkdir(parents=True)
    (tmp_path / "files" / "pt_only" / f"{NAME}.pt").write_bytes(content)
    with folder_server(tmp_path / "files") as address:
        monkeypatch.setenv("CONVNEXTV2_MIRROR", address)
        with monkeypatch.context() as patch:
            patch.setattr(transfer.Partial, "add", interrupting(transfer.Partial.add))
            with pytest.raises(KeyboardInterrupt):
                fetch()
        assert entries(hub) == KEPT
        assert fetch().read_bytes() == content
    assert hashlib.sha256(content).hexdigest() in (hub / WHOLE[1]).read_text()


def test_without_a_terminal_a_line_tells_of_a_download(start, hub, content, caplog):
    start()
    zoo.fetch(NAME)
    zoo.fetch(NAME)
    assert len([line for line in caplog.messages if re.fullmatch(r"downloading http\S+\.pt, 0 MiB", line)]) == 1


def test_where_files_have_no_locks_every_process_has_its_own(start, hub, content, monkeypatch):
    monkeypatch.setattr(transfer, "fcntl", None)
    server = start("cut", "500", "500", "500")
    with pytest.raises(CheckpointError, match="HTTP Error 500"):
        fetch()
    assert entries(hub) == [f"{NAME}.pt.partial{os.getpid()}{suffix}" for suffix in ("", ".json")]
    server.deeds.clear()
    assert fetch().read_bytes() == content
    assert offsets(server)[-1] == len(content) // 2
    server.content = b"<html>"
    (hub / WHOLE[0]).unlink()
    with pytest.raises(CheckpointError, match="web page"):
        fetch()
    assert entries(hub) == WHOLE[1:]


def test_a_file_system_without_locks_is_no_obstacle(start, hub, content, monkeypatch):
    def none(file: Any, how: int) -> None:
        raise OSError(transfer.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(transfer.fcntl, "flock", none)
    start()
    assert fetch().read_bytes() == content


def test_who_waited_for_a_failed_download_has_a_file_of_its_own(tmp_path):
    found = []

    def wait() -> None:
        with transfer.Partial.held(tmp_path / "x.pt") as partial:
            found.append((partial.in_place(), partial.size))

    with transfer.Partial.held(tmp_path / "x.pt") as first:
        first.add(b"abc")
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        assert not found
        first.remove()
    thread.join(10)
    assert found == [(True, 0)]
    assert entries(tmp_path) == []


def test_who_has_finished_takes_nothing_from_the_next(tmp_path):
    with contextlib.ExitStack() as held:
        with transfer.Partial.held(tmp_path / "x.pt") as first:
            first.add(b"abc")
            first.become(tmp_path / "x.pt")
            second = held.enter_context(transfer.Partial.held(tmp_path / "x.pt"))
            second.add(b"d")
        assert second.in_place()
        assert second.path.read_bytes() == b"d"
    assert entries(tmp_path) == ["x.pt"]
