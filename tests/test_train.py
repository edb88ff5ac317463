"""train.py: schedules and Lookahead against the reference; the script on tiny budgets: complete, killed, resumed, on
two processes, with wrong input."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE, ROOT, golden, uniform
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import data as datasets
import models
import purifier
import train
from attacks import balanced_kinds
from models import WideResNet, hash_weights, load_tensors, representation_layers
from purifier import Purifier, load_carso
from train import (
    PRESETS,
    Batch,
    Preset,
    Ranks,
    Run,
    Stage,
    kl_weight,
    learning_rate,
    schedule_epoch,
)

CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------- presets, schedules, the optimizer


@pytest.mark.parametrize("scenario, preset", [("a", "cifar10"), ("b", "cifar100"), ("c", "tinyimagenet")])
def test_schedules_equal_the_reference(scenario, preset):
    p, want = PRESETS[preset], golden("optimizer")
    np.testing.assert_allclose([learning_rate(e, p) for e in range(p.epochs)], want[f"lr_{scenario}"], rtol=1e-6)
    np.testing.assert_allclose([kl_weight(e, p) for e in range(p.epochs)], want[f"beta_{scenario}"], atol=1e-9)


def test_radam_in_lookahead_equals_the_reference():
    want, shapes = golden("optimizer"), [(4, 3), (5,)]
    network = nn.ParameterList(torch.tensor(uniform(f"p{i}", s), dtype=torch.float32) for i, s in enumerate(shapes))
    lookahead = train.build_optimizer(network, PRESETS["digits"])
    lookahead.optimizer.param_groups[0]["lr"] = 0.01
    for t in range(20):
        for i, w in enumerate(network):
            w.grad = torch.tensor(2 * uniform(f"g{i}_{t}", w.shape) - 1, dtype=torch.float32)
        lookahead.step()
        fast = torch.cat([w.detach().flatten() for w in network]).numpy()
        np.testing.assert_allclose(fast, want["radam_lookahead_fast"][t], rtol=1e-5, atol=1e-6)
    lookahead.finish()
    slow = torch.cat([w.detach().flatten() for w in network]).numpy()
    np.testing.assert_allclose(slow, want["radam_lookahead_slow_at_20"], rtol=1e-5, atol=1e-6)


def test_presets_are_the_papers_tables_12_to_14():
    a, b, c = scenarios = [PRESETS[name] for name in ("cifar10", "cifar100", "tinyimagenet")]
    assert [p.epochs for p in scenarios] == [200, 200, 250]
    assert [p.batch_size for p in scenarios] == [8 * 640, 4 * 640, 8 * 128]
    assert [p.fraction for p in scenarios] == [0.5, 0.15, 0.01]
    assert [(p.condition_dim, p.latent_dim) for p in scenarios] == [(512, 128), (512, 128), (768, 192)]
    assert [p.learning_rate for p in scenarios] == [0.064, 0.064, 0.0128]
    assert all((p.depth, p.width, p.samples, p.eps) == (28, 10, 8, 8 / 255) for p in scenarios)
    assert all((p.attack_steps, p.attack_step_size, p.decoder_width) == (40, 0.01, 256) for p in scenarios)


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_of_any_length_keeps_the_schedules_proportions(name):
    usual = PRESETS[name]
    for epochs in [*range(1, 30), 10 * usual.epochs]:
        p = train.choose_preset(name, {"epochs": epochs})
        assert p.warmup >= 1 and p.warmup + p.plateau <= epochs and p.kl_from <= p.kl_to <= epochs
    for epochs, knots in ((40, (5, 5, 5, 6)), (400, (50, 50, 50, 68))):
        p = train.choose_preset("cifar10", {"epochs": epochs})
        assert (p.warmup, p.plateau, p.kl_from, p.kl_to) == knots
    p = train.choose_preset("cifar10", {"epochs": 40, "warmup": 0, "eps": 4 / 255, "mirror": False})
    assert (p.warmup, p.plateau, p.eps, p.mirror, p.augment) == (0, 5, 4 / 255, False, True)
    ramps = [train.choose_preset("digits", {"classifier_epochs": epochs}).classifier_ramp for epochs in (1, 9, 18, 36)]
    assert ramps == [0, 3, 6, 12]  # else a short training would never see the whole radius


def test_schedules_move_by_step_where_an_epoch_is_short_but_not_in_radams_first_five():
    paper, one = PRESETS["cifar10"], train.choose_preset("digits", {"epochs": 1})
    assert [schedule_epoch(e, n, 10, paper) for e in (0, 1, 199) for n in (0, 9)] == [0, 0, 1, 1, 199, 199]
    at = [schedule_epoch(t // 3, t % 3, 3, paper) for t in range(600)]
    assert at[:5] == [0] * 5 and at[5:] == [t / 3 for t in range(5, 600)]
    rates = [learning_rate(schedule_epoch(0, n, 21, one), one) for n in range(21)]
    assert rates[:5] == [5e-9] * 5 and rates[5] > 0.2 * one.learning_rate and rates[20] > 0.9 * one.learning_rate
    assert kl_weight(schedule_epoch(0, 20, 21, one), one) == 1
    assert [kl_weight(e, train.choose_preset("digits", {"kl_end": 0.01})) for e in (3, 6, 23)] == [0, 0.01, 0.01]


@pytest.mark.parametrize(
    "count, batches, rates",
    [
        (40, (16, 16), (0.0063, 0.0036)),
        (1500, (150, 150), (0.059, 0.011)),
        (5000, (512, 500), (0.2, 0.02)),
        (46_081, (512, 5120), (0.2, 0.064)),
    ],
)
def test_small_sets_get_batches_of_a_tenth_and_lower_rates(count, batches, rates):
    p = train.fit_batches(PRESETS["cifar10"], count, {}, processes=1)
    assert (p.classifier_batch_size, p.batch_size) == batches
    assert (p.classifier_learning_rate, p.learning_rate) == pytest.approx(rates, rel=0.02)
    for given in ({"batch_size": 5120}, {"learning_rate": 0.064}):
        assert train.fit_batches(PRESETS["cifar10"], count, given, processes=1).learning_rate == 0.064


# ------------------------------------------------------------------------------------------- ranks, and the loop alone


@pytest.fixture
def one_rank():
    """A process group of one, inside this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shape, dtype", [((6, 4), torch.float64), ((6, 4, 5, 5), torch.bfloat16)])
