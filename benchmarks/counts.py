"""Counts in place of times: what a block launches on a GPU, the bytes that each launch reads and writes, and the
instructions and registers of each Triton kernel.

Runs where there is no GPU. Bytes are counted in Triton's interpreter with the block shapes of a device: every load
and store as it is coded, for the masks at hand, whatever caches would keep of it. The floor beside them is each tensor
of a launch once; for torch's operators it is all that is known. Instructions are those of the cubin that
`scripts/warm_triton_cache.py` compiles; where a kernel has several block shapes to choose from, each is listed.

    TRITON_INTERPRET=1 python benchmarks/counts.py --models tiny base --json counts.json --markdown counts.md
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import gather
import torch
from common import DTYPES, write_report
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "set_"}
NO_KERNEL |= {"_unsafe_view", "lift_fresh", "resize_"}
"""Operators of aten that launch nothing on a device though they make tensors."""
WARM = Path(__file__).parents[1] / "scripts" / "warm_triton_cache.py"
OWN = {"launch", "backend"}
"""Modules that go on knowing that kernels are interpreted: they look for a device otherwise."""
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", re.M)


@dataclass
class Launch:
    """One kernel: its name, the bytes it reads and writes by the name of the argument, and the sizes of those."""

    name: str
    read: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    written: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each tensor among its arguments."""
    operator: str = ""
    """Of ours, inside of which it happens."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def floor(self) -> int:
        """Bytes if each tensor were read once and written once, as far as it is read or written at all."""
        return sum(self.sizes[name] for names in (self.read, self.written) for name in names)


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
            self.operator = func._schema.name.partition("::")[2]
            with self:
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            self.operator = ""
            return out
        if func._can_decompose():  # such as `to`, which is a view where it changes nothing
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = {t.untyped_storage().data_ptr() for t in given}
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        changes = func._schema.is_mutable
        views = not changes and made and all(t.untyped_storage().data_ptr() in places for t in made)
        if func.namespace == "aten" and name not in NO_KERNEL and not views:
            sizes = {f"in {i}": t.numel() * t.element_size() for i, t in enumerate(given)}
            sizes |= {f"out {i}": t.numel() * t.element_size() for i, t in enumerate(made)}
            read = {n: size for n, size in sizes.items() if n.startswith("in")}
            only_written = given[:1] if name in {"copy_", "fill_", "zero_"} else tree_leaves(kwargs.get("out"))
            read = {
                n: size
                for (n, size), t in zip(read.items(), given, strict=True)
                if not any(t is w for w in only_written)
            }
            written = {n: size for n, size in sizes.items() if n.startswith("out")}
            self.note(f"aten.{name}", read, written, sizes)
            if name == "addmm" and args[0].dim() == 2 and args[0] is not kwargs.get("out"):
                size = sizes["in 0"]
                self.note("aten.copy_", {"in 0": size}, {"out 0": size}, {"in 0": size, "out 0": size})
        return out

    def note(self, name: str, *counts: dict[str, int]) -> None:
        self._launches.append(Launch(name, *counts, operator=self.operator))


def rooms() -> list[Any]:
    """The modules of the backend."""
    package = importlib.import_module("sparse_ops.backends.triton")
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


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

    from sparse_ops.backends.triton import launch, products

    launches: list[Launch] = []
    places: list[tuple[int, int, str]] = []
    operators = _Operators(launches)
    builder, launch_it, interpreting = interpreter.InterpreterBuilder, launch.launch, launch.interpreting
    multiply = products._widened_product
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
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        tensors = [(name, tensor) for name, tensor in named.items() if isinstance(tensor, torch.Tensor)]
        sizes = {n: t.numel() * t.element_size() for n, t in tensors}
        operators.note(kernel.fn.__name__, defaultdict(int), defaultdict(int), sizes)
        if not execute:
            return
        places[:] = [(t.data_ptr(), t.data_ptr() + max(1, t.nbytes), name) for name, t in tensors]
        with torch.utils._python_dispatch._disable_current_modes():
            launch_it(kernel, grid, *args, **constants)

    def counted_product(out: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            made = multiply(out, a, b, dtype)
        sizes = {name: t.numel() * t.element_size() for name, t in (("a", a), ("b", b), ("out", made))}
        read = {name: size for name, size in sizes.items() if name != "out" or out is not None}
        operators.note("aten.mm" if out is None else "aten.addmm_", read, {"out": sizes["out"]}, sizes)
        return made

    with contextlib.ExitStack() as stack:
        for module in rooms():
            if getattr(module, "launch", None) is launch_it:
                stack.enter_context(mock.patch.object(module, "launch", counted_launch))
            if getattr(module, "interpreting", None) is interpreting and module.__name__.rpartition(".")[2] not in OWN:
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


@dataclass(frozen=True)
class Row:
    """A kernel of a block, as often as it is launched in a pass; bytes are for each number of ``[N, C]``, a launch."""

    model: str
    stage: int
    channels: int
    pass_: str
    kernel: str
    launches: int
    read: float
    written: float
    floor: float
    instructions: str | None = None
    registers: str | None = None


def rows_of(found: BlockCounts, sizes: dict[str, list[tuple[int, int]]]) -> list[Row]:
    """The launches of a block, those of one kernel that move alike as one row.

    Args:
        found: the launches.
        sizes: of a kernel's name, instructions and registers of its variants.
    """
    rows = []
    for pass_, launches in (("forward", found.forward), ("backward", found.backward)):
        kinds: dict[tuple[str, int, int, int], int] = defaultdict(int)
        for launch in launches:
            kinds[launch.name, sum(launch.read.values()), sum(launch.written.values()), launch.floor] += 1
        for (name, read, written, floor), count in kinds.items():
            variants = sorted(set(sizes.get(name, [])))
            instructions, registers = (", ".join(str(v[i]) for v in variants) or None for i in (0, 1))
            each = [number / (found.cells * found.channels) for number in (read, written, floor)]
            place = found.model, found.stage, found.channels, pass_
            rows.append(Row(*place, name, count, *each, instructions, registers))
    return rows


def compiled_sizes(model: str, dtype: str, arch: int, cache: Path) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Instructions and registers of each kernel: by channels of its stage and its name, for each block shape.

    Raises:
        RuntimeError: if a kernel does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, WARM, str(cache), "--arch", str(arch), "--models", model, "--dtypes", dtype]
    environment["PYTHONPATH"] = os.pathsep.join([str(WARM.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{WARM.name} {model}: {done.stderr.strip()[-500:]}")
    found: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for kernel in json.loads((cache / "warmed.json").read_text(encoding="utf-8"))["kernels"]:
        if kernel["kernel_size"] == 7:
            cubin = next((cache / kernel["folder"]).glob("*.cubin"))
            found[kernel["channels"], kernel["kernel"]].append((instructions(cubin), kernel["registers"]))
    return found


def instructions(cubin: Path) -> int:
    """Of its machine code, without the padding."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True)
    return len(INSTRUCTION.findall(done.stdout))


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
    """Print a table for each stage, and write the files after each; 2 if Triton does not interpret."""
    from convnextv2.models.masking import keep_count, random_mask
    from sparse_ops import ActiveSet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "base"], help="variants, atto … huge")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--batch-size", type=int, default=2, help="images")
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--arch", type=int, default=90, help="of the instructions; 0 for none")
    parser.add_argument("--cache", type=Path, help="Triton's, for what is compiled; a temporary one if left out")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--markdown", type=Path, help="write a table for each model and stage to this file")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args.cache = None
        for model in args.models:
            name = model if model.startswith("convnextv2_") else f"convnextv2_{model}"
            sizes = compiled_sizes(name, args.dtype, args.arch, cache.resolve()) if args.arch else {}
            keep = keep_count(49, args.mask_ratio)
            active = ActiveSet.from_mask(random_mask(args.batch_size, 49, args.mask_ratio), (7, 7), keep=keep)
            for stage in range(1, 5):
                if stage in args.stages:
                    residual = torch.float32 if stage == 1 else DTYPES[args.dtype]
                    found = block_counts(name, stage, active, DTYPES[args.dtype], residual)
                    of_stage = {
                        kernel: size for (channels, kernel), size in sizes.items() if channels == found.channels
                    }
                    rows += rows_of(found, of_stage)
                    write_report({"triton": importlib.import_module("triton").__version__}, args, rows)
                    if args.markdown is not None:
                        gather.write_text(args.markdown, markdown(rows))
                    print(markdown([r for r in rows if (r.model, r.stage) == (name, stage)]), flush=True)
                active = active.down() if active.side > 1 else active
    return 0


