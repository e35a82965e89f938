"""The layouts of weights that are known: one file of this folder each, and those that a program registers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from convnextv2.weights.guard import CheckpointError
from convnextv2.weights.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS: dict[str, Layout] = {}
"""Every known layout by its name."""


def register_layout(layout: Layout) -> None:
    """Make a layout known, to reading, writing, verification and the converter alike; ValueError if there is one of
    that name."""
    if layout.name in LAYOUTS:
        raise ValueError(f"there is a layout {layout.name!r} already; choose another name")
    LAYOUTS[layout.name] = layout


for _module in pkgutil.iter_modules(__path__):
    register_layout(importlib.import_module(f"{__name__}.{_module.name}").LAYOUT)


def get_layout(name: str) -> Layout:
    """The layout of that name; ValueError if there is none."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Name of the layout that the names of a state dict follow; CheckpointError if it is none of ConvNeXt V2's."""
    for layout in LAYOUTS.values():
        if layout.recognises(state_dict.keys()):
            return layout.name
    raise CheckpointError(
        f"not the weights of a ConvNeXt V2: none of the layouts {', '.join(LAYOUTS)} has names like "
        f"{', '.join(sorted(state_dict)[:3])}"
    )