def test_global_batch_norm_is_batch_norm_of_all_ranks_rows(one_rank, shape, dtype):
    """Output, gradients and running statistics of the second of three ranks; the others' pictures are zeros."""
    ranks = Ranks(CPU, 1, 3)
    ranks.sum = lambda counts: counts + torch.tensor([2, 0, 3])
    x = torch.randn(shape, dtype=dtype)
    rows = torch.cat([x.new_zeros(2, *shape[1:]), x, x.new_zeros(3, *shape[1:])])
    ways = []
    for pictures in (x, rows):
        layer = nn.BatchNorm1d(4) if len(shape) == 2 else nn.BatchNorm2d(4)
        layer.to(dtype if dtype == torch.float64 else torch.float32)
        pictures.requires_grad_()
        out = layer(pictures)[2:8] if pictures is rows else train.global_batch_norm(ranks, layer, pictures)
        out.square().sum().backward()
        gradient = pictures.grad[-9:-3] if pictures is rows else pictures.grad
        ways.append([out, gradient, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
        ways[-1].append(layer.eval()(x))
    assert_close(*ways)


def some_digits(count: int, classes: int = 10) -> datasets.Dataset:
    whole = datasets.load("digits")
    images, labels = whole.train_images[:count], whole.train_labels[:count] % classes
    return dataclasses.replace(whole, train_images=images, train_labels=labels)


class OneOfMany(Ranks):
    """A rank that speaks for the others, too."""

    def gather(self, value):
        return [value] * self.count

    def sum(self, values):
        return values


def some_run(folder, data=None, p=PRESETS["digits"], start=None, ranks=None, **more) -> Run:
    return Run(folder, some_digits(72) if data is None else data, p, start, ranks or Ranks(CPU), **more)


def some_batches(run: Run, *sizes, first=0) -> list[Batch]:
    """Consecutive batches of these sizes."""
    batches = []
    for step, size in enumerate(sizes):
        generator = run.make_generator("purifier", 0, step)
        batches.append(Batch(0, step, torch.arange(first, first + size) % len(run.labels), first, generator))
        first += size
    return batches


@pytest.mark.parametrize("count, micro_batch", [(3, None), (1, 4), (2, 3)])
def test_any_number_of_ranks_attacks_what_one_would(tmp_path, tiny_carso, count, micro_batch):
    """Up to rounding: where a gradient is nearly 0 its sign, and with it a whole step, may turn."""
    data, p = some_digits(30, 5), dataclasses.replace(PRESETS["digits"], attack_steps=2, fraction=0.6)

    def attack(rank, count, micro_batch):
        run = some_run(tmp_path, data, p, ranks=OneOfMany(CPU, rank, count), micro_batch=micro_batch)
        batches = some_batches(run, 13, first=7)
        _, perturbed = next(train.attack_batches(run, tiny_carso.classifier, batches))
        return perturbed - run.load_pictures(batches[0])[0]

    whole = attack(0, 1, None)
    parts = torch.cat([attack(rank, count, micro_batch) for rank in range(count)])
    assert torch.equal(whole.flatten(1).any(1), balanced_kinds(7, 13, 0.6) >= 0)
    assert ((whole - parts).abs() > 1e-4).float().mean() < 0.01


@pytest.mark.parametrize("begin, rank", [(0, 0), (2, 1)])
def test_attacks_of_four_batches_in_one_call_are_those_of_one_by_one(tmp_path, monkeypatch, tiny_carso, begin, rank):
    """Also where a run goes on in the middle of a group, and on the second of two ranks. In float64, or the sign of a
    rounding is a whole step."""
    monkeypatch.setattr(datasets, "pixels", lambda images: images.double() / 255)
    monkeypatch.setattr(torch, "rand", functools.partial(torch.rand, dtype=torch.double))
    p = dataclasses.replace(PRESETS["digits"], attack_steps=3, fraction=0.3)
    run = some_run(tmp_path, some_digits(72, 5), p, ranks=OneOfMany(CPU, rank, 1 + rank))
    classifier = tiny_carso.classifier.double()

    def attack(together):
        batches = some_batches(run, 9, 9, 8, 9, 8, 8, first=3)[begin:]
        monkeypatch.setattr(train, "choose_group_size", lambda run: together)
        pairs = list(train.attack_batches(run, classifier, batches))
        assert [batch for batch, _ in pairs] == batches
        draws = [torch.randn(1, generator=batch.generator) for batch in batches]  # what the step will draw
        return [perturbed for _, perturbed in pairs], draws

    assert_close(attack(4), attack(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "preset, device, processes, size",
    [("cifar10", "cpu", 8, 1), ("cifar10", "cuda", 1, 1), ("cifar10", "cuda", 8, 4), ("tinyimagenet", "cuda", 8, 16)],
)
def test_on_a_gpu_so_many_batches_are_attacked_at_once_that_it_is_busy(preset, device, processes, size):
    ranks = Ranks(torch.device(device), 0, processes)
    assert train.choose_group_size(types.SimpleNamespace(ranks=ranks, p=PRESETS[preset])) == size


def test_random_numbers_follow_from_seed_stage_epoch_and_step(tmp_path):
    def draw(seed, *where):
        return torch.rand(4, generator=some_run(tmp_path / f"{seed}", seed=seed).make_generator(*where))

    one = draw(0, "purifier", 1, 2)
    assert torch.equal(one, draw(0, "purifier", 1, 2))
    for other in ((1, "purifier", 1, 2), (0, "classifier", 1, 2), (0, "purifier", 2, 2), (0, "purifier", 1, 1)):
        assert not torch.equal(one, draw(*other)), other


def train_stage(run: Run, step, epochs: int = 2) -> None:
    """Eight steps of nine pictures an epoch."""
    stage = Stage(run, "stage", epochs, 9, {}, ("sum",))
    for epoch in stage.epochs():
        for batch in stage.batches(epoch):
            stage.add(batch, step(batch))


class Killed(BaseException):
    pass


def test_sums_are_complete_wherever_a_run_is_killed(tmp_path, monkeypatch, capsys):
    """In an epoch or at its end. Beside them: the numbers that pictures have since the beginning."""
    monkeypatch.setattr(train, "SAVING", torch.inf)

    def loop(kill_at):
        def step(batch):
            if (batch.epoch, batch.step) == kill_at:
                raise Killed
            assert batch.first == 72 * batch.epoch + 9 * batch.step
            return batch.indices.sum()[None]

        train_stage(some_run(tmp_path), step)
        assert (tmp_path / "log-stage.tsv").read_text().splitlines() == ["epoch\tsum", "0\t35.5", "1\t35.5"]

    for kill_at in ((1, 0), (1, 2)):
        with pytest.raises(Killed):
            loop(kill_at)
    loop(None)
    loop(None)  # what is complete is not done again
    went_on = re.findall("going on at (.*)", capsys.readouterr().out)
    assert went_on == ["epoch 0, step 8", "epoch 1, step 2", "epoch 2, step 0"]


@pytest.mark.parametrize(
    "step_seconds, save_seconds, places",
    [(1, 0.09, [(0, 1), (0, 6), (1, 3), (1, 8), (2, 0)]), (150, 100, [(0, 1), (0, 5), (1, 1), (1, 5), (2, 0)])],
)
def test_checkpoints_take_a_fiftieth_of_the_time(tmp_path, monkeypatch, step_seconds, save_seconds, places):
    """But one is made every ten minutes. The first one comes at once: it shows whether one can be kept, and how long it
    takes."""
    now, saved = 0.0, []

    def step(batch):
        nonlocal now
        now += step_seconds
        return torch.zeros(1)

    def save(path, content):
        nonlocal now
        now += save_seconds
        saved.append((content["epoch"], content["step"]))

    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(train, "save_tensors", save)
    train_stage(some_run(tmp_path), step)
    assert saved == places


def test_a_long_epoch_says_every_minute_how_long_the_rest_takes(tmp_path, monkeypatch, capsys):
    now = 0

    def step(_):
        nonlocal now
        now += 25  # seconds
        return torch.tensor([9.0])

    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now))
    train_stage(some_run(tmp_path), step)
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch " in line]
    left = {(0, 3): "0:05:25", (0, 6): "0:04:10", (1, 3): "0:02:05", (1, 6): "0:00:50"}
    assert lines == [f"stage: epoch {epoch}, batch {batch} of 8, {time} left" for (epoch, batch), time in left.items()]


def test_a_folder_belongs_to_one_network_one_data_set_and_one_preset(tmp_path):
    """Whoever makes the run. What a killed one left half written goes."""
    classifier, other = WideResNet(10, 10, 1, 1), WideResNet(10, 10, 1, 1)
    some_run(tmp_path, start=classifier)
    (tmp_path / ".carso.pt.0a1b.part").write_bytes(b"half")
    some_run(tmp_path, start=classifier)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    inverted = dataclasses.replace(some_digits(72), train_images=255 - some_digits(72).train_images)
    faster = dataclasses.replace(PRESETS["digits"], learning_rate=0.1)
    for key, changed in [
        ("weights", dict(start=other)),
        ("data", dict(data=inverted)),
        ("learning_rate", dict(p=faster)),
        ("seed", dict(seed=1)),
        ("versions", dict(versions=4)),
    ]:
        sentence = rf"holds other settings \({key}: .* there, .* now\): choose another folder"
        with pytest.raises(ValueError, match=sentence):
            some_run(tmp_path, **dict(start=classifier) | changed)


def test_a_purifier_of_other_sizes_does_not_go_on_with_what_was_saved(tmp_path):
    run = some_run(tmp_path)
    Stage(run, "purifier", 0, 9, {"purifier": nn.Linear(3, 4)}, ()).save()
    with pytest.raises(ValueError, match=f"the weights in {tmp_path}/purifier.resume.pt do not fit: .*size mismatch"):
        Stage(run, "purifier", 0, 9, {"purifier": nn.Linear(3, 5)}, ())


# --------------------------------------------------------------------------------------------------------------- memory


class Memory(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are made and still alive, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, out)
        return out

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)
        return tensor

    def forget(self, key):
        self.now -= self.alive.pop(key)


