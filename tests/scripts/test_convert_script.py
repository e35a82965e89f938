from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from convnextv2 import ConvNeXtV2, EncoderConfig, create_fcmae, create_model
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import load_checkpoint, save_checkpoint
from convnextv2.weights.loading import init_classifier, load_model
from convnextv2.weights.reading import read_weights, write_layout

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_sparse_to_dense.py"
ENCODER = EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24))


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the script in this process; returns (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def pretrained(tmp_path) -> Path:
    torch.manual_seed(0)
    model = create_fcmae(ENCODER, img_size=64, decoder_dim=16, mask_ratio=0.5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(tmp_path / "run/checkpoints/last.safetensors", model, model.config, {"mean": [0.5], "std": [0.25]})
    return tmp_path / "run"


def test_pretraining_run_to_dense(convert, pretrained, tmp_path):
    status, out, err = convert(pretrained, tmp_path / "dense.safetensors")
    assert (status, err) == (0, "")
    assert "dropped: decoder (10 tensors), mask_token (1 tensor), pred (2 tensors), proj (2 tensors)" in out
    assert "left to fine-tuning (not in the file): final norm (2 tensors), head (2 tensors)" in out
    line = next(line for line in out.splitlines() if line.startswith("verified: largest relative error"))
    assert float(line.split()[4]) < 1e-13
    checkpoint = load_checkpoint(tmp_path / "dense.safetensors")
    assert checkpoint.config == ENCODER
    assert checkpoint.metadata["mean"] == [0.5]
    source = load_model(pretrained).encoder.state_dict()
    assert checkpoint.state_dict.keys() == source.keys()
    assert all(torch.equal(checkpoint.state_dict[name], value) for name, value in source.items())
    report = init_classifier(create_model(ENCODER, num_classes=3), checkpoint)
    assert report.dropped == ()


def test_there_and_back_is_bit_exact(convert, pretrained, tmp_path):
    assert convert(pretrained, tmp_path / "sparse.pth", "--to", "sparse-official")[0] == 0
    sparse = load_checkpoint(tmp_path / "sparse.pth")
    assert sparse.state_dict["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    original, back = load_model(pretrained), load_model(tmp_path / "sparse.pth")
    assert back.config == original.config
    assert all(torch.equal(back.state_dict()[name], value) for name, value in original.state_dict().items())
    assert convert(tmp_path / "sparse.pth", tmp_path / "dense.pth")[0] == 0
    dense = load_checkpoint(tmp_path / "dense.pth").state_dict
    assert all(torch.equal(dense[name], value) for name, value in original.encoder.state_dict().items())


def test_num_classes_makes_a_whole_classifier(convert, pretrained, tmp_path):
    status, out, _ = convert(pretrained, tmp_path / "a.pth", "--num-classes", 5, "--seed", 3)
    assert status == 0
    assert "freshly initialised: final norm (2 tensors), head (2 tensors)" in out
    model = load_model(tmp_path / "a.pth")
    assert model.config == ClassifierConfig(ENCODER, 5)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    convert(pretrained, tmp_path / "b.pth", "--num-classes", 5, "--seed", 3)
    assert torch.equal(load_model(tmp_path / "b.pth").head.weight, model.head.weight)
    status, out, _ = convert(tmp_path / "a.pth", tmp_path / "c.pth", "--num-classes", 2)
    assert "dropped: head (2 tensors)" in out
    assert "freshly initialised: head (2 tensors)" in out


def test_timm_verbose(convert, pretrained, tmp_path):
    status, out, _ = convert(pretrained, tmp_path / "timm.pth", "--to", "timm", "--verbose")
    assert status == 0
    assert "timm's network" in out
    shapes = "encoder.stages.0.0.grn.gamma [1, 1, 1, 32]", "stages.0.blocks.0.mlp.grn.weight [32]"
    assert any(all(shape in line for shape in shapes) for line in out.splitlines())
    assert "stem.0.weight" in load_checkpoint(tmp_path / "timm.pth").state_dict


def test_half_precision_is_told(convert, tmp_path):
    torch.save({"model": create_model(ENCODER, num_classes=2).half().state_dict()}, tmp_path / "half.pth")
    status, out, _ = convert(tmp_path / "half.pth", tmp_path / "full.pth")
    assert status == 0
    assert "16-bit weights are written as float32" in out
    assert load_model(tmp_path / "full.pth").head.weight.dtype == torch.float32


def test_a_mismatch_writes_nothing(convert, pretrained, tmp_path, monkeypatch):
    from convnextv2.weights.layouts import sparse_official as converter

    assert convert(pretrained, tmp_path / "sparse.pth", "--to", "sparse-official")[0] == 0
    right = converter.taps_to_map
    monkeypatch.setattr(converter, "taps_to_map", lambda kernel: right(kernel).transpose(-1, -2).contiguous())
    status, _, err = convert(tmp_path / "sparse.pth", tmp_path / "dense.pth")
    assert status == 2
    assert "nothing written: largest relative error" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "dense.pth").exists()
    status, out, _ = convert(tmp_path / "sparse.pth", tmp_path / "dense.pth", "--no-verify")
    assert status == 0
    assert "verified" not in out


def _resnet(path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(2), "bn1.weight": torch.ones(2)}, path)


def _diverged(path: Path) -> None:
    state = create_model(ENCODER, num_classes=2).state_dict()
    state["stages.0.0.dwconv.bias"].fill_(float("nan"))
    torch.save(state, path)


def _incomplete(path: Path) -> None:
    state = write_layout(read_weights(create_model(ENCODER, num_classes=2).state_dict()), "timm")
    torch.save({k: v for k, v in state.items() if k != "stages.2.blocks.0.norm.bias"}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("<html>404</html>"), "web page"),
        (_resnet, "not the weights of a ConvNeXt V2"),
        (_diverged, "NaN or infinity"),
        (_incomplete, r"stages.2.0.norm.bias"),
    ],
)
def test_bad_input_is_one_line_and_status_2(convert, tmp_path, make, message):
    make(tmp_path / "a.pt")
    status, out, err = convert(tmp_path / "a.pt", tmp_path / "out.pth")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'a.pt'}: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out.pth").exists()


