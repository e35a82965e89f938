"""The dense network goes through torch's ONNX exporter, and another runtime computes the same."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from convnextv2 import ClassifierConfig, ConvNeXtV2, EncoderConfig


@pytest.mark.slow
def test_exported_with_dynamic_batch_and_size(tmp_path):
    """Standard operators alone, though the network itself runs on the compiled kernels here."""
    config = EncoderConfig(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    model = ConvNeXtV2(ClassifierConfig(config, 5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # GRN's are zero otherwise
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    images = torch.randn(2, 3, 64, 96)
    program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=(free,), verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    (name,) = (given.name for given in session.get_inputs())
    for shape in ((2, 3, 64, 96), (1, 3, 224, 224), (3, 3, 100, 75)):
        images = torch.randn(shape)
        with torch.inference_mode():
            expected = model(images).numpy()
        (found,) = session.run(None, {name: images.numpy()})
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
