from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convnextv2 import ConvNeXtV2, EncoderConfig, create_fcmae
from convnextv2.data import DataError, ImageDataset, build_finetune_datasets, build_predict_dataset
from convnextv2.evaluation import extract_features
from convnextv2.evaluation.features import pooled
from convnextv2.models.config import ClassifierConfig

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def network(tiny_encoder: EncoderConfig) -> ConvNeXtV2:
    return ConvNeXtV2(ClassifierConfig(tiny_encoder, 3))


@pytest.fixture
def images(image_folder: Callable[..., Path]) -> ImageDataset:
    """Twelve images of three classes, augmented."""
    return build_finetune_datasets(image_folder(dict.fromkeys("abc", 5)), (32, 48), mean=MEAN, std=STD)[0]


def maps(network: ConvNeXtV2, images: ImageDataset, numbers: Any) -> Tensor:
    with torch.no_grad():
        return network.eval().forward_features(
            torch.stack([images.plain_transform(images.source.load(n)) for n in numbers])
        )


def test_features_are_pooled_maps_of_images_without_augmentation(network: ConvNeXtV2, images: ImageDataset) -> None:
    expected = maps(network, images, range(12))
    assert expected.shape == (12, 24, 2, 3)
    mean = extract_features(network, images, batch_size=5)
    assert (mean.values.dtype, mean.labels.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(mean.values, expected.mean((2, 3)), atol=1e-6, rtol=1e-5)
    assert mean.labels.tolist() == images.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert (mean.classes, len(mean), mean.unreadable) == (("a", "b", "c"), 12, ())
    assert [file.parent.name for file in mean.files] == [*"aaaabbbbcccc"]
    both = extract_features(network, images, pooling="mean_std").values
    deviation = (expected - expected.mean((2, 3), keepdim=True)).square().mean((2, 3)).sqrt()
    torch.testing.assert_close(both, torch.cat((expected.mean((2, 3)), deviation), 1), atol=1e-6, rtol=1e-5)
    assert torch.equal(extract_features(network, images, pooling="stages").values[:, -48:], both)
    both.requires_grad_().sum().backward()  # no tensors of the inference mode
    assert both.grad is not None


def test_a_map_of_one_cell_does_not_deviate() -> None:
    assert pooled(torch.full((2, 3, 1, 1), 5.0), "mean_std").tolist() == [[5.0] * 3 + [0.0] * 3] * 2


def test_batches_and_workers_change_nothing(network: ConvNeXtV2, images: ImageDataset) -> None:
    first = extract_features(network, images, batch_size=12)
    seen: list[int] = []

    def watch(loader: Any) -> Any:
        seen.append(len(loader))
        return loader

    for batch_size, workers in ((1, 0), (5, 2)):
        again = extract_features(network, images, batch_size=batch_size, workers=workers, progress=watch)
        torch.testing.assert_close(again.values, first.values, atol=1e-6, rtol=1e-5)
        assert (again.files, again.labels.tolist()) == (first.files, first.labels.tolist())
    assert seen == [12, 3]


def test_images_that_cannot_be_read_are_left_out(network: ConvNeXtV2, images: ImageDataset) -> None:
    whole = extract_features(network, images)
    for number in (0, 6, 7):
        whole.files[number].write_bytes(b"")
    left = extract_features(network, images, batch_size=2)
    kept = [1, 2, 3, 4, 5, 8, 9, 10, 11]
    torch.testing.assert_close(left.values, whole.values[kept], atol=1e-6, rtol=1e-5)
    assert left.labels.tolist() == whole.labels[kept].tolist()
    assert left.files == tuple(whole.files[number] for number in kept)
    assert left.unreadable == tuple((whole.files[number], "empty file") for number in (0, 6, 7))


def test_images_without_labels(network: ConvNeXtV2, image_folder: Callable[..., Path]) -> None:
    root = image_folder({"": 3})
    dataset = build_predict_dataset([root], (32, 32), 3, MEAN, STD)
    found = extract_features(network, dataset)
    assert (found.labels.tolist(), found.classes, len(found.values)) == ([-1] * 3, (), 3)
    for file in root.iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 3 images can be read: .*000\.png: empty file"):
        extract_features(network, dataset)


def test_kinds_of_networks(network: ConvNeXtV2, images: ImageDataset, tiny_encoder: EncoderConfig) -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network

        def forward_features(self, x: Tensor) -> Tensor:
            return self.inside.forward_features(x)

    fcmae = create_fcmae(tiny_encoder, img_size=32, decoder_dim=16)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith(("norm", "head"))}
    fcmae.encoder.load_state_dict(state)
    expected = extract_features(network, images).values
    for other in (fcmae, fcmae.encoder, Foreign()):
        assert torch.equal(extract_features(other, images).values, expected)


def test_every_module_keeps_its_mode_and_drop_path_is_off(images: ImageDataset) -> None:
    network = ConvNeXtV2(ClassifierConfig(EncoderConfig((1, 1, 1, 1), (8, 8, 16, 16), 3, 16, drop_path_rate=0.9), 3))
    network.stages[1].eval()
    modes = {name: module.training for name, module in network.named_modules()}
    inside = []
    network.stages[3].register_forward_hook(
        lambda module, *_: inside.append((module.training, torch.is_grad_enabled()))
    )
    first, second = (extract_features(network, images).values for _ in range(2))
    assert torch.equal(first, second)
    assert inside == [(False, False)] * 2
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_what_is_refused(network: ConvNeXtV2, images: ImageDataset) -> None:
    with pytest.raises(ValueError, match="pooling must be one of mean, mean_std, stages, got 'max'"):
        extract_features(network, images, pooling="max")
    with torch.no_grad():
        network.stages[3][0].pwconv2.bias[2] = torch.nan
    with pytest.raises(ValueError, match="features of 12 of 12 images are NaN or infinite, first those of "):
        extract_features(network, images)
