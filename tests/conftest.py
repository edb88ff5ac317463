"""Shared by all tests: weights by formula, the golden files, tiny models."""

import copy
import functools
import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DEVICE = os.environ.get("CARSO_DEVICE", "cpu")  # where the real scripts run
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny networks gain nothing from more, and lose much where other programs run

from models import WideResNet, record, representation_layers, run_script  # noqa: E402
from purifier import CARSO, build_carso  # noqa: E402

# The parts of the reference's purifier, by our names: (reference part, reference key prefix) for each of our prefixes.
REFERENCE_NAMES = {
    "image_encoder.": "input_compressor/",
    "layer_encoders.": "repr_compressors/",
    "condition_head.": "repr_fcn_compressor/1.",
    "joint_head.": "joint_fcn_compressor/1.",
    "to_mu.": "neck/x_to_mu.",
    "to_logvar.": "neck/x_to_log_var.",
    "decoder.0.0.": "decoder/0.1.",
    "decoder.": "decoder/",
}


def reference_name(ours: str) -> str:
    prefix = next(p for p in REFERENCE_NAMES if ours.startswith(p))
    return REFERENCE_NAMES[prefix] + ours.removeprefix(prefix)


def uniform(name: str, shape) -> np.ndarray:
    """The formula: n numbers in [0, 1) that follow from a name, in float64."""
    i = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    s = np.sin(12.9898 * i + 2 * np.pi * (zlib.crc32(name.encode()) % 1000) / 1000) * 43758.5453
    return (s - np.floor(s)).reshape(shape)


def formula_tensor(name: str, shape) -> torch.Tensor:
    u = uniform(name, shape)
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        u = 0.5 + u
    elif len(shape) == 1:
        u = 0.2 * (2 * u - 1)
    else:
        u = (2 * u - 1) * math.sqrt(3 / math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(u, dtype=np.float32))


def fill(module: torch.nn.Module, name) -> torch.nn.Module:
    """Fill a module's tensors by the formula; name(key) is each tensor's name in it."""
    module.load_state_dict({key: formula_tensor(name(key), t.shape) for key, t in module.state_dict().items()})
    return module


def formula_classifier(depth: int, width: int) -> WideResNet:
    return fill(WideResNet(10, depth, width), lambda key: f"classifier/{key}").eval()


def exit_status(name: str, main) -> int:
    """The status with which the script would end."""
    with pytest.raises(SystemExit) as stop:
        run_script(name, main)
    return stop.value.code


def picture(name: str, shape) -> torch.Tensor:
    return torch.from_numpy(uniform(name, shape).astype(np.float32))


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(TESTS / f"golden_{name}.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def _same_random_numbers_whatever_ran_before():
    torch.manual_seed(0)


@functools.cache
def _reference_carso() -> CARSO:
    carso = build_carso(formula_classifier(10, 2), representation_layers(10), (3, 32, 32))
    fill(carso.purifier, reference_name)
    return carso


@pytest.fixture
def wrn_10_2() -> WideResNet:
    return formula_classifier(10, 2)


@pytest.fixture
def reference_carso() -> CARSO:
    """The small CARSO that the golden files were computed with: WRN-10-2, D 512, Z 128."""
    return copy.deepcopy(_reference_carso())


def fresh_carso(num_classes: int, samples: int, channels: int = 1, **sizes) -> CARSO:
    """An untrained CARSO whose answers depend on the picture: BatchNorm's statistics are those of some pictures (with
    the initial ones, the signal dies out on its way through the layers and gradients are rounding noise)."""
    torch.manual_seed(0)
    classifier, layers = WideResNet(num_classes, 10, 1, in_channels=channels), representation_layers(10)
    x = torch.rand(16, channels, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        classifier.train()(x)
        classifier.logits.weight.mul_(10)
        carso = build_carso(classifier, layers, (channels, 32, 32), samples, **sizes)
        for module in carso.purifier.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        carso.train().purifier(x, record(carso.classifier, layers, x)[1])
        carso.purifier.decoder[-2].weight.mul_(10)
    return carso.eval()


@pytest.fixture
def tiny_carso() -> CARSO:
    """A few thousand parameters, 5 classes, one channel."""
    return fresh_carso(5, samples=3, condition_dim=16, latent_dim=4, decoder_width=16)
