"""A study as it is declared, one YAML file, and the parts that follow from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from convnextv2.messages import one_line
from convnextv2.recipes import find_recipe
from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.option_types import check_types
from convnextv2.training.recipe_files import read_recipe
from studies.parts import FROZEN, RESERVED, Part
from studies.variants import VARIANTS

T = TypeVar("T")
HERE = Path(__file__).parent
MEASURES = (*FROZEN, "finetune")
RUNS = {"pretrain": PretrainOptions, "finetune": FinetuneOptions}
NAMES = {kind: {item.name for item in fields(options)} - {*RESERVED} for kind, options in RUNS.items()}
NAMES["pretrain"].remove("patience")  # nothing is evaluated there that could become worse

BOUNDS = {
    "seeds": (1, 1000),
    "images": (0, 1e9),
    "epochs": (1e-6, 1e6),
    "held_out": (0, 0.99),
    "probes": (0, 1e6),
    "budget_of_pretraining": (0, 100),
}
"""The least and the most of the numbers that a file declares, beside options."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Options of all runs, of pre-training and of fine-tuning; ``recipe`` among the latter two names one of them."""

    options: dict = field(default_factory=dict)
    pretrain: dict | None = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Arm(Layer):
    """What is compared. Without ``pretrain`` it starts from scratch; ``budget_of_pretraining``, the time of an image of
    pre-training in those of fine-tuning, adds the epochs to fine-tuning that pre-training would have taken."""

    variant: str | None = None
    measures: list | None = None
    budget_of_pretraining: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """A table: arms, and what is measured of each; ``held_out`` is a share of the training images to measure on."""

    arms: dict
    title: str = ""
    seeds: int | list | None = None
    labels: list | None = None
    measures: list | None = None
    held_out: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scale(Layer):
    """A smaller study: so many seeds and images at most, these labels and questions alone, a factor on epochs."""

    seeds: int | None = None
    labels: list | None = None
    questions: list | None = None
    images: int = 0
    epochs: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Declaration(Layer):
    """A file; seeds, labels and measures are of the questions that do not name their own."""

    questions: dict
    title: str = ""
    data: str | None = None
    seeds: int | list = 1
    labels: list = field(default_factory=lambda: [1])
    measures: list = field(default_factory=lambda: [*MEASURES])
    probes: int = 10
    scales: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cell:
    """One number of a table: the part that gives it, and the row that it belongs to."""

    question: str
    arm: str
    measure: str
    labels: float
    part: Part


@dataclass(frozen=True, eq=False)
class Study:
    """What a file declares, at one scale: titles of the questions, and the cells of all tables, seed by seed."""

    name: str
    scale: str
    title: str
    questions: Mapping[str, str]
    cells: tuple[Cell, ...]
    probes: int

    @property
    def parts(self) -> list[Part]:
        """Each once, what others start from before them."""
        chains = ([cell.part.needs, cell.part] if cell.part.needs else [cell.part] for cell in self.cells)
        return list({part.key: part for chain in chains for part in chain}.values())


