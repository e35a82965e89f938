import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnextv2 import FCMAE, VARIANTS, EncoderConfig, FCMAEConfig, create_fcmae, create_model
from convnextv2.models.config import encoder_config
from convnextv2.models.masking import keep_count
from convnextv2.models.spent import under_a_mask
from convnextv2.models.summary import layers
from convnextv2.weights.checkpoint import save_checkpoint
from convnextv2.weights.figures import beside, published_of
from convnextv2.weights.zoo import PUBLISHED as FILES


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_are_the_published_ones(name: str) -> None:
    """Parameters to the printed digits, multiply-adds within a per cent, at 224, 384 and 512 pixels; where nothing was
    published for a resolution, of what was published for 224, by the number of pixels."""
    files = {file.resolution: file for file in published_of(encoder_config(name))}
    for side in (224, 384, 512):
        if side in files:
            ours = beside(files[side])
            assert ours.same_parameters
            work, published = ours.multiply_adds, files[side].flops
            assert ours.difference is not None
            assert abs(ours.difference) < 0.01
            assert published is not None
            if side == 224 and name != "convnextv2_tiny":  # of which below
                digits = len(f"{published:g}".partition(".")[2])
                assert round(work / 1e9, digits) == published
        else:
            with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
                create_model(name)(torch.empty(1, 3, side, side))
            work, published = counter.get_total_flops() // 2, files[224].flops
            assert published is not None
            published *= (side / 224) ** 2
        assert work / 1e9 == pytest.approx(published, rel=0.01)


def test_published_multiply_adds_of_tiny() -> None:
    """They hold five operations for each element of a LayerNorm."""
    with torch.device("meta"):
        rows = layers(create_model("tiny"), (224, 224), leaves=True)
    norms = sum(torch.Size(row.shape).numel() for row in rows if row.kind == "LayerNorm")
    assert round((sum(row.multiply_adds for row in rows) + 5 * norms) / 1e9, 2) == 4.47


def test_dense_work_is_what_runs(tiny_encoder: EncoderConfig) -> None:
    with torch.device("meta"):
        model = create_model(tiny_encoder, num_classes=7)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 48, 64))
    for leaves in (False, True):
        assert sum(r.multiply_adds for r in layers(model, (48, 64), leaves=leaves)) * 2 == counter.get_total_flops()


def test_shapes_are_those_of_the_features(tiny_encoder: EncoderConfig) -> None:
    model = create_model(tiny_encoder, num_classes=7)
    rows = {row.name: row.shape for row in layers(model, (48, 64))}
    from sparse_ops import DenseGrid

    for stage, (features, _) in enumerate(model.forward_stages(torch.zeros(1, 3, 48, 64), DenseGrid(1))):
        assert (
            rows[f"downsample_layers.{stage}"] == rows[f"stages.{stage}.0"] == (*features.shape[2:], features.shape[1])
        )
    assert rows["head"] == (7,)
    leaves = {row.name: row.shape for row in layers(model, (48, 64), leaves=True)}
    assert leaves["downsample_layers.1.0"] == rows["stages.0.0"]
    assert leaves["stages.0.0.pwconv1"] == leaves["stages.0.0.grn"] == (*rows["stages.0.0"][:2], 32)


def test_sparse_encoder_counts_visible_cells() -> None:
    with torch.device("meta"):
        model = create_fcmae("convnextv2_pico")
    rows = layers(model, (224, 224))
    by_name = {row.name: row for row in rows}
    assert sum(row.parameters for row in rows) == 12_521_792
    assert by_name["encoder.stages.0.0"].shape == (19 * 64, 64)
    assert by_name["encoder.stages.3.1"].shape == (19, 512)
    assert by_name["pred"].shape == (7, 7, 3072)
    dense = layers(create_model("convnextv2_pico"), (224, 224))[:-2]
    sparse_work = sum(row.multiply_adds for row in rows if row.name.startswith("encoder."))
    assert sparse_work * 49 == sum(row.multiply_adds for row in dense) * 19


def test_figures_are_those_of_the_published_table() -> None:
    """As printed: figure 0.55 G, parameters 3.7 M; every classifier that was published is compared."""
    compared = {(file.variant, file.resolution) for name in VARIANTS for file in published_of(encoder_config(name))}
    assert compared == {(file.variant, file.resolution) for file in FILES.values() if file.flops is not None}
    ours = beside(FILES["convnextv2_atto_1k_224_ema"])
    assert not beside(FILES["convnextv2_atto_1k_224_fcmae"]).difference
    assert (ours.parameters, ours.multiply_adds) == (3_708_400, 547_332_480)
    assert not type(ours)(ours.file, 3_760_000, ours.multiply_adds).same_parameters
    assert type(ours)(ours.file, 3_749_999, ours.multiply_adds).same_parameters
    for changes in ({"patch_size": 16}, {"in_chans": 1}, {"kernel_size": 5}):
        assert not published_of(encoder_config("convnextv2_atto", **changes))
    assert not published_of(EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8)))


