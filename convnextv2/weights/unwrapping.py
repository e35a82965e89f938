"""State dicts as the networks have them that other programs wrapped: in a trainer, a detector, timm's feature lists."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from convnextv2.weights.layouts import LAYOUTS

T = TypeVar("T")
WRAPPERS = ("module", "model", "net", "network", "backbone", "encoder", "ema_model")
"""Names under which programs keep a network; several may be nested."""
DEEPEST = 3
FEATURE_LIST = re.compile(r"^(stem|stages)_(\d+)\.")
"""Names of ``features_only`` models of timm, whose layers are flattened: ``stem_0.``, ``stages_1.``."""

logger = logging.getLogger(__name__)


def unwrapped(state: Mapping[str, T], source: Any = "") -> dict[str, T]:
    """A state dict with the names of a known layout, from one whose network is below prefixes; or as it is.

    The shortest prefix is taken below which a layout recognises names. What is not below it, such as the head of a
    detector, and what the layout's project has beside the network (:attr:`~.layout.Layout.leaves`) is left out, which
    is logged as a warning.

    Args:
        state: names to anything.
        source: where it is from, for the warning.
    """
    for prefix in _prefixes(state):
        plain = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        names = {name: FEATURE_LIST.sub(r"\1.\2.", new) for name, new in plain.items()}
        if len(set(names.values())) < len(names):  # of both spellings: no file of timm's
            names = plain
        layout = next((layout for layout in LAYOUTS.values() if layout.recognises(set(names.values()))), None)
        if layout is None:
            continue
        kept = {name: new for name, new in names.items() if not (layout.leaves and re.match(layout.leaves, new))}
        if gone := list(dict.fromkeys(_first(name) for name in state if name not in kept)):
            shown = f"{', '.join(gone[:3])}{f' and {len(gone) - 3} more' if len(gone) > 3 else ''}"
            logger.warning("%s: left out, for it is no part of a ConvNeXt V2: %s", source or "weights", shown)
        return {new: state[name] for name, new in kept.items()}
    return dict(state)


def _prefixes(names: Collection[str]) -> list[str]:
    """Those that occur, of nested wrappers, the shortest first; none at all is the very first."""
    found = {
        "".join(f"{part}." for part in parts[:count])
        for parts in {tuple(name.split(".")[:DEEPEST]) for name in names}
        for count in range(len(list(itertools.takewhile(WRAPPERS.__contains__, parts))) + 1)
    }
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _first(name: str) -> str:
    """The first two words of a name: ``decode_head``, ``backbone.norm0``."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in WRAPPERS else first
