from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from convnextv2 import EncoderConfig, create_fcmae, create_model
from convnextv2.files import append_jsonl, atomic_path, write_json
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from convnextv2.weights.loading import load_model

ENCODER = EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24))


def tiny_fcmae():
    torch.manual_seed(0)
    return create_fcmae(ENCODER, img_size=(64, 96), decoder_dim=16, mask_ratio=0.5)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_replaces_only_on_success(tmp_path):
    target = tmp_path / "new folder" / "a.png"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        temporary.write_text("first")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "first"
    assert leftovers(target.parent) == ["a.png"]


def test_json_is_readable_by_strict_parsers(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "values": [1.5, -math.inf], "name": "Gänseblümchen"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Gänseblümchen" in text
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None,
        "values": [1.5, None],
        "name": "Gänseblümchen",
    }


def test_jsonl_closes_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"epoch": 0})
    with path.open("a") as file:
        file.write('{"epoch": 1, "lo')
    append_jsonl(path, {"epoch": 2})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in (lines[0], lines[2])] == [{"epoch": 0}, {"epoch": 2}]
    assert len(lines) == 3


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A full disk, as far as writing files of more than ``limit`` bytes goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path, suffix):
    path = tmp_path / f"last{suffix}"
    save_checkpoint(path, {"weight": torch.ones(3)}, None)
    with file_size_limit(100_000), pytest.raises(OSError):
        save_checkpoint(path, {"weight": torch.zeros(100_000)}, None)
    assert leftovers(tmp_path) == [path.name]
    assert torch.equal(load_checkpoint(path).state_dict["weight"], torch.ones(3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_round_trip_of_a_masked_autoencoder(tmp_path, suffix):
    model = tiny_fcmae()
    metadata = {"mean": [0.4, 0.5, 0.6], "epoch": 3, "data": "Blüten"}
    save_checkpoint(tmp_path / f"a{suffix}", model, model.config, metadata)
    checkpoint = load_checkpoint(tmp_path / f"a{suffix}")
    assert checkpoint.config == model.config
    assert checkpoint.metadata == metadata
    loaded = load_model(tmp_path / f"a{suffix}", backend="reference")
    assert loaded.config == model.config
    assert loaded.backend == "reference"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_round_trip_of_a_classifier(tmp_path):
    model = create_model(ENCODER, num_classes=5).eval()
    save_checkpoint(tmp_path / "a.safetensors", model, model.config)
    images = torch.randn(2, 3, 64, 64)
    loaded = load_model(tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(images), model(images))


def test_views_and_shared_storage_are_saved_by_value(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"column": whole[:, 1], "row": whole[1], "again": whole, "whole": whole}
    for suffix in (".safetensors", ".pth"):
        save_checkpoint(tmp_path / f"a{suffix}", state, None)
        loaded = load_checkpoint(tmp_path / f"a{suffix}").state_dict
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_suffix_must_be_known(tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_checkpoint(tmp_path / "a.bin", {"weight": torch.ones(1)}, None)
    assert leftovers(tmp_path) == []


def test_run_folder_means_best_then_last(tmp_path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        load_checkpoint(tmp_path)
    save_checkpoint(folder / "last.safetensors", {"weight": torch.zeros(1)}, None)
    assert load_checkpoint(tmp_path).path == folder / "last.safetensors"
    save_checkpoint(folder / "best.safetensors", {"weight": torch.ones(1)}, None)
    assert load_checkpoint(tmp_path).state_dict["weight"] == 1
    assert load_checkpoint(folder).state_dict["weight"] == 1


def test_config_and_weights_that_disagree(tmp_path):
    model = tiny_fcmae()
    save_checkpoint(tmp_path / "a.pth", model, create_fcmae(ENCODER, img_size=64, decoder_dim=24).config)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_model(tmp_path / "a.pth")


def test_config_of_a_newer_version(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "config": {"kind": "EncoderConfig", "novel": 1}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth.*novel"):
        load_checkpoint(tmp_path / "a.pth")


def test_an_encoder_alone_is_no_network(tmp_path):
    model = tiny_fcmae()
    save_checkpoint(tmp_path / "a.safetensors", model.encoder, ENCODER)
    with pytest.raises(CheckpointError, match="encoder without decoder and without head"):
        load_model(tmp_path / "a.safetensors")


def test_official_file_with_namespace(tmp_path):
    state = {"downsample_layers.0.0.weight": torch.randn(8, 3, 4, 4)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3, model="atto"), "epoch": 3}, tmp_path / "a.pt")
    assert torch.equal(load_checkpoint(tmp_path / "a.pt").state_dict[next(iter(state))], next(iter(state.values())))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickles_are_not_executed(tmp_path):
    mark = tmp_path / "executed"
    torch.save({"model": {"weight": torch.ones(1)}, "args": Malicious(mark)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Malicious(mark)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match="could run code"):
            load_checkpoint(tmp_path / name)
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists(), "the file of this test is harmless, so it proves nothing"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
        lambda state: {"model": {k.replace("stages.0", "stages.0._orig_mod"): v for k, v in state.items()}},
        lambda state: {"model": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}}},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_wrappers_are_removed(tmp_path, wrap):
    state = {"stages.0.0.norm.weight": torch.randn(3), "norm.bias": torch.randn(2)}
    torch.save(wrap(state), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth").state_dict
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema"])
def test_averaged_weights_are_preferred_and_said(tmp_path, name):
    raw, averaged = {"weight": torch.zeros(1)}, {"module.weight": torch.ones(1)}
    torch.save({"model": raw, name: averaged, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint.state_dict["weight"] == 1
    assert checkpoint.metadata["weights"] == name


def _no_file(folder: Path) -> Path:
    return folder / "none.pth"


def _empty(folder: Path) -> Path:
    (folder / "a.pth").write_bytes(b"")
    return folder / "a.pth"


def _web_page(folder: Path) -> Path:
    (folder / "a.pt").write_text("\n<!DOCTYPE html><html><body>Log in</body></html>")
    return folder / "a.pt"


def _lfs_pointer(folder: Path) -> Path:
    (folder / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return folder / "a.pt"


def _foreign_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.pth", "w") as file:
        file.writestr("readme.txt", "no weights here")
    return folder / "a.pth"


def _text(folder: Path) -> Path:
    (folder / "a.pth").write_text("not a checkpoint at all\n" * 10)
    return folder / "a.pth"


def _noise(folder: Path) -> Path:
    (folder / "a.safetensors").write_bytes(bytes(range(256)) * 8)
    return folder / "a.safetensors"


def _no_weights(folder: Path) -> Path:
    torch.save({"epoch": 3, "args": argparse.Namespace()}, folder / "a.pth")
    return folder / "a.pth"


def _a_number(folder: Path) -> Path:
    torch.save(3, folder / "a.pth")
    return folder / "a.pth"


def _not_only_tensors(folder: Path) -> Path:
    torch.save({"weight": torch.ones(1), "version": "one"}, folder / "a.pth")
    return folder / "a.pth"


def _two_of_a_name(folder: Path) -> Path:
    torch.save({"weight": torch.ones(1), "_orig_mod.weight": torch.zeros(1)}, folder / "a.pth")
    return folder / "a.pth"


def _no_tensors(folder: Path) -> Path:
    save_checkpoint(folder / "a.safetensors", {}, None)
    return folder / "a.safetensors"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_file, "no such file"),
        (_empty, "empty"),
        (_web_page, "web page"),
        (_lfs_pointer, "LFS pointer"),
        (_foreign_zip, "damaged"),
        (_text, "not a torch checkpoint|damaged"),
        (_noise, "not a torch checkpoint|damaged"),
        (_no_weights, "holds no weights"),
        (_a_number, "holds no weights"),
        (_not_only_tensors, "'version' in the state dict is str"),
        (_no_tensors, "holds no weights"),
        (_two_of_a_name, "of the same name with and without _orig_mod"),
    ],
)
def test_unusable_files_get_one_clear_line(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_truncated_anywhere(tmp_path, suffix, share):
    path = tmp_path / f"a{suffix}"
    save_checkpoint(path, nn.Linear(64, 256), None)
    content = path.read_bytes()
    path.write_bytes(content[: max(1, int(len(content) * share))])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_safetensors_header_of_another_program(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"config": "not json", "format": "pt"})
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.config is None
    assert checkpoint.metadata == {}


def test_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        path = tmp_path / "weights.safetensors"
        save_checkpoint(path, {"norm.weight": torch.ones(2)}, None)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("old", [False, True])
def test_nested_tensors_are_not_made(tmp_path, old):
    """torch makes those of the old format with sizes that it has not read yet: of whatever lies in memory."""
    content = {"model": {"a": torch.ones(1)}, "x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=r"a\.pth: holds a nested tensor; only plain dense ones"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_names_of_21841_classes_are_no_bomb(tmp_path, suffix):
    names = tuple(f"n{number:08d}, a thing" for number in range(21_841))
    model = ConvNeXtV2(ClassifierConfig(ENCODER, len(names), class_names=names))
    save_checkpoint(tmp_path / f"a{suffix}", model, model.config, {"mean": [0.5] * 3})
    assert load_model(tmp_path / f"a{suffix}").config.class_names == names


@pytest.mark.parametrize("beside", [{"step": torch.tensor(5)}, {"epoch": 3, "loss": torch.tensor(0.4)}])
def test_a_tensor_beside_the_weights_is_none_of_them(tmp_path, beside):
    state = tiny_fcmae().encoder.state_dict()
    torch.save({**beside, "model": state}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").state_dict.keys() == state.keys()