class Training(FCMAE):
    """As pre-training runs it."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **{**options, "return_pred": False})


@pytest.mark.parametrize(
    ("patch", "ratio", "changes", "decoder_depth"),
    [(32, 0.6, {}, 1), (16, 0.75, {"in_chans": 5, "kernel_size": 3}, 2), (8, 0.5, {"in_chans": 1}, 3)],
)
def test_what_is_spent_under_a_mask(patch: int, ratio: float, changes: dict[str, int], decoder_depth: int) -> None:
    """Against networks that run: all of the prediction, the masked patches' alone, and nothing masked."""
    encoder = EncoderConfig((1, 2, 3, 1), (8, 16, 24, 40), patch_size=patch, **changes)
    config = FCMAEConfig(encoder, (4 * patch, 6 * patch), 0.9, decoder_depth=decoder_depth, decoder_dim=12)
    found = under_a_mask(config, config.img_size, ratio)
    assert (found.visible, found.patches, found.mask_ratio) == (keep_count(24, ratio), 24, ratio)
    with torch.device("meta"):
        models = FCMAE(config), Training(config)
        dense = create_model(encoder, num_classes=0)
    whole, training = ({row.name: row for row in layers(model, config.img_size, ratio)} for model in models)
    of_dense = {f"encoder.{row.name}": row for row in layers(dense, config.img_size)[:-1]}

    def work(rows: dict[str, Any], *starts: str) -> int:
        return sum(row.multiply_adds for name, row in rows.items() if name.startswith(starts))

    for number, part in enumerate(found.parts[:4]):
        of_stage = f"encoder.downsample_layers.{number}", f"encoder.stages.{number}."
        assert part.name == f"stage {number + 1}"
        assert part.spent == work(training, *of_stage) == work(whole, *of_stage)
        assert part.dense == work(of_dense, *of_stage)
        assert part.share == pytest.approx(found.visible / 24)
    decoder = "proj", "decoder.", "pred"
    assert (found.parts[4].dense, found.parts[4].spent) == (work(whole, *decoder), work(training, *decoder))
    assert found.whole.spent == work(training, "") == found.encoder.spent + found.parts[4].spent
    for size, wrong in (((100, 96), ratio), (config.img_size, 0.999)):
        with pytest.raises(ValueError, match=r"divisible|mask_ratio"):
            under_a_mask(config, size, wrong)


def test_command_line(script: Any, tmp_path: Path, tiny_encoder: EncoderConfig) -> None:
    result = script("model_info", "atto", "--num-classes", 10)
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[-1].startswith("one image of 224×224 pixels: 3,390,610 parameters, 0.547 G")
    assert re.search(r"convnextv2_atto_1k_224_ema +224 +3\.7 M +3,708,400 +0\.55 G +0\.5473 G +-0\.49%", result.out)
    assert "mask ratio 0.6, 19 of 49 patches visible" in result.out
    assert "FLOPs by torch.utils.flop_counter: 1.094 G" in result.out
    model = create_fcmae(tiny_encoder, img_size=(48, 64), decoder_dim=16)
    save_checkpoint(tmp_path / "x.safetensors", model, model.config)
    result = script("model_info", tmp_path / "x.safetensors", "--mask-ratio", 0.5)
    assert f"48×64 pixels: {sum(p.numel() for p in model.parameters()):,} parameters" in result.out
    assert "mask ratio 0.5, 6 of 12 patches visible" in result.out
    assert "published" not in result.out
    first = script("summary", tmp_path / "x.safetensors", "--mask-ratio", 0.5, "--layers")
    assert first == script("model_info", tmp_path / "x.safetensors", "--mask-ratio", 0.5, "--layers")
    assert len(first.out.splitlines()) > len(result.out.splitlines())
    classifier = create_model(tiny_encoder, num_classes=2)
    save_checkpoint(tmp_path / "y.pth", classifier, classifier.config)
    assert script("model_info", tmp_path / "y.pth", "--img-size", "32x48").status == 0
    refused = script("model_info", tmp_path / "y.pth", "--mask-ratio", "0.5")
    assert (refused.status, refused.err.splitlines()[-1].endswith("masks nothing (see --fcmae)")) == (2, True)


@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [("convnextv2_nano_22k_384_ema", 384, "ConvNeXtV2"), ("convnextv2_atto_1k_224_fcmae", 224, "FCMAE")],
)
def test_json_of_names(script: Any, name: str, size: int, kind: str) -> None:
    found = json.loads(script("model_info", name, "--json").out)
    assert (found["model"], found["kind"], found["img_size"]) == (name, kind, [size, size])
    assert sum(row["parameters"] for row in found["layers"]) == found["parameters"]
    assert 2 * sum(row["multiply_adds"] for row in found["layers"]) == found["flops"]
    names = [one["name"] for one in found["published"]]
    assert names == ([name] if name.endswith("_ema") else [n for n in FILES if n in names])
    assert all(one["same_parameters"] and abs(one["difference"]) < 0.01 for one in found["published"])
    *parts, encoder, whole = found["under_a_mask"]["parts"]
    assert sum(part["spent"] for part in parts) == whole["spent"]
    patches = (size // 32) ** 2
    assert encoder["share"] == pytest.approx(keep_count(patches, 0.6) / patches)


def test_a_size_that_cannot_be_masked_is_told(script: Any) -> None:
    result = script("model_info", "atto", "--img-size", "250")
    assert result.status == 0
    assert "under a mask: not at this size: image size 250 × 250 is not divisible" in result.out


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
        (["atto", "--mask-ratio", "1"], "mask_ratio"),
        (["atto", "--mask-ratio", "0.5", "--img-size", "100"], "divisible"),
        (["convnextv2_atto_1k_384_ema"], "unknown model"),
        (["atto", "--num-classes", "-1"], "num_classes"),
        (["convnextv2_atto_1k_224_fcmae", "--num-classes", "3"], "--num-classes is not for a masked autoencoder"),
        (["atto", "--fcmae", "--num-classes", "3"], "--num-classes is not for a masked autoencoder"),
        ([""], "no such file"),
    ],
)
def test_errors(script: Any, arguments: list[str], word: str) -> None:
    result = script("model_info", *arguments)
    assert result.status == 2
    assert word in result.err.splitlines()[-1]
    assert is_one_line(result.err)


def is_one_line(err: str) -> bool:
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    return len(lines) == 1 and "Traceback" not in err
