"""Components of a run, the options that belong to each, and what is near to a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from convnextv2.messages import one_line

COMPONENTS = {
    name: tuple(options.split())
    for name, options in {
        "data": "data img_size in_chans classes ignore_index val_fraction max_bad max_pixels reduce_jpeg cache "
        "cache_side workers views pixels window bands no_data value_range",
        "model": "model depths dims patch_size drop_path init init_bands mask_ratio grn_scope decoder_depth "
        "decoder_dim norm_pix_loss decoder decoder_width pooling linear_probe head_init_scale head_start",
        "augmentation": "augment crop vflip turns brightness contrast noise band_dropout "
        "resize augment_on auto_augment color_jitter random_erasing crop_scale scale hflip mixup cutmix "
        "smoothing",
        "optimizer": "optimizer batch_size accum lr blr min_lr schedule warmup_epochs cooldown_epochs weight_decay "
        "official_weight_decay betas clip_grad layer_decay layer_decay_type dice ema_decay ema_warmup",
        "hardware": "device precision tf32 compile grad_checkpointing sharding backend timeout_minutes",
        "evaluation": "probe probe_every patience reconstruct_every",
        "run": "output epochs min_steps seed resume overwrite save_minutes save_steps keep_states skip_steps tracker",
    }.items()
}
"""Components of a run, in the order of ``--help``, and their options."""
OTHER = "task"
"""The component of options that a task of one's own brings."""
LAYER_DECAY_TYPES = ("single", "group")
"""Choices of ``layer_decay_type``."""
_OF = {option: name for name, options in COMPONENTS.items() for option in options}


def component_of(option: str) -> str:
    """The component that an option belongs to."""
    return _OF.get(option, OTHER)


def by_component(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options below their components, in the order of :data:`COMPONENTS`."""
    found = {
        name: {option: values[option] for option in sorted(values, key=_place) if component_of(option) == name}
        for name in (*COMPONENTS, OTHER)
    }
    return {name: options for name, options in found.items() if options}


def _place(option: str) -> int:
    place = COMPONENTS.get(component_of(option), ())
    return place.index(option) if option in place else 0


def nearest(name: str, known: Collection[str]) -> str:
    """``"; did you mean lr?"``, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def unknown(name: str, known: Collection[str]) -> str:
    """Why ``name`` is refused where ``known`` are the options."""
    if name in _OF:
        return f"{name} is no option of this kind of run"
    near = [*known, *COMPONENTS] if name not in COMPONENTS else known
    return f"there is no option {one_line(name)}{nearest(name, near)}"


def plain_flags(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """Arguments of a command line with each flag as it is known: that of a component, as ``--optimizer.lr``, by itself.

    Raises:
        ValueError: if a flag is unknown, or of another component.
    """
    plain = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        component, _, name = flag.removeprefix("--").partition(".")
        if flag.startswith("--") and name and component in (*COMPONENTS, OTHER):
            flag = f"--{name}"
            home = component_of(name.removeprefix("no-").replace("-", "_"))
            if flag in flags and home != component:
                raise ValueError(f"{flag} belongs to {home}, not to {component}")
        if flag.startswith("--") and len(flag) > 2 and flag not in flags:
            if (option := flag[2:]) == option.lower() and option.replace("-", "_") in _OF and "_" not in option:
                raise ValueError(f"{flag} is no option of this kind of run")
            raise ValueError(f"there is no option {one_line(flag)}{nearest(flag, flags)}")
        plain.append(f"{flag}{equals}{value}")
    return plain
