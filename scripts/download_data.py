"""The command ``fcmae download-data``."""

from convnextv2.commands import _cli
from convnextv2.commands.download_data import main

if __name__ == "__main__":
    _cli.run(main)
