"""Downloads from a server of this machine that cuts connections, tells wrong sizes, and sends what nobody asked for."""

from __future__ import annotations

import hashlib
import http.server
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
import torch

from convnextv2 import EncoderConfig, create_model
from convnextv2.weights import download, transfer, zoo
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint

NAME = "convnextv2_atto_1k_224_fcmae"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the method of that name that the test has chosen, the next one at each request; the last stays."""

    protocol_version = "HTTP/1.1"
    answers: list[Callable[[Handler], None]]
    asked: list[str]
    content: bytes

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.close_connection = True
        (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(self)

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def whole(self) -> None:
        self.head(Content_Length=len(self.content))
        self.wfile.write(self.content)

    def cut(self) -> None:
        self.head(Content_Length=len(self.content))
        self.wfile.write(self.content[: len(self.content) // 2])

    def cut_in_the_last_byte(self) -> None:
        self.head(Content_Length=len(self.content))
        self.wfile.write(self.content[:-1])

    def nothing(self) -> None:
        self.head(Content_Length=len(self.content))

    def silence(self) -> None:
        """Hangs up before a word."""

    def too_short_a_length(self) -> None:
        self.head(Content_Length=len(self.content) - 1000)
        self.wfile.write(self.content)

    def no_length(self) -> None:
        self.head()
        self.wfile.write(self.content)

    def no_length_cut(self) -> None:
        self.head()
        self.wfile.write(self.content[:-1000])

    def chunks(self, last: bytes = b"0\r\n\r\n") -> None:
        self.head(Transfer_Encoding="chunked")
        for start in range(0, len(self.content), 5000):
            piece = self.content[start : start + 5000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(last)

    def chunks_cut(self) -> None:
        self.chunks(last=b"")

    def empty(self) -> None:
        self.head(Content_Length=0)

    def page(self) -> None:
        text = b"<!DOCTYPE html><html><body>Please log in</body></html>"
        self.head(Content_Type="text/html", Content_Length=len(text))
        self.wfile.write(text)

    def garbage(self) -> None:
        text = bytes(range(256)) * 40
        self.head(Content_Length=len(text))
        self.wfile.write(text)

    def missing(self) -> None:
        self.head(404, Content_Length=0)

    def forbidden(self) -> None:
        self.head(403, Content_Length=0)

    def redirect(self) -> None:
        self.head(302, Location="/elsewhere", Content_Length=0)

    def circle(self) -> None:
        self.head(302, Location=self.path, Content_Length=0)

    def stall(self) -> None:
        self.head(Content_Length=len(self.content))
        self.wfile.write(self.content[:1000])
        self.wfile.flush()
        time.sleep(2)


@pytest.fixture
def content(tmp_path) -> bytes:
    model = create_model(EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24)), num_classes=2)
    torch.save({"model": model.state_dict()}, tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


@pytest.fixture
def server(content, monkeypatch) -> Iterator[Callable[..., type[Handler]]]:
    """Starts a server with answers by name, and makes it the mirror."""
    running: list[http.server.ThreadingHTTPServer] = []
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def start(*answers: str) -> type[Handler]:
        functions = [getattr(Handler, answer) for answer in answers]
        handler = type("Handler", (Handler,), {"answers": functions, "asked": [], "content": content})
        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("CONVNEXTV2_MIRROR", f"http://127.0.0.1:{running[-1].server_port}/files")
        return handler

    yield start
    for own in running:
        own.shutdown()
        own.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("answer", ["whole", "no_length", "chunks", "redirect"])
def test_what_is_whole_is_kept_with_its_sha256(server, hub, content, answer):
    handler = server(*(["redirect", "whole"] if answer == "redirect" else [answer]))
    paths = [zoo.fetch(NAME, progress=False) for _ in range(2)]
    assert paths == [hub / f"{NAME}.pt"] * 2
    assert paths[0].read_bytes() == content
    assert entries(hub) == [f"{NAME}.pt", f"{NAME}.pt.sha256"]
    assert (hub / f"{NAME}.pt.sha256").read_text() == f"{hashlib.sha256(content).hexdigest()}  {NAME}.pt\n"
    assert subprocess.run(["sha256sum", "-c", f"{NAME}.pt.sha256"], cwd=hub, capture_output=True).returncode == 0
    asked = [f"/files/pt_only/{NAME}.pt"]
    assert handler.asked == (asked if answer != "redirect" else [*asked, "/elsewhere"])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("cut", r"it ended after [\d,]+ of [\d,]+ bytes|IncompleteRead"),
        ("cut_in_the_last_byte", r"it ended after [\d,]+ of [\d,]+ bytes|IncompleteRead"),
        ("nothing", r"it ended after 0 of [\d,]+ bytes|IncompleteRead"),
        ("silence", "closed connection without response"),
        ("too_short_a_length", "truncated or damaged"),
        ("no_length_cut", "truncated or damaged"),
        ("chunks_cut", "IncompleteRead"),
        ("empty", "the file is empty"),
        ("page", "this is a web page, not a checkpoint"),
        ("garbage", "torch checkpoint"),
        ("missing", "HTTP Error 404: Not Found"),
        ("forbidden", "HTTP Error 403: Forbidden"),
        ("circle", "HTTP Error 302: .*infinite loop"),
        ("stall", "timed out"),
    ],
)
def test_what_is_not_is_a_line_and_leaves_nothing(server, hub, monkeypatch, answer, reason):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    server(answer)
    with pytest.raises(CheckpointError) as caught:
        zoo.fetch(NAME, progress=False)
    address = re.escape(os.environ["CONVNEXTV2_MIRROR"] + f"/pt_only/{NAME}.pt")
    place = re.escape(str(hub / f"{NAME}.pt"))
    text = str(caught.value)
    assert re.fullmatch(rf"cannot download {address} \(.*({reason}).*\); .* fetch the file .*put it at {place}", text)
    assert ".tmp" not in text
    assert entries(hub) == []


def test_a_server_that_is_not_there(hub, monkeypatch):
    for mirror, reason in (
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://name.invalid/", "[Nn]ame|resolution"),
        ("nonsense", "expected http://"),
        ("http://a b/", "URL|control|not known"),
        (f"file://{hub}", "No such file"),
    ):
        monkeypatch.setenv("CONVNEXTV2_MIRROR", mirror)
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(CheckpointError, match=rf"^cannot download {re.escape(mirror)}.*{reason}") as caught:
            zoo.fetch(NAME, progress=False)
        assert "\n" not in str(caught.value)
        assert entries(hub) == []


def test_a_mirror_may_be_a_folder(hub, content, tmp_path, monkeypatch):
    (tmp_path / "mirror" / "pt_only").mkdir(parents=True)
    (tmp_path / "mirror" / "pt_only" / f"{NAME}.pt").write_bytes(content)
    monkeypatch.setenv("CONVNEXTV2_MIRROR", (tmp_path / "mirror").as_uri())
    assert zoo.fetch(NAME, progress=False).read_bytes() == content


def test_a_proxy_of_the_environment_is_asked(server, hub, monkeypatch):
    handler = server("whole")
    monkeypatch.setenv("http_proxy", os.environ["CONVNEXTV2_MIRROR"].removesuffix("/files"))
    monkeypatch.setenv("CONVNEXTV2_MIRROR", "http://weights.invalid/")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert zoo.fetch(NAME, progress=False).is_file()
    assert handler.asked == [f"http://weights.invalid/pt_only/{NAME}.pt"]


def one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: b"<html>", lambda content: content[:200]],
)
def test_a_damaged_file_in_the_cache_is_told_and_fetched_anew(server, hub, content, caplog, recorded, damage):
    handler = server("whole")
    path = zoo.fetch(NAME, progress=False)
    path.write_bytes(damage(content))
    if not recorded:
        (hub / f"{NAME}.pt.sha256").unlink()
    caplog.clear()
    assert zoo.fetch(NAME, progress=False).read_bytes() == content
    assert len(handler.asked) == 2
    assert re.match(rf"{path}: .*; fetched anew$", caplog.messages[1])
    assert entries(hub) == [f"{NAME}.pt", f"{NAME}.pt.sha256"]
    zoo.fetch(NAME, progress=False)
    assert len(handler.asked) == 2


@pytest.mark.parametrize("record", ["", "no digest\n", "\0\xff"])
def test_a_single_bit_and_a_record_that_is_none(server, hub, content, record):
    handler = server("whole")
    path = zoo.fetch(NAME, progress=False)
    path.write_bytes(one_bit(content))
    assert load_checkpoint(path)  # torch sees nothing
    assert zoo.fetch(NAME, progress=False).read_bytes() == content
    (hub / f"{NAME}.pt.sha256").write_bytes(record.encode("latin-1"))
    assert zoo.fetch(NAME, progress=False).read_bytes() == content
    assert len(handler.asked) == 3


def test_a_damaged_file_stays_where_nothing_better_comes(server, hub, content):
    server("whole", "cut")
    path = zoo.fetch(NAME, progress=False)
    path.write_bytes(content[:-1])
    for _ in range(2):  # and is not believed the second time
        with pytest.raises(CheckpointError, match="cannot download"):
            zoo.fetch(NAME, progress=False)
    assert entries(hub) == [f"{NAME}.pt", f"{NAME}.pt.sha256"]
    path.write_bytes(content)  # by hand, as the line says
    assert zoo.fetch(NAME, progress=False) == path


def test_a_file_put_there_by_hand_is_taken(server, hub, content, monkeypatch):
    handler = server("missing")
    hub.mkdir(parents=True)
    (hub / f"{NAME}.pt").write_bytes(content)
    assert zoo.fetch(NAME, progress=False).read_bytes() == content
    assert entries(hub) == [f"{NAME}.pt", f"{NAME}.pt.sha256"]
    (hub / f"{NAME}.pt.sha256").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert zoo.fetch(NAME, progress=False).read_bytes() == content
    assert entries(hub) == [f"{NAME}.pt"]
    assert handler.asked == []


def test_what_an_interrupted_download_left_is_not_believed(server, hub, content):
    handler = server("whole")
    hub.mkdir(parents=True)
    (hub / f".{NAME}.0badf00d.tmp.pt").write_bytes(content[:1000])
    assert zoo.fetch(NAME, progress=False).read_bytes() == content
    assert len(handler.asked) == 1


def test_an_interruption_leaves_nothing(server, hub, monkeypatch):
    server("whole")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "check_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zoo.fetch(NAME, progress=False)
    assert entries(hub) == []


def test_a_full_disk_is_a_line(server, hub, monkeypatch):
    server("whole")
    monkeypatch.setattr(transfer.Partial, "add", lambda self, chunk: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match=r"cannot download .*\(\[Errno 28\] full\)"):
        zoo.fetch(NAME, progress=False)


def test_a_cache_that_cannot_be_written(server, hub):
    server("whole")
    hub.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="hub"):
        zoo.fetch(NAME, progress=False)


def test_several_at_once(server, hub, content, tmp_path):
    handler = server("whole")
    program = tmp_path / "program.py"
    program.write_text(
        "from convnextv2.weights import zoo\n"
        f"print(zoo.fetch({NAME!r}, progress=False)); zoo.fetch({NAME!r}, progress=False)"
    )
    processes = [forked.Forked(program, env={"TORCH_HOME": str(tmp_path)}) for _ in range(3)]
    done = [process.finish() for process in processes]
    assert [(process.stdout.strip(), process.returncode) for process in done] == [(str(hub / f"{NAME}.pt"), 0)] * 3
    assert entries(hub) == [f"{NAME}.pt", f"{NAME}.pt.sha256"]
    assert (hub / f"{NAME}.pt").read_bytes() == content
    assert len(handler.asked) == 1


def test_threads_at_once_while_the_cached_file_is_damaged(server, hub, content):
    server("whole")
    zoo.fetch(NAME, progress=False).write_bytes(content[:-1])
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(zoo.fetch(NAME, progress=False).read_bytes())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content] * 8


def test_the_licence_is_named_at_each_use(server, hub, caplog):
    server("whole")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            zoo.fetch(NAME, progress=False)
    assert caplog.messages == [f"{NAME}: the published weights are under CC-BY-NC 4.0, not for commercial use"] * 2