def markdown(rows: list[Row]) -> str:
    """A table for each model and stage."""
    tables = []
    for model, stage in dict.fromkeys((row.model, row.stage) for row in rows):
        own = [row for row in rows if (row.model, row.stage) == (model, stage)]
        forward, backward = (sum(r.launches for r in own if r.pass_ == p) for p in ("forward", "backward"))
        moved = sum(r.launches * (r.read + r.written) for r in own)
        floor = sum(r.launches * r.floor for r in own)
        cells = [
            (
                r.pass_,
                r.kernel,
                r.launches,
                f"{r.read:.2f}",
                f"{r.written:.2f}",
                f"{r.floor:.2f}",
                r.instructions,
                r.registers,
            )
            for r in own
        ]
        head = "pass", "kernel", "launches", "read", "written", "floor", "instructions", "registers"
        lines = [head, ["---"] * len(head), *cells]
        tables.append(
            f"{model}, stage {stage}, C={own[0].channels}: {forward} + {backward} launches, {moved:.1f} bytes a number "
            f"of `[N, C]`, {floor:.1f} if each launch moved each of its tensors once\n\n"
            + "\n".join(f"| {' | '.join('' if c is None else str(c) for c in line)} |" for line in lines)
        )
    return "\n\n".join(tables) + "\n"


if __name__ == "__main__":
    sys.exit(main())
