"""The command ``fcmae finetune``."""

from convnextv2.commands import _cli
from convnextv2.commands.finetune import main

if __name__ == "__main__":
    _cli.run(main)
