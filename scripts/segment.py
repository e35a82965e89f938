"""The command ``fcmae segment``."""

from convnextv2.commands import _cli
from convnextv2.commands.segment import main

if __name__ == "__main__":
    _cli.run(main)
