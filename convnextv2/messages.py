"""Text of others in messages of ours."""

from __future__ import annotations

LONGEST_MESSAGE = 800
"""Letters of an error: what a file holds, which may be megabytes, stands in them."""


def one_line(text: object) -> str:
    """``text`` for a message: one line, what cannot be printed as escapes, the middle of a long one left out."""
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(str(text).split())
    )
    return shown if len(shown) <= LONGEST_MESSAGE else f"{shown[: LONGEST_MESSAGE - 200]}…{shown[-199:]}"
