"""A network as a folder of transformers: configuration, image processor, weights, for ``from_pretrained``."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2.export.refusal import ExportError
from convnextv2.export.source import Run, Source
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.layers import EPS
from convnextv2.weights.beside import OURS
from convnextv2.weights.layouts import get_layout

KERNEL_SIZE = 7
"""Of transformers' network, which has no other."""
BICUBIC = 3
FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}


@contextlib.contextmanager
def _quietly(library: Any) -> Iterator[None]:
    """Without transformers' progress bars."""
    logging = library.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def processor_options(source: Source) -> dict[str, Any] | None:
    """What transformers' CLIPImageProcessor, the one that resizes and crops at any size, needs to give our pixels;
    None where it cannot: for images that are not square, not of 8 bits or have not three channels, or of which nothing
    is known."""
    if source.preprocessing is None or source.network.encoder_config.in_chans != 3:
        return None
    if source.metadata.get("pixels") == "native":
        return None
    mean, std, (height, width) = source.preprocessing
    if height != width:
        return None
    edge = math.floor(height / 0.875) if height >= 160 else height
    crop = {"height": height, "width": width}
    options = {"size": {"shortest_edge": edge}, "crop_size": crop, "resample": BICUBIC, "do_convert_rgb": True}
    return options | {"image_mean": list(mean), "image_std": list(std)}


def write(source: Source, path: Path) -> Run:
    """Write ``config.json``, ``model.safetensors`` and, where there can be one, ``preprocessor_config.json``."""
    network, config = source.network, source.network.encoder_config
    if config.kernel_size != KERNEL_SIZE:
        raise ExportError(f"transformers has kernel size 7 alone, not {config.kernel_size}; use the target onnx")
    if isinstance(network, ConvNeXtV2) and network.config.pooling != "mean":
        raise ExportError(f"transformers pools by the mean alone, not {network.config.pooling}; use the target onnx")
    library = importlib.import_module("transformers")
    names = source.class_names or tuple(f"LABEL_{index}" for index in range(source.num_classes))
    size = {} if source.preprocessing is None else {"image_size": source.preprocessing[2][0]}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    about = library.ConvNextV2Config(
        num_channels=config.in_chans,
        patch_size=config.stem_stride,
        hidden_sizes=list(config.dims),
        depths=list(config.depths),
        layer_norm_eps=EPS,
        **size,
        **(labels if source.num_classes else {}),
        **{OURS: source.about()},
    )
    classes = library.ConvNextV2ForImageClassification if source.num_classes else library.ConvNextV2Model
    theirs = classes(about)
    layout = get_layout("transformers")
    state = {layout.name_of(name): layout.write(name, value, config) for name, value in network.state_dict().items()}
    if not source.num_classes:
        state = {name.removeprefix("convnextv2."): value for name, value in state.items()}
    if not isinstance(network, ConvNeXtV2):
        state |= {"layernorm.weight": torch.ones(config.dims[-1]), "layernorm.bias": torch.zeros(config.dims[-1])}
    theirs.load_state_dict(state, assign=True)
    options = processor_options(source)
    with _quietly(library):
        theirs.eval().save_pretrained(path)
        if options is not None:
            library.CLIPImageProcessor(**options).save_pretrained(path)
        again = classes.from_pretrained(path, local_files_only=True).eval()

    def run(images: Tensor) -> Tensor:
        outputs = again(images)
        if source.num_classes:
            return outputs.logits
        return outputs.pooler_output if isinstance(network, ConvNeXtV2) else outputs.last_hidden_state

    return run


def is_one(path: Path) -> bool:
    """Whether a folder is one that was written here, with nothing added to it."""
    names = {entry.name for entry in path.iterdir()}
    if "config.json" not in names or not names <= FILES:
        return False
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(about, dict) and OURS in about


def loading(source: Source, path: str) -> list[str]:
    """How the folder is loaded, and how its image processor differs from ours."""
    kind = "AutoModelForImageClassification" if source.num_classes else "AutoModel"
    lines = [f"load it with: transformers.{kind}.from_pretrained({path!r})"]
    if not isinstance(source.network, ConvNeXtV2):
        lines.append("its last_hidden_state is the encoder's; pooler_output has a norm that nothing has trained")
    options = processor_options(source)
    if options is None:
        return [*lines, "no image processor: transformers has none for these images; prepare them as this project does"]
    margin = options["size"]["shortest_edge"] - options["crop_size"]["height"]
    beside = "; its crop starts one pixel before ours" if margin % 4 == 3 else ""
    return [*lines, f"its images: transformers.AutoImageProcessor.from_pretrained({path!r}, use_fast=False){beside}"]
