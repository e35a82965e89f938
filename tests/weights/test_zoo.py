from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import VARIANTS, ClassifierConfig, encoder_config
from convnextv2.weights import download, zoo
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.transfer import Partial

VARIANT_NAMES = [f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")]
"""Those that were published; the project may have more."""


def multiply_adds(variant: str, resolution: int) -> int:
    """Multiply-adds of the dense classifier's convolutions and linear layers, by hand."""
    depths, dims = VARIANTS[variant]
    cells = (resolution // 4) ** 2
    total = cells * 3 * 16 * dims[0] + dims[-1] * 1000
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            cells //= 4
            total += cells * 4 * dims[stage - 1] * dim
        total += depth * cells * (49 * dim + 8 * dim * dim)
    return total


def test_the_table_is_complete():
    assert len(zoo.PUBLISHED) == 26
    kinds = [file.kind for file in zoo.PUBLISHED.values()]
    assert [kinds.count(kind) for kind in ("fcmae", "1k", "22k")] == [8, 8, 10]
    for kind in ("fcmae", "1k"):
        assert [file.variant for file in zoo.PUBLISHED.values() if file.kind == kind] == VARIANT_NAMES
    assert len({file.url for file in zoo.PUBLISHED.values()}) == 26


@pytest.mark.parametrize(
    ("name", "path", "top1"),
    [
        ("convnextv2_atto_1k_224_fcmae", "pt_only/convnextv2_atto_1k_224_fcmae.pt", None),
        ("convnextv2_huge_1k_224_ema", "im1k/convnextv2_huge_1k_224_ema.pt", 86.3),
        ("convnextv2_nano_22k_384_ema", "im22k/convnextv2_nano_22k_384_ema.pt", 83.4),
        ("convnextv2_huge_22k_512_ema", "im22k/convnextv2_huge_22k_512_ema.pt", 88.9),
    ],
)
def test_paths_and_accuracies(name, path, top1):
    file = zoo.get(name)
    assert file.url == zoo.BASE_URL + path
    assert file.top1 == top1


def test_published_flops_are_those_of_our_network():
    for file in zoo.PUBLISHED.values():
        assert (file.flops is None) == (file.kind == "fcmae")
        if file.flops is not None:
            counted = multiply_adds(file.variant, file.resolution) / 1e9
            assert counted == pytest.approx(file.flops, rel=0.01), file.name


@pytest.mark.parametrize("variant", VARIANT_NAMES[:5])
def test_published_parameters_are_those_of_our_network(variant):
    with torch.device("meta"):
        model = ConvNeXtV2(ClassifierConfig(encoder_config(variant), 1000))
    counted = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert {file.parameters for file in zoo.PUBLISHED.values() if file.variant == variant} == {round(counted, 1)}


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no published checkpoint 'atto'.*convnextv2_atto_1k_224_fcmae"):
        zoo.fetch("atto")
    with pytest.raises(
        ValueError, match=r"^no published checkpoint '[^']+'; did you mean convnextv2_base_22k_384_ema\?$"
    ):
        zoo.get("convnextv2_base_22k_385_ema")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("CONVNEXTV2_MIRROR", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), ConnectionResetError("reset"), TimeoutError("timed out")]
)
def test_offline_is_one_clear_line(hub, monkeypatch, error):
    def half(url: str, partial: Partial, progress: bool) -> None:
        partial.add(b"half")
        raise error

    monkeypatch.setattr(download, "transfer", half)
    with pytest.raises(CheckpointError, match=r"cannot download https://.*atto.*check the connection") as caught:
        zoo.fetch("convnextv2_atto_1k_224_fcmae")
    assert "\n" not in str(caught.value)
    assert list(hub.iterdir()) == []


def test_fetch_downloads_once(hub, monkeypatch):
    urls = []

    def whole(url: str, partial: Partial, progress: bool) -> None:
        urls.append(url)
        torch.save({"weights": torch.arange(3)}, partial.path)

    monkeypatch.setattr(download, "transfer", whole)
    paths = [zoo.fetch("convnextv2_tiny_1k_224_ema") for _ in range(2)]
    assert paths == [hub / "convnextv2_tiny_1k_224_ema.pt"] * 2
    assert torch.load(paths[0])["weights"].tolist() == [0, 1, 2]
    assert urls == ["https://dl.fbaipublicfiles.com/convnext/convnextv2/im1k/convnextv2_tiny_1k_224_ema.pt"]
