"""The command ``fcmae download-weights``."""

from convnextv2.commands import _cli
from convnextv2.commands.download_weights import main

if __name__ == "__main__":
    _cli.run(main)
