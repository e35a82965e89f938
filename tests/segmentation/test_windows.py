"""Images of any size by windows that overlap; scores of the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from convnextv2.segmentation.masks import IGNORED
from convnextv2.segmentation.scores import confusion_of, pixel_scores
from convnextv2.segmentation.windows import Windows, class_maps

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 0.9))
def test_windows_cover_an_axis_and_overlap_as_asked(length: int, size: int, overlap: float) -> None:
    starts = Windows((size, size), overlap).starts(length, 0)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - size)
    covered = {place for start in starts for place in range(start, start + size)}
    assert covered >= set(range(length))
    gaps = np.diff(starts)
    assert all(gaps > 0)
    assert all(gaps <= max(1, size - np.ceil(size * overlap)))
    if length > size:  # no window could be left out
        assert (len(starts) - 2) * max(1, size - int(np.ceil(size * overlap))) < length - size


def pointwise(inputs: Tensor) -> Tensor:
    """A network whose logits of a pixel are its own channels."""
    return inputs


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_of_a_network_of_single_pixels_nothing_changes(overlap: float, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 61), (16, 24), (5, 100), (33, 7), (17, 25)]
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    maps = class_maps(pointwise, images, PLAIN, Windows((16, 24), overlap), batch_size=batch_size)
    for image, found in zip(images, maps, strict=True):
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), image.float().argmax(-1))


def test_overlapping_logits_are_summed_by_their_weights() -> None:
    """Against a plain sum over the whole image, of a network that sees where in its window a pixel is."""
    windows, generator = Windows((16, 16), 0.5), torch.Generator().manual_seed(1)
    position = torch.randn(4, 16, 16, generator=generator)

    def network(inputs: Tensor) -> Tensor:
        return position * inputs[:, :1]

    image = torch.rand(45, 38, 3, generator=generator)
    (found,) = class_maps(network, [image], PLAIN, windows, batch_size=4)
    total = torch.zeros(4, 45, 38)
    for top in windows.starts(45, 0):
        for left in windows.starts(38, 1):
            part = image[top : top + 16, left : left + 16].permute(2, 0, 1)[None]
            total[:, top : top + 16, left : left + 16] += network(part)[0] * windows.weights()
    assert torch.equal(found.long(), total.argmax(0))
    weights = windows.weights()
    assert torch.equal(weights, weights.flip(0))
    assert weights[8, 8] > 10 * weights[0, 0] > 0
    assert bool((Windows((16, 16), 0.0).weights()[1:-1, 1:-1] == 1).all())


def test_a_long_image_is_held_by_rows_of_windows() -> None:
    """Of the logits there are as many rows as a window has."""
    most = 0

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point():
                most = max(most, result.untyped_storage().nbytes())
            return result

    image = torch.zeros(4000, 64, 3, dtype=torch.uint8)
    with Watched():
        (found,) = class_maps(pointwise, [image], PLAIN, Windows((32, 32), 0.5), batch_size=4)
    assert found.shape == (4000, 64)
    assert 0 < most <= 4 * 3 * 32 * 64 * 4


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(class_maps(lambda x: x * torch.nan, [torch.zeros(8, 8, 3)], PLAIN, Windows((8, 8))))


@pytest.mark.parametrize("overlap", [-0.1, 0.95, float("nan")])
def test_an_overlap_is_a_share(overlap: float) -> None:
    with pytest.raises(ValueError, match=r"overlap must be a share from 0 to 0\.9"):
        Windows((8, 8), overlap)


def test_scores_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 4, (3, 50, 41), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 3, (3, 50, 41), dtype=torch.uint8, generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = IGNORED
    masks[:, 10:] = torch.where(masks[:, 10:] == IGNORED, IGNORED, predicted[:, 10:])
    confusion = sum(confusion_of(ours, theirs, 5) for ours, theirs in zip(predicted, masks, strict=True))
    assert isinstance(confusion, Tensor)
    found = pixel_scores(confusion, "abcde", 3)
    options: dict[str, Any] = {"num_classes": 5, "ignore_index": IGNORED}
    every = MulticlassJaccardIndex(average="none", **options)(predicted.long(), masks.long())
    mean = MulticlassJaccardIndex(average="macro", **options)(predicted.long(), masks.long())
    assert found.iou[:4] == pytest.approx((100 * every[:4]).tolist(), rel=1e-6)
    assert np.isnan(found.iou[4])  # neither in masks nor predicted
    assert found.miou == pytest.approx(100 * float(mean), rel=1e-6)
    known = masks != IGNORED
    assert found.accuracy == pytest.approx(100 * float((predicted == masks)[known].float().mean()))
    assert int(found.confusion.sum()) == int(known.sum())
    assert found.as_dict()["classes"][3]["pixels"] == int((masks == 3).sum())


def test_masks_of_ignored_pixels_alone_have_no_score() -> None:
    nothing = torch.full((4, 4), IGNORED, dtype=torch.uint8)
    confusion = confusion_of(torch.zeros(4, 4, dtype=torch.uint8), nothing, 2)
    with pytest.raises(ValueError, match="no pixel of 1 masks is of a class"):
        pixel_scores(confusion, "ab", 1)
