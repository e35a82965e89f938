"""The whole encoder on MinkowskiEngine, and a network of its own layers in the official layout, against the oracle."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_helpers import (
    RAGGED,
    UNIFORM,
    as_rows,
    images_for,
    largest_relative_error,
    randomise,
    stages_and_gradients,
    tiny_config,
    tiny_fcmae,
)
from torch import nn

from convnextv2 import Encoder, EncoderConfig, create_fcmae
from convnextv2.models.config import VARIANTS, encoder_config
from convnextv2.weights.checkpoint import save_checkpoint
from convnextv2.weights.loading import load_model
from convnextv2.weights.reading import read_weights, write_layout
from sparse_ops import ActiveSet, BackendUnavailableError, SparseGrid
from sparse_ops.backends.minkowski import backend as backend_module
from sparse_ops.backends.minkowski import layers as minkowski
from sparse_ops.oracle import MaskedDenseGrid, visible_from_text

ROOT = Path(__file__).parents[2]
SQUARE, OBLONG = visible_from_text("..#/#.#/.##", "#.#/##./..#"), visible_from_text(".##.#/#..##", "#.#../.##.#")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.minkowski


class OfficialEncoder(nn.Module):
    """The encoder of the official sparse network, made of MinkowskiEngine's layers and of ours beside them.

    Its parameters have the official names and layouts by themselves; nothing here converts.
    """

    def __init__(self, config: EncoderConfig, scope: str = "image") -> None:
        super().__init__()
        engine, dims = minkowski.minkowski_engine(), config.dims
        stem = nn.Sequential(
            nn.Conv2d(config.in_chans, dims[0], config.stem_stride, config.stem_stride), ChannelsFirstNorm(dims[0])
        )
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in itertools.pairwise(dims):
            conv = engine.MinkowskiConvolution(narrow, wide, kernel_size=2, stride=2, bias=True, dimension=2)
            self.downsample_layers.append(nn.Sequential(minkowski.MinkowskiLayerNorm(narrow), conv))
        self.stages = nn.ModuleList(
            nn.Sequential(*(OfficialBlock(dim, config.kernel_size, scope) for _ in range(depth)))
            for depth, dim in zip(config.depths, dims, strict=True)
        )

    def forward(self, images, visible):
        """Features of the last stage as a sparse tensor; coordinates in a shuffled order, as a user may give them."""
        engine = minkowski.minkowski_engine()
        active = ActiveSet.from_mask(~visible)
        cells = active.coordinates[torch.randperm(active.num_cells)]
        embedded = self.downsample_layers[0](images)
        rows = embedded[cells[:, 0], :, cells[:, 1], cells[:, 2]]
        x = self.stages[0](engine.SparseTensor(rows, cells.int().contiguous()))
        for downsample, stage in zip(list(self.downsample_layers)[1:], list(self.stages)[1:], strict=True):
            x = stage(downsample(x))
        return x


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm of a dense map ``[B, C, H, W]``."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OfficialBlock(nn.Module):
    """A block of the official sparse network."""

    def __init__(self, dim: int, kernel_size: int, scope: str) -> None:
        super().__init__()
        engine = minkowski.minkowski_engine()
        self.dwconv = minkowski.MinkowskiDepthwiseConvolution(dim, kernel_size=kernel_size, bias=True, dimension=2)
        self.norm = minkowski.MinkowskiLayerNorm(dim)
        self.pwconv1 = engine.MinkowskiLinear(dim, 4 * dim)
        self.act = engine.MinkowskiGELU()
        self.pwconv2 = engine.MinkowskiLinear(4 * dim, dim)
        self.grn = minkowski.MinkowskiGRN(4 * dim, scope)
        self.drop_path = minkowski.MinkowskiDropPath(0.0)

    def forward(self, x):
        return x + self.drop_path(self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(self.dwconv(x)))))))


def official_rows(sparse, visible):
    """Rows in the active set's order, by their coordinates."""
    stride = torch.tensor([1, *sparse.tensor_stride])
    place = {tuple(row): index for index, row in enumerate((sparse.C.cpu().long() // stride).tolist())}
    cells = ActiveSet.from_mask(~visible, side=1).coordinates.tolist()
    return sparse.F[[place[tuple(row)] for row in cells]]


def official_weights(encoder: Encoder) -> dict:
    state = write_layout(read_weights(encoder.state_dict()), "sparse-official")
    return {name.removeprefix("encoder."): value for name, value in state.items()}


@pytest.mark.parametrize("visible", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("device", DEVICES)
def test_every_variants_shape_against_the_oracle(name, visible, device):
    """Depths as published; widths too up to nano, a quarter of them above, for the time that float64 takes."""
    config = encoder_config(name)
    if config.dims[0] > 80:
        config = replace(config, dims=tuple(dim // 4 for dim in config.dims))
    encoder = Encoder(config)
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.endswith(("grn.gamma", "grn.beta", "bias")):
            nn.init.normal_(parameter, std=0.2)
    images = images_for(visible, 32)
    found = stages_and_gradients(
        encoder.to(device),
        images.to(device),
        SparseGrid(ActiveSet.from_mask((~visible).to(device)), "minkowski"),
        visible,
    )
    oracle = MaskedDenseGrid(visible, dtype=torch.float64)
    expected = stages_and_gradients(encoder.cpu().double(), images.double(), oracle, visible)
    assert largest_relative_error({key: value.cpu() for key, value in found.items()}, expected) < 1e-5


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("patch", [32, 16, 8])
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_the_official_network_is_ours_with_all_gradients(visible, patch, scope):
    config = tiny_config(patch_size=patch, in_chans=2)
    encoder = Encoder(config).double()
    randomise(encoder)
    official = OfficialEncoder(config, scope).double()
    official.load_state_dict(official_weights(encoder))
    images = images_for(visible, patch, channels=2, dtype=torch.float64).requires_grad_()

    oracle = MaskedDenseGrid(visible, 8, scope, torch.float64)
    expected = as_rows(encoder(images, oracle), oracle, visible, 1)
    found = official_rows(official(images, visible), visible)
    assert largest_relative_error({"rows": found}, {"rows": expected}) < 1e-11

    cotangent = torch.randn_like(expected)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, [images, *parameters], cotangent)
    theirs, own_parameters = zip(*official.named_parameters(), strict=True)
    own = torch.autograd.grad(found, [images, *own_parameters], cotangent)
    # Gradients have the layouts of their parameters, so that the converter translates them too.
    assert largest_relative_error({"images": own[0]}, {"images": gradients[0]}) < 1e-11
    back = read_weights({f"encoder.{name}": value for name, value in zip(theirs, own[1:], strict=True)}).encoder
    assert largest_relative_error(back, dict(zip(names, gradients[1:], strict=True))) < 1e-11


def convert(*arguments: object) -> str:
    command = [sys.executable, str(ROOT / "scripts/convert_sparse_to_dense.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_a_checkpoint_of_the_official_network_becomes_the_dense_one(tmp_path):
    official = OfficialEncoder(tiny_config(patch_size=32))
    randomise(official)
    torch.save(
        {"model": {f"encoder.{name}": value for name, value in official.state_dict().items()}}, tmp_path / "a.pth"
    )
    assert "layout sparse-official" in convert(tmp_path / "a.pth", tmp_path / "dense.safetensors")
    encoder = Encoder(tiny_config(patch_size=32))
    from convnextv2.weights.checkpoint import load_checkpoint

    encoder.load_state_dict(load_checkpoint(tmp_path / "dense.safetensors").state_dict)
    encoder, official, images = encoder.double(), official.double(), images_for(UNIFORM, 32, dtype=torch.float64)
    oracle = MaskedDenseGrid(UNIFORM, dtype=torch.float64)
    dense = encoder(images, oracle)
    found = official_rows(official(images, UNIFORM), UNIFORM)
    assert largest_relative_error({"rows": found}, {"rows": as_rows(dense, oracle, UNIFORM, 1)}) < 1e-11


def test_a_checkpoint_of_ours_becomes_the_official_network(tmp_path):
    model = tiny_fcmae(encoder={"patch_size": 32})
    save_checkpoint(tmp_path / "ours.safetensors", model, model.config)
    convert(tmp_path / "ours.safetensors", tmp_path / "official.pth", "--to", "sparse-official")
    state = torch.load(tmp_path / "official.pth", weights_only=True)
    state = state.get("model", state)
    weights = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    official = OfficialEncoder(model.config.encoder)
    official.load_state_dict(weights)  # strict: names and shapes are the official ones
    official, images = official.double(), images_for(UNIFORM, 32, dtype=torch.float64)
    found = official_rows(official(images, UNIFORM), UNIFORM)
    expected, _ = (
        load_model(tmp_path / "ours.safetensors", "reference").double().encode(images, ActiveSet.from_mask(~UNIFORM))
    )
    assert largest_relative_error({"rows": found}, {"rows": expected}) < 1e-11


def losses(backend: str, steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    config = EncoderConfig((1, 1, 2, 1), (16, 24, 32, 48), patch_size=16, drop_path_rate=0.2)
    model = create_fcmae(config, img_size=(64, 96), backend=backend).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    images = nn.functional.interpolate(torch.randn(4, 3, 4, 6), scale_factor=16.0, mode="bilinear")
    found = []
    for _ in range(steps):
        loss = model(images).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("rival", ["cpu", "reference"])
def test_pretraining_loses_as_on_the_other_backends(rival):
    expected, found = losses(rival), losses("minkowski")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert math.isfinite(found[-1])
    assert found[-1] < found[0]


def test_the_script_pretrains_on_it(script, image_folder, tmp_path):
    options = "--depths 1 1 1 1 --dims 8 8 8 8 --decoder-dim 8 --patch-size 8 --img-size 32 --batch-size 4 --workers 0"
    data, metrics = image_folder({"": 8}), {}
    for backend in ("minkowski", "reference"):
        output = tmp_path / backend
        result = script(
            "pretrain", "--data", data, "--output", output, "--backend", backend, "--epochs", 2, "--device", "cpu",
            *options.split(),
        )  # fmt: skip
        assert result.status == 0, result.err
        metrics[backend] = (output / "metrics.jsonl").read_text().count("\n")
    assert metrics["minkowski"] == metrics["reference"] > 0
    ours, theirs = (load_model(tmp_path / b, "reference").state_dict() for b in ("minkowski", "reference"))
    assert largest_relative_error(ours, theirs) < 1e-3


UNAIDED = """
import runpy, sys
sys.path.insert(0, {scripts!r})
for arguments in {commands!r}:
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
    assert "MinkowskiEngine" not in sys.modules, arguments
    assert "MinkowskiEngineBackend" not in sys.modules, arguments
print("never imported")
"""


def test_pretraining_conversion_finetuning_and_prediction_do_not_import_it(image_folder, tmp_path):
    """MinkowskiEngine is installed here, and still nothing but its own backend asks for it."""
    scripts = ROOT / "scripts"
    data = str(image_folder({"red": 6, "green": 6}))
    tiny = "--depths 1 1 1 1 --dims 8 8 8 8 --img-size 32 --batch-size 4 --workers 0 --device cpu --epochs 1".split()  # noqa: SIM905  # as one types it
    run, dense, tuned = (str(tmp_path / name) for name in ("pretrain", "dense.safetensors", "finetune"))
    commands = [
        [
            str(scripts / "pretrain.py"),
            "--data",
            data,
            "--output",
            run,
            "--decoder-dim",
            "8",
            "--patch-size",
            "8",
            *tiny,
        ],
        [str(scripts / "convert_sparse_to_dense.py"), run, dense],
        [str(scripts / "finetune.py"), "--data", data, "--init", dense, "--output", tuned, "--patch-size", "8", *tiny],
        [str(scripts / "predict.py"), tuned, data, "--output", str(tmp_path / "results.csv")],
    ]
    code = UNAIDED.format(scripts=str(scripts), commands=commands)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("never imported\n")


def test_without_it_a_model_names_the_one_command(monkeypatch):
    monkeypatch.setattr(backend_module, "_import_error", lambda: "MinkowskiEngine is not installed")
    with pytest.raises(BackendUnavailableError, match=r"not installed; fcmae minkowski"):
        create_fcmae("convnextv2_atto", backend="minkowski")
    from sparse_ops.__main__ import report

    assert "why: MinkowskiEngine is not installed; fcmae minkowski" in report()
