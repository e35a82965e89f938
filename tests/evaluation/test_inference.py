"""What prediction does on a device: bytes, precision, layout, compilation; on a processor the numbers are as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convnextv2 import ConvNeXtV2, EncoderConfig
from convnextv2.data import build_predict_dataset
from convnextv2.data.datasets import PredictDataset
from convnextv2.evaluation import inference as inference_module
from convnextv2.evaluation.inference import Inference, autocast_dtype
from convnextv2.models.config import ClassifierConfig

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def model() -> Any:
    config = ClassifierConfig(EncoderConfig((1, 1, 1, 1), (8, 8, 16, 16), patch_size=8), 5, head_init_scale=50)
    return ConvNeXtV2(config).eval()


@pytest.fixture
def dataset(image_folder: Callable[..., Path]) -> PredictDataset:
    root = image_folder({"": 7})
    (root / "003.png").write_bytes(b"no image")
    return build_predict_dataset([root], (32, 32), 3, MEAN, STD)


def run(inference: Inference, workers: int = 0) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([inference.probabilities(images) for images, _, _ in inference.batches(workers)])


@pytest.mark.parametrize("workers", [0, 2])
def test_probabilities_are_those_of_the_images_as_floats(model: Any, dataset: PredictDataset, workers: int) -> None:
    inference = Inference(model, dataset, 4, precision="auto", compile=None)
    images, numbers, reasons = next(iter(inference.batches(workers)))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 32, 32, 3))
    assert numbers.tolist() == [0, 1, 2, 3]
    assert [bool(reason) for reason in reasons] == [False, False, False, True]
    found = run(inference, workers)
    with torch.inference_mode():
        expected = torch.cat([model(torch.stack([dataset[i][0] for i in some])) for some in ((0, 1, 2, 3), (4, 5, 6))])
    readable = [0, 1, 2, 4, 5, 6]
    assert torch.equal(found[readable], expected.softmax(1)[readable])


def test_precision(model: Any, dataset: PredictDataset) -> None:
    processor, gpu = torch.device("cpu"), torch.device("cuda")
    assert autocast_dtype("auto", processor) is None
    assert autocast_dtype("bf16", processor) == torch.bfloat16
    assert autocast_dtype("fp16", gpu) == torch.float16
    assert autocast_dtype("no", gpu) is None
    with pytest.raises(ValueError, match="`precision` fp16 needs a GPU"):
        Inference(model, dataset, 4, precision="fp16", compile=None)
    with pytest.raises(ValueError, match="`precision` must be one of auto, no, bf16, fp16, got 'half'"):
        autocast_dtype("half", processor)
    exact, rounded = (run(Inference(model, dataset, 4, precision=p, compile=None)) for p in ("no", "bf16"))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0)  # 8 bits, logits of some units
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run(Inference(model, dataset, 4, precision="bf16", compile=None))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert autocast_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if has else None)


def test_a_compiled_network_sees_one_size(model: Any, dataset: PredictDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, modes = [], []

    def compiled(network: Any, *, mode: str) -> Any:
        modes.append(mode)
        return lambda images: sizes.append(tuple(images.shape)) or network(images)

    expected = run(Inference(model, dataset, 4, precision="no", compile=None))
    monkeypatch.setattr(inference_module.torch, "compile", compiled)
    found = run(Inference(model, dataset, 4, precision="no", compile="reduce-overhead"))
    assert modes == ["reduce-overhead"]
    assert sizes == [(4, 3, 32, 32)] * 2
    torch.testing.assert_close(found, expected)


def test_images_are_moved_without_blocking_channels_last_on_a_gpu(
    model: Any, dataset: PredictDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of a GPU, tried on a processor."""
    inference = Inference(model, dataset, 4, precision="no", compile=None)
    expected = run(inference)
    inference._format = torch.channels_last
    model.to(memory_format=torch.channels_last)
    moves, layouts = [], []
    to = torch.Tensor.to

    def watched(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device):
            moves.append(options)
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    model.register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(run(inference), expected)
    assert moves == [{"non_blocking": True}] * 2
    assert layouts == [True, True]
