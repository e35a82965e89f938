"""One page about one or several runs: curves, pictures, recipes, environments, commands."""

from convnextv2.report.page import REPORT, report

__all__ = ["REPORT", "report"]