def test_a_representation_made_in_pieces_is_held_once():
    classifier, layers = WideResNet(10, 16, 2), representation_layers(16)
    x = torch.rand(64, 3, 32, 32)
    whole = train.record_piecewise(classifier.eval(), layers, x, None)
    with Memory() as memory:
        pieces = train.record_piecewise(classifier, layers, x, 4)
    assert_close(pieces, whole)
    assert memory.peak < 1.3 * sum(layer.nbytes for layer in whole)


def commands_for_cifar10() -> list[str]:
    readme = (ROOT / "README.md").read_text()
    return re.findall(r"^(?:torchrun|python) .*train\.py.*--dataset cifar10.*$", readme, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_for_cifar10())
def test_the_readmes_commands_fit_into_the_memory_of_a_gpu(command):
    """A step of stage two, on tensors of which only the sizes are real. A line that names 24 GB is for such a card, the
    others are for 80 GB; cuDNN and CUDA want some, too."""
    processes = int((re.findall(r"nproc_per_node=(\d+)", command) or [1])[0])
    options = command.partition("train.py")[2].partition("#")[0].split()
    args = train.parse_arguments(options)
    numbers = {field.name: getattr(args, field.name) for field in dataclasses.fields(Preset)}
    p = train.choose_preset("cifar10", {name: number for name, number in numbers.items() if number is not None})

    classifier = WideResNet(10, p.depth, p.width)
    layers = representation_layers(p.depth)
    sizes = p.samples, p.condition_dim, p.latent_dim, p.decoder_width
    carso = purifier.build_carso(classifier, layers, (3, 32, 32), *sizes).train()
    carso.purifier.recompute = args.micro_batch is not None
    batch = p.batch_size // processes
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        x = torch.rand(batch, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=p.bf16):
            representation = train.record_piecewise(classifier, layers, x, args.micro_batch)
            outputs = carso.purifier(x, representation, torch.randn(batch, p.latent_dim))
        sum(output.float().sum() for output in outputs).backward()
    weights = sum(parameter.nbytes for parameter in carso.parameters())
    gigabytes = (memory.peak + 4 * weights) / 1e9  # beside the weights: RAdam's two averages, the slow ones
    print(f"{command}: {gigabytes:.1f} GB")
    assert gigabytes < (20 if "24 GB" in command else 75)


