"""The command ``fcmae info``."""

from convnextv2.commands import _cli
from convnextv2.commands.info import main

if __name__ == "__main__":
    _cli.run(main)
