"""What a checkpoint says about the images that its network was trained with, if that can be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

IMAGE_METADATA = ("mean", "std", "img_size")
MOST_PIXELS = 2**24
"""Of an image as a checkpoint says it should be, 4096×4096: more has to be asked for."""


def numbers_of(metadata: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """The numbers of an entry of :data:`IMAGE_METADATA`, a list or JSON text; None where there is none.

    Raises:
        ValueError: if they are none, not finite, or cannot be what the entry stands for.
    """
    value = metadata.get(name)
    if value is None:
        return None
    try:
        value = json.loads(value) if isinstance(value, str) else value
        found = tuple(map(float, value if isinstance(value, list | tuple) else [value]))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the checkpoint's {name!r} should be a list of numbers, got {value!r:.60}") from error
    least = {"mean": -math.inf, "std": math.ulp(0), "img_size": 1}[name]
    if not all(math.isfinite(number) and number >= least for number in found):
        raise ValueError(f"the checkpoint's {name!r} holds {found}; expected finite numbers of at least {least}")
    if name == "img_size" and (len(found) not in (1, 2) or found[0] * found[-1] > MOST_PIXELS):
        raise ValueError(
            f"the checkpoint's 'img_size' should be a height and a width of at most {MOST_PIXELS} pixels, got {found}"
        )
    return found
