"""What a checkpoint may hold, looked at before anything is loaded or built: small files stay small.

torch's own unpickler (``weights_only``) runs no code, but it makes what a file asks for, and a file of a few bytes can
ask for gigabytes: compressed entries, entries that share their bytes, a ``bytearray`` of any size, a tensor of one
number seen as a trillion.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convnextv2.messages import one_line


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is of another network, or does not fit: names the file, reason and remedy, in
    one line whatever names and values the file holds."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


SUFFIXES = (".safetensors", ".pth", ".pt")
"""Of the files that we write."""
MOST_ENTRIES = 20_000
"""Tensors in a file; the largest variant has under 400, and three times that with an optimizer's state."""
MOST_PICKLE = 8 * 2**20
"""Bytes of what a file says about its tensors; their numbers are stored apart."""
MOST_VALUES = 200_000
"""Of configuration and metadata: the 21,841 class names of ImageNet-22K, and then some."""
DEEPEST = 64
"""Levels of nesting."""
HARMLESS = re.compile(
    r"torch (Size|[a-z]\w*|\w+Storage)|torch\.nn\.parameter Parameter|torch\.storage \w+Storage"
    r"|torch\.serialization _get_layout|torch\._utils _rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?"
    r"|meta_tensor_no_storage|qtensor|sparse_tensor)"
    r"|collections (OrderedDict|Counter|defaultdict)|argparse Namespace|_codecs encode|(__)?builtin(__|s) (set|complex)"
)
"""What a pickle of weights names. What it may call of these, torch decides; what is made this way is no larger than the
file, or is found by :func:`check_state`."""


def check_zip(path: Path, harmless: re.Pattern[str] = HARMLESS) -> None:
    """Refuse an archive that holds more than its size in bytes, or names what is not ``harmless``.

    Raises:
        CheckpointError: with the reason.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickled = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > size:
                raise CheckpointError(
                    f"{path}: holds more than its {size:,} bytes (compressed, or the same bytes many times), which "
                    "torch never writes; load it where you trust it, and save its state dict"
                )
            if len(entries) > MOST_ENTRIES or any(entry.file_size > MOST_PICKLE for entry in pickled):
                raise CheckpointError(f"{path}: holds {len(entries):,} entries, more than any network of ours has")
            for entry in pickled:
                check_pickle(archive.read(entry), path, harmless)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise CheckpointError(f"{path}: truncated or damaged ({error}); copy or download it again") from error


def check_pickle(content: bytes | io.BytesIO, path: Path, harmless: re.Pattern[str] = HARMLESS) -> bool:
    """Whether ``content`` goes on with a pickle; CheckpointError if that asks for more than weights are made of."""
    strings: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name == "GLOBAL":
                _check_name(str(argument), path, harmless)
            elif code.name == "STACK_GLOBAL":
                _check_name(" ".join(strings[-2:]), path, harmless)
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    except CheckpointError:
        raise
    except (ValueError, pickle.UnpicklingError, EOFError, OverflowError, MemoryError):  # the reader says what is wrong
        return False
    return True


def _check_name(name: str, path: Path, harmless: re.Pattern[str]) -> None:
    if name == "torch._utils _rebuild_nested_tensor":  # the old format's are made with sizes that are not read yet
        raise CheckpointError(f"{path}: holds a nested tensor; only plain dense ones hold weights")
    if not harmless.fullmatch(name):
        what = name.replace(" ", ".")
        raise CheckpointError(
            f"{path}: holds Python objects beside tensors ({what[:80]}), which could run code, so it was not opened; "
            "in a place where you trust it, save its state dict alone"
        )


COMPILED = "_orig_mod."
"""What torch.compile adds to names."""


def check_state(state: Mapping[Any, Any], size: int) -> None:
    """Refuse what is no plain tensor of numbers that are all in the file, of ``size`` bytes.

    Raises:
        CheckpointError: naming the entry.
    """
    from torch import Tensor  # takes a second: not for --help

    if len(state) > MOST_ENTRIES:
        raise CheckpointError(f"holds {len(state):,} tensors, more than any network of ours has")
    plain_names = {str(name).replace(COMPILED, "") for name in state}
    if len(plain_names) < len(state):
        raise CheckpointError(f"holds weights of the same name with and without {COMPILED}; keep one of the two sets")
    seen, left = set[int](), size
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"the name {str(name)[:80]!r} in the state dict is {type(name).__name__}, not text")
        shown = name if len(name) <= 200 else f"{name[:80]}… ({len(name):,} letters)"
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{shown!r} in the state dict is {type(value).__name__}, not a tensor")
        kind = "quantised" if value.is_quantized else str(value.layout)
        kind = f"on {value.device}" if value.device.type != "cpu" else kind
        if kind != "torch.strided":
            raise CheckpointError(f"{shown} is a tensor that is {kind}; only plain dense ones hold weights")
        storage = value.untyped_storage()
        left -= 0 if storage.data_ptr() in seen else storage.nbytes()
        seen.add(storage.data_ptr())
        if value.numel() * value.element_size() > storage.nbytes() or left < 0:
            raise CheckpointError(f"{shown} says that it has {value.numel():,} numbers, more than the file holds")


def plain(value: Any) -> Any:
    """``value`` if JSON can hold it.

    Raises:
        ValueError: if it holds anything else, or itself, is nested deeper than :data:`DEEPEST`, or is no small thing.
    """
    left = MOST_VALUES

    def copied(value: Any, levels: int) -> Any:
        nonlocal left
        left -= 1
        if not levels or not left:
            raise ValueError(f"is nested deeper than {DEEPEST} levels, or holds more than {MOST_VALUES:,} values")
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {str(key): copied(item, levels - 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copied(item, levels - 1) for item in value]
        raise ValueError(f"holds {type(value).__name__}, which JSON cannot")

    return copied(value, DEEPEST)


def number(value: Any) -> float:
    """``value`` as a finite number; ValueError if it is none."""
    try:
        found = float(value)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{str(value)[:40]!r} is no number") from error
    if not math.isfinite(found):
        raise ValueError(f"{found} is not finite")
    return found
