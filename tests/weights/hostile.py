"""Checkpoints made to hang, swell, run code or raise: one function each, from a folder to the file it writes there.

A file is a wrong one for every script that reads checkpoints: each has to tell in one line and write nothing.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, config_from_dict, config_to_dict
from convnextv2.weights.checkpoint import save_checkpoint

ENCODER = EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24), patch_size=16)
METADATA = {"mean": [0.5] * 3, "std": [0.25] * 3, "img_size": [32, 32]}
Make = Callable[[Path], Path]
HOSTILE: dict[str, Make] = {}
ONLY_HEADER: set[str] = set()
"""Those whose tensors are good, and of which only what the header says is not."""


def fcmae() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and configuration of a masked autoencoder that loads."""
    torch.manual_seed(0)
    model = create_fcmae(ENCODER, img_size=32, decoder_dim=16)
    return dict(model.state_dict()), config_to_dict(model.config)


def classifier() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a classifier of two classes."""
    torch.manual_seed(0)
    model = ConvNeXtV2(ClassifierConfig(ENCODER, 2, class_names=("a", "b")))
    return dict(model.state_dict()), config_to_dict(model.config)


_base = fcmae


def good() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the files are made from."""
    return _base()


def write_all(folder: Path, base: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> dict[str, Path]:
    """Every hostile file, in a folder of its own below ``folder``, made from what ``base`` gives."""
    global _base
    before, _base = _base, base
    made = {}
    try:
        for name, make in HOSTILE.items():
            (folder / name).mkdir(parents=True)
            made[name] = make(folder / name)
    finally:
        _base = before
    return made


def hostile(function: Make) -> Make:
    HOSTILE[function.__name__.strip("_")] = function
    return function


def hostile_to_all(function: Make) -> Make:
    """As :func:`hostile`, of a file that takes long to make and is refused whatever it is made from: made once."""
    made = list[Path]()

    @functools.wraps(function)
    def make(folder: Path) -> Path:
        if made and made[0].exists():
            os.link(made[0], folder / made[0].name)
        else:
            made[:] = [function(folder)]
        return folder / made[0].name

    return hostile(make)


def _bytes(name: str, content: bytes, suffix: str = ".pth") -> None:
    def make(folder: Path) -> Path:
        (folder / f"a{suffix}").write_bytes(content)
        return folder / f"a{suffix}"

    HOSTILE[name] = make


def _saved(name: str, change: Callable[[dict[str, Any]], Any], **options: Any) -> None:
    """A file of torch's of what ``change`` makes of {"model", "config", "metadata"}, in place or by returning it."""

    def make(folder: Path) -> Path:
        state, config = good()
        content: Any = {"model": state, "config": config, "metadata": dict(METADATA)}
        changed = change(content)
        torch.save(content if changed is None else changed, folder / "a.pth", **options)
        return folder / "a.pth"

    HOSTILE[name] = make


def _config(name: str, of: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]] | None = None, **fields: Any) -> None:
    """A file of ours whose configuration has other fields; those of the encoder are told by their names."""

    def make(folder: Path) -> Path:
        state, config = (of or good)()
        for field, value in fields.items():
            (config["encoder"] if field in asdict(ENCODER) else config)[field] = value
        header = {"format": "pt", "config": json.dumps(config), "metadata": json.dumps(METADATA)}
        return _safetensors(folder, state, header)

    HOSTILE[name] = make
    ONLY_HEADER.add(name)


def _metadata(name: str, text: str) -> None:
    def make(folder: Path) -> Path:
        state, config = good()
        return _safetensors(folder, state, {"format": "pt", "config": json.dumps(config), "metadata": text})

    HOSTILE[name] = make
    ONLY_HEADER.add(name)


def _safetensors(folder: Path, state: dict[str, Tensor], header: dict[str, str]) -> Path:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, folder / "a.safetensors", header)
    return folder / "a.safetensors"


def _tensor(name: str, change: Callable[[Tensor], Tensor], of: str = "encoder.stages.1.0.pwconv1.weight") -> None:
    def apply(content: dict[str, Any]) -> None:
        own = of if of in content["model"] else of.removeprefix("encoder.")
        if own not in content["model"]:  # a classifier has no mask token
            own = "head.bias"
        content["model"][own] = change(content["model"][own])

    _saved(name, apply)


