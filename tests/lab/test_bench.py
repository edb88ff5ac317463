"""What lab.bench counts."""

import pytest
import torch

import models
from lab.bench import FlopCounter


@pytest.mark.slow
def test_flop_are_counted_alike_fused_and_not(tiny_carso, monkeypatch):
    classifier, x, found = tiny_carso.classifier, torch.rand(2, 1, 32, 32, requires_grad=True), []
    for fused_on in (("cpu",), ()):
        monkeypatch.setattr(models, "FUSED_ON", fused_on)
        with FlopCounter() as counter:
            classifier(x).sum().backward()
        found.append(counter.total)
    convolution = classifier.get_submodule("layer.0.block.0.conv_0")
    one = 2 * 2 * 32 * 32 * convolution.weight.numel()  # multiply, add; 2 pictures; forward
    assert found[0] == found[1] > 10 * one
