"""Recipes that come with the package, one a file, and how ``--config`` finds them by name."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from convnextv2.messages import one_line

FOLDER = Path(__file__).parent
FORMER = "configs"
"""The folder of the repository that they lay in: what still names a file in it means the recipe."""


@cache
def recipes() -> dict[str, Path]:
    """Names to files, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(given: str | Path, task: str = "", folder: Path | None = None) -> Path:
    """The file that is meant: one that is there, or a recipe of the package.

    Args:
        given: a path, or a name: ``pretrain_small``, or of the task alone ``small``. A path that leads nowhere stays
            what it is, for the reader to tell, but for those in :data:`FORMER`.
        task: pretrain, finetune or segment.
        folder: where relative paths begin, instead of the present one.

    Raises:
        ValueError: if a name is of no recipe.
    """
    path = (folder or Path()) / given
    if path.is_file():
        return path
    known, name = recipes(), str(given)
    if Path(name).name == name and not Path(name).suffix:
        meant = next((own for own in (f"{task}_{name}", f"{name}_{task}", name) if own in known), None)
        if meant is not None:
            return known[meant]
        if not path.exists():
            raise ValueError(f"`config` {why_no_recipe(name, task)}")
    former = Path(name).parent.name == FORMER and Path(name).suffix == ".yaml"
    return known.get(path.stem, path) if former and not path.exists() else path


def why_no_recipe(name: str, task: str = "") -> str:
    """What is wrong with the name of a recipe, and which one may be meant."""
    short = {own.replace(f"{task}_", "").replace(f"_{task}", "") for own in recipes() if task and task in own}
    near = difflib.get_close_matches(name, sorted(short | recipes().keys()), 1)
    hint = f"did you mean {near[0]}?" if near else "`fcmae recipes` lists those that there are"
    return f"{one_line(name)}: no such file, and no recipe of that name; {hint}"


def about(path: Path) -> str:
    """The first sentence of a recipe's head, which says what it is for."""
    head = path.read_text(encoding="utf-8").partition("# Launch: ")[0]
    text = " ".join(line.lstrip("# ") for line in head.splitlines())
    first = text.partition(". ")[0]
    return first.rstrip(".")
