"""The command ``fcmae model-card``."""

from convnextv2.commands import _cli
from convnextv2.commands.model_card import main

if __name__ == "__main__":
    _cli.run(main)
