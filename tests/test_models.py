"""The classifier against the reference, the hooks that record its representation, and files of weights."""

import io
import json
import os
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, exit_status, formula_classifier, golden, picture
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import silu
from torch.testing import assert_close

import models
from models import PUBLISHED, WideResNet, hash_weights, load_classifier, record, representation_layers

# ----------------------------------------------------------------------------------- the network, and the paper's


@pytest.mark.parametrize("file, depth, width", [("wrn28_10", 28, 10), ("wrn10_2", 10, 2)])
def test_state_dict_has_the_public_names_and_shapes(file, depth, width):
    keys = json.loads((TESTS / f"keys_{file}_cifar.json").read_text())["classifier"]
    with torch.device("meta"):
        ours = WideResNet(10, depth, width).state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == keys


def test_logits_of_wrn_10_2(wrn_10_2):
    logits = wrn_10_2(picture("x", (8, 3, 32, 32))).detach()
    assert_close(logits, torch.from_numpy(golden("classifier")["wrn10_2_logits"]), rtol=1e-4, atol=1e-5)


def test_logits_of_wrn_28_10():
    with torch.inference_mode():
        logits = formula_classifier(28, 10)(picture("x", (4, 3, 32, 32)))
    expected = golden("classifier")["wrn28_10_logits_float64"]
    assert np.abs(logits.double().numpy() - expected).max() / np.abs(expected).max() < 1e-4


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
    assert all(layer.is_contiguous(memory_format=torch.channels_last) for layer in representation)
    assert [list(layer.shape[1:]) for layer in representation] == want["repr_shapes"].tolist()
    np.testing.assert_allclose([layer.mean() for layer in representation], want["repr_means"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([layer.std() for layer in representation], want["repr_stds"], rtol=1e-4)


def test_larger_pictures_and_more_classes():
    assert WideResNet(200, depth=16, width=1)(torch.rand(2, 3, 64, 64)).shape == (2, 200)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(depth=27), "depth must be 6n \\+ 4"),
        (dict(mean=(0.5,), std=(0.5,)), "one number for each of the 3 channels"),
    ],
)
def test_wrong_arguments_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        WideResNet(10, **wrong)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 32)])
def test_what_is_no_batch_of_pictures_is_refused(wrn_10_2, shape):
    with pytest.raises(ValueError, match="expected pictures"):
        wrn_10_2(torch.rand(shape))


@pytest.mark.parametrize("training", [False, True])
def test_normalise_and_activate_is_batchnorm_and_silu(training):
    theirs, ours = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.double) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    theirs.train(training), ours.train(training)
    x = torch.randn(4, 5, 3, 3, dtype=torch.double, requires_grad=True)
    expected, out = silu(theirs(x)), models.normalise_and_activate(ours, x)
    assert_close(out, expected)
    expected = torch.autograd.grad(expected.sin().sum(), [x, theirs.weight, theirs.bias])
    assert_close(torch.autograd.grad(out.sin().sum(), [x, ours.weight, ours.bias]), expected)
    assert_close(ours.state_dict(), theirs.state_dict())


# ------------------------------------------------------------------------------------------------ the representation

LAYERS = representation_layers(10)


def test_recording_is_differentiable(wrn_10_2):
    x = picture("x", (2, 3, 32, 32)).requires_grad_()
    for layer in record(wrn_10_2, LAYERS, x)[1]:
        assert torch.autograd.grad(layer.sum(), x, retain_graph=True)[0].any()


def test_hooks_are_removed_whatever_happens(wrn_10_2):
    record(wrn_10_2, LAYERS, picture("x", (2, 3, 32, 32)))
    with pytest.raises(ValueError, match="expected pictures"):
        record(wrn_10_2, LAYERS, torch.rand(2, 1, 32, 32))
    assert not any(module._forward_hooks for module in wrn_10_2.modules())


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return out


@pytest.mark.parametrize(
    "first, tap, second",
    [(nn.Conv2d(3, 3, 3), "0", nn.ReLU(inplace=True)), (Shortcut(), "0.conv", nn.Identity())],
)
def test_what_was_put_out_is_kept_though_the_network_changes_it_in_place(first, tap, second):
    network, x = nn.Sequential(first, second, nn.Flatten()), torch.randn(2, 3, 8, 8, requires_grad=True)
    want = network.get_submodule(tap)(x)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            logits, (kept,) = record(network, [tap], x)
        assert_close(kept, want)
        assert_close(logits, network(x))
        if kept.requires_grad:
            gradients = (torch.autograd.grad(layer.square().sum(), x)[0] for layer in (kept, want))
            assert_close(*gradients)


