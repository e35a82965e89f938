"""What the commands share: one-line errors, progress, notices, and the parsing of everyday options."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from convnextv2.messages import one_line
from convnextv2.outputs import output_path
from convnextv2.training.reporting import bar

if TYPE_CHECKING:
    import torch

    from convnextv2.training.result import ValidatedResult

TRACEBACK_VARIABLE = "CONVNEXTV2_TRACEBACK"
"""Set this environment variable to 1 to see the traceback of an error that is otherwise told in one line."""

EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError)
"""What wrong options, files, folders and machines raise. CheckpointError and DataError are ValueErrors."""

OF_LIBRARIES = (
    ("sparse_ops.registry", "BackendUnavailableError"),
    ("safetensors", "SafetensorError"),
    ("torch", "OutOfMemoryError"),
)
"""The same of modules that are not imported for their errors' sake."""

TOO_LARGE = ("can't allocate memory", "size calculation overflowed")
"""In the RuntimeErrors of torch where somebody asks for more than there is, or than 64 bits can count."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and exit with its status.

    Errors that the user can act on become one line on stderr and status 2; Ctrl-C is status 130; a closed pipe
    (``| head``) ends the script quietly. Anything else is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of any alphabet on a terminal of any encoding
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if os.environ.get("RANK", "0") != "0":  # of the processes of a run the first one speaks, and each of its own end
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {with_flags(one_line(message))}\n"
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        warn("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's own flush complains
        sys.exit(1)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1" or not is_expected(error):
            raise
        warn(f"error: {describe(error)}")
        sys.exit(2)
    sys.exit(status or 0)


def is_expected(error: Exception) -> bool:
    """Whether the user can act on an error."""
    known = [getattr(sys.modules[module], name) for module, name in OF_LIBRARIES if module in sys.modules]
    if isinstance(error, (*EXPECTED_ERRORS, *known)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TOO_LARGE)


class Parser(argparse.ArgumentParser):
    """argparse's parser, which repeats what it does not know as it is: here in one line."""

    def __init__(self, *, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog=prog or Path(sys.argv[0]).name, **options)

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


@cache
def options() -> set[str]:
    """Names that a message of the package may hold in backticks."""
    from convnextv2.segmentation import SegmentOptions
    from convnextv2.training import FinetuneOptions, PretrainOptions

    of_runs = {item.name for kind in (PretrainOptions, FinetuneOptions, SegmentOptions) for item in fields(kind)}
    return of_runs | {"config", "processes"}


def with_flags(text: str) -> str:
    """A message of the package as the command line says it: an option in backticks becomes its flag."""
    return re.sub(
        r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}" if found[1] in options() else found[0], text
    )


class LogFormat(logging.Formatter):
    """Lines of a log, :func:`with_flags`."""

    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record))


def describe(error: BaseException) -> str:
    """An error in one line: for the operating system's the file and the reason, else the message."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror)
    return one_line(error) or type(error).__name__


def say(text: str = "") -> None:
    """One line of results, on stdout."""
    sys.stdout.write(f"{with_flags(text)}\n")
    sys.stdout.flush()


def say_once(text: str, tell: Callable[[str], None] = say) -> None:
    """:func:`say`, or what ``tell`` is; of the processes of a run the first one only."""
    from accelerate import PartialState  # takes a second: not for --help

    if PartialState().is_main_process:
        tell(text)


def warn(text: str) -> None:
    """One line beside the results, on stderr."""
    sys.stderr.write(f"{with_flags(text)}\n")
    sys.stderr.flush()


def add_output(parser: argparse.ArgumentParser, default: str, help: str) -> None:
    """The options ``--output`` and ``--overwrite`` of a command that writes one file."""
    parser.add_argument("--output", type=output_path, default=Path(default), help=help)
    parser.add_argument("--overwrite", action="store_true", help="let the output replace a file of another kind")


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell of a table begins that spreadsheets run."""


def plain_cell(text: str) -> str:
    """The text, which a spreadsheet would otherwise take for a formula, behind an apostrophe."""
    return f"'{text}" if text.startswith(FORMULA) else text


def plain_name(file: str) -> str:
    """The same of a file's name, with ``./`` in front, which leaves it what it was."""
    return f"./{file}" if file.startswith(FORMULA) else file


def starts_with(path: Path, start: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(start)) == start


