"""Say which backends there are, which can run here, and which ``auto`` would take: python -m sparse_ops, too."""

from __future__ import annotations

from collections.abc import Sequence

from convnextv2.commands import _cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look, tell."""
    _cli.Parser(description=__doc__).parse_args(arguments)
    from sparse_ops.__main__ import report

    _cli.say(report())
