"""Counts in place of times: what a block launches on a GPU, and the bytes that each Triton kernel reads and writes.

Runs where there is no GPU, in the interpreter of Triton with the block shapes of a device: every load and store is
counted as it is coded, for the masks at hand, whatever caches would keep of it.

    TRITON_INTERPRET=1 python benchmarks/counts.py --models tiny base
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "set_"}
NO_KERNEL |= {"_unsafe_view", "lift_fresh", "resize_"}
"""Operators of aten that launch nothing on a device though they are no views."""


@dataclass
class Launch:
    """One kernel: its name, and for Triton's the bytes it reads and writes by the name of the argument."""

    name: str
    operator: str = ""
    """Of ours, inside of which it happens."""
    read: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    written: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class _Operators(TorchDispatchMode):
    """Notes torch's operators that launch a kernel, also those inside of ours.

    One launch each: a sum in two passes and a product split over its inner dimension count once, and so does the bias
    of a product, which cuBLAS adds itself; what a product is added to is copied first, unless it is the result.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches
        self.operator = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sparse_ops":
            backend = importlib.import_module(f"sparse_ops.backends.triton.{_room(func)}")
            self.operator = func._schema.name.partition("::")[2]
            with self:
                out = getattr(backend, self.operator)._init_fn(*args, **kwargs)
            self.operator = ""
            return out
        if func._can_decompose():  # such as `to`, which is a view where it changes nothing
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "aten" and not func.is_view and name not in NO_KERNEL:
            self.note(f"aten.{name}")
            if name == "addmm" and args[0].dim() == 2 and args[0] is not kwargs.get("out"):
                self.note("aten.copy_")
        return out

    def note(self, name: str) -> Launch:
        self._launches.append(Launch(name, self.operator))
        return self._launches[-1]


def _room(func: Any) -> str:
    name = func._schema.name.partition("::triton_")[2]
    return "depthwise" if "depthwise" in name else name


@contextlib.contextmanager
def counting(execute: bool = True) -> Iterator[list[Launch]]:
    """The launches of what runs inside, in their order; ``TRITON_INTERPRET`` must be 1.

    Args:
        execute: False leaves Triton's kernels out, which is quick: launches are counted, bytes are not.

    Raises:
        RuntimeError: if kernels would not be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("launches are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    from triton.runtime import interpreter

    from sparse_ops.backends.triton import depthwise, launch, mlp, products

    launches: list[Launch] = []
    places: list[tuple[int, int, str]] = []
    operators = _Operators(launches)
    builder, launch_it, multiply = interpreter.InterpreterBuilder, launch.launch, products._widened_product
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(counts: dict[str, int], pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data.astype(bool)] if mask is not None else pointers.data.ravel()
        if not used.size:
            return
        first, size = int(used.flat[0]), pointers.get_element_ty().primitive_bitwidth // 8
        name = next(name for begin, end, name in places if begin <= first < end)
        counts[name] += used.size * size

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(launches[-1].read, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(launches[-1].written, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        operators.note(kernel.fn.__name__)
        if not execute:
            return
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        tensors = [(name, tensor) for name, tensor in named.items() if isinstance(tensor, torch.Tensor)]
        places[:] = [(t.data_ptr(), t.data_ptr() + max(1, t.nbytes), name) for name, t in tensors]
        with torch.utils._python_dispatch._disable_current_modes():
            launch_it(kernel, grid, *args, **constants)

    def counted_product(*args: Any) -> torch.Tensor:
        operators.note("aten.mm")
        with torch.utils._python_dispatch._disable_current_modes():
            return multiply(*args)

    with contextlib.ExitStack() as stack:
        for module in (depthwise, mlp):
            stack.enter_context(mock.patch.object(module, "launch", counted_launch))
            stack.enter_context(mock.patch.object(module, "interpreting", lambda: False))
        stack.enter_context(mock.patch.object(builder, "create_masked_load", counted_load))
        stack.enter_context(mock.patch.object(builder, "create_masked_store", counted_store))
        stack.enter_context(mock.patch.object(products, "_widened_product", counted_product))
        stack.enter_context(operators)
        yield launches


@dataclass(frozen=True)
class BlockCounts:
    """What a block launches on one stage, forward and backward."""

    model: str
    stage: int
    channels: int
    cells: int
    forward: list[Launch]
    backward: list[Launch]

    def bytes_per_number(self, launch: Launch) -> float:
        """Bytes read and written, by the numbers of the features ``[N, C]``."""
        return (sum(launch.read.values()) + sum(launch.written.values())) / (self.cells * self.channels)


def block_counts(
    model: str, stage: int, active: Any, dtype: torch.dtype, residual: torch.dtype, execute: bool = True
) -> BlockCounts:
    """Forward and backward pass of a block of stage 1, 2, 3 or 4 on ``active``, under autocast to ``dtype``.

    Args:
        model: a variant's name.
        stage: from 1.
        active: the active set of the stage.
        dtype: what is computed in.
        residual: dtype of the block's input; float32 in stage 1 on CUDA, where autocast leaves the stem's LayerNorm so.
        execute: see :func:`counting`.
    """
    from convnextv2.models.config import encoder_config
    from convnextv2.models.encoder import Block
    from sparse_ops import SparseGrid, get_backend

    channels = encoder_config(model).dims[stage - 1]
    block = Block(channels)
    x = torch.randn(active.num_cells, channels).to(residual).requires_grad_()
    get_backend("triton").prepare(active, 7)  # tables are made once a stage, not once a block
    _ = active.row_offsets
    with counting(execute) as forward, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = block(x, SparseGrid(active, "triton"))
    grad = torch.randn(out.shape).to(out.dtype)
    with counting(execute) as backward:
        out.backward(grad)
    return BlockCounts(model, stage, channels, active.num_cells, forward, backward)


def main(argv: list[str] | None = None) -> int:
    """Print a table for each stage."""
    import argparse

    from common import DTYPES

    from convnextv2.models.masking import keep_count, random_mask
    from sparse_ops import ActiveSet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "base"], help="variants, atto … huge")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--batch-size", type=int, default=2, help="images")
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    for model in args.models:
        name = model if model.startswith("convnextv2_") else f"convnextv2_{model}"
        active = ActiveSet.from_mask(
            random_mask(args.batch_size, 49, args.mask_ratio), (7, 7), keep=keep_count(49, args.mask_ratio)
        )
        for stage in range(1, 5):
            if stage in args.stages:
                residual = torch.float32 if stage == 1 else DTYPES[args.dtype]
                found = block_counts(name, stage, active, DTYPES[args.dtype], residual)
                print(f"{name}, stage {stage}, C={found.channels}, {found.cells} cells, {args.dtype}:", end=" ")
                print(f"{len(found.forward)} + {len(found.backward)} launches", flush=True)
                for launch in (*found.forward, *found.backward):
                    parts = [
                        f"{name} {count / found.cells / found.channels:.2f}" for name, count in launch.read.items()
                    ]
                    print(f"  {launch.name:<32}{found.bytes_per_number(launch):>7.2f} bytes a number; reads", *parts)
            active = active.down() if active.side > 1 else active
    return 0


if __name__ == "__main__":
    sys.exit(main())