# ----------------------------------------------------------------------------------------------------- the real script

# Nothing but rounding tells one process from two: eps is tiny, since the sign of a gradient makes a rounding a step of
# full length, and RAdam's first five steps, which follow the bare gradient, count, so that its scale matters.
TINY = (
    "--preset digits --epochs 2 --batch-size 9 --classifier-epochs 1 --classifier-batch-size 15 --attack-steps 2 "
    "--classifier-attack-steps 1 --eps 0.00001 --learning-rate 1e-3 --learning-rate-start 3e-7 "
    f"--condition-dim 8 --latent-dim 4 --decoder-width 8 --samples 2 --device {DEVICE}"
).split()
OPTIONS = ["--dataset", "tiny.npz", *TINY]
CLOSE = 5e-3 if DEVICE == "cuda" else 1e-3  # there convolutions are in TF32 by default
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # with another number sums round in another order


def execute(folder, *command) -> str:
    how = dict(cwd=folder, env=ENVIRONMENT, text=True, timeout=200, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run([sys.executable, *map(str, command)], **how)
    assert done.returncode == 0, done.stdout
    return done.stdout


def here(folder, *options, code=0, main=train.main, name="train.py") -> str:
    """What the script says in this process, which saves the seconds of a start."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", [name])
            models.run_script(name, lambda: main([str(option) for option in options]))
    assert stop.value.code == code, said.getvalue()
    return said.getvalue()


def start(folder, *options, script="train", patch="", said="said.txt", **variables) -> subprocess.Popen:
    """The script in a process of its own, after the statements of `patch`; it says all into a file."""
    program = f"""
import os, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import models, train, {script}
{patch}
models.run_script({script!r}, lambda: {script}.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, *map(str, options)]
    with open(folder / said, "w") as file:
        return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT | variables, stdout=file, stderr=subprocess.STDOUT)


def pair(folders, *options, patches=("", ""), script="train") -> list[int]:
    """Statuses of two processes that act as one, by torchrun's variables. They say all into said-RANK.txt."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two processes want a GPU each")
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    variables |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}
    processes = []
    for rank, folder in enumerate(folders):
        own = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        how = dict(script=script, patch=patches[rank], said=f"said-{rank}.txt")
        processes.append(start(folder, *options, **how, **variables, **own))
    return [process.wait(timeout=100) for process in processes]


def kill(folder, file: str, times: int, *options, **script) -> None:
    """End the script, in this process, when it is about to put a file in place for the n-th time."""
    left, real = times, os.replace

    def replace(source, target):
        nonlocal left
        left -= os.path.basename(target) == file
        if left == 0:
            raise Killed
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "SAVING", torch.inf)  # at every step
        patch.setattr(os, "replace", replace)
        here(folder, *options, **script)


def write_tiny(folder) -> None:
    rng, labels = np.random.default_rng(0), np.arange(45) % 3
    images = (40 * labels[:, None, None, None] + rng.integers(0, 60, (45, 32, 32, 1))).astype(np.uint8)
    test = {"test_images": images[:12], "test_labels": labels[:12]}
    np.savez(folder / "tiny.npz", train_images=images, train_labels=labels, **test)


def write_classifier(path, classes: int) -> None:
    """Weights for grey pictures, which follow from torch's random numbers."""
    normalisation = {"mean": torch.tensor([0.5]), "std": torch.tensor([0.5])}
    models.save_tensors(path, {"state_dict": WideResNet(classes, 10, 1, 1).state_dict() | normalisation})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny data set, and one complete run on it, named whole."""
    folder = tmp_path_factory.mktemp("train")
    write_tiny(folder)
    (folder / "said-whole.txt").write_text(execute(folder, ROOT / "train.py", *OPTIONS, "--name", "whole"))
    return folder


def assert_same(one, other, close=0.0):
    """The same weights and rows of the logs in two runs' folders."""
    a, b = (load_tensors(run / "carso.pt") for run in (one, other))
    for part in ("classifier_weights", "purifier_weights"):
        assert_close(a[part], b[part], rtol=close, atol=close)
    for log in other.glob("log-*.tsv"):
        rows = (np.loadtxt(path, skiprows=1) for path in (one / log.name, log))
        np.testing.assert_allclose(*rows, rtol=close / 10, atol=close / 100)


