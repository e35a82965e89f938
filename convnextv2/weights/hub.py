"""Weights of the Hugging Face hub, through its own library: its cache, its tokens, its offline mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from convnextv2.messages import one_line
from convnextv2.weights.guard import CheckpointError

PREFIX = "hf-hub:"
_NAME = re.compile(r"(?P<repo>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^\s@]+))?")


def hub_file(name: str, files: Sequence[str]) -> Path:
    """The first of ``files`` that a repository has, in the library's cache, downloaded unless it is there.

    The hub is asked each time what the revision holds; where it cannot be, what the cache holds is taken.

    Args:
        name: ``hf-hub:org/name``, or ``hf-hub:org/name@revision`` for a branch, a tag or a commit.
        files: paths in the repository.

    Raises:
        CheckpointError: in one line, if the name is none, or there is no such repository, revision or file, or none
            can be had: offline, or for want of a token.
        OSError: if the cache cannot be read or written.
    """
    found = _NAME.fullmatch(name.removeprefix(PREFIX))
    if found is None:
        raise CheckpointError(f"{name}: expected {PREFIX}org/name or {PREFIX}org/name@revision")
    from huggingface_hub import hf_hub_download, model_info, utils  # takes a while to import

    repository, revision = found["repo"], found["revision"]
    try:
        there = {file.rfilename for file in model_info(repository, revision=revision).siblings or ()}
        chosen = next(filter(there.__contains__, files), None)
        if chosen is None:
            raise CheckpointError(f"{name}: has no weights that are read here; looked for {', '.join(files)}")
        return Path(hf_hub_download(repository, chosen, revision=revision))
    except CheckpointError:
        raise
    except utils.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: is given to those who asked for it; set HF_TOKEN to a token of theirs"
        ) from error
    except utils.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the repository has no revision {revision!r}") from error
    except utils.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such repository, or it is private; set HF_TOKEN to a token that may read it"
        ) from error
    except utils.HFValidationError as error:
        raise CheckpointError(f"{name}: {_first_line(error)}") from error
    except Exception as error:  # offline, or a hub that is out of order: of the transports, which come and go
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of this machine
        if (cached := _cached(repository, revision, files)) is not None:
            return cached
        raise CheckpointError(
            f"{name}: is not in the hub's cache, and the hub cannot be reached ({_first_line(error)}); check the "
            "connection, or download it elsewhere and name the folder"
        ) from error


def _cached(repository: str, revision: str | None, files: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(repository, file, revision=revision) for file in files)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _first_line(error: Exception) -> str:
    return one_line(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)
