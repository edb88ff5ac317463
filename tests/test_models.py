"""The classifier against the reference, the hooks that record its representation, and files of weights."""

import json
import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TESTS, formula_classifier, golden, picture
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


def test_other_sizes():
    for depth, channels, size, classes in ((10, 1, 32, 7), (16, 3, 64, 200)):
        network = WideResNet(classes, depth, 1, channels)
        assert network(torch.rand(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    "wrong", [dict(depth=27), dict(mean=(0.5,), std=(0.5,)), dict(in_channels=1, mean=(1, 2), std=(1, 2))]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        WideResNet(10, **wrong)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32)])
def test_what_is_no_batch_of_pictures_is_refused(wrn_10_2, shape):
    with pytest.raises(ValueError, match="expected pictures"):
        wrn_10_2(torch.rand(shape))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_normalise_and_activate_is_batchnorm_and_silu(training, memory_format):
    theirs, ours = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.double) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, 3, 3, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for layer in (theirs.train(training), ours.train(training)):
        out = models.normalise_and_activate(ours, x) if layer is ours else silu(theirs(x))
        assert out.is_contiguous(memory_format=memory_format)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, layer.weight, layer.bias])])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    assert_close(theirs.state_dict(), ours.state_dict())


def test_gradients_of_pictures_are_contiguous(wrn_10_2):
    """AutoAttack calls view() on them; the layers inside are channels-last."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = picture("x", (2, 3, 32, 32)).contiguous(memory_format=memory_format).requires_grad_()
        assert torch.autograd.grad(wrn_10_2(x).sum(), x)[0].is_contiguous()


# ------------------------------------------------------------------------------------------------ the representation

LAYERS = representation_layers(10)


def count_hooks(module):
    return sum(len(m._forward_hooks) for m in module.modules())


def test_recording_is_differentiable_and_follows_no_grad(wrn_10_2):
    x = picture("x", (2, 3, 32, 32)).requires_grad_()
    for layer in record(wrn_10_2, LAYERS, x)[1]:
        (gradient,) = torch.autograd.grad(layer.sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not any(layer.requires_grad for layer in record(wrn_10_2, LAYERS, x)[1])


def test_hooks_are_removed_whatever_happens(wrn_10_2):
    x = picture("x", (2, 3, 32, 32))
    record(wrn_10_2, LAYERS, x)
    assert count_hooks(wrn_10_2) == 0
    wrn_10_2.unused = nn.Identity()
    for layers, pictures, sentence in (
        (LAYERS, torch.rand(2, 1, 32, 32), "expected pictures"),
        ([*LAYERS, "layer.9"], x, "no layer named layer.9"),
        ([*LAYERS, "unused"], x, "did not run unused"),
    ):
        with pytest.raises(ValueError, match=sentence):
            record(wrn_10_2, layers, pictures)
        assert count_hooks(wrn_10_2) == 0


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return out


@pytest.mark.parametrize("second", [nn.ReLU(inplace=True), nn.Identity()])
@pytest.mark.parametrize("first, tap", [(nn.Conv2d(3, 3, 3), "0"), (Shortcut(), "0.conv")])
def test_what_was_put_out_is_kept_though_the_network_changes_it_in_place(first, tap, second):
    network, x = nn.Sequential(first, second, nn.Flatten()), torch.randn(2, 3, 8, 8, requires_grad=True)
    conv = network.get_submodule(tap)
    want = conv(x)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            logits, (kept,) = record(network, [tap], x)
        assert_close(kept, want)
        assert_close(logits, network(x))
        if kept.requires_grad:
            assert_close(torch.autograd.grad(kept.square().sum(), x)[0], gradient)


class Attention(nn.Module):
    """Tokens (B, N, C) from pictures, as a vision transformer has them."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Flatten(2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.again = nn.Identity()

    def forward(self, x):
        tokens = self.tokens(self.again(self.again(x)))
        return self.attention(tokens, tokens, tokens)[0].mean(2)