WHOLE = {"carso.pt", "classifier.pt", "config.json", "reconstructions.png"}
WHOLE |= {f"log-{stage}.tsv" for stage in ("classifier", "purifier")}


def test_a_run_leaves_what_it_promises(folder):
    whole, data = folder / "runs" / "whole", datasets.load(folder / "tiny.npz")
    assert {path.name for path in whole.iterdir()} == WHOLE and not list(folder.rglob("*.part"))
    carso, state = load_carso(whole / "carso.pt")
    assert state["dataset"] == "tiny.npz" and carso.samples == 2 and state["classes"] == ["0", "1", "2"]
    trained_on = datasets.fingerprint(data.train_images, data.train_labels, data.classes)
    assert state["fingerprint"] == load_tensors(whole / "classifier.pt")["fingerprint"] == trained_on

    (whole / "purifier.resume.pt").touch()  # as of a run that was killed between its last two lines
    assert "is complete" in here(folder, *OPTIONS, "--name", "whole")
    assert {path.name for path in whole.iterdir()} == WHOLE


def test_a_run_says_what_it_logs(folder):
    whole, said = folder / "runs" / "whole", (folder / "said-whole.txt").read_text()
    assert "\nnow: python evaluate.py --ckpt runs/whole/carso.pt --budget reduced\n" in said
    printed = [line.split() for line in said.splitlines() if re.match(r" *(\d|epoch)", line)]
    for stage in ("classifier", "purifier"):
        log = [line.split("\t") for line in (whole / f"log-{stage}.tsv").read_text().splitlines()]
        rows = [log[0]] + [[row[0], *(f"{float(value):.5g}" for value in row[1:])] for row in log[1:]]
        assert rows == [line[: len(log[0])] for line in printed[: len(log)]]
        assert printed[len(log) - 1][-1] == "0:00:00"
        del printed[: len(log)]
    assert not printed
    purifier = np.loadtxt(whole / "log-purifier.tsv", skiprows=1)  # means: of 1024 pixels, about log 2 each
    assert purifier[:, 0].tolist() == [0, 1] and ((purifier[:, 2] > 300) & (purifier[:, 2] < 1500)).all()
    assert purifier[0, 1] == pytest.approx(purifier[0, 2])  # the KL weight is 0 in the first epoch


KILL = """
def kill(source, target):
    if os.path.basename(target) == "classifier.resume.pt":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
replace, os.replace = os.replace, kill
"""


def test_a_run_killed_in_every_stage_ends_as_if_it_had_not_been(folder):
    """Between writing and renaming a checkpoint; the first time by SIGKILL."""
    options = [*OPTIONS, "--name", "killed"]
    left = folder / "runs" / "killed"
    assert start(folder, *options, patch=KILL).wait(timeout=100) == -signal.SIGKILL
    assert "classifier: 1 epochs of 45 pictures" in (folder / "said.txt").read_text()  # it is not held back
    assert list(left.glob(".classifier.resume.pt.*.part")) and not (left / "classifier.resume.pt").exists()

    kill(folder, "classifier.resume.pt", 3, *options)
    kill(folder, "purifier.resume.pt", 8, *options)
    kill(folder, "carso.pt", 1, *options)
    said = here(folder, *options)
    assert "in batches of 9, going on at epoch 2, step 0" in said
    assert {path.name for path in left.iterdir()} == WHOLE
    assert_same(folder / "runs" / "whole", left)


def interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C in the n-th step of the purifier's training from now on."""
    steps, real = iter(range(1, 1000)), train.Lookahead.step

    def interrupted(self):
        if next(steps) == step:
            signal.raise_signal(signal.SIGINT)
        real(self)

    monkeypatch.setattr(train.Lookahead, "step", interrupted)


@pytest.mark.parametrize("at, where", [(5, "epoch 0, step 4"), (8, "epoch 1, step 2")])
def test_an_interrupted_run_ends_as_if_it_had_not_been(folder, monkeypatch, at, where):
    """Before and after Lookahead's first synchronisation, at step 6."""
    given = [*OPTIONS, "--name", f"interrupted-{at}", "--classifier", "runs/whole/classifier.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVING", torch.inf)
        interrupt_at(patch, at)
        said = here(folder, *given, code=130)
    assert said.endswith("stopped; the same command goes on from what was saved\n")
    assert f"going on at {where}" in here(folder, *given)
    assert_same(folder / "runs" / "whole", folder / "runs" / f"interrupted-{at}")


# ------------------------------------------------------------------------------------------------- several processes

# All ranks' weights after each step.
HASH = """
add = train.Stage.add
def hashed(stage, batch, sums):
    network = stage.parts.get("purifier", stage.parts.get("network"))
    print("weights", stage.name, batch.epoch, batch.step, models.hash_weights(network))
    add(stage, batch, sums)
train.Stage.add = hashed
"""

