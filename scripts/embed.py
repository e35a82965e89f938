"""The command ``fcmae embed``."""

from convnextv2.commands import _cli
from convnextv2.commands.embed import main

if __name__ == "__main__":
    _cli.run(main)
