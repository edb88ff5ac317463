"""Schedules and Lookahead against the reference, and the real script on tiny budgets: complete, killed, resumed, on two
processes, and with wrong input."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import DEVICE, ROOT, golden, uniform
from torch import nn
from torch.testing import assert_close

import data
import evaluate
import train
from attacks import adversarially_balanced_batch, pgd
from lab import robust_training
from lab.checkpoints import load_checkpoint
from lab.presets import PRESETS
from lab.robust_training import untrained
from lab.start import out_of_memory
from models import WideResNet, record, representation_layers
from purifier import build_carso, vae_loss
from train import Lookahead, kl_weight, learning_rate, refresh_batchnorm, schedule_at

# ------------------------------------------------------------------------------------------------------ small pieces


@pytest.mark.parametrize("scenario, preset", [("a", "cifar10"), ("b", "cifar100"), ("c", "tinyimagenet")])
def test_schedules_equal_the_reference(scenario, preset):
    p, want = PRESETS[preset], golden("optimizer")
    np.testing.assert_allclose([learning_rate(e, p) for e in range(p.epochs)], want[f"lr_{scenario}"], rtol=1e-6)
    np.testing.assert_allclose([kl_weight(e, p) for e in range(p.epochs)], want[f"beta_{scenario}"], atol=1e-9)


def test_radam_in_lookahead_equals_the_reference():
    want = golden("optimizer")
    shapes = [(4, 3), (5,)]
    weights = [nn.Parameter(torch.tensor(uniform(f"p{i}", s), dtype=torch.float32)) for i, s in enumerate(shapes)]
    lookahead = Lookahead(torch.optim.RAdam(weights, lr=0.01), k=6, alpha=0.8)
    for t in range(20):
        for i, w in enumerate(weights):
            w.grad = torch.tensor(2 * uniform(f"g{i}_{t}", w.shape) - 1, dtype=torch.float32)
        lookahead.step()
        now = torch.cat([w.detach().flatten() for w in weights]).numpy()
        np.testing.assert_allclose(now, want["radam_lookahead_fast"][t], rtol=1e-5, atol=1e-6)
    lookahead.finish()
    slow = torch.cat([w.detach().flatten() for w in weights]).numpy()
    np.testing.assert_allclose(slow, want["radam_lookahead_slow_at_20"], rtol=1e-5, atol=1e-6)


def test_presets_are_the_papers_table_14():
    a, b, c = PRESETS["cifar10"], PRESETS["cifar100"], PRESETS["tinyimagenet"]
    assert [p.epochs for p in (a, b, c)] == [200, 200, 250]
    assert [p.batch_size for p in (a, b, c)] == [8 * 640, 4 * 640, 8 * 128]
    assert [p.fraction for p in (a, b, c)] == [0.5, 0.15, 0.01]
    assert [(p.condition_dim, p.latent_dim) for p in (a, b, c)] == [(512, 128), (512, 128), (768, 192)]
    assert all((p.depth, p.width, p.samples, p.eps) == (28, 10, 8, 8 / 255) for p in (a, b, c))
    assert all((p.attack_steps, p.attack_step_size) == (40, 0.01) for p in (a, b, c))


def test_refreshed_batchnorm_has_the_statistics_of_the_data():
    network = nn.Sequential(nn.BatchNorm1d(3))
    network[0].running_mean.fill_(100)
    parts = torch.randn(4, 25, 3) * 2 + 5
    refresh_batchnorm(network, lambda: [network(part) for part in parts])
    assert_close(network[0].running_mean, parts.mean((0, 1)))
    assert_close(network[0].running_var, torch.stack([part.var(0) for part in parts]).mean(0))
    assert network[0].momentum == 0.1


def test_schedules_move_by_step_where_an_epoch_is_short():
    """From enough steps on they are the paper's; else RAdam's first five steps keep the rate of the start."""
    paper = PRESETS["cifar10"]
    assert [schedule_at(e, n, 10, paper) for e in (0, 1, 199) for n in (0, 9)] == [0, 0, 1, 1, 199, 199]
    at = [schedule_at(t // 3, t % 3, 3, paper) for t in range(600)]
    assert at[:5] == [0] * 5 and at[5:] == [t / 3 for t in range(5, 600)]
    one, _ = train.prepare(train.parse_arguments(["--dataset", "digits", "--epochs", "1"]))
    rates = [learning_rate(schedule_at(0, n, 21, one), one) for n in range(21)]
    assert rates[:5] == [5e-9] * 5 and rates[5] > 0.2 * one.learning_rate and rates[20] > 0.9 * one.learning_rate
    assert kl_weight(schedule_at(0, 20, 21, one), one) == 1


# -------------------------------------------------------------------------------------------------- the real script

BUDGET = (
    "--preset digits --epochs 3 --batch-size 9 --classifier-epochs 1 --classifier-batch-size 24 --attack-steps 2 "
    f"--classifier-attack-steps 1 --device {DEVICE}"
).split()
TINY = [*BUDGET, *"--condition-dim 8 --latent-dim 4 --decoder-width 8 --samples 2".split()]
# The scripts run in one thread: with another number sums round in another order, and many processes share two cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(folder, *options, ranks=1, script="train.py"):
    if DEVICE == "cuda" and ranks > torch.cuda.device_count():
        pytest.skip(f"{ranks} processes want a GPU each")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return dict(
        args=[sys.executable, *launcher, str(ROOT / script), *map(str, options)],
        cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(folder, *options, code=0, **how) -> str:
    done = subprocess.run(**command(folder, *options, **how), timeout=200)
    assert done.returncode == code, done.stdout
    return done.stdout


def here(script, folder, options, monkeypatch, capsys, code=0) -> str:
    """What a script's main says in this process, which saves the seconds of a start."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
    try:
        status = script.main()
    except SystemExit as stop:  # argparse's own
        status = stop.code
    said = capsys.readouterr()
    assert status == code, said
    return said.out + said.err