# What two processes find in common, and a training that is interrupted. The same training goes on behind the patch, in
# the same processes: their start is dear.
ASK_RANKS = f"""
import shutil
ranks = train.start_ranks(models.start_device({DEVICE!r}))
train.start_ranks = lambda device: ranks

def fail():
    raise OSError("rank 1 finds no file")

print("loaded", ranks.take_turns(lambda: os.environ["RANK"]))
for do in (
    lambda: ranks.run_where(ranks.rank == 1, fail),
    lambda: ranks.check_alike({{"one": 1, "two": ranks.rank}}),
    lambda: train.main([*sys.argv[1:], "--dataset", "different.npz", "--classifier", "different.pt"]),
):
    try:
        do()
    except (ValueError, SystemExit) as error:
        print("refused:", error)
"""
INTERRUPT = """
import pytest, test_train
with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train, "SAVING", float("inf"))
    test_train.interrupt_at(patch, 8)
    train.main(sys.argv[1:])
if ranks.is_first:
    shutil.copytree("runs", "interrupted")
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folders, which two processes do not share, and what each said, line by line. Only the first
    one sees what was saved."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for number, each in enumerate(folders):
        write_tiny(each)
        arrays = dict(np.load(each / "tiny.npz"))
        np.savez(each / "different.npz", **arrays | {"train_images": arrays["train_images"] + number})
        write_classifier(each / "different.pt", classes=3)
    statuses = pair(folders, *OPTIONS, patches=[ASK_RANKS + HASH + INTERRUPT] * 2)
    said = [(folder / f"said-{rank}.txt").read_text() for rank, folder in enumerate(folders)]
    assert statuses == [0, 0], said
    return folders, said


def test_two_processes_agree_on_errors_and_refuse_to_differ(two_processes):
    first, second = ([line for line in said.splitlines() if "refused: " in line] for said in two_processes[1])
    advice = "give all the same data, weights and options"
    assert first == [
        "refused: rank 1 finds no file",
        f"refused: the processes differ in two: {advice}",
        f"refused: the processes differ in data, weights: {advice}",
    ]
    assert second == ["refused: 2"] * 3  # one speaks for all
    assert [said.splitlines()[0] for said in two_processes[1]] == ["loaded 0", "loaded 1"]


def test_two_processes_are_as_one_and_go_on_in_any_number(folder, two_processes, tmp_path):
    folders, (said, other) = two_processes
    assert [(each / "runs").exists() for each in folders] == [True, False]
    assert [path.name for path in (folders[0] / "runs").iterdir()] == ["tiny"]  # nothing was made of what differed
    first, second = (re.findall("^weights .*", text, re.M) for text in (said, other))
    assert first == second and len(first) == 3 + 10
    assert len({line.split()[-1] for line in first[:13]}) == 13  # they change with each step

    assert "2 process(es)" in said and "now: python" in said and said.count("classifier: 1 epochs") == 1
    assert "going on at epoch 1, step 2" in said and "going on" not in other  # one speaks for all
    assert "Warning" not in said + other
    assert_same(folder / "runs" / "whole", folders[0] / "runs" / "tiny", close=CLOSE)

    shutil.copytree(folders[0] / "interrupted", tmp_path / "runs")
    write_tiny(tmp_path)
    assert "going on at epoch 1, step 2" in here(tmp_path, *OPTIONS)  # alone
    assert_same(folder / "runs" / "whole", tmp_path / "runs" / "tiny", close=CLOSE)


@pytest.fixture
def watch(monkeypatch):
    """watch(module, name): from now on (name, is it in bfloat16?) of every call is in watch.seen."""

    def watch(module, name):
        real = getattr(module, name)

        def noted(*args, **how):
            watch.seen.add((name, torch.is_autocast_enabled(DEVICE)))
            return real(*args, **how)

        monkeypatch.setattr(module, name, noted)

    watch.seen = set()
    return watch


def test_micro_batches_change_roundings_only(folder, watch):
    watch(purifier, "checkpoint")
    here(folder, *OPTIONS, "--micro-batch", "4", "--name", "micro")
    assert watch.seen == {("checkpoint", False)}  # the purifier's activations are computed twice
    assert_same(folder / "runs" / "whole", folder / "runs" / "micro", close=CLOSE)


def test_in_bfloat16_are_attacks_classifier_and_purifier_but_not_the_losses(folder, watch):
    networks = {"pgd", "record", "adversarially_balanced_batch"}
    for name in (*networks, "vae_loss"):
        watch(train, name)
    watch(Purifier, "encode")
    here(folder, *OPTIONS, "--bf16", "--name", "bf16")
    assert {name for name, reduced in watch.seen if reduced} == networks | {"encode"}
    assert ("vae_loss", False) in watch.seen
    logs = [np.loadtxt(folder / "runs" / name / "log-purifier.tsv", skiprows=1) for name in ("whole", "bf16")]
    assert not np.array_equal(*logs)
    np.testing.assert_allclose(*logs, rtol=0.1)


@pytest.mark.slow
def test_eight_processes_train_and_evaluate_as_one(folder, tmp_path):
    """By torchrun, as the README says."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=8".split()
    shutil.copy(folder / "tiny.npz", tmp_path)
    assert "8 process(es) on cpu" in execute(tmp_path, *torchrun, ROOT / "train.py", *OPTIONS, "--device", "cpu")
    assert_same(folder / "runs" / "whole", tmp_path / "runs" / "tiny", close=CLOSE)

    numbers = "--attack rand --pictures 12 --chunk 2 --steps 2 --eot 1 --select 2 --draws 2 --device cpu".split()
    # At the training's eps an attack's step is lost among roundings, and the audit says so.
    evaluation = [ROOT / "evaluate.py", "--ckpt", "runs/tiny/carso.pt", "--eps", "8/255", *numbers]
    execute(tmp_path, *torchrun, *evaluation, "--out", "eight")
    execute(tmp_path, *evaluation, "--out", "one")
    assert (tmp_path / "eight" / "rows.tsv").read_text() == (tmp_path / "one" / "rows.tsv").read_text()


