import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnextv2 import EncoderConfig, create_fcmae, create_model
from convnextv2.weights.checkpoint import save_checkpoint


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module("summary")


PUBLISHED = {  # G, decimals
    "atto": (0.55, 2), "femto": (0.78, 2), "pico": (1.37, 2), "nano": (2.45, 2),
    "tiny": (4.47, 2), "base": (15.4, 1), "large": (34.4, 1), "huge": (115, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_multiply_adds(summary: Any, name: str) -> None:
    with torch.device("meta"):
        model = create_model(f"convnextv2_{name}")
    rows = summary.layers(model, (224, 224), leaves=True)
    work = sum(row.multiply_adds for row in rows)
    if name == "tiny":  # the published figure of this one holds five operations for each element of a LayerNorm
        elements = 0
        for row in rows:
            if row.kind == "LayerNorm":
                elements += torch.Size(row.shape).numel()
        work += 5 * elements
    value, decimals = PUBLISHED[name]
    assert round(work / 1e9, decimals) == value
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())


def test_dense_work_is_what_runs(summary: Any, tiny_encoder: EncoderConfig) -> None:
    with torch.device("meta"):
        model = create_model(tiny_encoder, num_classes=7)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 48, 64))
    for leaves in (False, True):
        assert (
            sum(r.multiply_adds for r in summary.layers(model, (48, 64), leaves=leaves)) * 2
            == counter.get_total_flops()
        )


def test_shapes_are_those_of_the_features(summary: Any, tiny_encoder: EncoderConfig) -> None:
    model = create_model(tiny_encoder, num_classes=7)
    rows = {row.name: row.shape for row in summary.layers(model, (48, 64))}
    from sparse_ops import DenseGrid

    for stage, (features, _) in enumerate(model.forward_stages(torch.zeros(1, 3, 48, 64), DenseGrid(1))):
        assert (
            rows[f"downsample_layers.{stage}"] == rows[f"stages.{stage}.0"] == (*features.shape[2:], features.shape[1])
        )
    assert rows["head"] == (7,)
    leaves = {row.name: row.shape for row in summary.layers(model, (48, 64), leaves=True)}
    assert leaves["downsample_layers.1.0"] == rows["stages.0.0"]
    assert leaves["stages.0.0.pwconv1"] == leaves["stages.0.0.grn"] == (*rows["stages.0.0"][:2], 32)


def test_sparse_encoder_counts_visible_cells(summary: Any) -> None:
    with torch.device("meta"):
        model = create_fcmae("convnextv2_pico")
    rows = summary.layers(model, (224, 224))
    by_name = {row.name: row for row in rows}
    assert sum(row.parameters for row in rows) == 12_521_792
    assert by_name["encoder.stages.0.0"].shape == (19 * 64, 64)
    assert by_name["encoder.stages.3.1"].shape == (19, 512)
    assert by_name["pred"].shape == (7, 7, 3072)
    dense = summary.layers(create_model("convnextv2_pico"), (224, 224))[:-2]
    sparse_work = sum(row.multiply_adds for row in rows if row.name.startswith("encoder."))
    assert sparse_work * 49 == sum(row.multiply_adds for row in dense) * 19


def test_command_line(script: Any, tmp_path: Path, tiny_encoder: EncoderConfig) -> None:
    result = script("summary", "atto", "--num-classes", 10)
    assert result.status == 0
    assert result.out.splitlines()[-1].startswith("one image of 224×224 pixels: 3,390,610 parameters, 0.547 G")
    assert len(script("summary", "atto", "--layers").out.splitlines()) > len(result.out.splitlines())
    model = create_fcmae(tiny_encoder, img_size=(48, 64), decoder_dim=16)
    save_checkpoint(tmp_path / "x.safetensors", model, model.config)
    result = script("summary", tmp_path / "x.safetensors")
    assert f"48×64 pixels: {sum(p.numel() for p in model.parameters()):,} parameters" in result.out
    save_checkpoint(
        tmp_path / "y.pth", create_model(tiny_encoder, num_classes=2), create_model(tiny_encoder, num_classes=2).config
    )
    assert script("summary", tmp_path / "y.pth", "--img-size", "32x48").status == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["zeppo"], "unknown model"),
        (["nowhere.pth"], "no such checkpoint"),
        (["atto", "--fcmae", "--img-size", "100"], "divisible"),
        (["atto", "--img-size", "31"], "smaller than the patch size 32"),
        (["atto", "--fcmae", "--mask-ratio", "1"], "mask_ratio"),
        (["atto", "--fcmae", "--mask-ratio", "0"], "mask_ratio"),
        (["atto", "--fcmae", "--mask-ratio", "nan"], "mask_ratio"),
        (["atto", "--mask-ratio", "0.5"], "masks nothing"),
        (["atto", "--num-classes", "-1"], "num_classes"),
    ],
)
def test_errors(script: Any, arguments: list[str], word: str) -> None:
    result = script("summary", *arguments)
    assert result.status == 2
    assert word in result.err.splitlines()[-1]
    assert is_one_line(result.err)


def is_one_line(err: str) -> bool:
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    return len(lines) == 1 and "Traceback" not in err