def test_layouts_on_offer(convert):
    status, out, _ = convert("--help")
    assert status == 0
    assert "--to {official-dense,sparse-official,timm,onnx,torch-export,transformers}" in out


def test_bad_options(convert, pretrained, tmp_path):
    for arguments, message in (
        ((tmp_path / "a.bin",), "OUTPUT must end in"),
        ((tmp_path / "a.pth", "--num-classes", 0), "--num-classes"),
        ((tmp_path / "a.pth", "--num-classes", 3, "--to", "sparse-official"), "--num-classes"),
    ):
        status, _, err = convert(pretrained, *arguments)
        assert status == 2
        assert message in err.splitlines()[-1]
    source = pretrained / "checkpoints" / "last.safetensors"
    status, _, err = convert(pretrained, source)
    assert status == 2
    assert "is the checkpoint itself" in err
    assert load_model(source)


def test_a_folder_that_cannot_be_written_to(convert, pretrained, tmp_path):
    """Below a file: there not even root may write."""
    (tmp_path / "file").write_text("")
    status, _, err = convert(pretrained, tmp_path / "file" / "a.pth")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "file") in err


def test_names_of_classes_are_kept_and_those_of_a_new_head_are_not(convert, tmp_path):
    model = ConvNeXtV2(ClassifierConfig(ENCODER, 2, class_names=("cat", "dog")))
    save_checkpoint(tmp_path / "a.safetensors", model, model.config)
    for more, names in (((), ("cat", "dog")), (("--num-classes", 2), ())):
        target = tmp_path / f"{len(more)}.safetensors"
        assert convert(tmp_path / "a.safetensors", target, *more)[0] == 0
        config = load_checkpoint(target).config
        assert isinstance(config, ClassifierConfig)
        assert config.class_names == names
