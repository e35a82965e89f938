import re

import pytest
import torch

from convnextv2.models.fcmae import pixel_mask
from convnextv2.models.masking import keep_count, parse_mask, random_mask


def test_keep_count_rounds_down():
    assert keep_count(49, 0.6) == 19
    assert keep_count(4, 0.5) == 2
    assert keep_count(64, 0.75) == 16


@pytest.mark.parametrize("ratio", [0, 1, 2, -0.5, float("nan"), float("inf"), 0.99])
def test_ratios_that_leave_nothing_to_do_are_refused(ratio):
    with pytest.raises(ValueError, match=r"choose a ratio between 0\.020 and 0\.979"):
        keep_count(49, ratio)


def test_one_patch_cannot_be_masked():
    with pytest.raises(ValueError, match="image of 1 patch cannot be masked"):
        keep_count(1, 0.6)


@pytest.mark.parametrize("patches", [2, 3, 4, 5, 10, 49, 196, 1024])
def test_the_range_in_the_message_works(patches):
    with pytest.raises(ValueError, match="choose a ratio") as caught:
        keep_count(patches, 1)
    lowest, highest = re.search(r"between (\S+) and (\S+)$", str(caught.value)).groups()
    assert keep_count(patches, float(lowest)) >= keep_count(patches, float(highest)) >= 1
    assert int(patches * (1 - float(highest) - 0.0011)) == 0 or patches > 900


def test_masks_have_one_count_and_differ():
    mask = random_mask(64, 49, 0.6, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (64, 49)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.sum(1).tolist() == [30.0] * 64
    assert len({tuple(row) for row in mask.tolist()}) == 64
    # Every patch is masked about equally often: 64 · 30/49 = 39.2 times, standard deviation 3.9.
    assert (mask.sum(0) - 39.2).abs().max() < 16


def test_masks_come_from_the_generator_alone():
    torch.manual_seed(0)
    first = random_mask(4, 16, 0.5, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, random_mask(4, 16, 0.5, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, random_mask(4, 16, 0.5, generator=torch.Generator().manual_seed(4)))


def test_parse_mask():
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert torch.equal(parse_mask("101\n001\n"), expected)
    assert torch.equal(parse_mask("\n # . x \n\n _ 0 X\n"), expected)


@pytest.mark.parametrize(
    ("text", "message"), [("", "nothing"), ("  \n", "nothing"), ("012", "'2'"), ("01\n0", "length")]
)
def test_wrong_mask_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mask(text)


def test_pixel_mask_repeats_patches():
    pixels = pixel_mask(torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]]), (2, 3), 2)
    assert pixels.shape == (1, 1, 4, 6)
    assert pixels[0, 0, :2].tolist() == [[1, 1, 0, 0, 0, 0]] * 2
    assert pixels[0, 0, 2:].tolist() == [[1, 1, 1, 1, 0, 0]] * 2
