"""What tools ask of a classifier by the names that timm gave: its head, its groups of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from convnextv2.models.config import ClassifierConfig
from convnextv2.models.layers import init_weights

POOLED = (None, "avg")
"""What ``global_pool`` may be: the network pools by the mean, or as its configuration says."""


def new_head(norm: nn.LayerNorm, config: ClassifierConfig) -> nn.Module:
    """A linear layer for the classes of the configuration, its initial weights scaled, beside its norm; or none."""
    if not config.num_classes:
        return nn.Identity()
    head = nn.Linear(norm.weight.numel(), config.num_classes, device=norm.weight.device, dtype=norm.weight.dtype)
    init_weights(head)
    head.weight.data.mul_(config.head_init_scale)
    return head


class ClassifierInterface(nn.Module):
    """The methods, for a network that has a ``config``, a ``norm`` and a ``head``."""

    config: ClassifierConfig
    norm: nn.LayerNorm
    head: nn.Module

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.config.encoder.dims[-1]

    def get_classifier(self) -> nn.Module:
        """The linear head; an identity without one."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, *, head_init_scale: float = 1.0
    ) -> None:
        """Replace the head by a new one for ``num_classes`` (0: none), its initial weights scaled; classes lose their
        names.

        Raises:
            ValueError: if the number is none of classes, or ``global_pool`` is neither None nor ``avg``: the network
                pools as its configuration says.
        """
        if global_pool not in POOLED:
            raise ValueError(
                f"global_pool must be None or 'avg', got {global_pool!r}: the network pools as its configuration says"
            )
        self.config = replace(self.config, num_classes=num_classes, head_init_scale=head_init_scale, class_names=())
        self.head = new_head(self.norm, self.config)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names, from the stem up, for timm's layer-wise learning rates: a layer a block, or a stage."""
        parts = r"^(?:downsample_layers|stages)\.(\d+)"
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)]
        return {"stem": r"^downsample_layers\.0", "blocks": parts if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that no optimizer of timm should decay: GRN's."""
        return {name for name, _ in self.named_parameters() if ".grn." in name}
