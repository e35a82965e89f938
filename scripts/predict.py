"""The command ``fcmae predict``."""

from convnextv2.commands import _cli
from convnextv2.commands.predict import main

if __name__ == "__main__":
    _cli.run(main)
