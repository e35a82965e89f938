"""The command ``fcmae demo``."""

from convnextv2.commands import _cli
from convnextv2.commands.demo import main

if __name__ == "__main__":
    _cli.run(main)