def refusal(script, folder, options, monkeypatch, capsys) -> str:
    return here(script, folder, options, monkeypatch, capsys, code=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny data set, and one complete run on it, named whole."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    labels = np.arange(72) % 3
    images = (40 * labels[:, None, None, None] + rng.integers(0, 60, (72, 32, 32, 1))).astype(np.uint8)
    np.savez(
        folder / "tiny.npz", train_images=images, train_labels=labels, test_images=images[:12], test_labels=labels[:12]
    )
    run(folder, "--dataset", "tiny.npz", "--name", "whole", *TINY)
    return folder


def same_weights(folder, one, other, **tolerance):
    a, b = (load_checkpoint(folder / "runs" / name / "carso.pt")[0].state_dict() for name in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_a_run_leaves_what_it_promises(folder, monkeypatch, capsys):
    whole = folder / "runs" / "whole"
    logs = {"log.tsv", "log-classifier.tsv", "log-batchnorm.tsv"}
    kept = {"carso.pt", "classifier.pt", "config.json", "reconstructions.png"}
    assert {path.name for path in whole.iterdir()} == kept | logs
    log = (whole / "log.tsv").read_text().splitlines()
    assert log[0].split("\t") == ["epoch", "loss", "bce", "kld"] and len(log) == 4
    carso, state = load_checkpoint(whole / "carso.pt")
    assert state["dataset"] == "tiny.npz" and carso.samples == 2
    again = here(train, folder, ["--dataset", "tiny.npz", "--name", "whole", *TINY], monkeypatch, capsys)
    assert "is complete" in again


def test_log_holds_means_over_the_epoch(folder):
    """bce of a picture of 1024 pixels is a few hundred, whatever the batch size; the loss joins it with the KL
    weight."""
    rows = np.loadtxt(folder / "runs" / "whole" / "log.tsv", skiprows=1)
    assert ((rows[:, 2] > 100) & (rows[:, 2] < 1500)).all()
    p = PRESETS["digits"]
    assert p.epochs == 24
    assert rows[0, 1] == pytest.approx(rows[0, 2])  # KL weight 0 in the first epoch


@pytest.fixture(scope="module")
def calm(folder):
    """A run with a tiny eps (the sign of a gradient turns a rounding into a step of full length, so that a real
    attack's pictures differ in a few pixels), and a learning rate that makes RAdam's first five steps count: they
    follow the bare gradient, so that its scale matters. Its pictures are attacked anew in every batch."""
    options = ["--dataset", "tiny.npz", *TINY, "--eps", "0.00001", "--epochs", "2", "--attack-versions", "0"]
    options += ["--learning-rate", "1e-3", "--learning-rate-start", "3e-7"]
    run(folder, *options, "--name", "calm")
    return options


@pytest.mark.parametrize("how", ["two processes", "micro-batches"])
def test_the_same_weights_up_to_the_order_of_summation(folder, calm, how, monkeypatch, capsys):
    if how == "two processes":
        output = run(folder, *calm, "--name", how, ranks=2)
        assert "--batch-size 9 over 2 processes" in output
    else:
        here(train, folder, [*calm, "--name", how, "--micro-batch", "4"], monkeypatch, capsys)
    close = 5e-3 if DEVICE == "cuda" else 1e-3  # there convolutions are in TF32 by default
    same_weights(folder, "calm", how, rtol=close, atol=close)
    one, other = (np.loadtxt(folder / "runs" / name / "log.tsv", skiprows=1) for name in ("calm", how))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stages", [("classifier", "batchnorm"), ("purifier",)])
def test_a_killed_run_goes_on_and_ends_bitwise_equal(folder, stages):
    if DEVICE == "cuda" and stages != ("purifier",):
        pytest.skip("a GPU is looked at every ten steps, and has done the few of these stages by then")
    name = f"killed in {stages[0]}"
    options = ("--dataset", "tiny.npz", "--name", name, *TINY, "--save-every", "0")
    for stage in stages:
        process = subprocess.Popen(**command(folder, *options))
        checkpoint = folder / "runs" / name / f"{stage}.resume.pt"
        wanted = 10 if stage == "purifier" else 1  # steps; after Lookahead's first synchronisation, at 6
        while process.poll() is None:
            time.sleep(0.005)
            if checkpoint.is_file():  # renamed into place, so it is whole at any moment
                saved = torch.load(checkpoint, weights_only=True)
                if 8 * saved["epoch"] + saved["step"] >= wanted:
                    break
        process.send_signal(signal.SIGTERM if stage == "classifier" else signal.SIGKILL)
        output = process.communicate(timeout=100)[0]
        if stage == "classifier":
            assert process.returncode == 130 and "the same command goes on" in output, output
        assert not (folder / "runs" / name / "carso.pt").exists(), "killed too late to test anything"
        if stage != stages[0]:
            assert f"{stages[0]}: going on" in output, output
    output = run(folder, *options)
    assert re.search(rf"{stages[-1]}: going on at epoch \d+, step \d+", output), output
    same_weights(folder, "whole", name, rtol=0, atol=0)
    logs = [(folder / "runs" / n / "log.tsv").read_text() for n in ("whole", name)]
    assert logs[0] == logs[1]


END = ["--objective", "end-to-end", "--end-epochs", "2", "--end-batch-size", "9", "--end-attack-steps", "2"]


@pytest.fixture(scope="module")
def end_to_end(folder):
    """Options of a run from the paper-trained checkpoint, and its result, named end. Like calm, with a tiny eps."""
    start = ["--from", "runs/whole/carso.pt", "--eps", "0.00001", "--end-learning-rate", "3e-4"]
    options = ["--dataset", "tiny.npz", *BUDGET, *END, *start]
    run(folder, *options, "--name", "end")
    return options


def test_end_to_end_trains_the_decoders_path_and_nothing_else(folder, end_to_end):
    before, after = (load_checkpoint(folder / "runs" / name / "carso.pt")[0] for name in ("whole", "end"))
    assert after.own_answer == 0.5 and before.own_answer == 0
    frozen = ("classifier.", "purifier.image_encoder", "purifier.joint_head", "purifier.to_")
    new = after.state_dict()
    for key, old in before.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(old, new[key]), key
        elif key.endswith("weight"):
            assert not torch.equal(old, new[key]), key
    log = np.loadtxt(folder / "runs" / "end" / "log-end-to-end.tsv", skiprows=1)
    assert log.shape == (2, 4) and (0 < log[:, 2]).all() and (log[:, 2] < 1.5).all()  # BCE a value


@pytest.mark.parametrize("how", ["two processes", "micro-batches"])
def test_end_to_end_is_the_same_up_to_the_order_of_summation(folder, end_to_end, how, monkeypatch, capsys):
    if how == "two processes":
        run(folder, *end_to_end, "--name", f"end {how}", ranks=2)
    else:
        here(train, folder, [*end_to_end, "--name", f"end {how}", "--micro-batch", "4"], monkeypatch, capsys)
    same_weights(folder, "end", f"end {how}", rtol=0.02, atol=0.02)  # Adam makes steps of full length of roundings, too
    logs = [np.loadtxt(folder / "runs" / name / "log-end-to-end.tsv", skiprows=1) for name in ("end", f"end {how}")]
    np.testing.assert_allclose(*logs, rtol=1e-3)


def test_end_to_end_killed_goes_on_and_ends_bitwise_equal(folder, end_to_end):
    process = subprocess.Popen(**command(folder, *end_to_end, "--name", "end-killed", "--save-every", "0"))
    checkpoint = folder / "runs" / "end-killed" / "end-to-end.resume.pt"
    while process.poll() is None:
        time.sleep(0.005)
        if checkpoint.is_file():
            saved = torch.load(checkpoint, weights_only=True)
            if 8 * saved["epoch"] + saved["step"] >= 3:
                break
    process.kill()
    process.communicate(timeout=100)
    assert not (folder / "runs" / "end-killed" / "carso.pt").exists(), "killed too late to test anything"
    assert "end-to-end: going on at epoch" in run(folder, *end_to_end, "--name", "end-killed")
    same_weights(folder, "end", "end-killed", rtol=0, atol=0)


def test_end_to_end_lowers_the_loss_under_attack(folder, monkeypatch, capsys):
    """From scratch, with a real radius: the pictures of three grey levels become separable under attack."""
    options = ["--dataset", "tiny.npz", *TINY, *END, "--from", "scratch", "--end-epochs", "6", "--eps", "0.05"]
    options += ["--classifier", "runs/whole/classifier.pt", "--name", "end-scratch", "--tap", "init_conv"]
    here(train, folder, options, monkeypatch, capsys)
    assert load_checkpoint(folder / "runs" / "end-scratch" / "carso.pt")[0].layers == ["init_conv"]
    log = np.loadtxt(folder / "runs" / "end-scratch" / "log-end-to-end.tsv", skiprows=1)
    assert log[-1, 1] < log[0, 1] and log[-1, 2] < log[0, 2]


@pytest.mark.parametrize(
    "tap, layers",
    [
        (None, representation_layers(16)),
        (["layer.2.*"], [name for name in representation_layers(16) if name.startswith("layer.2.")]),
        (["*.shortcut", "init_conv"], ["layer.1.block.0.shortcut", "layer.2.block.0.shortcut", "init_conv"]),
        (["*.block.0.conv_0", "layer.0.*"], [f"layer.{group}.block.0.conv_0" for group in range(3)]
         + ["layer.0.block.0.conv_1", "layer.0.block.1.conv_0", "layer.0.block.1.conv_1"]),
    ],
)  # fmt: skip
def test_a_pattern_stands_for_the_papers_layers_that_it_matches(tap, layers):
    """Each of them once; a name that no pattern stands for is the module of that name."""
    with torch.device("meta"):
        carso = untrained(WideResNet(10, 16, 1), (3, 32, 32), PRESETS["digits"], tap)
    assert carso.layers == layers


@pytest.mark.parametrize("epochs, least", [(8, 0.95), (1, 1.0)])
def test_forty_digits_train_with_no_other_option(tmp_path, monkeypatch, capsys, epochs, least):
    """A loss that falls, from batches of 16; even in one epoch, of three steps that RAdam takes at the first rate."""
    digits = data.load("digits")
    images, labels = digits.train_images[:40, 0].numpy(), digits.train_labels[:40].numpy()
    np.savez(tmp_path / "few.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    options = ["--dataset", "few.npz", "--preset", "digits", "--epochs", epochs, "--classifier-epochs", "1"]
    output = here(train, tmp_path, [*options, "--device", DEVICE], monkeypatch, capsys)
    assert "in batches of 16" in output and "--batch-size 16 instead of 64" in output
    bce = np.atleast_2d(np.loadtxt(tmp_path / "runs" / "few" / "log.tsv", skiprows=1))[:, 2]
    assert bce[-1] <= least * bce[0] < 1000
    config = load_checkpoint(tmp_path / "runs" / "few" / "carso.pt")[1]["config"]
    assert (config["batch_size"], config["learning_rate"], config["classifier_learning_rate"]) == (16, 0.002, 0.025)


@pytest.mark.parametrize("stage", ["classifier", "purifier", "end-to-end"])
def test_what_is_not_finite_ends_the_run_and_is_not_kept(folder, stage, monkeypatch, capsys):
    settings = BUDGET if stage == "end-to-end" else TINY
    options = ["--dataset", "tiny.npz", *settings, "--name", f"diverged-{stage}", "--save-every", "0"]
    options += {
        "classifier": ["--classifier-learning-rate", "1e30"],
        "purifier": ["--classifier", "runs/whole/classifier.pt", "--learning-rate-start", "1e30"],
        "end-to-end": [*END, "--from", "runs/whole/carso.pt", "--end-learning-rate", "1e30"],
    }[stage]
    output = refusal(train, folder, options, monkeypatch, capsys)
    assert re.search(rf"train.py: {stage}: (the loss|a weight) is not finite at epoch 0, step \d", output), output
    left = {path.name for path in (folder / "runs" / f"diverged-{stage}").iterdir()}
    assert left - {"attacked"} == {"config.json"}  # the attacked training set is whole, and serves another rate as well


def test_grey_pictures_of_two_classes_from_training_to_report(tmp_path, monkeypatch, capsys):
    """As MedMNIST has them: 28x28, labels (N, 1)."""
    rng, labels = np.random.default_rng(0), np.arange(60)[:, None] % 2
    images = (90 * labels[..., None] + rng.integers(0, 90, (60, 28, 28))).astype(np.uint8)
    splits = {"train": slice(48), "val": slice(48, 54), "test": slice(54, 60)}
    arrays = {f"{s}_{k}": a[rows] for s, rows in splits.items() for k, a in (("images", images), ("labels", labels))}
    np.savez(tmp_path / "mnist.npz", **arrays)
    sizes = "--condition-dim 8 --latent-dim 4 --decoder-width 8 --samples 2 --depth 10 --width 1".split()
    budget = "--epochs 2 --classifier-epochs 1 --attack-steps 1 --classifier-attack-steps 1 --eps 0.05".split()
    options = ["--dataset", "mnist.npz", "--preset", "cifar10", *sizes, *budget, "--device", DEVICE]
    assert "resized from 28x28 to 32x32" in here(train, tmp_path, options, monkeypatch, capsys)
    options = f"--ckpt runs/mnist/carso.pt --out report --steps 1 --eot 1 --draws 2 --device {DEVICE} --attack apgd"
    here(evaluate, tmp_path, options.split(), monkeypatch, capsys)
    assert json.loads((tmp_path / "report" / "report.json").read_text())["n"] == 6


APART = """
import os, runpy, sys
sys.path.insert(0, {root!r})
if os.environ["RANK"] == "1":
    os.chdir("elsewhere")
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_processes_without_a_shared_folder_go_on_at_the_same_step(folder, calm, monkeypatch, capsys):
    """One process is stopped in the second epoch; of the two that go on, only one sees what it left."""
    steps, real = iter(range(100)), Lookahead.step
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Lookahead, "step", lambda self: real(self) or (next(steps) == 9 and terminate()))
    output = here(train, folder, [*calm, "--name", "apart"], monkeypatch, capsys, code=130)
    assert "stopped at purifier epoch 1, step 2" in output
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "tiny.npz").symlink_to(folder / "tiny.npz")
    (folder / "apart.py").write_text(APART.format(root=str(ROOT)))
    how = command(folder, *calm, "--name", "apart", ranks=2)
    how["args"] = [str(folder / "apart.py") if a == str(ROOT / "train.py") else a for a in how["args"]]
    done = subprocess.run(**how, timeout=200)
    assert done.returncode == 0 and "purifier: going on at epoch 1, step 2" in done.stdout, done.stdout
    same_weights(folder, "calm", "apart", rtol=1e-3, atol=1e-3)


def test_a_run_stands_on_the_same_data_and_weights(folder, tmp_path, monkeypatch, capsys):
    """And on a checkpoint that is whole. Each is told before anything is changed."""
    arrays = dict(np.load(folder / "tiny.npz"))
    shutil.copy(folder / "tiny.npz", tmp_path)
    kept = torch.load(folder / "runs" / "whole" / "classifier.pt", weights_only=True)
    torch.save(kept, tmp_path / "weights.pt")
    options = ["--dataset", "tiny.npz", *TINY, "--classifier", "weights.pt", "--name", "one"]

    def interrupted(*_):  # as Ctrl-C does; a real signal may arrive a moment later, when all is done
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_purifier", interrupted)
    here(train, tmp_path, options, monkeypatch, capsys, code=130)
    np.savez(tmp_path / "tiny.npz", **arrays | {"train_images": arrays["train_images"] // 2})
    assert re.search("data: .* there, .* now", refusal(train, tmp_path, options, monkeypatch, capsys))
    np.savez(tmp_path / "tiny.npz", **arrays)
    kept["state_dict"]["logits.bias"] += 1
    torch.save(kept, tmp_path / "weights.pt")
    assert re.search("weights: .* there, .* now", refusal(train, tmp_path, options, monkeypatch, capsys))
    kept["state_dict"]["logits.bias"] -= 1
    monkeypatch.undo()
    torch.save(torch.load(folder / "runs" / "whole" / "classifier.pt", weights_only=True), tmp_path / "weights.pt")
    (tmp_path / "runs" / "one" / "purifier.resume.pt").write_bytes(b"PK half a file")
    output = refusal(train, tmp_path, options, monkeypatch, capsys)
    assert "purifier.resume.pt is damaged; delete it" in output


def test_torchrun_restarts_a_killed_process_and_training_goes_on(folder, calm):
    options = [*calm, "--name", "restart", "--save-every", "0", "--classifier", "runs/calm/classifier.pt"]
    how = command(folder, *options, ranks=2)
    how["args"].insert(3, "--max-restarts=1")
    process = subprocess.Popen(**how)
    while not (folder / "runs" / "restart" / "purifier.resume.pt").is_file() and process.poll() is None:
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output = process.communicate(timeout=150)[0]
    assert process.returncode == 0 and "purifier: going on at" in output, output
    same_weights(folder, "calm", "restart", rtol=1e-3, atol=1e-3)


def test_other_settings_in_the_same_folder_are_refused(folder, monkeypatch, capsys):
    options = ["--dataset", "tiny.npz", "--name", "whole", *TINY, "--eps", "1/4"]
    output = refusal(train, folder, options, monkeypatch, capsys)
    assert "eps: 0.2 there, 0.25 now" in output and "--name" in output


def test_a_classifier_from_a_file(folder, monkeypatch, capsys):
    weights = folder / "runs" / "whole" / "classifier.pt"
    options = ["--dataset", "tiny.npz", "--name", "given", "--classifier", weights, *TINY]
    output = here(train, folder, options, monkeypatch, capsys)
    assert "clean accuracy" in output
    same_weights(folder, "whole", "given", rtol=0, atol=0)


def test_stage_one_goes_on_from_given_weights(folder, monkeypatch, capsys):
    weights = folder / "runs" / "whole" / "classifier.pt"
    options = ["--dataset", "tiny.npz", *TINY, "--name", "on", "--train-on", weights, "--epochs", "1"]
    options += ["--classifier-learning-rate", "0", "--classifier-weight-decay", "0"]
    output = here(train, folder, options, monkeypatch, capsys)
    assert "classifier: 1 epochs" in output, output
    before, after = (torch.load(folder / "runs" / n / "classifier.pt")["state_dict"] for n in ("whole", "on"))
    for key, old in before.items():  # the learning rate is 0: only BatchNorm's statistics move
        assert torch.equal(old, after[key]) != ("running" in key or "tracked" in key), key


def test_stage_classifier_ends_after_stage_one_and_stage_two_can_follow(folder, monkeypatch, capsys):
    options = ["--dataset", "tiny.npz", *TINY, "--name", "stages"]
    output = here(train, folder, [*options, "--stage", "classifier"], monkeypatch, capsys)
    assert {path.name for path in (folder / "runs" / "stages").iterdir()} >= {"classifier.pt", "config.json"}
    assert not (folder / "runs" / "stages" / "carso.pt").exists()
    assert "evaluate.py --ckpt runs/stages/classifier.pt --dataset tiny.npz --eps 51/255" in output
    here(train, folder, options, monkeypatch, capsys)
    kept = torch.load(folder / "runs" / "stages" / "classifier.pt", "cpu", weights_only=True)["state_dict"]
    for key, tensor in load_checkpoint(folder / "runs" / "stages" / "carso.pt")[0].classifier.state_dict().items():
        assert torch.equal(tensor, kept[key]), key  # stage two took the classifier of stage one


@pytest.mark.parametrize("limit, sizes", [([], [9, 3]), (["--micro-batch", "5"], [5, 5, 2])])
def test_a_classifier_is_kept_and_then_measured_in_the_memory_of_its_training(
    folder, monkeypatch, capsys, limit, sizes
):
    measured = []

    def attack(classifier, x, y, *given, **how):
        if how.get("steps") != 20:
            return pgd(classifier, x, y, *given, **how)
        assert (folder / "runs" / f"kept{sizes}" / "classifier.pt").is_file()
        return measured.append(len(x)) or x

    monkeypatch.setattr(robust_training, "pgd", attack)
    options = ["--dataset", "tiny.npz", *TINY, "--stage", "classifier", "--classifier-batch-size", "9", *limit]
    here(train, folder, [*options, "--name", f"kept{sizes}"], monkeypatch, capsys)
    assert measured == sizes


def test_a_run_inside_anothers_folder_stays(folder, monkeypatch, capsys):
    for name in ("outer/attacked", "outer"):
        here(train, folder, ["--dataset", "tiny.npz", *TINY, "--name", name, "--epochs", "1"], monkeypatch, capsys)
    assert (folder / "runs" / "outer" / "attacked" / "carso.pt").is_file()
    assert not list((folder / "runs" / "outer").rglob("*-0000000.pt"))


def test_bad_data_under_torchrun_gets_the_sentence_of_each_process(tmp_path):
    output = run(tmp_path, "--dataset", "nothing.npz", ranks=2, code=1)  # torchrun's own status
    assert output.count("train.py: there is no file nothing.npz") == 2 and "Connection" not in output


def test_no_terminal_at_all(folder):
    how = command(folder, "--dataset", "tiny.npz", *TINY, "--stage", "classifier", "--name", "quiet")
    assert subprocess.run(**how | dict(stdout=None, stderr=None, preexec_fn=lambda: os.close(2))).returncode == 0


def test_a_data_set_in_the_folder_where_one_stands(tmp_path, monkeypatch):
    """Its run is named after that folder, and lies under runs/."""
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "pictures/.."):
        _, run_name = train.prepare(train.parse_arguments(["--dataset", name]))
        assert run_name == (tmp_path / name).resolve().stem
    (tmp_path / "latest.npz").symlink_to("v3.npz")  # a link has a name of its own, and runs/ may be on another disk
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to("elsewhere")
    assert train.prepare(train.parse_arguments(["--dataset", "latest.npz"]))[1] == "latest"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--dataset", "cifar11"], "no data set cifar11"),
        (["--dataset", "nowhere.npz"], "no file nowhere.npz"),
        (["--eps", "8"], "write 8/255"),
        (["--eps", "eight"], "'eight' is not a number such as 8/255"),
        (["--fraction", "1.5"], "not a share between 0 and 1"),
        (["--batch-size", "1"], "--batch-size 1 must be 2 or more"),
        (["--own-answer", "1"], "not a share of at least 0 and less than 1"),
        (["--epochs", "0"], "must be 1 or more"),
        (["--classifier", "nothing.pt"], "no file nothing.pt"),
        (["--depth", "11"], "6n \\+ 4"),
        (["--objective", "end-to-end"], "no runs/digits/carso.pt to start from"),
        (["--objective", "end-to-end", "--classifier", "train"], "goes with --from scratch"),
        (["--objective", "end-to-end", "--tap", "init_conv"], "--tap goes with --from scratch"),
        (["--objective", "end-to-end", "--width", "2", "--samples", "3"], "--width and --samples: the checkpoint that"),
        (["--mirror", "true"], "goes with --augment true"),
        (["--tap", "init_conv", "layer.9"], "the classifier has no layer named layer.9"),
        (["--tap", "layer.9.*"], "the classifier has no layer named layer.9.\\*"),
        (["--tap", "logits"], "layer 0 of the representation is .* tap an earlier layer"),
        (["--objective", "end-to-end", "--from", "scratch", "--tap", "logits"], "tap an earlier layer"),
        (["--tap", "init_conv", ""], "--tap is empty"),
        (["--objective", "end-to-end", "--from", ""], "--from is empty"),
        (["--depth", "999999999994"], "up to 1000"),
        (["--latent-dim", "9" * 30], "up to a million"),
        (["--micro-batch", "0"], "--micro-batch 0 must be 1 or more"),
        (["--seed", "9" * 30], "--seed 9* must be less than 2\\^32"),
        (["--save-every", "nan"], "--save-every nan must be 0 or more"),
        (["--name", "../elsewhere"], "--name is that of a folder under runs/"),
        (["--name", "."], "--name is that of a folder under runs/"),
        (["--dataset", "/"], "--name is that of a folder under runs/"),
        (["--attack-versions", "6"], "--attack-versions 6 must be 0 to 3, or a multiple of 4"),
        (["--train-on", "published"], "no classifier is published for digits"),
        (["--from", "scratch"], "goes with --objective end-to-end"),
        (["--train-on", "a.pt", "--classifier", "b.pt"], "exclude each other"),
    ],
)  # fmt: skip
def test_wrong_input_gets_a_sentence(tmp_path, monkeypatch, capsys, options, sentence):
    assert re.search(sentence, refusal(train, tmp_path, options, monkeypatch, capsys))
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("channels, classes, sentence", [(3, 3, "expected pictures"), (1, 4, "do not fit")])
def test_weights_that_do_not_fit_the_data_are_refused_by_name(folder, monkeypatch, capsys, channels, classes, sentence):
    weights = WideResNet(classes, 10, 1, channels).state_dict()
    torch.save(weights | {"mean": torch.full((channels,), 0.5), "std": torch.full((channels,), 0.5)}, folder / "w.pt")
    for option in ("--classifier", "--train-on"):
        output = refusal(train, folder, ["--dataset", "tiny.npz", *TINY, option, "w.pt"], monkeypatch, capsys)
        assert "w.pt" in output and sentence in output and not (folder / "runs" / "tiny").exists()


STRANGE = ([1], torch.ones(3), {"state_dict": torch.ones(2)}, {"parts": {}}, {"differences": torch.ones(2)})


@pytest.mark.parametrize("file", ["classifier.pt", "purifier.resume.pt", "attacked/0-0000000.pt"])
def test_strange_files_in_a_runs_folder_are_refused_by_name(folder, tmp_path, monkeypatch, capsys, file):
    shutil.copy(folder / "tiny.npz", tmp_path)
    shutil.copytree(folder / "runs" / "whole", tmp_path / "runs" / "whole")
    (tmp_path / "runs" / "whole" / "carso.pt").unlink()
    path = tmp_path / "runs" / "whole" / file
    path.parent.mkdir(exist_ok=True)
    for content in STRANGE:
        torch.save(content, path)
        options = ["--dataset", "tiny.npz", "--name", "whole", *TINY]
        output = refusal(train, tmp_path, options, monkeypatch, capsys)
        assert f"runs/whole/{file}" in output.splitlines()[-1] and "Traceback" not in output


def test_memory_that_is_not_enough_gets_a_sentence(folder, tmp_path, monkeypatch, capsys):
    for hungry in (lambda: torch.empty(2**60), lambda: np.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            hungry()
        assert out_of_memory(caught.value)
        monkeypatch.setattr(train, "stage_one", lambda *_, hungry=hungry: hungry())
        shutil.copy(folder / "tiny.npz", tmp_path)
        output = refusal(train, tmp_path, ["--dataset", "tiny.npz", *TINY], monkeypatch, capsys)
        assert "the memory is not enough: add --micro-batch" in output
    assert not out_of_memory(RuntimeError("shape mismatch"))


def test_a_refusal_from_the_shell(tmp_path):
    output = run(tmp_path, "--eps", "8", code=2)
    assert "write 8/255" in output and "Traceback" not in output


def test_one_step_of_the_full_cifar10_preset():
    """WRN-28-10 and the purifier of 106 million parameters: attack, representation, forward, backward."""
    p = PRESETS["cifar10"]
    layers, sizes = representation_layers(p.depth), dict(condition_dim=p.condition_dim, latent_dim=p.latent_dim)
    carso = build_carso(WideResNet(10, p.depth, p.width), layers, (3, 32, 32), p.samples, **sizes)
    clean, y = torch.rand(2, 3, 32, 32), torch.tensor([3, 5])
    perturbed = adversarially_balanced_batch(carso.classifier, clean, y, p.eps, p.fraction, steps=1)
    with torch.no_grad():
        _, representation = record(carso.classifier, carso.layers, perturbed)
    carso.train()
    reconstruction, mu, logvar = carso.purifier(perturbed, representation)
    loss, bce, _ = vae_loss(reconstruction, clean, mu, logvar, beta=0.5)
    loss.backward()
    assert 0.3 < bce.item() / clean.numel() < 1.5  # an untrained reconstruction: about log 2 a value
    assert all(p.grad is not None and p.grad.isfinite().all() for p in carso.purifier.parameters())
    assert all(p.grad is None for p in carso.classifier.parameters())


def test_published_is_the_default_where_it_exists():
    for options, expected in (
        (["--dataset", "cifar10"], "published"),
        (["--dataset", "cifar10", "--width", "2"], "train"),
        (["--dataset", "digits"], "train"),
        (["--dataset", "mine.npz"], "train"),
    ):
        args = train.parse_arguments(options)
        train.prepare(args)
        assert args.classifier == expected


def test_mixed_precision_training_of_the_classifier(folder, monkeypatch, capsys):
    options = ["--dataset", "tiny.npz", "--name", "bf16", *TINY, "--bf16", "true", "--epochs", "1"]
    output = here(train, folder, options, monkeypatch, capsys)
    row = (folder / "runs" / "bf16" / "log-classifier.tsv").read_text().splitlines()[1].split("\t")
    full = (folder / "runs" / "whole" / "log-classifier.tsv").read_text().splitlines()[1].split("\t")
    assert row != full and float(row[1]) == pytest.approx(float(full[1]), rel=0.05), output


def test_a_run_of_another_length_keeps_the_schedules_proportions():
    p, _ = train.prepare(train.parse_arguments(["--preset", "cifar10", "--dataset", "mine.npz", "--epochs", "40"]))
    assert (p.warmup, p.plateau, p.kl_from, p.kl_to) == (5, 5, 5, 6)
    rates = [learning_rate(e, p) for e in range(40)]
    assert rates[0] == 5e-9 and rates[5] == rates[10] == 0.064 and rates[39] < 0.003
    p, _ = train.prepare(train.parse_arguments(["--dataset", "digits", "--epochs", "2", "--warmup", "0"]))
    assert p.warmup == 0 and p.plateau == 1
