"""Random masks over the patch grid."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.types import Device


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches per image.

    Rounds down, as the official code does: 19 of 49 at ratio 0.6, so slightly more than the ratio is masked. Raises
    ValueError if no patch, or every patch, would stay visible, or the ratio is not a number.
    """
    if num_patches < 2:
        raise ValueError(f"an image of {num_patches} patch cannot be masked; use larger images or smaller patches")
    keep = int(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio <= 1 else 0
    if not 0 < keep < num_patches:
        highest = max(ratio for ratio in range(1000) if int(num_patches * (1 - ratio / 1000)) > 0) / 1000
        raise ValueError(
            f"mask_ratio={mask_ratio} keeps {keep} of {num_patches} patches; "
            f"choose a ratio between {1 / num_patches:.3f} and {highest:.3f}"
        )
    return keep


def random_mask(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    *,
    generator: Generator | None = None,
    device: Device = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Mask with the same number of visible patches in every image, uniformly drawn.

    The device of ``generator`` decides where the numbers are drawn, unless they are given as ``noise``
    ``[batch_size, num_patches]``: the patches with the lowest stay visible. ``device`` is where the mask goes. Returns
    ``[batch_size, num_patches]`` float32: 1 = masked, 0 = visible. Raises ValueError as :func:`keep_count`.
    """
    keep = keep_count(num_patches, mask_ratio)
    if noise is None:
        where = generator.device if generator else device
        noise = torch.rand(batch_size, num_patches, generator=generator, device=where)
    elif noise.shape != (batch_size, num_patches):
        raise ValueError(f"expected noise [{batch_size}, {num_patches}], got {list(noise.shape)}")
    visible = noise.argsort(dim=1, stable=True)[:, :keep]
    return torch.ones_like(noise).scatter_(1, visible, 0.0).to(device)


def parse_mask(text: str) -> Tensor:
    """Mask ``[gh, gw]`` (float32) from a text grid, one line a row of patches.

    ``1``, ``#``, ``x`` are masked; ``0``, ``.``, ``_`` are visible; white space and blank lines do not count. Raises
    ValueError on other characters, or rows of different lengths.
    """
    values = dict.fromkeys("1#xX", 1.0) | dict.fromkeys("0._", 0.0)
    rows = ["".join(line.split()) for line in text.splitlines() if line.strip()]
    unknown = sorted(set("".join(rows)) - set(values))
    if not rows or unknown:
        raise ValueError(f"a mask is lines of 0 (visible) and 1 (masked); got {'nothing' if not rows else unknown}")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"the rows of a mask must have one length; got {[len(row) for row in rows]}")
    return torch.tensor([[values[c] for c in row] for row in rows])