def say_skipped(skipped: Sequence[tuple[Path, str]], shown: int = 5) -> None:
    """Tell how many files were left out, and why, naming the first ``shown``."""
    from convnextv2.data.sources import describe_skipped

    for number, line in enumerate(describe_skipped(skipped, shown)):
        warn(f"  {line}" if number else line)


@dataclass
class Progress:
    """Iterate with a plain line every ``seconds``, and one behind the last item: for where no terminal shows a bar."""

    items: Iterable[Any]
    total: int | None
    description: str
    seconds: float = 10.0
    note: str = ""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Text to show behind the count, as tqdm's bars take it."""
        self.note = text

    def __iter__(self) -> Iterator[Any]:
        start = last = time.monotonic()
        for count, item in enumerate(self.items, 1):
            yield item
            now = time.monotonic()
            if now - last >= self.seconds or count == self.total:
                last = now
                of = "" if self.total is None else f"/{self.total}"
                note = f", {self.note}" if self.note else ""
                warn(f"{self.description}: {count}{of} in {now - start:.0f} s{note}")


def progress(items: Iterable[Any], total: int | None = None, description: str = "") -> Iterable[Any]:
    """``items`` with a bar on a terminal, with plain lines elsewhere; ``total`` None takes their ``len``, if any."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    return (bar if sys.stderr.isatty() else Progress)(items, total, description)


def image_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from ``224`` or ``192x256``; an argparse type."""
    from convnextv2.training import recipe

    try:
        return recipe.image_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def train(run: Callable[..., Any], options: Any, came_to: Callable[[Any], str]) -> int:
    """Run a training, tell what it came to or why it was stopped, and return the exit status."""
    from convnextv2.training import RunStoppedError

    try:
        result = run(options, log=warn, progress=progress)
    except RunStoppedError as stopped:
        say_once(str(stopped), warn)
        return stopped.status
    say_once(came_to(result))
    return 0


def best_line(record: str, result: ValidatedResult) -> str:
    """What a run that validates came to: ``record`` is the measure of its best epoch, in per cent."""
    return (
        f"best {record} % on {result.val_images} validation images (epoch {result.best_epoch} of {result.epochs}): "
        f"{result.folder / 'checkpoints' / 'best.safetensors'}"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The options of a command that gives images to a network: how they are prepared, and where it runs."""
    parser.add_argument("--img-size", type=image_size, help="pixels, 224 or 192x256; default: the checkpoint's")
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1, or auto, the default")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at a time; default: 64")
    add_workers(parser)
    add_max_pixels(parser)
    add_window(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The option ``--workers`` of a command that reads images."""
    text = "processes that decode images; default: by the number of images"
    parser.add_argument("--workers", type=workers, help=text)


def workers(text: str) -> int:
    """How many processes decode images; an argparse type."""
    try:
        count = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from error
    if count < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {count}")
    return count


def positive_int(text: str) -> int:
    """A whole number of at least 1; an argparse type."""
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A number that every generator takes as its seed; an argparse type."""
    if not text.strip().isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**32 - 1")
    return int(text)


def share(text: str) -> float:
    """A share of something that is there: above 0, at most 1; an argparse type."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")


def add_window(parser: argparse.ArgumentParser) -> None:
    """The option ``--window`` of a script that reads images."""
    text = "read scenes (TIFF, .npy, .zarr of any size) by windows of so many pixels, 512 or 384x512; default: whole"
    parser.add_argument("--window", type=image_size, help=text)


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """The option ``--max-pixels`` of a command that reads images."""
    from convnextv2.data.decoding import MAX_PIXELS

    text = "largest width × height of an image file; larger JPEG are read reduced, others are unreadable"
    parser.add_argument("--max-pixels", type=positive_int, default=MAX_PIXELS, help=text)


def checkpoint(text: str) -> str | Path:
    """A checkpoint as it is given: an address stays as it is, for a path has no two slashes; an argparse type."""
    from convnextv2.weights.addresses import scheme_of

    return text if scheme_of(text) else Path(text)


def device(text: str) -> torch.device:
    """A torch device that is there; ``auto`` is the GPU if there is one; an argparse type."""
    import torch  # takes a second: not for --help

    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"device {text!r} cannot be used: {one_line(error)[:160]}") from error
    return torch.device(name)
