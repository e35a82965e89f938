"""The command ``fcmae report``."""

from convnextv2.commands import _cli
from convnextv2.commands.report import main

if __name__ == "__main__":
    _cli.run(main)
