"""The command ``fcmae convert``."""

from convnextv2.commands import _cli
from convnextv2.commands.convert import main

if __name__ == "__main__":
    _cli.run(main)
