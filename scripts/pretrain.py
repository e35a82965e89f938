"""The command ``fcmae pretrain``."""

from convnextv2.commands import _cli
from convnextv2.commands.pretrain import main

if __name__ == "__main__":
    _cli.run(main)
