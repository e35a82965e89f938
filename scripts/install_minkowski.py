"""The command ``fcmae minkowski``, with the standard library alone: the package need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from convnextv2.commands.minkowski import main

if __name__ == "__main__":
    sys.exit(main())
