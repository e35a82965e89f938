"""The command ``fcmae check``."""

from convnextv2.commands import _cli
from convnextv2.commands.check import main

if __name__ == "__main__":
    _cli.run(main)
