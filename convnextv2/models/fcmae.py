"""The fully convolutional masked autoencoder (ConvNeXt V2, section 3.1): mask → encode → densify → decode → loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convnextv2.models.config import EncoderConfig, FCMAEConfig, encoder_config
from convnextv2.models.encoder import Block, Encoder, check_images
from convnextv2.models.layers import init_weights
from convnextv2.models.masking import keep_count, random_mask
from convnextv2.models.no_data import valid_loss
from convnextv2.models.recomputing import Recomputing, tracing_tables
from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.grid import DenseGrid, GRNScope
from sparse_ops.layers import pointwise_conv
from sparse_ops.pointwise import autocast_dtype
from sparse_ops.registry import get_backend, resolve_backend
from sparse_ops.sparse_grid import SparseGrid

TARGET_EPS = 1e-6


class FCMAEOutput(NamedTuple):
    """What :class:`FCMAE` returns; unpacks as ``loss, pred, mask``."""

    loss: Tensor
    """``[]``, float32."""
    pred: Tensor | None
    """``[B, patch_size² · in_chans, gh, gw]``, or None where only the loss was asked for."""
    mask: Tensor
    """``[B, L]``: 1 = masked, 0 = visible."""


class FCMAE(Recomputing):
    """Sparse ConvNeXt V2 encoder, light dense decoder, reconstruction loss on the masked patches.

    ``backend`` is the name of the backend of the sparse depthwise convolution; ``auto`` takes the best available.
    """

    def __init__(self, config: FCMAEConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend: str | Backend = backend
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        width = config.decoder_dim
        self.encoder = Encoder(config.encoder)
        self.proj = nn.Conv2d(config.encoder.dims[-1], width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.ModuleList(Block(width) for _ in range(config.decoder_depth))
        self.pred = nn.Conv2d(width, config.encoder.patch_size**2 * config.encoder.in_chans, 1)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_ratio: float | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        return_pred: bool = True,
        valid: Tensor | None = None,
    ) -> FCMAEOutput:
        """Reconstruct masked images.

        Args:
            images: ``[B, in_chans, H, W]`` with H and W divisible by the patch size; masked pixels enter the loss only.
            mask: ``[B, L]`` or ``[B, gh, gw]``, 1 = masked; any number of visible patches per image. Drawn if None.
            mask_ratio: share to mask where ``mask`` is drawn; the configuration's if None.
            generator: source of randomness of the mask.
            noise: ``[B, L]``, instead of what it would draw: see :func:`~.masking.random_mask`.
            return_pred: False computes the decoder's last layers for the masked patches only and returns None for
                the prediction; the loss is the same to rounding.
            valid: bool, of the images' shape: pixels without data weigh nothing in the loss. None where all is data.

        Returns:
            ``(loss, pred, mask)``. The loss is the mean over the masked patches of the mean squared error of a
            patch, in float32; 0 if nothing is masked.

        Raises:
            ValueError: if shapes do not fit, the ratio leaves no patch or every patch visible, or the mask holds
                anything but 0 and 1.
        """
        check_images(images, self.config.encoder.in_chans, self.config.encoder.patch_size)
        batch, (gh, gw), keep = images.shape[0], self._grid_size(images), None
        if mask is None:
            ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
            keep = keep_count(gh * gw, ratio)  # in every image: known without a look at the mask
            mask = random_mask(batch, gh * gw, ratio, generator=generator, noise=noise, device=images.device)
        elif mask_ratio is not None or noise is not None:
            raise ValueError("give a mask or a mask_ratio, not both, nor noise to draw one from")
        elif tuple(mask.shape) not in ((batch, gh, gw), (batch, gh * gw)):
            expected = f"a mask [{batch}, {gh * gw}] for a patch grid of {gh}×{gw}"
            raise ValueError(f"expected {expected}, got {tuple(mask.shape)}")
        else:
            mask = mask.flatten(1).to(images.device)
            if mask.is_complex() or not torch.all((mask == 0) | (mask == 1)):
                raise ValueError("a mask holds 1 (masked) and 0 (visible) only")
            mask = mask.float()
        backends = self._backends(images.device)
        loss, pred = ((keep and self._compiled) or self._masked)(images, mask, keep, backends, return_pred, valid)
        return FCMAEOutput(loss, pred, mask)

    def _backends(self, device: torch.device) -> tuple[Backend, Backend]:
        """Those of the encoder and the decoder, warmed up for a step, which they do once."""
        config, dtype = self.config, autocast_dtype(device) or self.mask_token.dtype
        block: Any = self.decoder[0]
        decoder_kernel = block.dwconv.kernel_size[0]
        parts = (config.encoder.stages, config.encoder.kernel_size), ([(1, config.decoder_dim)], decoder_kernel)
        found = [resolve_backend(self.backend, device, dtype, kernel_size) for _, kernel_size in parts]
        if not torch.compiler.is_compiling():
            for backend, part in zip(found, parts, strict=True):
                backend.warm_up(*part, device, dtype)
        return found[0], found[1]

    def compile(self, **options: Any) -> None:
        """Compile everything after the mask is drawn, with ``options`` of :func:`torch.compile`; one graph, no breaks.

        Parameters and their names stay as they are. With a mask that is given, whose number of visible patches no graph
        can know, it runs uncompiled. ``mode="reduce-overhead"`` runs it as CUDA graphs: then shapes must not change.
        """
        self._compiled = tracing_tables(torch.compile(self._masked, fullgraph=True, **options))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # copies are not compiled

    def _masked(
        self, images: Tensor, mask: Tensor, keep: int | None, backends: Any, return_pred: bool, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and prediction, with the backends of the encoder and the decoder."""
        grid_size = self._grid_size(images)
        visible = ActiveSet.from_mask(mask, grid_size, keep=keep)
        hidden = ActiveSet.from_mask(1 - mask, grid_size, side=1, keep=None if keep is None else mask.shape[1] - keep)
        features, grid = self.encode(images, visible, backends[0])
        rows = None if return_pred else hidden.patch_index
        pred = pointwise_conv(self.pred, self.decode(features, grid, rows, backends[1]))
        found = hidden.gather(pred) if return_pred else pred
        if valid is None:
            loss = self.loss(found, self.targets(images, hidden))
        else:
            loss = valid_loss(found, images, valid, hidden, TARGET_EPS if self.config.norm_pix_loss else None)
        return loss, pred.permute(0, 3, 1, 2) if return_pred else None

    def _grid_size(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.config.encoder.patch_size, images.shape[3] // self.config.encoder.patch_size

    def encode(
        self, images: Tensor, visible: ActiveSet, backend: str | Backend | None = None
    ) -> tuple[Tensor, SparseGrid]:
        """Features ``[P, C]`` of the visible patches, and the sparse grid of the last stage; the network's own backend
        by default."""
        grid = SparseGrid(visible, self.backend if backend is None else backend, self.config.grn_scope)
        *_, (features, last) = self.encoder.forward_stages(images, grid)
        assert isinstance(last, SparseGrid)
        return features, last

    def decode(
        self, features: Tensor, grid: SparseGrid, rows: Tensor | None = None, backend: Backend | None = None
    ) -> Tensor:
        """Decoder output ``[B, gh, gw, decoder_dim]`` from the features of the visible patches.

        The mask token takes the place of masked patches after the projection, as in the official code. With ``rows``,
        the indices ``[M]`` of patches in the batch, only those are computed: ``[M, decoder_dim]``. The decoder runs on
        ``backend`` where that fuses its layers, by default the encoder's, and else dense.
        """
        backend = grid.backend if backend is None else backend
        map_ = grid.active.densify(pointwise_conv(self.proj, features), fill=self.mask_token.flatten())
        everything: DenseGrid | SparseGrid = DenseGrid(grid.batch_size)
        if backend.fuses_mlp(map_.device, map_.dtype, self.mask_token.dtype):
            full = ActiveSet.full(grid.batch_size, grid.active.map_size, side=1, device=map_.device)
            everything = SparseGrid(full, backend)
        # Rows of single cells are in row-major order, so the dense map is a sparse one with nothing masked.
        x = map_.flatten(0, 2) if isinstance(everything, SparseGrid) else everything.features(map_)
        *blocks, last = self.decoder
        for block in blocks:
            x = block(x, everything)
        x = last(x, everything, rows)
        return x if rows is not None else everything.cells(x).view(map_.shape)

    def targets(self, images: Tensor, hidden: ActiveSet) -> Tensor:
        """Target pixels ``[M, patch_size² · in_chans]`` of the masked patches, float32, channels last in a patch.

        With ``norm_pix_loss`` each patch is normalised by its own mean and unbiased variance.
        """
        patches = hidden.gather_patches(images).float()
        channels = self.config.encoder.in_chans
        target = patches.view(patches.shape[0], channels, patches.shape[1] // channels).transpose(1, 2).flatten(1)
        if not self.config.norm_pix_loss:
            return target
        # LayerNorm, whose variance is the biased one, is one pass over the pixels.
        pixels = target.shape[1]
        biased = (pixels - 1) / pixels
        scale = target.new_full((pixels,), biased**0.5)
        return nn.functional.layer_norm(target, (pixels,), scale, eps=biased * TARGET_EPS)

    @staticmethod
    def loss(pred_hidden: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over the masked patches, in float32; every patch has the same number of pixels."""
        return nn.functional.mse_loss(pred_hidden.float(), target, reduction="mean" if target.numel() else "sum")

    @torch.no_grad()
    def reconstruct(self, images: Tensor, pred: Tensor) -> Tensor:
        """Prediction as images ``[B, in_chans, H, W]`` in the value range of ``images``.

        With ``norm_pix_loss`` each patch is de-normalised with its own mean and variance, masked ones included.
        """
        grid_size = pred.shape[2], pred.shape[3]
        rows = pred.permute(0, 2, 3, 1).flatten(0, 2).float()
        everything = ActiveSet.full(images.shape[0], grid_size, side=1, device=images.device)
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(everything.gather_patches(images).float(), dim=1, keepdim=True)
            rows = rows * (variance + TARGET_EPS).sqrt() + mean
        return unpatchify(rows.view(images.shape[0], -1, rows.shape[1]), grid_size, images.shape[1])


def unpatchify(patches: Tensor, grid_size: tuple[int, int], channels: int) -> Tensor:
    """``[B, L, p·p·channels]``, channels last in a patch, to images ``[B, channels, gh·p, gw·p]``."""
    batch, _, pixels = patches.shape
    side = round((pixels // channels) ** 0.5)
    by_channel = patches.view(batch, *grid_size, side**2, channels).permute(0, 4, 3, 1, 2)
    return nn.functional.pixel_shuffle(by_channel.flatten(1, 2), side)


def pixel_mask(mask: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Mask ``[B, L]`` as a map over pixels, ``[B, 1, gh·p, gw·p]``."""
    return nn.functional.interpolate(mask.view(mask.shape[0], 1, *grid_size), scale_factor=patch_size)


def create_fcmae(
    name: str | EncoderConfig,
    *,
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 32,
    in_chans: int = 3,
    backend: str = "auto",
    grn_scope: GRNScope = "image",
    mask_ratio: float = 0.6,
    decoder_depth: int = 1,
    decoder_dim: int = 512,
    norm_pix_loss: bool = True,
    drop_path_rate: float = 0.0,
) -> FCMAE:
    """Masked autoencoder around a published variant, or around a custom :class:`~.config.EncoderConfig`.

    Args:
        name: ``convnextv2_atto`` … ``convnextv2_huge``, or a configuration (then ``patch_size``, ``in_chans`` and
            ``drop_path_rate``, as :class:`~.config.EncoderConfig` has them, are taken from it).
        img_size: pixels, (H, W) or one number for a square.
        backend: ``auto`` or the name of a backend (``python -m sparse_ops`` lists them).
        grn_scope, mask_ratio, decoder_depth, decoder_dim, norm_pix_loss: as :class:`~.config.FCMAEConfig`.

    Raises:
        ValueError: if the name is unknown or an option is out of range.
        BackendUnavailableError: if the backend named cannot run here.
    """
    encoder = encoder_config(name, patch_size=patch_size, in_chans=in_chans, drop_path_rate=drop_path_rate)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    config = FCMAEConfig(encoder, size, mask_ratio, decoder_depth, decoder_dim, norm_pix_loss, grn_scope)
    keep_count(config.grid_size[0] * config.grid_size[1], mask_ratio)
    if backend != "auto":
        get_backend(backend)
    return FCMAE(config, backend)
