"""The classes of ImageNet-1K, which published classifiers have and their files do not name: timm's lists of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

IMAGENET = "imagenet-1k"
"""What the metadata of a checkpoint call them, under ``classes``."""


@lru_cache(maxsize=1)
def imagenet_classes() -> Mapping[str, str]:
    """The 1,000 classes in their order: the synset, ``n01440764``, as folders of ImageNet are named, to its words,
    ``tench, Tinca tinca``."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(IMAGENET)
    return dict(zip(info.label_names(), info.label_descriptions(), strict=True))