# --------------------------------------------------------------------------------------------------------- the options


@pytest.fixture(scope="module")
def given(folder):
    """Options of a short run around the complete run's classifier."""
    return [*OPTIONS, "--epochs", "1", "--classifier", folder / "runs" / "whole" / "classifier.pt"]


@pytest.mark.parametrize(
    "patterns, layers",
    [
        (["*"], representation_layers(16)),
        (["*.shortcut", "init_conv"], ["layer.1.block.0.shortcut", "layer.2.block.0.shortcut", "init_conv"]),
        (["layer.2.block.0.conv_0", "layer.2.block.0.c*"], ["layer.2.block.0.conv_0", "layer.2.block.0.conv_1"]),
    ],
)
def test_a_pattern_stands_for_the_papers_layers_that_it_matches(patterns, layers):
    """Each of them once; a name that no pattern stands for is the module of that name."""
    assert train.find_layers(WideResNet(10, 16, 1, 1), patterns) == layers


def test_a_classifier_from_a_file_a_layer_and_no_samples(folder, given, monkeypatch):
    options = [*given, "--name", "second", "--tap", "init_conv", "--samples", "0"]
    optimizers, build = [], train.build_optimizer
    monkeypatch.setattr(train, "build_optimizer", lambda *a: optimizers.append(build(*a)) or optimizers[0])
    assert "classifier: " not in here(folder, *options)
    carso, whole = (load_carso(folder / "runs" / name / "carso.pt")[0] for name in ("second", "whole"))
    assert hash_weights(carso.classifier) == hash_weights(whole.classifier)
    assert carso.layers == ["init_conv"] and carso.samples == 0
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(carso(x), carso(x))  # z = 0, nothing is drawn
    assert_close(list(carso.purifier.parameters()), optimizers[0].slow, check_device=False)  # not Lookahead's fast ones


def test_stage_classifier_ends_after_stage_one_and_stage_two_can_follow(folder, monkeypatch):
    options = [*OPTIONS, "--name", "stages"]
    said = here(folder, *options, "--stage", "classifier")
    assert f"evaluate.py --ckpt runs/stages/classifier.pt --dataset tiny.npz --eps {1e-5:g}" in said
    assert {path.name for path in (folder / "runs" / "stages").iterdir()} >= {"classifier.pt", "log-classifier.tsv"}
    monkeypatch.setattr(train, "train_classifier", None)  # it is not trained again
    here(folder, *options)
    assert_same(folder / "runs" / "whole", folder / "runs" / "stages")