# Files that are something else, or not whole.
_bytes("empty", b"")
_bytes("text", b"These are not the weights you are looking for.\n" * 40)
_bytes("web_page", b"<!DOCTYPE html><title>404</title>", ".pt")
_bytes("lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ".pt")
_bytes("zeros", bytes(100_000))
_bytes("noise", bytes(range(256)) * 400)
_bytes("header_of_a_petabyte", struct.pack("<Q", 10**15) + b'{"a":1}', ".safetensors")
_bytes("header_that_is_no_json", struct.pack("<Q", 8) + b"{" * 8 + bytes(64), ".safetensors")
_bytes("header_nested", struct.pack("<Q", 200_000) + b'{"a":' * 40_000, ".safetensors")


@hostile
def zip_of_something_else(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.pth", "w") as file:
        file.writestr("photo.txt", "holiday")
    return folder / "a.pth"


def _cut(name: str, share: float, suffix: str) -> None:
    def make(folder: Path) -> Path:
        path = folder / f"a{suffix}"
        state, config = good()
        if suffix == ".pth":
            torch.save({"model": state, "config": config, "metadata": METADATA}, path)
        else:
            header = {"config": json.dumps(config), "metadata": json.dumps(METADATA)}
            _safetensors(folder, state, header)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path

    HOSTILE[name] = make


for _share in (0.02, 0.5, 0.97, 0.9999):
    _cut(f"zip_cut_at_{_share}", _share, ".pth")
    _cut(f"safetensors_cut_at_{_share}", _share, ".safetensors")


@hostile
def old_format_that_lacks_numbers(folder: Path) -> Path:
    """The list of storages is empty: torch leaves in the tensors what happens to lie in memory."""
    state, config = good()
    path = folder / "a.pth"
    torch.save({"model": state, "config": config, "metadata": METADATA}, path, _use_new_zipfile_serialization=False)
    with path.open("r+b") as file:
        for _ in range(4):
            for _operation in pickletools.genops(file):
                pass
        file.truncate()
        pickle.dump([], file, 2)
    return path


# Files that run code where they are trusted, or do much for few bytes.
class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class Swelling:
    """A gigabyte times ``gigabytes`` when it is unpickled, of a kind that torch's own unpickler makes."""

    def __init__(self, kind: Callable[..., Any], *arguments: Any) -> None:
        self.call = kind, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@hostile
def code_beside_the_weights(folder: Path) -> Path:
    torch.save({"model": good()[0], "args": Malicious(folder / "executed")}, folder / "a.pth")
    return folder / "a.pth"


@hostile
def code_in_a_bare_pickle(folder: Path) -> Path:
    (folder / "a.pth").write_bytes(pickle.dumps(Malicious(folder / "executed")))
    return folder / "a.pth"


@hostile
def code_in_the_old_format(folder: Path) -> Path:
    content = {"model": good()[0], "args": Malicious(folder / "executed")}
    torch.save(content, folder / "a.pth", _use_new_zipfile_serialization=False)
    return folder / "a.pth"


_saved("bytes_of_ten_gigabytes", lambda content: content.update(x=Swelling(bytearray, 10**10)))
_saved(
    "bytes_of_ten_gigabytes_in_the_old_format",
    lambda content: content.update(x=Swelling(bytearray, 10**10)),
    _use_new_zipfile_serialization=False,
)
_saved("a_namespace_of_weights", lambda content: argparse.Namespace(**content))


@hostile_to_all
def zip_bomb(folder: Path) -> Path:
    """Weights of four gigabytes of zeros in four megabytes, at the place where one of 4 KB belongs."""
    torch.save({"model": good()[0]}, folder / "whole.pth")
    with zipfile.ZipFile(folder / "whole.pth") as whole, zipfile.ZipFile(folder / "a.pth", "w") as bomb:
        for number, entry in enumerate(whole.infolist()):
            if "/data/" in entry.filename and number < 8:
                with bomb.open(zipfile.ZipInfo(entry.filename), "w", force_zip64=True) as file:
                    file.write(whole.read(entry))
            else:
                bomb.writestr(entry.filename, whole.read(entry))
        info = zipfile.ZipInfo(f"{whole.namelist()[0].split('/')[0]}/data/bomb")
        info.compress_type = zipfile.ZIP_DEFLATED
        with bomb.open(info, "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(2**24))
    (folder / "whole.pth").unlink()
    return folder / "a.pth"


@hostile_to_all
def zip_whose_pickle_is_a_bomb(folder: Path) -> Path:
    torch.save({"model": good()[0]}, folder / "whole.pth")
    with zipfile.ZipFile(folder / "whole.pth") as whole, zipfile.ZipFile(folder / "a.pth", "w") as bomb:
        for entry in whole.infolist():
            content = whole.read(entry)
            if entry.filename.endswith("data.pkl"):
                blanks = b"X" + struct.pack("<I", 2**30) + b" " * 2**30 + b"0"  # a text of a gigabyte, thrown away
                bomb.writestr(entry.filename, content[:2] + blanks + content[2:], zipfile.ZIP_DEFLATED, 1)
            else:
                bomb.writestr(entry.filename, content)
    (folder / "whole.pth").unlink()
    return folder / "a.pth"


@hostile
def zip_of_entries_that_share_their_bytes(folder: Path) -> Path:
    """A directory that names the same megabyte a thousand times."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"model": {}}, 2))
        file.writestr("archive/data/0", bytes(2**20))
        entry = file.infolist()[-1]
        for number in range(1, 4000):
            other = zipfile.ZipInfo(f"archive/data/{number}")
            other.file_size, other.compress_size = entry.file_size, entry.compress_size
            other.header_offset, other.CRC = entry.header_offset, entry.CRC
            file.filelist.append(other)
    (folder / "a.pth").write_bytes(content.getvalue())
    return folder / "a.pth"


# Structures.
def _itself(content: dict[str, Any], key: str) -> dict[str, Any]:
    content[key] = content
    return content


def _nested(depth: int, inner: Any, key: str = "model") -> Any:
    for _ in range(depth):
        inner = {key: inner}
    return inner


_saved("a_dict_that_contains_itself", lambda content: _itself({}, "model"))
_saved("two_dicts_that_contain_each_other", lambda content: _itself({"state_dict": {"ema": {}}}, "model"))
_saved("a_list_that_contains_itself", lambda content: (lambda x: (x.append(x), {"model": x})[1])([]))
_saved("nested_two_hundred_deep", lambda content: _nested(200, content["model"]))
_saved("metadata_that_contains_itself", lambda content: content.update(metadata=_itself({}, "mean")))
_saved("metadata_nested_two_hundred_deep", lambda content: content.update(metadata=_nested(200, 1, "mean")))
_saved("keys_that_are_numbers", lambda content: {"model": dict(enumerate(content["model"].values()))})
_saved("keys_that_are_none_and_bytes", lambda content: content["model"].update({None: torch.ones(1), b"a": 1}))
_saved("keys_that_are_tuples", lambda content: {(1, 2): torch.ones(1)})
_saved("values_that_are_no_tensors", lambda content: content["model"].update({"mask_token": [1.0]}))
_saved("no_weights", lambda content: content.update(model={}))
_saved("nothing_at_all", lambda content: 0)
_saved("a_hundred_thousand_names", lambda content: {f"stages.0.{i}.norm.bias": torch.ones(1) for i in range(100_000)})
_saved("a_name_of_a_megabyte", lambda content: content["model"].update({"stages." + "0." * 500_000: torch.ones(1)}))
_saved("a_block_of_number_999999999", lambda content: content["model"].update(
    {"encoder.stages.0.999999999.norm.bias": torch.ones(8)}))  # fmt: skip
_saved(
    "a_block_of_number_999", lambda content: content["model"].update({"encoder.stages.0.999.norm.bias": torch.ones(8)})
)

# Tensors.
_tensor("sparse", lambda x: x.to_sparse())
_tensor("sparse_rows", lambda x: x.to_sparse_csr())
_tensor("sparse_of_10_to_the_12", lambda x: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6)))
_tensor("nested_tensor", lambda x: torch.nested.nested_tensor([x, x[:1]]))
_tensor("meta", lambda x: x.to("meta"))
_tensor("meta_of_10_to_the_12", lambda x: torch.empty(10**6, 10**6, device="meta"))
_tensor("quantised", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
_tensor("float8", lambda x: x.to(torch.float8_e4m3fn))
_tensor("complex", lambda x: x.to(torch.complex64))
_tensor("integers", lambda x: x.to(torch.int32))
_tensor("expanded_to_10_to_the_12", lambda x: torch.ones(1).expand(10**6, 10**6))
_tensor("a_stem_expanded", lambda x: torch.ones(1).expand(10**6, 3, 100, 100), "encoder.downsample_layers.0.0.weight")
_tensor("a_kernel_expanded", lambda x: torch.ones(1).expand(8, 1, 9999, 9999), "encoder.stages.0.0.dwconv.weight")
_tensor("a_mask_token_expanded", lambda x: torch.ones(1).expand(1, 10**11, 1, 1), "mask_token")
_tensor("no_numbers", lambda x: torch.empty(0, 16))
_tensor("no_axes", lambda x: torch.tensor(1.0), "encoder.stages.0.0.dwconv.weight")
_tensor("nan", lambda x: torch.full_like(x, float("nan")))
_tensor("infinity", lambda x: torch.full_like(x, float("inf")))


@hostile
def float8_in_safetensors(folder: Path) -> Path:
    state, config = good()
    state = {name: value.to(torch.float8_e5m2) if value.dim() == 2 else value for name, value in state.items()}
    return _safetensors(folder, state, {"config": json.dumps(config), "metadata": json.dumps(METADATA)})


@hostile
def storages_larger_than_the_file(folder: Path) -> Path:
    """The old format, whose pickle says how many numbers a storage has."""
    torch.save({"model": good()[0]}, folder / "a.pth", _use_new_zipfile_serialization=False)
    content = (folder / "a.pth").read_bytes()
    place = content.rfind(b"FloatStorage")
    assert place > 0
    large = content.replace(b"K\x08Ntq", b"J\xff\xff\xff\x7fNtq").replace(b"K\x08N", b"J\xff\xff\xff\x7fN")
    (folder / "a.pth").write_bytes(large if large != content else content[:-9])
    return folder / "a.pth"


# Configurations that say more than the weights.
_config("a_million_blocks", depths=[10**6, 1, 1, 1])
_config("no_blocks", depths=[1, 0, 1, 1])
_config("minus_one_block", depths=[1, -1, 1, 1])
_config("half_a_block", depths=[1, 1.5, 1, 1])
_config("blocks_in_words", depths="many")
_config("blocks_as_a_number", depths=7)
_config("widths_of_100000", dims=[10**5] * 4)
_config("widths_of_10_to_the_400", dims=[10**400] * 4)
_config("a_kernel_of_100001", kernel_size=100_001)
_config("a_kernel_of_true", kernel_size=True)
_config("a_million_channels", in_chans=10**6)
_config("a_patch_of_7", patch_size=7)
_config("a_million_decoder_blocks", decoder_depth=10**6)
_config("a_decoder_of_10_to_the_9", decoder_dim=10**9)
_config("a_decoder_of_half_a_channel", decoder_dim=16.5)
_config("images_of_8e9", img_size=[8 * 10**9, 8 * 10**9])
_config("a_mask_of_nan", mask_ratio=float("nan"))
_config("a_mask_in_words", mask_ratio="most")
_config("drop_path_of_infinity", drop_path_rate=float("inf"))
_config("an_unknown_kind", kind="TransformerConfig")
_config("a_kind_that_is_a_list", kind=[])
_config("a_trillion_classes", classifier, num_classes=10**12)
_config("minus_two_classes", classifier, num_classes=-2)
_config("fewer_names_than_classes", classifier, class_names=["a"])
_config("names_that_are_no_text", classifier, class_names=[1, None])
_config("an_encoder_that_is_a_list", encoder=[1, 2])

# Metadata.
_metadata("a_mean_of_10_to_the_400", json.dumps({**METADATA, "mean": [10**400] * 3}))
_metadata("a_mean_of_nan", json.dumps({**METADATA, "mean": [float("nan")] * 3}))
_metadata("a_std_of_zero", json.dumps({**METADATA, "std": [0, 0, 0]}))
_metadata("a_mean_in_words", json.dumps({**METADATA, "mean": "gray"}))
_metadata("a_mean_of_lists", json.dumps({**METADATA, "mean": [[0.5], [0.5], [0.5]]}))
_metadata("one_mean_for_three_channels", json.dumps({**METADATA, "mean": [0.5]}))
_metadata("metadata_images_of_8e9", json.dumps({**METADATA, "img_size": [8e9, 8e9]}))
_metadata("metadata_images_of_infinity", json.dumps({**METADATA, "img_size": [float("inf"), 32]}))
_metadata("metadata_images_of_minus_one", json.dumps({**METADATA, "img_size": [-32, 32]}))
_metadata("metadata_nested_100000_deep", "[" * 100_000 + "]" * 100_000)
_metadata("mean_nested_100000_deep", '{"mean": ' + "[" * 100_000 + "]" * 100_000 + "}")


@hostile
def config_nested_100000_deep(folder: Path) -> Path:
    text = '{"kind": "FCMAEConfig", "encoder": ' + '{"a":' * 100_000 + "1" + "}" * 100_001
    return _safetensors(folder, good()[0], {"config": text, "metadata": json.dumps(METADATA)})


ONLY_HEADER.add(config_nested_100000_deep.__name__)


def write_good(folder: Path) -> tuple[Path, Path]:
    """The checkpoints that the hostile ones are made from: a masked autoencoder and a classifier."""
    paths = folder / "fcmae.safetensors", folder / "classifier.safetensors"
    for path, (state, config) in zip(paths, (fcmae(), classifier()), strict=True):
        save_checkpoint(path, state, config_from_dict(config), METADATA)
    return paths
