"""The classifier and the recording hooks."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TESTS, formula_classifier, golden, picture
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import data
from lab.checkpoints import PUBLISHED_DATA, fingerprint_of, load_published_classifier
from lab.foreign import Foreign, check_answers, load_function
from models import CIFAR10_MEAN, CIFAR10_STD, WideResNet, record, representation_layers


@pytest.mark.parametrize("file, depth, width", [("wrn28_10", 28, 10), ("wrn10_2", 10, 2)])
def test_state_dict_has_the_public_names_and_shapes(file, depth, width):
    keys = json.loads((TESTS / f"keys_{file}_cifar.json").read_text())["classifier"]
    with torch.device("meta"):
        ours = WideResNet(10, depth, width).state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == keys


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in WideResNet(k).parameters()) for k in (10, 200)]
    assert counts == [36_479_194, 36_600_984]


def test_logits_of_wrn_10_2(wrn_10_2):
    logits = wrn_10_2(picture("x", (8, 3, 32, 32))).detach()
    assert_close(logits, torch.from_numpy(golden("classifier")["wrn10_2_logits"]), rtol=1e-4, atol=1e-5)


def test_logits_of_wrn_28_10():
    with torch.inference_mode():
        logits = formula_classifier(28, 10)(picture("x", (4, 3, 32, 32)))
    expected = golden("classifier")["wrn28_10_logits_float64"]
    assert np.abs(logits.double().numpy() - expected).max() / np.abs(expected).max() < 1e-4


@pytest.mark.parametrize("depth, width, channels, size, classes", [(10, 1, 1, 32, 7), (16, 1, 3, 64, 200)])
def test_other_sizes(depth, width, channels, size, classes):
    network = WideResNet(classes, depth, width, channels)
    assert network(torch.rand(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    "wrong", [dict(depth=27), dict(mean=(0.5,), std=(0.5,)), dict(in_channels=1, mean=(1, 2), std=(1, 2))]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        WideResNet(10, **wrong)


def test_wrong_channel_count_is_refused(wrn_10_2):
    with pytest.raises(ValueError, match="expected pictures"):
        wrn_10_2(torch.rand(2, 1, 32, 32))


def test_gradients_of_pictures_are_contiguous(wrn_10_2):
    """AutoAttack calls view() on them; the layers inside are channels-last."""
    x = picture("x", (2, 3, 32, 32)).requires_grad_()
    logits, representation = record(wrn_10_2, representation_layers(10), x)
    assert representation[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(logits.sum(), x)[0].is_contiguous()


# ------------------------------------------------------------------------------------------------ the representation


def test_the_26_layers_of_the_paper():
    layers = representation_layers(28)
    assert len(layers) == 26
    with torch.device("meta"):
        _, representation = record(WideResNet(10).eval(), layers, torch.zeros(1, 3, 32, 32))
    shapes = [tuple(layer.shape[1:]) for layer in representation]
    assert shapes == 8 * [(160, 32, 32)] + 9 * [(320, 16, 16)] + 9 * [(640, 8, 8)]


def test_representation_equals_the_reference(wrn_10_2):
    want = golden("purifier")
    layers = representation_layers(10)
    assert layers == want["repr_names"].tolist()
    with torch.no_grad():
        logits, representation = record(wrn_10_2, layers, picture("x", (8, 3, 32, 32)))
    assert_close(logits, torch.from_numpy(want["logits"]), rtol=1e-4, atol=1e-5)
    assert [list(layer.shape[1:]) for layer in representation] == want["repr_shapes"].tolist()
    np.testing.assert_allclose([layer.mean() for layer in representation], want["repr_means"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([layer.std() for layer in representation], want["repr_stds"], rtol=1e-4)


def hook_count(module):
    return sum(len(m._forward_hooks) for m in module.modules())


def test_recording_is_differentiable_and_follows_no_grad(wrn_10_2):
    x = picture("x", (2, 3, 32, 32)).requires_grad_()
    for layer in record(wrn_10_2, representation_layers(10), x)[1]:
        (gradient,) = torch.autograd.grad(layer.sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not any(layer.requires_grad for layer in record(wrn_10_2, representation_layers(10), x)[1])


def test_hooks_are_removed_after_success_and_after_an_exception(wrn_10_2):
    layers = representation_layers(10)
    record(wrn_10_2, layers, picture("x", (2, 3, 32, 32)))
    assert hook_count(wrn_10_2) == 0
    with pytest.raises(ValueError):
        record(wrn_10_2, layers, torch.rand(2, 1, 32, 32))
    assert hook_count(wrn_10_2) == 0
    with pytest.raises(ValueError, match="no layer named layer.9"):
        record(wrn_10_2, [*layers, "layer.9"], picture("x", (2, 3, 32, 32)))
    assert hook_count(wrn_10_2) == 0


def test_recording_twice_and_nested_keeps_each_to_its_own(wrn_10_2):
    """A recording started from inside a forward that is itself being recorded disturbs neither."""
    layers, inner = representation_layers(10), {}
    x, other = picture("x", (2, 3, 32, 32)), picture("other", (1, 3, 32, 32))
    alone, other_alone = record(wrn_10_2, layers, x)[1], record(wrn_10_2, layers, other)[1]

    def start_another(module, inputs, output):
        if not inner:
            inner["running"] = True
            inner["representation"] = record(wrn_10_2, layers, other)[1]

    handle = wrn_10_2.get_submodule(layers[3]).register_forward_hook(start_another)
    try:
        outer = record(wrn_10_2, layers, x)[1]
    finally:
        handle.remove()
    for a, b in zip(outer + inner["representation"], alone + other_alone, strict=True):
        assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- published weights


def public_weights():
    return {name: t for name, t in formula_classifier(10, 2).state_dict().items()}


LAYOUTS = {
    "Wang 2023": lambda w: {
        "model_state_dict": {f"module.0.{k}": v for k, v in w.items()},
        "unaveraged_model_state_dict": {},
    },
    "Cui 2023": lambda w: {
        "state_dict": {f"module.0.{k}": v for k, v in w.items()} | {"module.0.sub_block1.layer.weight": torch.zeros(1)}
    },
    "Cui 2023, twice wrapped": lambda w: {"state_dict": {"model_state_dict": {f"module.{k}": v for k, v in w.items()}}},
    "RobustBench": lambda w: (
        {f"module.model.{k}": v for k, v in w.items()}
        | {"module.mean": torch.full((1, 3, 1, 1), 0.4), "module.std": torch.full((1, 3, 1, 1), 0.2)}
    ),
    "bare": lambda w: w,
    "compiled": lambda w: {"state_dict": {f"module._orig_mod.0.{k}": v for k, v in w.items()}},
    "compiled in parts": lambda w: {k.replace("block.0.", "block.0._orig_mod."): v for k, v in w.items()},
    "numpy's numbers beside": lambda w: {"state_dict": w, "best": np.float64(0.5), "epoch": np.int64(3)},
    "without counters": lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_recognised_by_content(tmp_path, wrn_10_2, layout):
    torch.save(LAYOUTS[layout](public_weights()), tmp_path / "some.name")
    loaded = load_published_classifier(tmp_path / "some.name", 10, CIFAR10_MEAN, CIFAR10_STD)
    x = picture("x", (2, 3, 32, 32))
    if layout == "RobustBench":  # its own mean and std count, whatever the data's are
        assert loaded.config["mean"] == pytest.approx((0.4,) * 3) and loaded.config["std"] == pytest.approx((0.2,) * 3)
        loaded.mean, loaded.std = wrn_10_2.mean, wrn_10_2.std
    assert_close(loaded(x), wrn_10_2(x), rtol=0, atol=0)
    assert not loaded.training


def test_safetensors_are_recognised_by_content(tmp_path, wrn_10_2):
    save_file({k: v.contiguous() for k, v in public_weights().items()}, tmp_path / "weights")
    x = picture("x", (2, 3, 32, 32))
    assert_close(load_published_classifier(tmp_path / "weights", 10)(x), wrn_10_2(x), rtol=0, atol=0)


def test_published_normalisation_is_that_of_the_data():
    assert data.NORMALISATION["cifar10"] == (CIFAR10_MEAN, CIFAR10_STD)
    assert {PUBLISHED_DATA[k] for k in (10, 100, 200)} == set(data.NORMALISATION)


class Malicious:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return self.code


def cut(path, keep: float):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def change(path):
    """One byte of a weight, which stays a finite number."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WRONG = {
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "web page"),
    "nothing": (lambda path: None, "no file"),
    "noise": (lambda path: path.write_bytes(b"\x80\x02 noise"), "not a checkpoint"),
    "another network": (
        lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path),
        "not one of the public WideResNets",
    ),
    "other classes": (
        lambda path: torch.save(public_weights() | {"logits.bias": torch.zeros(7)}, path),
        "logits.bias \\(7,\\)",
    ),
    "a missing key": (
        lambda path: torch.save({k: v for k, v in public_weights().items() if k != "batchnorm.bias"}, path),
        "1 missing: batchnorm.bias",
    ),
    "an unexpected key": (
        lambda path: torch.save(public_weights() | {"extra": torch.zeros(1)}, path),
        "1 unexpected: extra",
    ),
    "a malicious pickle": (lambda path: torch.save({"a": Malicious((os.system, ("touch run",)))}, path), "run code"),
    "a builtin": (lambda path: torch.save({"a": Malicious((exec, ("1",)))}, path), "run code"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps(Malicious((exec, ("1",))))), "run code"),
    "truncated": (lambda path: (torch.save(public_weights(), path), cut(path, 0.5)), "is the file whole"),
    "a changed byte": (lambda path: (torch.save(public_weights(), path), change(path)), "is damaged"),
    "truncated safetensors": (
        lambda path: (save_file({k: v.contiguous() for k, v in public_weights().items()}, path), cut(path, 0.9)),
        "is the file whole",
    ),
    "safetensors cut in the header": (
        lambda path: (save_file({k: v.contiguous() for k, v in public_weights().items()}, path), cut(path, 0.001)),
        "whole",
    ),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "where weights by name should be"),
    "numbers for weights": (
        lambda path: torch.save(public_weights() | {"logits.bias": torch.zeros(10, dtype=torch.int8)}, path),
        "1 of another kind: logits.bias",
    ),
    "NaN": (
        lambda path: torch.save(public_weights() | {"logits.bias": torch.full((10,), torch.nan)}, path),
        "1 not finite: logits.bias",
    ),
    "another kind of convolution": (
        lambda path: torch.save(public_weights() | {"init_conv.weight": torch.zeros(3)}, path),
        "not one of the public WideResNets",
    ),
    "code": (
        lambda path: torch.save(public_weights() | {"args": argparse.Namespace()}, path),
        "holds more than tensors",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weight_files_get_a_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write, sentence = WRONG[kind]
    write(tmp_path / "file")
    with pytest.raises(ValueError, match=sentence):
        load_published_classifier(tmp_path / "file", 10)
    assert not (tmp_path / "run").exists()


def test_old_pickles_open_when_trusted(tmp_path, wrn_10_2):
    torch.save({"state_dict": public_weights(), "args": argparse.Namespace()}, tmp_path / "file")
    loaded = load_published_classifier(tmp_path / "file", 10, trust_pickle=True)
    x = picture("x", (2, 3, 32, 32))
    assert_close(loaded(x), wrn_10_2(x), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- the models of others

THEIRS = {
    "a clash with our models.py": (
        "from models import Net\n\ndef build():\n    return Net()\n",
        "import torch\nfrom data import K\nclass Net(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(1024, K)\n"
        "    def forward(self, x):\n        return super().forward(x.flatten(1))\n",
        "K = 5\n",
    ),
    "a dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
        "@dataclass\nclass Config:\n    k: int = 5\n"
        "def build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, Config().k))\n",
    ),
    "our own WideResNet": ("from models import WideResNet\ndef build():\n    return WideResNet(5, 10, 1, 1)\n",),
    "an attribute .classifier": (
        "import torch\nclass VGG(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.classifier = torch.nn.Linear(1024, 5)\n"
        "    def forward(self, x):\n        return self.classifier(x.flatten(1))\n"
        "build = VGG\n",
    ),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_model_of_others_is_built_in_its_own_surroundings(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in zip(("mine", "models", "data"), THEIRS[kind]):
        (tmp_path / f"{name}.py").write_text(text)
    model = load_function(f"{tmp_path / 'mine.py'}:build")
    check_answers(model, "mine.py", torch.zeros(3, 1, 32, 32, dtype=torch.uint8), 5)
    assert isinstance(model, Foreign) and not model.training and not hasattr(model, "classifier")
    assert sys.modules["models"].WideResNet is WideResNet and sys.modules["data"] is data


def test_a_project_that_this_repository_lies_in(tmp_path):
    """Its modules come first all the same, also those under names of ours."""
    shutil.copytree(ROOT, tmp_path / "carso", ignore=shutil.ignore_patterns(".*", "runs", "tests", "__pycache__"))
    for name, text in zip(("mine", "models", "data"), THEIRS["a clash with our models.py"]):
        (tmp_path / f"{name}.py").write_text(text)
    program = "from lab.foreign import load_function\nprint(type(load_function('../mine.py:build').model).__module__)"
    how = dict(cwd=tmp_path / "carso", capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", "import models, data\n" + program], **how)
    assert done.stdout == "models\n", done.stderr


class Packed(nn.Module):
    """A state dict may hold more than tensors: a quantised network's has tuples of them."""

    def __init__(self, *packed):
        super().__init__()
        self.packed = packed

    def get_extra_state(self):
        return self.packed


def test_a_fingerprint_is_of_whatever_a_state_dict_holds():
    many = torch.zeros(100_000)  # of which repr() shows a few
    other = many.index_fill(0, torch.tensor(50_000), 1)
    found = {fingerprint_of(Packed(*given)) for given in ((many, 8), (many, 4), (other, 8), ({"a": many}, 8))}
    assert len(found) == 4 and fingerprint_of(Packed(many.clone(), 8)) in found


def test_weights_without_checksums_are_read(tmp_path, wrn_10_2):
    """PyTorch can be told to leave them out."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(public_weights(), tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_published_classifier(tmp_path / "w.pt", 10).logits.bias, wrn_10_2.logits.bias)


def test_a_defence_of_others_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text("from conftest import fresh_carso\ndef build():\n    return fresh_carso(3, 2, "
                                      "condition_dim=8, latent_dim=4, decoder_width=8)\n")  # fmt: skip
    assert load_function(f"{tmp_path / 'mine.py'}:build").samples == 2


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("import nothing_of_that_name", "mine.py, line 1: ModuleNotFoundError: No module"),
        ("def build(:", "SyntaxError"),
        ("def build():\n    return {}['x']", "line 2: KeyError"),
        ("def build(depth):\n    pass", "TypeError: build\\(\\) missing"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit"),
        ("build = 3", "no function build"),
        ("def built():\n    pass", "no function build"),
        ("def build():\n    return 3", "return an nn.Module, not a int"),
        ("import torch\ndef build():\n    return torch.nn.Linear", "return an nn.Module, not a type"),
    ],
)
def test_a_model_that_cannot_be_built_gets_a_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(text + "\n")
    with pytest.raises(ValueError, match=sentence):
        load_function(f"{tmp_path / 'mine.py'}:build")


@pytest.mark.parametrize("text", ["mine.py", ":build", "mine.py:", "nowhere.py:build", "mine.txt:build", ""])
def test_where_a_model_comes_from(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ValueError, match="wants FILE.py:FUNCTION"):
        load_function(text)


ANSWERS = {
    "a tuple": (lambda x: (x.flatten(1)[:, :5], None), "returns a tuple"),
    "another number of classes": (lambda x: x.flatten(1)[:, :6], "float32 \\(2, 6\\)"),
    "whole numbers": (lambda x: x.flatten(1)[:, :5].long(), "int64"),
    "NaN": (lambda x: x.flatten(1)[:, :5] * torch.nan, "not finite"),
    "three dimensions": (lambda x: x.flatten(1)[:, None, :5], "\\(2, 1, 5\\)"),
    "one picture too few": (lambda x: x.flatten(1)[:, :5].squeeze(0), "\\(5,\\)"),
    "other channels": (torch.nn.Conv2d(3, 5, 32), "does not take pictures \\(2, 1, 32, 32\\)"),
    "an empty message": (lambda x: [][x], "does not take pictures"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_one_trial_forward_tells_what_is_no_classifier(kind):
    model, sentence = ANSWERS[kind]
    with pytest.raises(ValueError, match=f"mine.py .*{sentence}"):
        check_answers(model, "mine.py", torch.zeros(3, 1, 32, 32, dtype=torch.uint8), 5)
