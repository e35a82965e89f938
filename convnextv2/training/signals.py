"""What pre-training and fine-tuning share: the run folder, resuming, signals, seeds, loaders and one epoch's loop.

Device, precision, accumulation, distribution, saved state and trackers are accelerate's. A run is saved at the end of
every epoch, and every source of randomness is derived from (seed, epoch), so a run that was stopped, killed or
resumed gives the same weights as one that was not.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from convnextv2.checkpoint import CheckpointError, append_jsonl, write_json
from convnextv2.config import EncoderConfig, config_to_dict, encoder_config
from convnextv2.encoder import Encoder
from convnextv2.options import option

if TYPE_CHECKING:
    from accelerate import Accelerator

Log = Callable[[str], None]
ProgressBar = Callable[[Iterable[Any], int, str], Iterable[Any]]
PRECISIONS = ("auto", "no", "bf16", "fp16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
LOSS_CHECK_EVERY = 20
"""Updates between two looks at the losses on a GPU, where each look waits for it."""
STEEP_LR = 1e-2

logger = logging.getLogger(__name__)


class DivergedError(ValueError):
    """The loss or the weights are no longer finite; the message says where and what to try."""


class RunStoppedError(Exception):
    """A signal asked the run to stop, and it did between two steps; ``status`` is the exit status to end with."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signum