TAPS = {
    "none": ([], "a list with at least one layer's name, not []"),
    "a string": ("tokens", "a list with at least one layer's name, not 'tokens'"),
    "a tuple": (["attention"], "layer attention puts out a tuple: tap one that puts out a tensor"),
    "run twice": (["again"], "runs again more than once: tap a layer that it runs once"),
}


@pytest.mark.parametrize("tap", TAPS)
def test_taps_that_are_none_end_in_a_sentence(tap):
    layers, sentence = TAPS[tap]
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
    "a web page": (lambda path: path.write_text("\n <!DOCTYPE html>"), "is a web page"),
    "nothing": (lambda path: None, "there is no file"),
    "noise": (lambda path: path.write_bytes(b"\x80\x02 noise"), "is it whole"),
    "a pickle with objects": (lambda path: torch.save({"a": Malicious()}, path), "holds objects"),
    "objects beside the weights": (torch_file(args=SimpleNamespace()), "holds objects"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)), "is no file of tensors"),
    "truncated": (lambda path: (torch_file()(path), cut(path, 0.5)), "is it whole"),
    "truncated safetensors": (lambda path: (save_file(public_weights(), path), cut(path, 0.9)), "is it whole"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor where weights by name should be"),
    "an unknown wrapping": (lambda path: torch.save({"ema": public_weights()}, path), "first keys are .'ema'"),
    "numpy beside the weights": (
        torch_file(acc=np.float64(1)),
        r"holds objects \(numpy.*scalar\), whose code is never",
    ),
    "another network": (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "first keys are .'conv1"),
    "another stem": (torch_file(**{"init_conv.weight": torch.zeros(3)}), "not one of the public WideResNets"),
    "another number of classes": (torch_file(**{"logits.bias": torch.zeros(7)}), "do not fit.*mismatch.*logits.bias"),
    "a missing tensor": (lambda path: torch.save(dict([*public_weights().items()][:-1]), path), "do not fit.*Missing"),
    "a tensor too many": (torch_file(extra=torch.zeros(1)), "do not fit.*Unexpected.*extra"),
    "NaN": (torch_file(**{"logits.bias": torch.full((10,), torch.nan)}), "not finite: logits.bias"),
    "a whole CARSO": (torch_file(purifier={}), "is a whole CARSO"),
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
    whole, refused = bytearray(path.read_bytes()), 0
    for place in range(len(whole)):
        whole[place] ^= 0x11
        path.write_bytes(whole)
        whole[place] ^= 0x11
        try:
            loaded = models.load_tensors(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert loaded["epoch"] == 3 and torch.equal(loaded["weight"], content["weight"]), place
    assert refused > len(whole) / 4


def test_a_normalisation_that_is_not_known_or_does_not_fit_is_refused(tmp_path):
    torch_file()(tmp_path / "file")
    for mean, std, sentence in ((None, None, "pass mean= and std="), ((0.5,), (0.5,), "of 3 channel\\(s\\), not of 1")):
        with pytest.raises(ValueError, match=f"{tmp_path / 'file'}.*{sentence}"):
            load_classifier(tmp_path / "file", 10, mean, std)


def test_the_hash_changes_with_any_tensor_and_not_with_its_layout():
    network = WideResNet(3, 10, 1, in_channels=1)
    before, found = hash_weights(network), set()
    assert len(before) == 32 and int(before, 16)
    for tensor in network.state_dict().values():
        whole = tensor.clone()
        tensor[(-1,) * tensor.ndim] += 1
        found.add(hash_weights(network))
        tensor.copy_(whole)
    assert len(found | {before}) == 1 + len(network.state_dict())
    assert hash_weights(network.to(memory_format=torch.contiguous_format)) == hash_weights(network)
    named = {hash_weights(nn.ModuleDict({name: nn.BatchNorm2d(1)})) for name in "ab"}
    assert len(named) == 2


# ------------------------------------------------------------------------------------------------- published weights

GOWAL = "Gowal2020Uncovering_28_10_extra"


def test_the_published_table_names_the_papers_classifiers_first():
    accuracies = {name: next(iter(known.values()))[1] for name, known in PUBLISHED.items()}
    assert accuracies == {"cifar10": 0.9216, "cifar100": 0.7385, "tinyimagenet": 0.6519}  # table 2
    for known in PUBLISHED.values():
        assert all(url.startswith("https://") and 0.5 < accuracy < 1 for url, accuracy in known.values())


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


def test_a_file_that_did_not_arrive_whole_is_named(cifar10, tmp_path):
    host, file = (tmp_path / f / "cifar10_linf_wrn28-10_with.pt" for f in ("host", "published/cifar10"))
    cut(host, 0.5)
    with pytest.raises(ValueError, match=f"{file} .*is it whole.*Fetch or make it again"):
        models.fetch_classifier(cifar10, GOWAL, tmp_path)
    host.unlink(), file.unlink()
    with pytest.raises(OSError, match=f"could not be downloaded.*put the file at {file} by hand"):
        models.fetch_classifier(cifar10, GOWAL, tmp_path)
    assert not list(file.parent.iterdir())


def test_accuracy_counts_right_answers_clean_and_attacked():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.tensor([[0], [255]] * 3, dtype=torch.uint8)
    model[1].weight.data, model[1].bias.data = torch.tensor([[0.0] * 4, [1.0] * 4]), torch.tensor([2.0, 0.0])
    images, labels = images.expand(6, 4).reshape(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1, 1])
    for batch_size in (4, 6):
        assert models.measure_accuracy(model, images, labels, batch_size=batch_size) == 5 / 6
        assert models.measure_accuracy(model, images, labels, lambda model, x, y: 1 - x, batch_size) == 1 / 6


def test_the_device_is_deterministic_and_there(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert models.start_device("cpu") == torch.device("cpu") and torch.backends.cudnn.deterministic
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: False)
    assert models.start_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no GPU"):
        models.start_device("cuda")


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "load, cores, threads, variables, hints",
    [
        (2.1, 4, 4, {}, True),
        (1.9, 4, 4, {}, False),
        (9.0, 4, 4, {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        (9.0, 4, 1, {}, False),  # which waits for nobody
        (9.0, 4, 2, TORCHRUN | {"RANK": "0"}, True),
        (9.0, 4, 2, TORCHRUN | {"RANK": "1"}, False),
        (None, 4, 4, {}, False),
    ],
)
def test_a_busy_machine_is_told_of_once(monkeypatch, capsys, load, cores, threads, variables, hints):
    def getloadavg():
        if load is None:
            raise OSError("no load here")
        return load, 0.0, 0.0

    monkeypatch.setattr(os, "getloadavg", getloadavg)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("OMP_WAIT_POLICY", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    models.hint_at_waiting.cache_clear()
    for _ in range(2):
        models.start_device("cpu")
    assert capsys.readouterr().err.count("export OMP_WAIT_POLICY=PASSIVE") == int(hints)


@pytest.mark.parametrize(
    "variables, ranks",
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (0, 1)),  # left in the environment by something else
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, (1, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),  # in a batch script, which is one process
        ({"SLURM_STEP_NUM_TASKS": "8", "RANK": "0", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, (0, 8)),
        ({"SLURM_STEP_NUM_TASKS": "8"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None),
    ],
)
def test_processes_count_where_torchrun_says_so(monkeypatch, variables, ranks):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if ranks:
        assert models.read_ranks() == ranks
        return
    with pytest.raises(ValueError, match="started .* processes, which do not know of each other: .* torchrun"):
        models.read_ranks()


def test_a_terminal_that_has_not_all_letters_ends_no_script(tmp_path):
    """A file with a Greek name, on a terminal of strict ASCII: the work was done, and the status was 2."""
    code = "import models; models.run_script('name', lambda: print('runs/\u03b1\u03b2') or 0)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/\\u03b1\\u03b2\n"), done.stderr
