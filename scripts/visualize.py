"""The command ``fcmae visualize``."""

from convnextv2.commands import _cli
from convnextv2.commands.visualize import main

if __name__ == "__main__":
    _cli.run(main)