@pytest.mark.parametrize("attacked, augment, mirror", [(False, False, False), (True, True, True), (True, True, False)])
def test_stage_one_is_its_recipe(tmp_path, monkeypatch, attacked, augment, mirror):
    """Radii and rates of three steps; an average over an epoch is kept."""
    radii, mirrored, rates, weights, real_step = [], [], [], [], torch.optim.SGD.step

    def step(optimizer):
        real_step(optimizer)
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        weights.append(group["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(train, "pgd", lambda model, x, y, eps, *_, **__: radii.append(eps) or x)
    monkeypatch.setattr(datasets, "augment", lambda x, draws, mirror: mirrored.append(mirror) or x)
    settings = {"classifier_epochs": 1, "classifier_batch_size": 15, "classifier_ramp": 6, "eps": 0.12}
    settings |= {"classifier_attack_steps": int(attacked), "augment": augment, "mirror": mirror}
    run = some_run(tmp_path, some_digits(45), dataclasses.replace(PRESETS["digits"], **settings))
    classifier = WideResNet(10, 10, 1, 1)
    train.train_classifier(run, classifier)
    assert radii == pytest.approx([0.01, 0.05 / 3, 0.07 / 3] if attacked else [])
    assert mirrored == ([mirror] * 3 if augment else [])
    assert rates == pytest.approx([0.01, 0.1 * (2 / 3) / 0.7, 0.1 * (1 / 3) / 0.7])
    average = weights[0].lerp(weights[1], 1 / 3).lerp(weights[2], 1 / 3)
    assert_close(next(classifier.parameters()), average)


@pytest.mark.parametrize(
    "options, fetched",
    [
        ([], "published"),
        (["--width", "2"], None),
        (["--preset", "digits"], None),
        (["--stage", "classifier"], None),
        (["--classifier", "train"], None),
        (["--classifier", "Wang2023Better_WRN-28-10"], "Wang2023Better_WRN-28-10"),
    ],
)
def test_published_is_the_default_where_it_exists(monkeypatch, options, fetched):
    data = dataclasses.replace(some_digits(60), name="cifar10")
    monkeypatch.setattr(datasets, "load", lambda *_: data)
    monkeypatch.setattr(train, "fetch_classifier", lambda data, name, *_: name)
    args = train.parse_arguments(["--dataset", "cifar10", *options])
    assert train.load_inputs(args, CPU) == (data, fetched)


@pytest.mark.parametrize("name, clean", [("digits", 0.85), ("mine.npz", 0.75)])
def test_the_last_lines_say_how_to_go_on(tmp_path, tiny_carso, monkeypatch, capsys, name, clean):
    """In a command for the shell; the reduced budget for own pictures only. Where CARSO is far below its classifier on
    clean pictures, the training was too short."""
    monkeypatch.setattr(train, "measure_accuracy", lambda model, *_, **__: clean if model is tiny_carso else 0.9)
    train.finish(some_run(tmp_path / "it's a run", dataclasses.replace(some_digits(72), name=name)), tiny_carso)
    result, hint, *warning = capsys.readouterr().out.splitlines()
    assert f"clean {clean:.1%}, its classifier alone 90.0%, on 500 test pictures" in result
    command = ["python", "evaluate.py", "--ckpt", str(tmp_path / "it's a run" / "carso.pt")]
    assert shlex.split(hint.removeprefix("now: ")) == command + ["--budget", "reduced"] * (name == "mine.npz")
    assert [line for line in warning if "train longer" in line] == warning and len(warning) == (clean == 0.75)


def test_a_file_is_the_same_by_any_path(folder, tmp_path, monkeypatch):
    """Relative, absolute, or from the home folder, which the shell does not know behind an equals sign."""
    monkeypatch.setenv("HOME", str(folder))
    for path in (folder / "tiny.npz", "~/tiny.npz"):
        said = here(folder, f"--dataset={path}", *TINY, "--name=~/runs/whole", "--data-dir=~/data")
        assert f"{folder}/runs/whole/carso.pt is complete" in said
    assert not (folder / "~").exists()


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in ("(default: 0)", "(default: digits)", "(digits 24, cifar10 200, cifar100 200, tinyimagenet 250)"):
        assert text in said


# --------------------------------------------------------------------------------------------------- a script's bad day


@pytest.mark.parametrize(
    "stage, optimizer, at, what",
    [
        ("classifier", torch.optim.SGD, 3, "a weight"),
        ("purifier", torch.optim.RAdam, 2, "epoch 0, step 2: the loss"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_kept(folder, given, monkeypatch, stage, optimizer, at, what):
    """After the last of three steps only the weights show it. The checkpoint of the first step stays."""
    monkeypatch.setattr(train, "SAVING", 1e-9)
    steps, real = iter(range(1, 4)), optimizer.step

    def step(self):
        real(self)
        if next(steps) == at:
            nn.init.constant_(self.param_groups[0]["params"][0], torch.inf)

    monkeypatch.setattr(optimizer, "step", step)
    options = OPTIONS if stage == "classifier" else [*given, "--batch-size", "15"]
    said = here(folder, *options, "--name", f"infinite-{stage}", code=2).splitlines()[-1]
    assert said == f"train.py: {stage}: {what} is not finite: choose a lower learning rate, and another --name"
    [kept] = (folder / "runs" / f"infinite-{stage}").glob("*.pt")
    assert load_tensors(kept)["step"] == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--dataset", "nowhere.npz"], "nowhere.npz is none of"),
        (["--eps", "eight"], "argument --eps: eight is not a number, such as 8/255"),
        (["--eps", "2"], "--eps 2 is not between 0 and 1"),
        (["--learning-rate-end=-1"], "--learning-rate-end -1 is not between 0 and 1000"),
        (["--stage", "purifier"], "argument --stage: invalid choice"),
        (["--depth", "11"], "depth must be 6n + 4"),
        (["--warmup", "30"], "--warmup 30 and --plateau 6 are longer than the 24 epochs"),
        (["--kl-from", "5", "--kl-to", "4"], "--kl-from 5 and --kl-to 4 are not in order"),
        (["--classifier", "nothing.pt"], "there is no file nothing.pt; published for digits are: none"),
        (["--stage", "classifier", "--classifier", "x.pt"], "leave out --classifier"),
        (["--tap", "init_conv", "layer.9.*"], "the classifier has no layer named layer.9.*"),
        (["--tap", "logits"], "layer 0 of the representation is (10,); the purifier's"),
        (["--micro-batch", "0"], "--micro-batch 0 is not 1 or more"),
        (["--batch-size", "2000", "--device", "cuda"], "--device cuda: PyTorch finds no GPU here"),
    ],
)
def test_wrong_input_gets_a_sentence_before_anything_is_written(tmp_path, monkeypatch, options, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = here(tmp_path, *options, code=2).splitlines()[-1]
    assert said.startswith("train.py: ") and sentence in said
    assert not list(tmp_path.iterdir())


def test_batches_fit_the_set_and_the_number_of_processes(folder, capsys):
    def plan(*options):
        args = train.parse_arguments(["--preset", "digits", *options])
        return train.plan_training(args, datasets.load(folder / "tiny.npz"), None, Ranks(CPU, 0, 8))

    assert plan().batch_size == 16 and "and --batch-size 16, for ten batches an epoch of 45" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--batch-size 7 leaves a batch of 6 for 8 process"):
        plan("--batch-size", "7")


@pytest.mark.parametrize(
    "classes, options, sentence",
    [
        (4, [], "other.pt do not fit"),
        (3, ["--depth", "22"], "--depth 22 is not that of --classifier, 10: leave it out"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, classes, options, sentence):
    write_classifier(folder / "other.pt", classes)
    said = here(folder, *OPTIONS, "--name", "unfit", "--classifier", "other.pt", *options, code=2)
    assert "train.py: " in said and sentence in said
    assert not (folder / "runs" / "unfit").exists()


@pytest.mark.parametrize("file", ["classifier.pt", "classifier.resume.pt", "purifier.resume.pt"])
def test_damaged_files_are_refused_by_name_and_left_as_they_are(folder, tmp_path, file):
    whole = tmp_path / "runs" / "whole"
    shutil.copy(folder / "tiny.npz", tmp_path)
    shutil.copytree(folder / "runs" / "whole", whole)
    (whole / "carso.pt").unlink()
    if file == "classifier.resume.pt":
        (whole / "classifier.pt").unlink()
    damaged = (folder / "runs" / "whole" / "classifier.pt").read_bytes()[:-2000]
    (whole / file).write_bytes(damaged)
    said = here(tmp_path, *OPTIONS, "--name", "whole", code=2).splitlines()[-1]
    assert said.startswith(f"train.py: runs/whole/{file} ") and (whole / file).read_bytes() == damaged
