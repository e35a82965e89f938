"""Parameter groups (weight decay, layer-wise learning rates), the optimizer and its schedule, all for timm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from convnextv2.training.components import LAYER_DECAY_TYPES


def num_layers(depths: Sequence[int], layer_decay_type: str = "single") -> int:
    """Largest layer number of the encoder; final norm and head come one above it.

    ``group`` counts stages 0 and 1 as one layer each, stage 2 in threes and stage 3 as one, with 0 for the stem: 12 for
    the depths 3, 3, 27, 3 that the official code has built in, and derived here for any others.
    """
    return sum(depths) if layer_decay_type == "single" else 3 + math.ceil(depths[2] / 3)


def layer_number(name: str, depths: Sequence[int], layer_decay_type: str = "single") -> int:
    """Layer that a parameter of :class:`~convnextv2.ConvNeXtV2` belongs to, as the official code counts.

    ``single``: every block is a layer, 1 … sum(depths); the downsampling before a stage goes with its first block.
    ``group``: see :func:`num_layers`; a downsampling goes with the stage after it, but the one before stage 2 with
    that stage's first group. Raises ValueError if the type is another one.
    """
    if layer_decay_type not in LAYER_DECAY_TYPES:
        raise ValueError(f"layer_decay_type must be one of {', '.join(LAYER_DECAY_TYPES)}, got {layer_decay_type!r}")
    kind, *rest = name.split(".")
    last = num_layers(depths, layer_decay_type)
    if kind not in ("downsample_layers", "stages"):
        return last + 1
    stage = int(rest[0])
    block = int(rest[1]) if kind == "stages" else 0
    if layer_decay_type == "single":
        return sum(depths[:stage]) + block + 1
    return (int(kind == "stages"), 2, 3 + block // 3, last)[stage]


def decays(name: str, parameter: nn.Parameter, official_weight_decay: bool = False) -> bool:
    """Whether weight decay applies: to weights of matrices and kernels; not to biases, norms, GRN and the mask token.

    ``official_weight_decay`` includes GRN and the mask token, as the official pre-training does (their tensors have
    four axes there, and only one-axis tensors and biases are spared).
    """
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    spared = name == "mask_token" or name.endswith((".grn.gamma", ".grn.beta"))
    return official_weight_decay or not spared


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    depths: Sequence[int] = (),
    layer_decay: float = 1.0,
    layer_decay_type: str = "single",
    official_weight_decay: bool = False,
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by weight decay and learning rate.

    Args:
        model: parameters without ``requires_grad`` stay out.
        weight_decay: of the parameters that :func:`decays` names; 0 for the others.
        depths: blocks per stage; needed where ``layer_decay`` is not 1.
        layer_decay: factor on the learning rate from one layer to the one below it. A group's ``lr_scale``, which
            timm's schedules multiply with, is ``layer_decay ** (layers above it)``.
        layer_decay_type: what a layer is, see :func:`layer_number`.
        official_weight_decay: see :func:`decays`.

    Raises ValueError if nothing is trainable, or ``layer_decay`` is not in (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}; 1 gives every layer the same rate")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    layers = depths, layer_decay_type
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        above = 0 if layer_decay == 1 else num_layers(*layers) + 1 - layer_number(name, *layers)
        decayed = decays(name, parameter, official_weight_decay)
        new = {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": layer_decay**above}
        groups.setdefault((above, decayed), new)["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the model is trainable")
    return [groups[key] for key in sorted(groups, reverse=True)]


def create_optimizer(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], name: str = "adamw", fused: bool = False
) -> torch.optim.Optimizer:
    """timm's optimizer ``name`` over the groups of :func:`parameter_groups`; ValueError if there is none that fits.

    ``fused`` asks torch's Adam and AdamW for their fused kernels; others have none.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = [str(each) for each in list_optimizers()]
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}; timm has {', '.join(known)}")
    if (info := get_optimizer_info(name)).second_order or (info.has_betas and info.num_betas != len(betas)):
        raise ValueError(f"`optimizer` {name} needs second derivatives or another number of `betas`: take another one")
    options: dict[str, Any] = {"fused": True} if fused and name in ("adam", "adamw") else {}
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, betas=betas, **options)


def scaled_lr(blr: float, effective_batch: int, lr: float | None = None) -> float:
    """``lr`` if given, else ``blr · effective_batch / 256``, where the batch counts accumulation and processes."""
    return blr * effective_batch / 256 if lr is None else lr


def create_schedule(
    optimizer: torch.optim.Optimizer, updates_per_epoch: int, epochs: int, warmup_epochs: float, min_lr: float = 0.0
) -> Any:
    """timm's cosine schedule per update: linear from 0 over the warm-up, then half a cosine down to ``min_lr``.

    A warm-up longer than half of the run is cut to that. Call ``step_update(n)`` before update n, counted
    from 0; the schedule is a function of n alone, so resuming needs no saved state.
    """
    from timm.scheduler.cosine_lr import CosineLRScheduler

    total = updates_per_epoch * epochs
    warmup = min(round(warmup_epochs * updates_per_epoch), total // 2)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total - warmup, 2),  # timm warns of a cosine over a single update
        lr_min=min_lr,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