def silent(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """A progress bar that shows nothing."""
    return items


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every run."""

    data: str = option("", "folder of images, or 'digits' for the embedded handwritten digits")
    output: str = option("", "folder of the run; must be new or empty, but with --resume or --overwrite")
    model: str | None = option("convnextv2_atto", "convnextv2_atto, femto, pico, nano, tiny, base, large or huge")
    epochs: int = option(20, "passes over the data")
    batch_size: int = option(64, "images a step and process; no more than there are images is taken")
    img_size: tuple[int, int] | None = option((224, 224), "pixels: 224, or HEIGHTxWIDTH as in 192x256")
    patch_size: int | None = option(32, "pixels a patch side: 32, 16 or 8 (the total stride; smaller for small images)")
    in_chans: int | None = option(3, "channels of the images")
    seed: int = option(0, "of initial weights, order, augmentation and masks")
    workers: int = option(2, "processes that load images; 0 loads in the main process")
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    precision: str = option(
        "auto",
        "mixed precision: auto (bf16 on a GPU that has it, else no), no, bf16 or fp16 (fp16 needs a GPU); quote 'no' "
        "in a recipe",
        PRECISIONS,
    )
    tf32: bool = option(False, "float32 matrix products and convolutions in TensorFloat-32, on GPUs that have it")
    compile: str | None = option(
        None, "torch.compile with this mode, not at all by default; reduce-overhead uses CUDA graphs", COMPILE_MODES
    )
    accum: int = option(1, "batches whose gradients are added up before an update")
    lr: float | None = option(None, "peak learning rate; overrides --blr")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_epochs: float = option(2.0, "epochs over which the learning rate rises; at most half of the run")
    weight_decay: float = option(0.05, "AdamW's; never on biases and norms")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's two betas")
    optimizer: str = option("adamw", "any optimizer of timm's that takes betas")
    clip_grad: float | None = option(None, "largest norm of the gradient; try 1 where a run diverges")
    drop_path: float = option(0.0, "stochastic depth of the last block")
    depths: tuple[int, int, int, int] | None = option(
        None, "blocks of the four stages, for a custom size (with --dims)"
    )
    dims: tuple[int, int, int, int] | None = option(None, "channels of the four stages, for a custom size")
    init: str | None = option(None, "checkpoint (file or run folder) to take initial weights from; see also --resume")
    resume: bool = option(False, "continue the run in --output, with its own recipe but for what is given here")
    overwrite: bool = option(False, "delete the run in --output and start anew")
    tracker: str | None = option(None, "also log the metrics to: tensorboard, wandb, mlflow or trackio, if installed")

    def check(self) -> None:
        """Raise ValueError on options out of range."""
        if not self.data:
            raise ValueError("--data is missing: a folder of images, or 'digits'")
        if not self.output:
            raise ValueError("--output is missing: the folder to write the run to")
        if self.data != "digits" and not Path(self.data).is_dir():
            raise ValueError(f"--data {self.data}: no such folder")
        for name in ("epochs", "batch_size", "accum"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "seed", "warmup_epochs", "weight_decay", "min_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} must be a finite number, not negative, got {getattr(self, name)}")
        for name in ("lr", "blr", "clip_grad"):
            value = getattr(self, name, None)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} must be positive, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must be in [0, 1), got {self.betas}")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise ValueError(f"--compile must be one of {', '.join(COMPILE_MODES)}, got {self.compile!r}")
        if self.compile not in (None, "default") and self.accum > 1:
            raise ValueError(
                f"--compile {self.compile} and --accum exclude each other: a CUDA graph overwrites the gradients of "
                "the batch before; use --compile default"
            )
        if self.tracker is not None:
            if self.tracker not in TRACKERS:
                raise ValueError(f"--tracker must be one of {', '.join(TRACKERS)}, got {self.tracker!r}")
            if importlib.util.find_spec(TRACKERS[self.tracker]) is None:
                raise ValueError(f"--tracker {self.tracker} is not installed: pip install {TRACKERS[self.tracker]}")

    def encoder(self) -> EncoderConfig:
        """The encoder that model, sizes and drop path name.

        Raises:
            ValueError: if the name is unknown or an option is out of range.
        """
        shape = {"drop_path_rate": self.drop_path, "in_chans": self.in_chans, "patch_size": self.patch_size}
        if (self.depths is None) != (self.dims is None):
            raise ValueError("--depths and --dims describe a custom size together; give both or neither")
        if self.depths is not None and self.dims is not None:
            return EncoderConfig(self.depths, self.dims, **shape)  # type: ignore[arg-type]
        return encoder_config(self.model or "", **shape)


def flag(name: str) -> str:
    """``batch_size`` as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


# The run folder -------------------------------------------------------------------------------------------------------


class RunFolder:
    """Files of a run: ``checkpoints/`` (with the state to resume from), metrics, recipe and pictures.

    Args:
        path: the folder; nothing is touched before :meth:`prepare`.
    """

    OURS = (
        "checkpoints",
        "reconstructions",
        "metrics.jsonl",
        "loss.png",
        "config.yaml",
        "class_indices.json",
        "confusion_matrix.png",
    )

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.state = self.path / "checkpoints" / "state"
        self._new, self._old = self.state.with_name("state.tmp"), self.state.with_name("state.old")

    def checkpoint(self, name: str) -> Path:
        """Path of the weights called ``last`` or ``best``."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def check(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Progress of the run to be resumed, or None for a new one.

        Raises:
            ValueError: if the folder is in use and neither flag is given, or there is nothing to resume.
            NotADirectoryError: if it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file, expected a folder for the run", str(self.path))
        if resume:
            return self._progress()
        if self.path.is_dir() and not overwrite and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty; continue that run with --resume, replace it with --overwrite, or name "
                "another --output"
            )
        return None

    def _progress(self) -> dict[str, Any]:
        # A kill between the two renames of save_state leaves the last complete state under its other name.
        folder = next((f for f in (self.state, self._old) if (f / "progress.json").is_file()), None)
        if folder is None:
            raise ValueError(
                f"{self.path} holds no state to resume from: no run there, or none that finished an epoch; start one "
                "without --resume (--overwrite replaces what is there)"
            )
        try:
            return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{folder / 'progress.json'} is damaged ({error}); start anew with --overwrite"
            ) from error

    def prepare(self, progress: dict[str, Any] | None) -> None:
        """Make the folder, empty of an earlier run, or bring the run to be resumed back to its last saved epoch.

        Raises:
            OSError: if the folder cannot be made or written.
        """
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        if progress is None:
            for name in self.OURS:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            self.state.parent.mkdir()
            return
        if not self.state.exists():
            self._old.rename(self.state)
        for leftover in (self._old, self._new):
            shutil.rmtree(leftover, ignore_errors=True)
        rows = [row for row in self.metrics() if row["epoch"] <= progress["epoch"]]
        temporary = self.metrics_path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        for row in rows:
            append_jsonl(temporary, row)
        if rows:
            temporary.replace(self.metrics_path)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``; a line cut off by a kill is left out."""
        if not self.metrics_path.is_file():
            return []
        rows = [_row(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row is not None]

    def save_state(self, accelerator: Accelerator, progress: dict[str, Any]) -> None:
        """Save everything a resumed run needs, swapped in by rename: the old state or the new one is complete always.

        Raises:
            OSError: if it cannot be written.
        """
        if accelerator.is_main_process and self._new.exists():
            shutil.rmtree(self._new)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(self._new))
        except (SafetensorError, RuntimeError) as error:  # what these writers make of a full disk
            shutil.rmtree(self._new, ignore_errors=True)
            raise OSError(f"cannot write {self._new} (is the disk full?): {error}") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(self._new / "progress.json", progress)
            if self.state.exists():
                shutil.rmtree(self._old, ignore_errors=True)
                self.state.rename(self._old)
            self._new.rename(self.state)
            shutil.rmtree(self._old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load_state(self, accelerator: Accelerator) -> None:
        """Load what :meth:`save_state` wrote.

        Raises:
            CheckpointError: if it is damaged or does not fit.
        """
        try:
            accelerator.load_state(str(self.state))
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{self.state}: cannot be resumed from ({reason}); start anew with --overwrite"
            ) from error


def _row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        logger.warning("left out a damaged line of the metrics: %s", line[:80])
        return None


def check_same_model(progress: dict[str, Any], config: Any, output: str | Path) -> None:
    """Raise ValueError unless the run to be resumed trains a network of this configuration."""
    saved, wanted = progress["config"], json.loads(json.dumps(config_to_dict(config)))

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{key}.")
            else:
                yield prefix + key, value

    before, now = dict(flat(saved)), dict(flat(wanted))
    different = [
        f"{k} {before.get(k)} there, {now.get(k)} here" for k in {**before, **now} if before.get(k) != now.get(k)
    ]
    if different:
        raise ValueError(
            f"{output} holds a run of another network ({'; '.join(different)}); resume with its options, or use "
            "--init to take its weights only"
        )


# Signals, seeds, loaders ----------------------------------------------------------------------------------------------


class StopSignals:
    """Turns SIGINT and SIGTERM into a request to stop between two steps; a second one acts at once."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        signal.signal(signum, self._previous[signum])

    def check(self, output: Path, epoch: int) -> None:
        """Raise RunStoppedError if a signal came; ``epoch`` epochs have been saved."""
        if self._received is None:
            return
        name = signal.Signals(self._received).name
        saved = f"{epoch} epochs are saved, continue with --resume" if epoch else "no epoch had been finished"
        raise RunStoppedError(self._received, f"stopped by {name}; {saved}: {output}")


def derived_seed(*words: int) -> int:
    """A seed for the stream named by ``words``, such as (seed, epoch, process)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class EpochSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone, the same in every process."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers


def make_loader(dataset: Dataset[Any], batch_size: int, workers: int, sampler: Sampler[int] | None = None) -> Any:
    """Batches of a data set: shuffled by ``sampler`` with incomplete ones dropped, or all in order without one."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


def make_accelerator(options: RunOptions) -> Accelerator:
    """accelerate's entry for the device, precision, accumulation and tracker asked for.

    Raises:
        ValueError: if the device or precision cannot be used here.
    """
    from accelerate import Accelerator

    kind, _, index = options.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {options.device!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if int(index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {options.device}: there are {torch.cuda.device_count()} CUDA devices")
        if index:
            torch.cuda.set_device(int(index))
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.tf32
    # Without an accelerator, accelerate joins the processes of a launcher only if told that they run on processors;
    # otherwise each would train by itself, all into the same folder.
    return Accelerator(
        cpu=kind == "cpu" or not torch.accelerator.is_available(),
        mixed_precision=mixed_precision(options),
        gradient_accumulation_steps=options.accum,
        log_with=options.tracker,
        project_dir=options.output,
    )


def mixed_precision(options: RunOptions) -> str:
    """The precision asked for, with auto resolved: bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if options.precision != "auto":
        return options.precision
    on_cuda = not options.device.startswith("cpu") and torch.cuda.is_available()
    return "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def fitting_batch_size(options: RunOptions, images: int, processes: int, log: Log) -> int:
    """The batch size, lowered where the data set cannot fill one batch; says so.

    Raises:
        ValueError: if there are fewer images than processes.
    """
    if images < processes:
        raise ValueError(f"{images} images cannot be shared among {processes} processes; run fewer")
    size = min(options.batch_size, images // processes)
    if size < options.batch_size:
        log(f"notice: --batch-size {options.batch_size} lowered to {size}: there are {images} images to train on")
    return size


class Occasionally:
    """True at most once in ``seconds``: for pictures, which may take longer than a short epoch."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self._last = -math.inf

    def __call__(self, certainly: bool = False) -> bool:
        """Whether it is time again; ``certainly`` makes it so."""
        now = time.monotonic()
        due = certainly or now - self._last >= self.seconds
        if due:
            self._last = now
        return due


def resuming(done: int, epochs: int) -> str:
    """A line on where a resumed run stands."""
    return f"resuming after epoch {done}" if done < epochs else f"nothing to do: {done} epochs are done; raise --epochs"


def say_skipped(skipped: Sequence[tuple[Path, str]], log: Log, shown: int = 5) -> None:
    """Tell how many files were left out, and why, naming the first ``shown``."""
    if skipped:
        more = f"; and {len(skipped) - shown} more" if len(skipped) > shown else ""
        named = "; ".join(f"{path}: {reason}" for path, reason in skipped[:shown])
        log(f"notice: skipped {len(skipped)} unusable file{'s' if len(skipped) > 1 else ''}: {named}{more}")


# One epoch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpochResult:
    """What an epoch of training measured: mean loss, last learning rate, seconds, images seen by all processes."""

    loss: float
    lr: float
    seconds: float
    images: int


class Loop:
    """Steps of training: schedule, forward, backward, clip, update; a loss that is not finite ends the run.

    Args:
        accelerator: prepared model and optimizer belong to it.
        model: prepared.
        optimizer: prepared.
        schedule: from :func:`~convnextv2.optim.create_schedule`.
        folder: of the run, for messages.
        stop: signals.
        clip_grad: largest norm of the gradient, or None.
        after_update: called with the number of updates made so far after each.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        folder: RunFolder,
        stop: StopSignals,
        clip_grad: float | None = None,
        after_update: Callable[[int], None] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.folder = folder
        self.stop = stop
        self.clip_grad = clip_grad
        self.after_update = after_update
        self.step = 0
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._check_every = 1 if accelerator.device.type == "cpu" else LOSS_CHECK_EVERY

    def epoch(self, done: int, batches: Any, loss_of: Callable[[Any], tuple[Tensor, int]]) -> EpochResult:
        """Train on every batch once.

        Args:
            done: epochs finished before.
            batches: sized iterable, perhaps in a progress bar with a ``note`` method.
            loss_of: from a batch to its loss and its number of images.

        Raises:
            DivergedError: if a loss or a weight is not finite.
            RunStoppedError: if a signal came.
        """
        start = time.perf_counter()
        total, count, images, lr = 0.0, 0, 0, 0.0
        pending: list[Tensor] = []
        first_pending = self.step
        for batch in batches:
            self.stop.check(self.folder.path, done)
            with self.accelerator.accumulate(self.model):
                self.schedule.step_update(self.step)
                lr = max(group["lr"] for group in self.optimizer.param_groups)
                loss, size = loss_of(batch)
                pending.append(loss.detach().clone())  # the memory of a CUDA graph's output is used again
                self.accelerator.backward(loss)
                if self.clip_grad is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self._trained, self.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            images += size
            if self.accelerator.sync_gradients:
                self.step += 1
                if self.after_update is not None:
                    self.after_update(self.step)
            if len(pending) >= self._check_every:
                total += self._sum(pending, done, first_pending, lr)
                count += len(pending)
                pending, first_pending = [], self.step
                if hasattr(batches, "note"):
                    batches.note(f"loss {total / count:.4f}")
        if pending:
            total += self._sum(pending, done, first_pending, lr)
            count += len(pending)
        self._check_weights(done, lr)
        seconds = time.perf_counter() - start
        sums = torch.tensor([total, count, images], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.float().to(self.accelerator.device), "sum").cpu()
        total, count, images = sums.tolist()
        return EpochResult(total / count, lr, seconds, int(images))

    def _sum(self, losses: list[Tensor], done: int, first_step: int, lr: float) -> float:
        values = torch.stack(losses).double().tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value}", first_step + offset, done, lr)
        return sum(values)

    def _check_weights(self, done: int, lr: float) -> None:
        """The last update of an epoch has no loss after it that would show that it went wrong."""
        norms = torch._foreach_norm([p.detach() for p in self._trained])
        if not torch.isfinite(torch.stack(norms)).all():
            raise self._diverged("weights are not finite", self.step, done, lr)

    def _diverged(self, what: str, step: int, done: int, lr: float) -> DivergedError:
        kept = f"the checkpoint of epoch {done} is kept" if done else "no checkpoint was written yet"
        return DivergedError(
            f"{what} at step {step} (epoch {done + 1}, learning rate {lr:.2e}); {kept}: try a smaller --blr, more "
            "--warmup-epochs, --clip-grad 1, or another --precision"
        )


@torch.no_grad()
def feature_diversity(encoder: Encoder, images: Tensor) -> float:
    """Mean pairwise cosine distance between channels, ``mean over i, j of (1 - cos(x_i, x_j)) / 2``, in [0, 1].

    The measure of feature collapse of ConvNeXt V2, section 3.2, where 0 means that all channels are alike. A channel
    is the vector of its values at every cell of all ``images`` ``[B, C, H, W]`` (unmasked, on a dense grid), and the
    result is the mean over the outputs of the four stages.
    """
    from sparse_ops.grid import DenseGrid

    distances = []
    for x, _ in encoder.forward_stages(images, DenseGrid(images.shape[0])):
        channels = nn.functional.normalize(x.flatten(0, -2).float().T, dim=1)
        # The mean over all pairs of unit vectors is the squared length of their mean.
        distances.append((1 - channels.mean(0).square().sum()) / 2)
    return float(torch.stack(distances).mean())


def every(interval: int | None, epochs: int, default_count: int = 5) -> set[int]:
    """Epochs (from 1) at which something is due: each ``interval``-th and the last; None about ``default_count`` times,
    0 never."""
    if interval == 0:
        return set()
    step = interval or max(1, math.ceil(epochs / default_count))
    return {*range(step, epochs + 1, step), epochs}
