"""Gradients of a masked autoencoder for four images and four masks, shared by the processes of the launcher, in
float64: shared_gradients.py FILE BACKEND."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.models.masking import random_mask

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    encoder = EncoderConfig((1, 1, 2, 1), (8, 16, 24, 32), patch_size=8)
    plain = create_fcmae(encoder, img_size=(32, 48), decoder_dim=16, backend=sys.argv[2]).double()
    for name, parameter in plain.named_parameters():
        if ".grn." in name:  # these start at zero, and would hide what lies behind them
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    images = torch.randn(4, 3, 32, 48, generator=generator, dtype=torch.float64)
    mask = random_mask(4, 24, 0.6, generator=generator)
    share = 4 // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    model = accelerator.prepare(plain)
    accelerator.backward(model(images[mine], mask[mine], return_pred=False).loss)
    if accelerator.is_main_process:
        torch.save({name: parameter.grad for name, parameter in plain.named_parameters()}, sys.argv[1])
    accelerator.wait_for_everyone()
