"""The command ``fcmae evaluate``."""

from convnextv2.commands import _cli
from convnextv2.commands.evaluate import main

if __name__ == "__main__":
    _cli.run(main)