def read_study(name: str, scale: str, data: str | None = None) -> Study:
    """A study of this folder by its name, or any by its file.

    Args:
        name: such as ``digits``, or a path that ends in .yaml.
        scale: one that it declares, or ``full`` for the study as it stands.
        data: what images to take, in place of those that it names.

    Raises:
        ValueError: in one line, if it is declared wrongly or the images are not there.
        OSError: if the file cannot be read.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in HERE.glob("*.yaml")))
        raise ValueError(f"{path}: no such study; there are {known}, or name a file")
    declared = _make(Declaration, path.name, _read(path))
    scales = {"full": None, **declared.scales}
    _check_names(f"{path.name}: scale", [scale], scales)
    chosen = _make(Scale, f"{path.name}: scale {scale}", scales[scale])
    kept = list(declared.questions) if chosen.questions is None else chosen.questions
    _check_names(f"{path.name}: questions of scale {scale}", kept, declared.questions)
    images = data or declared.data
    if images is None:
        raise ValueError(f"{path.name}: names no images; say which: --data FOLDER")
    questions = {name: _make(Question, f"{path.name}: {name}", declared.questions[name]) for name in kept}
    reader = _Reader(path, declared, chosen, images)
    cells = [cell for name, question in questions.items() for cell in reader.cells(name, question)]
    if not cells:
        raise ValueError(f"{path.name}: no question has an arm")
    cells.sort(key=lambda cell: cell.part.seed)
    titles = {name: question.title or name for name, question in questions.items()}
    return Study(path.stem, scale, declared.title or path.stem, titles, tuple(cells), declared.probes)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {one_line(error)}") from error


def _make(kind: type[T], where: str, given: Any) -> T:
    """A dataclass from what a file says; ValueError names unknown, missing and ill-typed keys."""
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    _check_names(where, {} if given is None else given, names)
    try:
        made = kind(**(given or {}))
        check_types(made)
    except TypeError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error
    for name, bounds in BOUNDS.items():
        if isinstance(value := getattr(made, name, None), int | float):
            _check_numbers(f"{where}: {name}", [value], (int, float), *bounds)
    return made


def _check_names(where: str, given: Any, known: Iterable[str]) -> None:
    """ValueError unless ``given`` is a mapping or a list of names that are known."""
    if not isinstance(given, dict | list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where}: expected names, got {one_line(given)}")
    for name in given:
        if name in RESERVED and name not in known:
            raise ValueError(f"{where}: `{name}` is set by the study itself")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1, 0)
            raise ValueError(f"{where}: `{one_line(name)}` is not known; the nearest is `{''.join(near)}`")


def _check_numbers(where: str, given: Any, kinds: tuple[type, ...], least: float, most: float) -> list[Any]:
    """A list of numbers of these kinds between the two, each once; else ValueError."""
    right = isinstance(given, list) and given and all(type(one) in kinds and least <= one <= most for one in given)
    if not right or len(set(given)) < len(given):
        kind = "numbers" if float in kinds else "whole numbers"
        raise ValueError(f"{where}: expected {kind} from {least:g} to {most:g}, each once, got {one_line(given)}")
    return list(given)


@dataclass(frozen=True)
class _Reader:
    """From questions to parts."""

    path: Path
    declared: Declaration
    scale: Scale
    data: str

    def cells(self, name: str, question: Question) -> Iterator[Cell]:
        """Those of one table."""
        where, declared, scale = f"{self.path.name}: {name}", self.declared, self.scale
        seeds = declared.seeds if question.seeds is None else question.seeds
        seeds = list(range(seeds)) if isinstance(seeds, int) else seeds
        seeds = _check_numbers(f"{where}: seeds", seeds, (int,), 0, 2**31 - 1)[: scale.seeds]
        shares = _check_numbers(f"{where}: labels", question.labels or declared.labels, (int, float), 1e-6, 1)
        if scale.labels is not None:
            kept = [share for share in shares if share in scale.labels]
            shares = _check_numbers(f"{where}: labels that the scale leaves", kept, (int, float), 0, 1)
        measures = question.measures or declared.measures
        _check_names(f"{where}: arms", question.arms, question.arms)
        limits = {"held_out": question.held_out, "images": scale.images}
        images = {name: value for name, value in limits.items() if value}
        for arm, given in question.arms.items():
            made = _make(Arm, f"{where}: {arm}", given)
            _check_names(f"{where}: {arm}: measures", made.measures or measures, MEASURES)
            if made.variant is not None:
                _check_names(f"{where}: {arm}: variant", [made.variant], VARIANTS)
            try:
                for seed in seeds:
                    for share, measure, part in self._parts(made, seed, shares, made.measures or measures, images):
                        yield Cell(name, arm, measure, share, part)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: {arm}: {error}") from error

    def _parts(
        self, arm: Arm, seed: int, shares: list[float], measures: list[str], images: dict[str, Any]
    ) -> Iterator[tuple[float, str, Part]]:
        """Share of the labels, measure and part of an arm; ValueError, TypeError on wrong options."""
        before, tuning, needs = self._options("pretrain", arm), self._options("finetune", arm), None
        if arm.pretrain is not None:
            needs = Part("pretrain", seed, before, self.data, images, arm.variant)
        for share in shares:
            drawn = images if share == 1 else {**images, "labels": share, "seed": seed}
            for measure in measures:
                given, variant = before, None
                if measure == "finetune":
                    given, variant = tuning, arm.variant
                    if arm.budget_of_pretraining:
                        alone = Part(measure, seed, tuning, self.data, drawn)
                        more = round(arm.budget_of_pretraining * before["epochs"] / share)
                        given = {**tuning, "epochs": alone.passes + more}
                part = Part(measure, seed, given, self.data, drawn, variant if variant != "leaking" else None, needs)
                part.key  # noqa: B018  # looks at the options
                yield share, measure, part

    def _options(self, kind: str, arm: Arm) -> dict[str, Any]:
        """Options of a run: of the last recipe that is named, over them those of the study, the scale and the arm."""
        layers = self.declared, self.scale, arm
        values: Any = {}
        for layer in layers:
            if recipe := (getattr(layer, kind) or {}).get("recipe"):
                values = read_recipe(find_recipe(recipe, kind, self.path.parent), NAMES[kind])
        for layer in layers:
            where, own = type(layer).__name__.lower(), getattr(layer, kind) or {}
            _check_names(f"{where}: options", layer.options, NAMES["pretrain"] | NAMES["finetune"])
            _check_names(f"{where}: {kind}", own, NAMES[kind] | {"recipe"})
            values |= {name: value for name, value in layer.options.items() if name in NAMES[kind]} | own
        values.pop("recipe", None)
        epochs, warmup = (values.get(name, getattr(RUNS[kind], name)) for name in ("epochs", "warmup_epochs"))
        _check_numbers(f"{kind}: epochs", [epochs], (int,), 1, 10**6)
        _check_numbers(f"{kind}: warmup_epochs", [warmup], (int, float), 0, 10**6)
        scaled = {"epochs": max(1, round(epochs * self.scale.epochs)), "warmup_epochs": warmup * self.scale.epochs}
        if cooldown := values.get("cooldown_epochs"):
            _check_numbers(f"{kind}: cooldown_epochs", [cooldown], (int, float), 0, 10**6)
            scaled["cooldown_epochs"] = cooldown * self.scale.epochs
        return values | scaled
