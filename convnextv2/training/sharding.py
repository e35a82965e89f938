"""Weights, gradients and the optimizer's moments in shards, one a process: PyTorch's FSDP2, block by block.

Outside of forward and backward passes a parameter is a ``DTensor``, of which each process has its part. A block's
parameters are gathered before it computes, forward and backward, and let go afterwards. What is written down, or looked
at after an epoch, is whole, so files are the same with shards and without.

accelerate has FSDP2 for accelerators alone; this serves processors, too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.models.encoder import Block
from convnextv2.models.fcmae import FCMAE
from sparse_ops.backend import Backend
from sparse_ops.registry import resolve_backend


class Sharding:
    """Shards of a run's networks, if its options ask for them; without, all is left to accelerate.

    Args:
        options: of the run.
        accelerator: of its processes.

    Raises ValueError if shards are asked for, and there is one process.
    """

    def __init__(self, options: Any, accelerator: Any) -> None:
        self._accelerator, self._plain = accelerator, None
        self._on = options.sharding == "full"
        if self._on and accelerator.num_processes == 1:
            raise ValueError(
                "`sharding` full shares weights among processes, and this run has one; start several with torchrun or "
                "accelerate launch, or use `sharding` none"
            )

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The network and its new optimizer as accelerate prepares them, the network in shards.

        Raises ValueError if the blocks of a masked autoencoder run on a backend that cannot compute with shards.
        """
        if not self._on:
            return self._accelerator.prepare(model, optimizer)
        self._check_backend(model)
        self._plain = without_weights(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.shard(model)
        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[names[parameter]] for parameter in group["params"]]
        wrapped = self._accelerator.prepare_model(model, evaluation_mode=True)  # which is without DDP
        return wrapped, self._accelerator.prepare_optimizer(optimizer)

    def _check_backend(self, model: nn.Module) -> None:
        """FSDP sees the tensors that a block gives, and gathers its weights again when their gradient comes."""
        if not isinstance(model, FCMAE):
            return
        dtype = torch.bfloat16 if self._accelerator.mixed_precision == "bf16" else torch.float32
        kernel_size = model.config.encoder.kernel_size
        backend = resolve_backend(model.backend, self._accelerator.device, dtype, kernel_size)
        if type(backend).native_grid is not Backend.native_grid:
            raise ValueError(
                f"`sharding` full: between blocks the backend {backend.name} has features of a kind of its own, for "
                "which weights are not gathered again in the backward pass; use another `backend`"
            )

    def shard(self, model: nn.Module) -> None:
        """Cut the parameters of a network, where they are, into shards: those of each block, and the others."""
        if not self._on:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._accelerator.device.type, (self._accelerator.num_processes,))
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # no others are served
        blocks = [module for module in model.modules() if isinstance(module, Block) and module is not model]
        for module in (*blocks, model):
            # By default the outermost keeps its whole parameters after a pass that is not followed by a backward one.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def whole(self, model: Any) -> Any:
        """A plain network with the weights of ``model`` as they are now, on the device; or itself, without shards.

        For all processes at once; each has one of its own then, which none of the others is needed for.

        Args:
            model: the network of the run, or an average of it.
        """
        if self._plain is None:
            return model
        network = copy.deepcopy(self._plain)
        network.load_state_dict({name: full(value) for name, value in model.state_dict().items()}, assign=True)
        return network.to(self._accelerator.device)


def without_weights(model: nn.Module) -> Any:
    """A copy of a network whose parameters are on the meta device, and take no memory."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def full(value: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a shard, for all of them at once; any other as it is."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def as_shards(state: dict[str, Any], target: Any) -> dict[str, Any]:
    """A state of whole tensors, with those cut that ``target`` has in shards; each process has all of it.

    Args:
        state: as ``target.load_state_dict`` takes it.
        target: a network, an optimizer, or anything else that has a state, which then has no shards.
    """
    if isinstance(target, torch.optim.Optimizer):
        parameters = [parameter for group in target.param_groups for parameter in group["params"]]
        cut = {
            number: {name: _shard_like(parameters[number], value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": cut}
    own = target.state_dict() if isinstance(target, nn.Module) else {}
    return {name: _shard_like(own.get(name), value) for name, value in state.items()}


def _shard_like(own: Any, value: Any) -> Any:
    """Tensors of another shape than ``own``, which belong to another network, are left whole."""
    if not hasattr(own, "full_tensor") or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
