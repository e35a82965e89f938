"""One run of any task: set-up, resuming, epochs, saving, trackers, pictures, signals."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from convnextv2.data.batches import memory_format
from convnextv2.data.loading import EpochSampler, derived_seed
from convnextv2.data.reading import reading_of
from convnextv2.data.sources import describe_skipped
from convnextv2.files import append_jsonl, write_json
from convnextv2.models.config import config_to_dict
from convnextv2.training.bad_data import BadData, told_if_worker_dies
from convnextv2.training.claim import claim
from convnextv2.training.compiling import Compiling
from convnextv2.training.cooldown import schedule_of
from convnextv2.training.device import make_accelerator
from convnextv2.training.draws import Draws
from convnextv2.training.environment import record_session
from convnextv2.training.epoch_pass import EpochPass
from convnextv2.training.exchange import Exchange, told_if_lost
from convnextv2.training.feeding import fitting_accum, fitting_batch, make_feeds, make_samples, passes_for
from convnextv2.training.handlers import ignored
from convnextv2.training.keeping import Keeper
from convnextv2.training.loop import Loop
from convnextv2.training.measures import measures, pace, save_losses
from convnextv2.training.optim import create_optimizer, scaled_lr
from convnextv2.training.patience import check_patience, epochs_of, out_of_patience
from convnextv2.training.processes import in_first_process, leave_at_exit, start_tracker, take
from convnextv2.training.recipe import recipe_text
from convnextv2.training.reporting import Log, Progress, logger, reporters
from convnextv2.training.result import Metrics, RunResult
from convnextv2.training.run_folder import RunFolder, check_same_model
from convnextv2.training.saved_state import load_state
from convnextv2.training.sharding import Sharding
from convnextv2.training.signals import StopSignals
from convnextv2.training.task import Outcome, Task
from convnextv2.training.watching import OnLoss, Watch
from convnextv2.weights.loading import load_strict

R = TypeVar("R", bound=RunResult)
MODEL_STREAM = 2
PROBE_IMAGES = 16
PICTURE_SECONDS = 15.0  # least time between pictures, which may take longer than a short epoch


def run_task(
    task: Task[Any],
    kind: type[R],
    *,
    log: Log | None = None,
    progress: Progress | None = None,
    on_loss: OnLoss | None = None,
) -> R:
    """Run, or resume, the training that ``task`` and its options describe.

    Args:
        task: new; a task serves one run.
        kind: class of the result.
        log: takes lines for the user. By default they are written beside the progress bar in a notebook and on a
            terminal, and go to ``logging`` elsewhere.
        progress: wraps the batches of an epoch; by default a bar in a notebook and on a terminal.
        on_loss: see :class:`~convnextv2.training.loop.Loop`; called in the first process.

    Raises:
        ValueError: on options that do not fit each other or the data, before any file is written.
        DataError: if there is no usable image.
        CheckpointError: if ``init`` or the state to resume from cannot be used.
        BackendUnavailableError: if the backend named cannot run here.
        DivergedError: if the loss is not finite.
        RunStoppedError: after SIGINT or SIGTERM.
        OSError: if the output cannot be written.
    """
    with contextlib.ExitStack() as held, told_if_lost(task.options), ignored("SIGUSR1"):  # there is nothing to save yet
        run = Run(task, *reporters(log, progress), on_loss)
        run.open_folder(held)
        held.callback(run.keeper.close)
        for feed in run.feeds:
            held.callback(feed.close)
        with run.stop, told_if_worker_dies(run.parts):
            run.begin()
            for epoch in epochs_of(run):
                row, better = run.measure(epoch, run.train(epoch))
                run.save(row, better)
                run.draw(row["epoch"])
                run.say(f"epoch {row['epoch']}/{run.options.epochs}: {task.line(row)}, {pace(row, run.options.epochs)}")
                run.bad.tell(row["epoch"])
            run.keeper.answer(run.keeper.asked(), run.start, None)  # what came after the last step, too
        return run.finish(kind)


class Run:
    """A run, set up: data, network, optimizer and schedule on their device. No file is written yet."""

    def __init__(self, task: Task[Any], log: Log, progress: Progress, on_loss: OnLoss | None) -> None:
        from accelerate.utils import set_seed

        task.options.check()
        self.task, self._log, self._progress = task, log, progress
        self.folder = RunFolder(task.options.output)
        self.stop = StopSignals()
        self.accelerator = make_accelerator(task.options)
        self.main = self.accelerator.is_main_process
        self.sharding = Sharding(task.options, self.accelerator)
        self.saved = in_first_process(self._claim)
        task.resolve(self.saved)
        self.parts = list(task.data())
        set_seed(derived_seed(task.options.seed, 0, 0, MODEL_STREAM))
        self.model: Any = task.model()
        if self.saved is not None:
            check_same_model(self.saved, self.model.config, self.folder.path)
        first_weights = task.initialise(self.model, self.saved is not None)
        for part in self.parts:
            self.say(f"data: {part.description}")
            if skipped := describe_skipped(part.skipped):
                self.say(f"{skipped[0]} {'; '.join(skipped[1:])}")
        if first_weights:
            self.say(first_weights)
        self.start = 0
        self.best: dict[str, float] | None = None
        self._best_outcome: Outcome | None = None
        self._drawn, self._drawn_epoch = -math.inf, 0
        self.bad = BadData(self.parts, task.options.max_bad, self.accelerator, self.say)
        self._set_up(on_loss)
        self.bad.tell(0 if self.saved is None else self.saved["epoch"])
        if self.saved is not None:
            if "damaged" in self.saved:
                self.say(f"warning: going back to the state before: {self.saved['damaged']}")
            load_state(self.folder.checkpoints / self.saved["state"], self.model, self._stateful)
            self.start = self._drawn_epoch = self.saved["epoch"]
            self.best, self.watch.skipped = self.saved.get("best"), self.saved.get("skipped", 0)
            self.epoch_pass.resume(self.saved, self.say)

    def _claim(self) -> dict[str, Any] | None:
        o = self.task.options
        return claim(self.folder.path, o.resume, o.overwrite, o.data, o.init, getattr(o, "probe_data", ""))

    def say(self, line: str) -> None:
        """Tell the user, in the first process."""
        (self._log if self.main else logger.debug)(" ".join(line.splitlines()))  # of odd names, too

    def _set_up(self, on_loss: OnLoss | None) -> None:
        """Batch size, optimizer, loaders, schedule, compilation, averaging."""
        from timm.utils import ModelEmaV3

        task, training, asked = self.task, self.parts[0], self.task.options.batch_size
        check_patience(task.options, self.parts)
        images, processes = len(training), self.accelerator.num_processes
        if images < processes:
            raise ValueError(f"{images} images cannot be shared among {processes} processes; run fewer")
        if (size := min(asked, images // processes * task.options.views)) < asked:
            self.say(f"notice: `batch_size` {asked} lowered to {size}: there are {images} images to train on")
        size = fitting_batch(size, task.options.views, task.fit_batch)
        options = replace(task.options, batch_size=size)
        self._passes = passes_for(self.saved, task.min_steps, images, options, processes)
        if (accum := fitting_accum(options, images * self._passes, processes)) < options.accum:
            self.say(f"notice: `accum` {options.accum} lowered to {accum}: an epoch has no more batches")
            self.accelerator.gradient_accumulation_steps = accum
        task.options = self.options = options = replace(options, accum=accum)
        self._effective_batch = options.batch_size * accum * processes
        self._lr = scaled_lr(options.blr, self._effective_batch, options.lr)
        steep, advice = task.steep_lr
        if self._lr > steep:
            self.say(f"notice: the learning rate {self._lr:.2e} is steep; {advice}")
        layout = memory_format(self.accelerator.device, task.channels_last)
        self.model.to(memory_format=layout)
        fused = self.accelerator.device.type == "cpu"  # accelerate looks after the others
        raw_optimizer = create_optimizer(task.groups(self.model), self._lr, options.betas, options.optimizer, fused)
        samples = make_samples(self.parts, options, layout, self.say, self._passes)
        if self.saved is None and (told := task.start(self.accelerator, self.model, training)):
            self.say(told)
        updates = len(samples[0]) * options.views // self._effective_batch
        sampler = EpochSampler(len(samples[0]), options.seed, self._effective_batch // options.views)
        task.draws = Draws(options.seed, options.batch_size, self.accelerator.process_index)
        self.wrapped, optimizer = self.sharding.prepare(self.model, raw_optimizer)
        self.feeds = make_feeds(self.accelerator, samples, options, sampler)
        self._loader, *self._others = self.feeds
        schedule = schedule_of(options, raw_optimizer, updates)
        compiling = Compiling(self.model, self.wrapped, options, self.accelerator, self.say)
        exchange = Exchange(self.accelerator, options.timeout_minutes)
        trained = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        watched = self.accelerator, exchange, optimizer, trained, options.clip_grad, options.skip_steps
        self.watch = Watch(*watched, on_loss if self.main else None)
        self.loop = Loop(self.accelerator, self.wrapped, optimizer, schedule, self.watch)
        self._stateful: dict[str, Any] = {"optimizer.bin": raw_optimizer}
        if self.accelerator.scaler is not None:
            self._stateful["scaler.pt"] = self.accelerator.scaler
        self._kept, self._evaluated = self.model, self.wrapped  # with averaging both are the average
        if task.ema_decay:
            average = ModelEmaV3(self.sharding.whole(self.model), task.ema_decay, use_warmup=task.ema_warmup)
            self.sharding.shard(average.module)
            self._stateful["custom_checkpoint_0.pkl"] = average
            self.loop.after_update = partial(average.update, self.model)
            self._kept = self._evaluated = average.module
        kept = self.stop, self.model, self._stateful
        self.keeper = Keeper(self.folder, options, self.accelerator, exchange, *kept, partial(self.draw, ending=True))
        parts = self.folder.path, task, self.loop, compiling, self.keeper, training, sampler, self._loader
        self.epoch_pass = EpochPass(*parts, self._effective_batch // accum, self._progress_of)
        self._examples: Tensor = training.examples(PROBE_IMAGES).to(self.accelerator.device)

    def open_folder(self, held: contextlib.ExitStack) -> None:
        """Make or restore the folder of the run, which is held for this run alone until ``held`` is closed."""
        self.accelerator.wait_for_everyone()  # all have read what they need
        in_first_process(lambda: self._open_folder(held))

    def _open_folder(self, held: contextlib.ExitStack) -> None:
        o, start = self.options, partial(start_tracker, self.accelerator, self.task.name, self.options.tracker)
        take(self.folder.path, self._claim, self.saved, held)
        if o.overwrite:  # nothing is deleted where the tracker cannot be used
            start()
        self.folder.prepare(self.saved, recipe_text(o))
        for name, content in self.task.files.items():
            write_json(self.folder.path / name, content)
        record_session(self.folder.path, self.accelerator, self.model, self.loop.step, self.start >= o.epochs)
        if not o.overwrite:
            start()

    def begin(self) -> None:
        """Tell what is going to happen."""
        accelerator = self.accelerator
        if self.saved is not None:
            done = self.start >= self.options.epochs
            here = f", at step {self.loop.step}" if self.epoch_pass.so_far.batches else ""
            resuming = f"resuming after epoch {self.start}{here}"
            self.say(f"nothing to do: {self.start} epochs are done" if done else resuming)
        self.say(
            f"{self.task.describe(self.model)} on {accelerator.device}: "
            f"{len(self._loader) // self.options.accum} steps an epoch of batch {self._effective_batch}, "
            f"peak learning rate {self._lr:.2e}, mixed precision: {accelerator.mixed_precision}"
        )

    def train(self, epoch: int) -> dict[str, float]:
        """One pass over the training part, or what is left of it, for the row of the epoch."""
        self.epoch_pass.begin(epoch)
        batches = self.bad.watch(self._loader, epoch)
        if self.main:
            batches = self._progress(batches, len(batches), f"epoch {epoch + 1}/{self.options.epochs}")
        return self.epoch_pass.train(epoch, batches)

    def measure(self, epoch: int, pace: dict[str, float]) -> tuple[dict[str, Any], bool]:
        """The row of the epoch, and whether it is the best so far."""
        self.keeper.wait()  # loaders may start processes, which is no moment for a thread at work
        others = [self.bad.watch(other, epoch) for other in self._others]
        kept = self.sharding.whole(self._kept)
        evaluated = self._evaluated if kept is self._kept else kept
        outcome = self.task.evaluate(self.accelerator, evaluated, others)
        found = {**({} if outcome is None else outcome.numbers), **measures(kept, self._examples)}
        row = {"epoch": epoch + 1, "step": self.loop.step, self.task.loss_name: pace.pop("loss"), **found, **pace}
        row |= self.task.after_epoch(self.accelerator, kept, row, self.say)
        rank = self.task.rank
        if outcome is None or not (self.best is None or rank(outcome.record) > rank(self.best)):
            return row, False
        self.best, self._best_outcome = {**outcome.record, "epoch": epoch + 1}, outcome
        return row, True

    def save(self, row: dict[str, Any], better: bool) -> None:
        """Write the row, the weights, and the state to resume from."""
        if self.main:
            append_jsonl(self.folder.metrics_path, row)
        self.accelerator.log(row, step=row["epoch"])
        training = self.parts[0]
        images = {**reading_of(training), "mean": list(training.mean), "std": list(training.std)}
        metadata = {**images, "img_size": list(self.options.size), "epoch": row["epoch"], **self.task.metadata}
        names = ("last", "best") if better else ("last",)
        self.keeper.save(self._progress_of(row["epoch"], None), names, self._kept, metadata)
        self.start = row["epoch"]

    def _progress_of(self, epoch: int, inside: dict[str, Any] | None) -> dict[str, Any]:
        """What a state says beside weights: ``epoch`` epochs are done, and ``inside`` of the next."""
        found = {"epoch": epoch, "step": self.loop.step, "passes": self._passes, "inside": inside, "best": self.best}
        found["skipped"], optimizer = self.watch.skipped, type(self._stateful["optimizer.bin"]).__name__
        kept = {"seed": self.options.seed} | {name: value for name, value in found.items() if value is not None}
        return {**kept, "optimizer": optimizer, "config": config_to_dict(self.model.config), **self.task.progress}

    def draw(self, epoch: int, ending: bool = False) -> None:
        """The loss curve and the pictures of the task, if they are due, or the run is ``ending`` without them."""
        now, model = time.monotonic(), self.sharding.whole(self.model)
        certain = ending or epoch in (*self.task.picture_epochs, self.options.epochs) or out_of_patience(self, epoch)
        if self.main and epoch > self._drawn_epoch and (certain or now - self._drawn >= PICTURE_SECONDS):
            self._drawn, self._drawn_epoch = now, epoch
            save_losses(self.folder.path / "loss.png", self.folder.metrics())
            self.task.pictures(self.folder, model, self._examples, epoch, self._best_outcome)

    def finish(self, kind: type[R]) -> R:
        """Close the trackers, and read back what the run stands for."""
        self.keeper.wait()
        self.bad.tell(self.options.epochs, "in the end ")
        for tracker in self.accelerator.trackers:  # its end_training leaves the group, too
            tracker.finish()
        leave_at_exit()
        path = self.folder.checkpoint("last" if self.best is None else "best")
        model = self.sharding.whole(self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False))
        load_strict(model, safetensors.torch.load_file(path), path)
        return kind(
            folder=self.folder.path,
            epochs=self.start,
            images=tuple(map(len, self.parts)),
            best=self.best,
            metrics=Metrics(self.folder.metrics()),
            model=model.eval(),
        )
