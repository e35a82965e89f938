"""``python -m convnextv2``: the command ``fcmae``, for launchers too, as in ``torchrun -m convnextv2 pretrain``."""

from convnextv2.commands import main

if __name__ == "__main__":
    main()
