"""Weights of the Hugging Face hub by name, through its library: from a server that speaks as the hub does, its cache,
and folders in its layout."""

from __future__ import annotations

import http.server
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants, hf_api
from serving import serving

from convnextv2 import EncoderConfig, create_model
from convnextv2.weights import load_checkpoint, read_checkpoint, save_checkpoint
from convnextv2.weights.checkpoint import CheckpointError

SIZE = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks the hub: what a revision holds, and a file of it."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    failure: tuple[int, dict[str, str]] | None
    asked: list[str]

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.failure is not None:
            return self.answer(self.failure[0], b"", **self.failure[1])
        if self.path.startswith("/api/models/org/name"):
            about = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        found = self.files.get(self.path.partition("/resolve/")[2].partition("/")[2])
        if found is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        about = {"X_Repo_Commit": COMMIT, "ETag": f'"{len(found)}"', "Accept_Ranges": "bytes"}
        return self.answer(200, found, **about)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Hub", (Hub,), {"files": {}, "failure": None, "asked": []})
    with serving(handler) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        yield handler


def of_timm() -> Any:
    return timm.create_model("convnextv2_atto", num_classes=3, **SIZE).eval()


def timm_file(folder: Path) -> bytes:
    """What timm puts on the hub."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in of_timm().state_dict().items()}, folder / "model.safetensors"
    )
    return (folder / "model.safetensors").read_bytes()


def test_a_name_of_the_hub(hub: type[Hub], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {
        "README.md": b"",
        "config.json": b"{}",
        "model.safetensors": timm_file(tmp_path),
        "pytorch_model.bin": b"",
    }
    checkpoint = load_checkpoint("hf-hub:org/name")
    assert read_checkpoint(checkpoint).config == EncoderConfig(**SIZE)
    assert checkpoint.path == cache / "models--org--name" / "snapshots" / COMMIT / "model.safetensors"
    assert not [line for line in hub.asked if "pytorch_model" in line]
    model = create_model(EncoderConfig(**SIZE), pretrained="hf-hub:org/name@main")
    assert model.head.weight.shape == (3, 32)
    # Then the hub is gone, and after that not even asked.
    hub.failure = (503, {})
    assert load_checkpoint("hf-hub:org/name").path == checkpoint.path
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(f"hf-hub:org/name@{COMMIT}").path == checkpoint.path
    assert hub.asked == []


def test_a_run_of_ours_on_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    config = EncoderConfig(**SIZE)
    model = create_model(config, num_classes=2)
    save_checkpoint(tmp_path / "best.safetensors", model, model.config, {"img_size": [96, 96]})
    hub.files = {"checkpoints/best.safetensors": (tmp_path / "best.safetensors").read_bytes(), "model.safetensors": b""}
    assert load_checkpoint("hf-hub:org/name").config == model.config


@pytest.mark.parametrize(
    ("status", "headers", "told"),
    [
        (401, {"X_Error_Code": "RepoNotFound"}, "there is no such repository, or it is private; set HF_TOKEN"),
        (403, {"X_Error_Code": "GatedRepo"}, "is given to those who asked for it; set HF_TOKEN"),
        (404, {"X_Error_Code": "RevisionNotFound"}, "the repository has no revision 'v9'"),
        (500, {}, "is not in the hub's cache, and the hub cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub: type[Hub], status: int, headers: dict[str, str], told: str) -> None:
    hub.failure = status, headers
    with pytest.raises(CheckpointError, match=rf"^hf-hub:org/name@v9: {told}") as caught:
        load_checkpoint("hf-hub:org/name@v9")
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights(hub: type[Hub]) -> None:
    hub.files = {"README.md": b"", "tf_model.h5": b""}
    with pytest.raises(CheckpointError, match=r"has no weights that are read here; looked for .*model\.safetensors"):
        load_checkpoint("hf-hub:org/name")


def test_nothing_that_could_run_is_run(hub: type[Hub], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil()}, tmp_path / "evil.bin")
    hub.files = {"pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()}
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint("hf-hub:org/name")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:../../etc", "hf-hub:a/b@", "hf-hub:a b/c"]
)
def test_names_that_are_none(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{name}: "):
        load_checkpoint(name)
    assert not cache.exists()


def test_offline_with_nothing_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"is not in the hub's cache.*offline mode"):
        load_checkpoint("hf-hub:org/name")


def test_a_cache_that_another_program_filled(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    timm_file(snapshot)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint("hf-hub:org/name").path == snapshot / "model.safetensors"
    assert load_checkpoint(snapshot).path == snapshot / "model.safetensors"  # and as a folder


def test_a_folder_of_save_pretrained(tmp_path: Path) -> None:
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], num_labels=4)
    ConvNextV2ForImageClassification(config).save_pretrained(tmp_path / "saved")
    model = create_model(EncoderConfig(**SIZE), pretrained=tmp_path / "saved")
    assert model.head.weight.shape == (4, 32)
    assert huggingface_hub.__version__
