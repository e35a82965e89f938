"""The command ``fcmae stats``."""

from convnextv2.commands import _cli
from convnextv2.commands.stats import main

if __name__ == "__main__":
    _cli.run(main)
