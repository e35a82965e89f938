"""When a run saves, and what: copies are taken between two steps, and a thread writes them while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convnextv2.training.device import Accelerator
from convnextv2.training.exchange import Exchange
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.signals import SAVE, StopSignals, stopped
from convnextv2.training.states import Writer, copied, mark, write_state
from convnextv2.weights.checkpoint import save_checkpoint


class Keeper:
    """Saves states and weights of a run, in its first process.

    Args:
        folder: of the run.
        options: of the run.
        accelerator, exchange: of its processes.
        stop: signals to this process.
        model: the network, as it was before accelerate prepared it.
        stateful: names of files to what has a state beside it: ``optimizer.bin`` to the optimizer.
        ending: called in all processes with the number of epochs done before the run ends because it is asked to.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: Any,
        accelerator: Accelerator,
        exchange: Exchange,
        stop: StopSignals,
        model: nn.Module,
        stateful: Mapping[str, Any],
        ending: Callable[[int], None] = lambda epochs: None,
    ) -> None:
        self._folder, self._options, self._main = folder, options, accelerator.is_main_process
        self._exchange, self._stop, self._model, self._stateful = exchange, stop, model, stateful
        self._writer, self._saved_at, self._ending = Writer(), time.monotonic(), ending

    def asked(self, step: int | None = None) -> int:
        """What one of the processes is asked for, or what is due after ``step`` updates: 0, SAVE, or more to stop too.

        Raises OSError if what was saved last could not be written.
        """
        self._writer.check()
        late = self._main and time.monotonic() - self._saved_at >= 60 * self._options.save_minutes
        every = self._options.save_steps
        due = step is not None and (late or (every is not None and step % every == 0))
        save = self._stop.save
        if save and step is not None:  # before the others are waited for: one that comes meanwhile is another
            self._stop.save = False
        return self._exchange.highest(max(self._stop.asked, SAVE * (due or save)))

    def save(
        self,
        progress: dict[str, Any],
        names: Iterable[str] = (),
        weights: nn.Module | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy the state of the run and have it written; and of its weights those called ``names``, first.

        Args:
            progress: JSON values.
            names: ``last``, ``best``.
            weights: the network that they are of; the run's own by default.
            metadata: for them.

        Raises OSError if what was saved before could not be written.
        """
        self._saved_at = time.monotonic()
        if self._main:
            self._writer.wait()
            if names:
                mark(self._folder.checkpoints)
        elif self._options.sharding == "none":
            return
        files: dict[str, Any] = {"model.safetensors": copied(self._model.state_dict(), self._main)}
        files |= {name: copied(thing.state_dict(), self._main) for name, thing in self._stateful.items()}
        kept = files["model.safetensors"]
        if weights is not None and weights is not self._model:
            kept = copied(weights.state_dict(), self._main)
        if not self._main:  # has lent its shards
            return
        paths = [self._folder.checkpoint(name) for name in names]
        state = partial(write_state, self._folder.checkpoints, files, progress, self._options.keep_states)
        self._writer.start(partial(_write, paths, kept, getattr(self._model, "config", None), metadata, state))

    def answer(self, asked: int, epochs: int, step: int | None) -> None:
        """End the run if that is ``asked``: after so many epochs, or inside of the next, after ``step`` updates in all.

        Raises RunStoppedError, once all is written.
        """
        if asked > SAVE:
            self.wait()
            self._ending(epochs)
            self._exchange.highest(0)  # a launcher ends the others when one has ended: not before all is written
            inside = f"step {step} is saved (epoch {epochs + 1})"
            saved = inside if step is not None else f"{epochs} epochs are saved" if epochs else ""
            raise stopped(asked, saved, self._folder.path)

    def wait(self) -> None:
        """Until all is written; raises OSError if it could not be."""
        self._writer.wait()

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it: for a run that ends with an error of its own."""
        self._writer.close()


def _write(paths: list[Path], weights: dict[str, Tensor], config: Any, metadata: Any, state: Any) -> None:
    for path in paths:
        save_checkpoint(path, weights, config, metadata)
    state()
