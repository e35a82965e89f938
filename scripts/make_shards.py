"""The command ``fcmae shards``."""

from convnextv2.commands import _cli
from convnextv2.commands.shards import main

if __name__ == "__main__":
    _cli.run(main)
