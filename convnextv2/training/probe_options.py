"""Options of the probes of a run's features."""

# ruff: noqa: RUF009  # option() makes a field

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convnextv2.training.recipe import option
from convnextv2.training.starting import StartOptions


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(StartOptions):
    """Options of a run whose features are probed."""

    probe: str | Path = option(
        "auto",
        "labelled images (a folder, or digits) on which kNN and a linear classifier probe the features, as fcmae "
        "evaluate does; auto: --data where it is labelled; none",
    )
    probe_every: int | None = option(
        None, "epochs between probes, and one after the last; by default they take at most 5 % of the run's time"
    )

    @property
    def probe_data(self) -> str:
        """What is probed on; empty for nothing."""
        return {"auto": str(self.data), "none": ""}.get(str(self.probe), str(self.probe))

    def check(self) -> None:
        """As every run's; the images to probe on must be there."""
        from convnextv2.data.opening import why_unknown  # with torch: not for --help

        super().check()
        self.require("must be at least 1", lambda value: value >= 1, "probe_every")
        if not self.probe:
            raise ValueError("`probe` is empty: name a folder of labelled images, 'digits', auto or none")
        if self.probe not in ("auto", "none") and (problem := why_unknown(self.probe)):
            raise ValueError(f"`probe` {problem}, or auto, or none")
