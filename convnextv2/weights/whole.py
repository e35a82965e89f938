"""Whether a file can be a checkpoint, and is all of one, without loading it: what is asked of a download."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from convnextv2.weights.guard import CheckpointError, check_zip
from convnextv2.weights.old_format import check_old_format

OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How files begin that torch wrote before version 1.6: a pickle of a magic number."""


EXPORTED = (".onnx", ".pt2")


def check_start(path: Path) -> bytes:
    """The first bytes of the file, once they do not show that it is something else altogether.

    Raises:
        CheckpointError: if it is empty, a web page, a pointer to a file, or an exported program.
        OSError: if it cannot be opened.
    """
    if path.suffix in EXPORTED:
        raise CheckpointError(f"{path}: is a program that was exported; give the checkpoint that it was made from")
    with path.open("rb") as file:
        start = file.read(64)
    text = start.lstrip().lower()
    if not start:
        raise CheckpointError(f"{path}: the file is empty; copy or download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: this is a web page, not a checkpoint (a download that led to a log-in or error page?)"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: this is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    return start


def is_archive(start: bytes) -> bool:
    """Whether a file that starts so is one of torch's archives."""
    return start.startswith(b"PK\x03\x04")


def is_safetensors(start: bytes) -> bool:
    """Whether a file that starts so is of the safetensors format."""
    return not is_archive(start) and start[8:9] == b"{"


def check_whole(path: Path) -> None:
    """Refuse a file that is no container of weights, or is cut: by the directory at an archive's end, the sizes in the
    header of safetensors, the pickles of the old format, all of which are read, and none of the numbers.

    Raises:
        CheckpointError: with the reason.
        OSError: if it cannot be opened.
    """
    start = check_start(path)
    if is_archive(start):
        check_zip(path)
    elif is_safetensors(start):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or damaged safetensors file ({error})") from error
    elif start.startswith(OLD_FORMAT):
        check_old_format(path)
    else:
        raise CheckpointError(f"{path}: is not a torch checkpoint or safetensors file")
