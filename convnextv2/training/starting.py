"""What a run takes from the checkpoint of ``init`` beside weights: the shape of images and stem that was left open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from convnextv2.models.config import EncoderConfig
from convnextv2.training.hardware import COMPILE_MODES
from convnextv2.training.options import RunOptions
from convnextv2.training.recipe import option

if TYPE_CHECKING:
    from convnextv2.models.recomputing import Recomputing
    from convnextv2.weights.checkpoint import Checkpoint

N = TypeVar("N", bound="Recomputing")
USUAL = {"patch_size": 32, "in_chans": 3}
"""Where neither an option nor a checkpoint says."""


@dataclass(frozen=True, kw_only=True)
class StartOptions(RunOptions):
    """Options of a run whose network is one of ours, and may start from a checkpoint for other images."""

    patch_size: int | None = option(None, "pixels a patch side (total stride): 32, 16, 8; default: as --init, else 32")
    in_chans: int | None = option(None, "channels of the images; default: as --init, else 3")
    init_bands: str | None = option(
        None, "0,3,2,1: for each channel of the images the one of --init it starts from, counted from 1; 0 for none"
    )
    grad_checkpointing: bool = option(
        False, "recompute the encoder's blocks in the backward pass: less memory, a forward pass more, the same bits"
    )

    def check(self) -> None:
        """As every run's; blocks must be of a kind that can be recomputed."""
        from convnextv2.models.recomputing import compiles_recomputing
        from sparse_ops.backend import Backend  # with torch, as the others here: not for --help
        from sparse_ops.registry import registry

        super().check()
        backend = registry().get(getattr(self, "backend", ""))
        if self.grad_checkpointing and backend and type(backend).native_grid is not Backend.native_grid:
            raise ValueError(
                f"`grad_checkpointing`: between blocks the backend {backend.name} has features of a kind of its own, "
                "which are not made anew; use another `backend`, or leave it out"
            )
        if self.grad_checkpointing and self.compile in COMPILE_MODES and not compiles_recomputing():
            raise ValueError(
                "`grad_checkpointing` and `compile` exclude each other with this version of torch; use `compile` none"
            )

    def recomputing(self, model: N) -> N:
        """The network, which recomputes its blocks if that is asked for."""
        if self.grad_checkpointing:
            model.set_grad_checkpointing()
        return model

    def encoder(self) -> EncoderConfig:
        """The encoder, as of every run; what is left open is as usual."""
        left_open: dict[str, Any] = {name: value for name, value in USUAL.items() if getattr(self, name) is None}
        return replace(self, **left_open).encoder() if left_open else super().encoder()


O = TypeVar("O", bound=StartOptions)  # noqa: E741  # of options


def check_bands(options: StartOptions, in_chans: int | None = None) -> None:
    """Raise ValueError where ``init_bands`` is given without ``init``, or does not fit the channels of file and images.

    Args:
        options: of the run.
        in_chans: of the file; None where that is not read, because the run is resumed.
    """
    if options.init_bands and options.init is None:
        raise ValueError("`init_bands` says where the channels of `init` go; name that, too, or leave it out")
    if options.init_bands and in_chans is not None:
        from convnextv2.weights.adapting import parse_bands

        parse_bands(options.init_bands, in_chans, options.encoder().in_chans)


def from_init(options: O, resumed: bool) -> tuple[O, Checkpoint | None]:
    """Options with patch size and channels filled in, as the checkpoint of ``init`` has them, and that checkpoint.

    Of a run that is resumed the checkpoint is not read: its recipe says all.

    Raises:
        CheckpointError: if it cannot be read.
        ValueError: as :func:`check_bands`.
    """
    from convnextv2.weights.checkpoint import load_checkpoint
    from convnextv2.weights.reading import read_checkpoint

    found, checkpoint, in_chans = dict[str, Any](USUAL), None, None
    if options.init is not None and not resumed:
        checkpoint = load_checkpoint(options.init)
        config = read_checkpoint(checkpoint).config
        found, in_chans = {"patch_size": config.patch_size, "in_chans": config.in_chans}, config.in_chans
    filled = replace(options, **{name: value for name, value in found.items() if getattr(options, name) is None})
    check_bands(filled, in_chans)
    return filled, checkpoint
