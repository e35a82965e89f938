"""``create_model(name, pretrained=…)``: names, paths and addresses; which head is kept, and what is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from serving import folder_server

import convnextv2
from convnextv2 import ClassifierConfig, ConvNeXtV2, EncoderConfig, create_fcmae, create_model
from convnextv2.models.config import encoder_config
from convnextv2.weights import save_checkpoint, zoo
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.pretrained import default_weights

TINY = EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache, with the published atto and what else is put there; there is no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("CONVNEXTV2_MIRROR", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def atto(hub: Path) -> ConvNeXtV2:
    model = create_model("convnextv2_atto", head_init_scale=7.0)
    torch.save({"model": model.state_dict()}, hub / "convnextv2_atto_1k_224_ema.pt")
    return model


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[ConvNeXtV2, Path]:
    config = ClassifierConfig(TINY, 3, class_names=("a", "b", "c"))
    model = ConvNeXtV2(config)
    save_checkpoint(tmp_path / "run" / "checkpoints" / "best.safetensors", model, config)
    return model, tmp_path / "run"


def same(one: torch.nn.Module, other: torch.nn.Module, without: tuple[str, ...] = ()) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    kept = [name for name in theirs if not name.startswith(without)]
    return all(torch.equal(mine[name], theirs[name]) for name in kept) and len(kept) > 40


@pytest.mark.parametrize(
    "make",
    [
        lambda: create_model("convnextv2_atto", pretrained=True),
        lambda: create_model("atto", pretrained=True),
        lambda: create_model("convnextv2_atto_1k_224_ema", pretrained=True),
        lambda: create_model("convnextv2_atto", pretrained="convnextv2_atto_1k_224_ema"),
        lambda: create_model(EncoderConfig((2, 2, 6, 2), (40, 80, 160, 320)), pretrained=True),
        lambda: convnextv2.convnextv2_atto(pretrained=True, drop_path_rate=0.1),
    ],
)
def test_the_published_weights_of_a_variant(atto, make, caplog):
    assert same(make(), atto)
    told = "the published weights are under CC-BY-NC 4.0, not for commercial use"
    assert caplog.messages == [f"convnextv2_atto_1k_224_ema: {told}"]


def test_there_is_a_default_for_every_published_variant():
    for variant in {file.variant for file in zoo.PUBLISHED.values()}:
        file = zoo.get(default_weights(variant))
        assert (file.variant, file.kind, file.resolution) == (variant, "1k", 224)
    with pytest.raises(ValueError, match=r"no weights were published for 'convnextv2_zepto', only for convnextv2_atto"):
        default_weights("convnextv2_zepto")


def test_without_them_nothing_is_downloaded(hub):
    model = create_model("convnextv2_atto")
    assert model.head.out_features == 1000
    assert create_model("convnextv2_atto", num_classes=0).head.state_dict() == {}
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("classes", [None, 3])
def test_a_head_that_fits_is_kept_with_its_names(classifier, classes, caplog):
    model, path = classifier
    made = create_model(TINY, pretrained=path, num_classes=classes)
    assert same(made, model)
    assert made.config.class_names == ("a", "b", "c")
    assert caplog.messages == []


@pytest.mark.parametrize(("classes", "told"), [(5, "freshly initialised: head"), (0, None)])
def test_another_head_is_fresh_and_that_is_told(classifier, classes, told, caplog):
    model, path = classifier
    made = create_model(TINY, pretrained=str(path), num_classes=classes, head_init_scale=0.0)
    assert same(made, model, ("head",))
    assert made.config.num_classes == classes and made.config.class_names == ()
    if told is None:
        assert caplog.messages == [] and not made.head.state_dict()
    else:
        assert made.head.weight.shape == (5, 24) and not made.head.weight.any()
        assert [told in line for line in caplog.messages] == [True]


def test_a_pretraining_gives_the_encoder(tmp_path, caplog):
    fcmae = create_fcmae(TINY, decoder_dim=8)
    save_checkpoint(tmp_path / "best.pth", fcmae, fcmae.config)
    made = create_model(TINY, pretrained=tmp_path)
    assert made.head.out_features == 1000
    assert torch.equal(made.stages[0][0].dwconv.weight, fcmae.encoder.stages[0][0].dwconv.weight)
    assert ["freshly initialised: norm, head" in line for line in caplog.messages] == [True]


def test_patch_size_and_channels_are_the_files_unless_asked_for(tmp_path):
    small = create_model("convnextv2_atto", patch_size=8, in_chans=1, num_classes=3)
    save_checkpoint(tmp_path / "best.safetensors", small, small.config)
    made = create_model("convnextv2_atto", pretrained=tmp_path)
    assert made.config == small.config
    assert torch.equal(made.downsample_layers[0][0].weight, small.downsample_layers[0][0].weight)
    adapted = create_model("convnextv2_atto", pretrained=tmp_path, in_chans=3).config.encoder
    assert (adapted.patch_size, adapted.in_chans) == (8, 3)
    assert create_model("convnextv2_atto").config.encoder == encoder_config("convnextv2_atto")


@pytest.mark.parametrize("pooling", ["mean_std", "stages"])
def test_a_head_with_deviations_is_kept(tmp_path, pooling):
    config = ClassifierConfig(TINY, 2, pooling=pooling)
    model = ConvNeXtV2(config)
    save_checkpoint(tmp_path / "best.safetensors", model, config)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(create_model(TINY, pretrained=tmp_path).eval()(images), model.eval()(images))


def test_an_address(classifier, hub):
    model, path = classifier
    with folder_server(path) as address:
        url = f"{address}/checkpoints/best.safetensors"
        assert same(create_model(TINY, pretrained=url), model)
        assert same(create_model(TINY, pretrained=Path(url)), model)  # which has one slash
    assert same(create_model(TINY, pretrained=url), model)  # and from the cache
    assert same(create_model(TINY, pretrained=(path / "checkpoints/best.safetensors").as_uri()), model)
    assert len(list(hub.iterdir())) == 1


def test_a_path_that_exists_wins(atto, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = create_model("convnextv2_atto", num_classes=2)
    torch.save(own.state_dict(), "convnextv2_atto_1k_224_ema")
    assert same(create_model("convnextv2_atto", pretrained="convnextv2_atto_1k_224_ema"), own)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("convnextv2_atto", {"pretrained": "convnextv2_nano_22k_384_em"}, "did you mean convnextv2_nano_22k_384_ema"),
        ("convnextv2_atto", {"pretrained": "convnextv2_nano"}, "published weights are convnextv2_nano_1k_224_fcmae"),
        ("convnextv2_nano", {"pretrained": True}, "cannot download http://127.0.0.1:1/.*nano.*Connection refused"),
        ("convnextv2_nano", {"pretrained": "convnextv2_atto_1k_224_ema"}, "but the network is convnextv2_nano"),
        ("convnextv2_atto", {"pretrained": ""}, "no checkpoint in this folder|no such file"),
        ("convnextv2_atto", {"pretrained": "a\0b"}, "no such file or folder"),
        ("convnextv2_atto", {"pretrained": "x" * 5000}, "no such file or folder"),
        ("convnextv2_atto", {"pretrained": "../convnextv2_atto_1k_224_ema"}, "no such file or folder"),
        ("convnextv2_atto_1k_224_ema", {}, "names weights: say `pretrained`=True"),
        ("convnextv2_atto_1k_224_ema", {"pretrained": "x.pt"}, "names weights"),
        (TINY, {"pretrained": True}, "no weights were published for 'a custom network'"),
        ("convnextv2_zeppo", {"pretrained": True}, "unknown model"),
        ("convnextv2_atto", {"pretrained": True, "num_classes": -1}, "num_classes"),
    ],
)
def test_what_cannot_be_is_one_line(atto, tmp_path, monkeypatch, name, options, told):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=told) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CheckpointError) == (
        (isinstance(options.get("pretrained"), str) and name != "convnextv2_atto_1k_224_ema") or "nano" in str(name)
    )


@pytest.mark.parametrize("value", [None, 1, 0, b"x", ["convnextv2_atto_1k_224_ema"], np.True_])
def test_other_types_are_refused(atto, value):
    with pytest.raises(TypeError, match="`pretrained` must be True, False, a name or a path"):
        create_model("convnextv2_atto", pretrained=value)