class Attention(nn.Module):
    """Tokens (B, N, C) from pictures, as a vision transformer has them."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Flatten(2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.again = nn.Identity()
        self.unused = nn.Identity()

    def forward(self, x):
        tokens = self.tokens(self.again(self.again(x)))
        return self.attention(tokens, tokens, tokens)[0].mean(2)


@pytest.mark.parametrize(
    "layers, sentence",
    [
        ([], "a list with at least one layer's name, not []"),
        ("tokens", "a list with at least one layer's name, not 'tokens'"),
        (["layer.9"], "the classifier has no layer named layer.9"),
        (["attention"], "layer attention puts out a tuple: tap one that puts out a tensor"),
        (["again"], "runs again more than once: tap a layer that it runs once"),
        (["unused"], "the classifier's forward did not run unused"),
    ],
)
def test_taps_that_are_none_end_in_a_sentence(layers, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        record(Attention(), layers, torch.rand(1, 3, 4, 4))


# -------------------------------------------------------------------------------------------------- files of weights


def public_weights() -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in formula_classifier(10, 2).state_dict().items()}


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


CIFAR10 = models.CIFAR10_MEAN, models.CIFAR10_STD
OWN = torch.full((3,), 0.4), torch.full((3,), 0.2)  # mean and std that a file brings along
LAYOUTS = {
    "Wang 2023": lambda w: {"model_state_dict": prefixed("module.0.", w), "unaveraged_model_state_dict": {}},
    "Cui 2023, twice wrapped": lambda w: {
        "state_dict": {"model_state_dict": prefixed("module.0.", w | {"sub_block1.layer.weight": torch.zeros(1)})}
    },
    "RobustBench's Wang 2023": lambda w: prefixed(
        "module.", prefixed("model.", w) | {"mean": OWN[0].view(1, 3, 1, 1), "std": OWN[1].view(1, 3, 1, 1)}
    ),
    "RobustBench's Rebuffi 2021": lambda w: w | {"mu": OWN[0].view(3, 1, 1), "sigma": OWN[1].view(3, 1, 1)},
    "DeepMind's, and bare": lambda w: w,
    "train.py's": lambda w: {"state_dict": w | {"mean": OWN[0], "std": OWN[1]}},
    "net": lambda w: {"net": prefixed("module.", w), "acc": 94.1, "optimizer": {"state": {}}},
    "averaged": lambda w: {"model": prefixed("module.", w) | {"n_averaged": torch.tensor(3)}},
    "compiled": lambda w: {"state_dict": prefixed("module._orig_mod.0.", w)},
    "compiled in parts": lambda w: {k.replace("block.0.", "block.0._orig_mod."): v for k, v in w.items()},
    "without counters": lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
    "safetensors": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_recognised_by_content(tmp_path, wrn_10_2, layout):
    if LAYOUTS[layout]:
        torch.save(LAYOUTS[layout](public_weights()), tmp_path / "some.name")
    else:
        save_file(public_weights(), tmp_path / "some.name")
    loaded = load_classifier(tmp_path / "some.name", 10, *CIFAR10)
    x = picture("x", (2, 3, 32, 32))
    if layout.startswith(("RobustBench", "train.py")):  # their own mean and std count, not those of the arguments
        assert loaded.config["mean"] == pytest.approx((0.4,) * 3) and loaded.config["std"] == pytest.approx((0.2,) * 3)
        wrn_10_2.mean, wrn_10_2.std = (own.view(3, 1, 1) for own in OWN)
    assert_close(loaded(x), wrn_10_2(x), rtol=0, atol=0)
    assert not loaded.training


class Malicious:
    def __reduce__(self):
        return os.system, ("touch run",)


def cut(path, keep: float):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def torch_file(**changes):
    return lambda path: torch.save(public_weights() | changes, path)


WRONG = {
    "nothing": (lambda path: None, "there is no file"),
    "a web page": (lambda path: path.write_text("\n <!DOCTYPE html>"), "is a web page"),
    "truncated": (lambda path: (torch_file()(path), cut(path, 0.5)), "is it whole"),
    "truncated safetensors": (lambda path: (save_file(public_weights(), path), cut(path, 0.9)), "is it whole"),
    "code beside the weights": (torch_file(args=Malicious()), "holds objects .*, whose code is never run"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)), "is no file of tensors"),
    "numpy beside the weights": (torch_file(acc=np.float64(1)), r"holds objects \(numpy.*scalar\), whose code"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor where weights by name should be"),
    "a whole CARSO": (torch_file(purifier={}), "is a whole CARSO"),
    "an unknown wrapping": (lambda path: torch.save({"ema": public_weights()}, path), "first keys are .'ema'"),
    "another stem": (torch_file(**{"init_conv.weight": torch.zeros(3)}), "not one of the public WideResNets"),
    "another number of classes": (torch_file(**{"logits.bias": torch.zeros(7)}), "do not fit.*mismatch.*logits.bias"),
    "a tensor too many": (torch_file(extra=torch.zeros(1)), "do not fit.*Unexpected.*extra"),
    "NaN": (torch_file(**{"logits.bias": torch.full((10,), torch.nan)}), "not finite: logits.bias"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_refused_by_one_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write, sentence = WRONG[kind]
    write(tmp_path / "file")
    with pytest.raises(ValueError, match=sentence) as error:
        load_classifier(tmp_path / "file", 10, *CIFAR10)
    assert str(tmp_path / "file") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_no_byte_can_change_unnoticed(tmp_path):
    """Every byte of a small file in turn: the file is refused, or means what it meant (padding, dates)."""
    path, content = tmp_path / "file", {"weight": torch.arange(6.0).view(2, 3), "epoch": 3}
    torch.save(content, path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        try:
            loaded = models.load_tensors(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert loaded["epoch"] == 3 and torch.equal(loaded["weight"], content["weight"]), place
    assert refused > len(whole) / 4


def test_a_normalisation_that_is_not_known_or_does_not_fit_is_refused(tmp_path):
    torch_file()(tmp_path / "file")
    for mean, std, sentence in ((None, None, "pass mean= and std="), ((0.5,), (0.5,), "of 3 channel\\(s\\), not of 1")):
        with pytest.raises(ValueError, match=f"{tmp_path / 'file'}.*{sentence}"):
            load_classifier(tmp_path / "file", 10, mean, std)


def test_the_hash_changes_with_any_tensor_and_not_with_its_layout():
    network = WideResNet(3, 10, 1, in_channels=1)
    found = {hash_weights(network)}
    assert found == {hash_weights(network.to(memory_format=torch.contiguous_format))}
    for tensor in network.state_dict().values():
        tensor[(-1,) * tensor.ndim] += 1
        found.add(hash_weights(network))
    assert len(found) == 1 + len(network.state_dict()) and all(len(digits) == 32 for digits in found)
    first, second = (hash_weights(nn.ModuleDict({name: nn.BatchNorm2d(1)})) for name in "ab")
    assert first != second


# ------------------------------------------------------------------------------------------------- published weights

GOWAL = "Gowal2020Uncovering_28_10_extra"


def test_the_published_table_names_the_papers_classifiers_first():
    accuracies = {name: next(iter(known.values()))[1] for name, known in PUBLISHED.items()}
    assert accuracies == {"cifar10": 0.9216, "cifar100": 0.7385, "tinyimagenet": 0.6519}  # table 2


@pytest.fixture
def cifar10(tmp_path, monkeypatch, wrn_10_2):
    """A folder in place of the hosts, with formula weights; 12 pictures as that network labels them."""
    (tmp_path / "host").mkdir()
    for name, (url, _) in PUBLISHED["cifar10"].items():
        file = tmp_path / "host" / url.rpartition("/")[2]
        save_file(public_weights(), file) if file.suffix == ".safetensors" else torch_file()(file)
        monkeypatch.setitem(PUBLISHED["cifar10"], name, (file.as_uri(), 0.9))
    images = (255 * picture("pictures", (12, 3, 32, 32))).to(torch.uint8)
    with torch.no_grad():
        labels = wrn_10_2(images / 255).argmax(1)
    data = dict(name="cifar10", classes=[*"0123456789"], mean=CIFAR10[0], std=CIFAR10[1])
    return SimpleNamespace(test_images=images, test_labels=labels, **data)


@pytest.mark.parametrize("name", ["published", GOWAL])
def test_a_published_classifier_is_fetched_once(cifar10, tmp_path, wrn_10_2, name):
    assert hash_weights(models.fetch_classifier(cifar10, name, tmp_path)) == hash_weights(wrn_10_2)
    url = PUBLISHED["cifar10"][name if name == GOWAL else "Cui2023Decoupled_WRN-28-10"][0]
    (tmp_path / "host" / url.rpartition("/")[2]).unlink()
    assert models.fetch_classifier(cifar10, name, tmp_path).config["depth"] == 10
    assert [file.name for file in (tmp_path / "published" / "cifar10").iterdir()] == [url.rpartition("/")[2]]


def test_another_file_than_the_published_one_is_refused(cifar10, tmp_path):
    cifar10.test_labels = (cifar10.test_labels + (torch.arange(12) < 2)) % 10
    with pytest.raises(ValueError, match="with.pt labels 83.3% of clean pictures, not 90.0%"):
        models.fetch_classifier(cifar10, GOWAL, tmp_path)
    with pytest.raises(ValueError, match="no file Nobody2020; published for cifar10 are: Cui2023"):
        models.fetch_classifier(cifar10, "Nobody2020", tmp_path)
    cifar10.name = "digits"
    with pytest.raises(ValueError, match="published for digits are: none"):
        models.fetch_classifier(cifar10, "published", tmp_path)


def test_a_host_that_is_not_reached_is_named(cifar10, tmp_path):
    host, file = (tmp_path / f / "cifar10_linf_wrn28-10_with.pt" for f in ("host", "published/cifar10"))
    host.unlink()
    with pytest.raises(OSError, match=f"could not be downloaded.*put the file at {file} by hand"):
        models.fetch_classifier(cifar10, GOWAL, tmp_path)
    assert not list(file.parent.iterdir())


def test_accuracy_counts_right_answers_clean_and_attacked():
    """Of a model that takes bright pictures for class 1 and dark ones for class 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model[1].weight.data = torch.tensor([[0.0] * 4, [1.0] * 4])
    model[1].bias.data = torch.tensor([2.0, 0.0])
    images = torch.tensor([0, 255, 0, 255, 0, 255], dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    labels = torch.tensor([0, 1, 0, 1, 1, 1])
    assert models.measure_accuracy(model, images, labels, batch_size=4) == 5 / 6
    assert models.measure_accuracy(model, images, labels, lambda model, x, y: 1 - x, batch_size=4) == 1 / 6


def test_the_device_is_deterministic_and_there(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert models.start_device("cpu") == torch.device("cpu") and torch.backends.cudnn.deterministic
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: False)
    assert models.start_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no GPU"):
        models.start_device("cuda")


@pytest.fixture
def set_variables(monkeypatch):
    """Set these variables of the environment, and none of torchrun's, srun's and OpenMP's besides."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "load, threads, variables, hints",
    [
        (2.1, 4, {}, True),
        (1.9, 4, {}, False),
        (9.0, 4, {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        (9.0, 1, {}, False),  # which waits for nobody
        (9.0, 4, TORCHRUN | {"RANK": "1"}, False),
    ],
)
def test_a_busy_machine_is_told_of_once(monkeypatch, set_variables, capsys, load, threads, variables, hints):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    set_variables(variables)
    models.hint_at_waiting.cache_clear()
    models.start_device("cpu")
    models.start_device("cpu")
    assert capsys.readouterr().err.count("export OMP_WAIT_POLICY=PASSIVE") == int(hints)


@pytest.mark.parametrize(
    "variables, ranks",
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),  # left in the environment by something else
        (TORCHRUN | {"RANK": "1"}, (1, 2)),
        (TORCHRUN | {"RANK": "1", "SLURM_STEP_NUM_TASKS": "8"}, (1, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),  # in a batch script, which is one process
    ],
)
def test_processes_count_where_torchrun_says_so(set_variables, variables, ranks):
    set_variables(variables)
    assert models.read_ranks() == ranks


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_of_another_launcher_are_refused(set_variables, variable):
    set_variables({variable: "2"})
    with pytest.raises(ValueError, match="started 2 processes, which do not know of each other: .* torchrun"):
        models.read_ranks()


def test_a_terminal_that_has_not_all_letters_ends_no_script(monkeypatch):
    """A file with a Greek name, on a terminal of strict ASCII: the work was done, and the status was 2."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_status("name", lambda: print("runs/\u03b1\u03b2")) is None
    assert terminal.buffer.getvalue() == b"runs/\\u03b1\\u03b2\n"
