"""Whatever people bring: hundreds of random corruptions of each kind of file, arrays and options, and what the scripts
say to a bad day. Nothing gets through but the right result or one clear sentence."""

import contextlib
import io
import json
import os
import random
import re
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import fresh_carso, picture
from PIL import Image
from safetensors.torch import save_file
from test_data import png, tiny_imagenet_zip
from test_train import here, refusal

import data
import evaluate
import train
from lab import bench, compare, plot, presets, report, torture
from lab.checkpoints import load_checkpoint, load_published_classifier, save_checkpoint
from lab.files import check_config
from lab.ranks import start_ranks
from lab.start import launched, start_device, start_output
from models import WideResNet


@contextlib.contextmanager
def at_most(seconds: float):
    """No hang."""

    def stop(*_):
        raise TimeoutError(f"this took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def corrupted(content: bytes, rng: random.Random) -> bytes:
    """Cut, a few bytes changed, a piece zeroed, doubled or taken out."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    how = rng.choice(["cut", "changed", "zeroed", "doubled", "taken out"])
    if how == "cut":
        return content[:a]
    if how == "changed":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 4, 50])):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(changed)
    middle = {"zeroed": bytes(b - a), "doubled": 2 * content[a:b], "taken out": b""}[how]
    return content[:a] + middle + content[b:]


def check(dataset: data.Dataset) -> None:
    """What every data set promises."""
    for images, labels in (
        (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
    ):  # fmt: skip
        assert images.dtype == torch.uint8 and images.shape[2:] in ((32, 32), (64, 64)) and images.shape[1] in (1, 3)
        assert labels.dtype == torch.int64 and len(labels) == len(images) > 0
        assert 0 <= labels.min() and labels.max() < len(dataset.classes)
    assert len(dataset.classes) > 1 and len(dataset.test_numbers) == len(dataset.test_labels)


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((255 * picture("fuzz", (24, 24, 3)).numpy()).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small file of every kind, and what reads it."""
    folder = tmp_path_factory.mktemp("input")
    pixels, labels = (255 * picture("npz", (4, 16, 16)).numpy()).astype(np.uint8), np.array([0, 1, 0, 1])
    np.savez(folder / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    classifier = WideResNet(10, 10, 1, in_channels=1)
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    torch.save({"state_dict": weights}, folder / "weights.pt")
    save_file(weights, folder / "weights.safetensors")
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    save_checkpoint(folder / "carso.pt", carso, dataset="digits", config={"eps": 0.2})
    (folder / "config.json").write_text(json.dumps({"eps": 0.2, "n": 3, "names": ["a"]}))
    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            (folder / "pictures" / split / name).mkdir(parents=True)
            (folder / "pictures" / split / name / "0.png").write_bytes(png())
    tiny_imagenet_zip(folder / "tiny.zip")
    return folder


READERS = {
    "a.npz": (100, lambda path: check(data.load(path))),
    "weights.pt": (30, lambda path: load_published_classifier(path, 10, 0.5, 0.5)),
    "weights.safetensors": (30, lambda path: load_published_classifier(path, 10, 0.5, 0.5)),
    "carso.pt": (30, load_checkpoint),
    "config.json": (60, lambda path: check_config(path, {"eps": 0.2}, "--name")),
    "tiny.zip": (30, lambda path: check(data.load(path, path.parent / "cache"))),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_right_or_named(small, tmp_path, name):
    times, read = READERS[name]
    rng, refused = random.Random(name), 0
    for _ in range(times):
        (tmp_path / name).write_bytes(corrupted((small / name).read_bytes(), rng))
        before = files(tmp_path)
        try:
            with at_most(20):
                read(tmp_path / name)
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error), error
            assert files(tmp_path) == before
    assert refused > times / 4


PICTURES = {
    "png": lambda: encoded("PNG"),
    "16-bit.png": png,
    "jpg": lambda: encoded("JPEG"),
    "gif": lambda: encoded("GIF"),
    "tiff": lambda: encoded("TIFF", compression="tiff_lzw"),
    "bmp": lambda: encoded("BMP"),
    "webp": lambda: encoded("WEBP"),
    "ppm": lambda: encoded("PPM"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_damaged_pictures_are_read_or_named(small, kind):
    rng, bad = random.Random(kind), small / "pictures" / "train" / "cats" / f"bad.{kind}"
    whole = PICTURES[kind]()
    try:
        for _ in range(30):
            bad.write_bytes(corrupted(whole, rng))
            try:
                with at_most(20):
                    check(data.load(small / "pictures"))
            except ValueError as error:
                assert bad.name in str(error)
    finally:
        bad.unlink()


def test_arrays_of_every_kind(tmp_path):
    """Every dtype, shape and emptiness for each of the four."""
    rng, taken = random.Random(0), 0
    dtypes = "? b B h H i I q Q e f d g F D S3 U2 M8[s] m8[s] O V4".split()
    shapes = [(), (0,), (4,), (4, 1), (1, 4), (4, 2), (0, 16, 16), (4, 16, 16), (4, 16, 16, 1), (4, 16, 16, 3)]
    shapes += [(4, 3, 16, 16), (4, 16, 16, 4), (4, 0, 0), (4, 4, 4), (4, 9, 40), (4, 16, 16, 3, 1), (16, 16)]
    plain = dict(train_images=(4, 16, 16), train_labels=(4,), test_images=(4, 16, 16), test_labels=(4,))
    for _ in range(400):
        arrays = {}
        for key, usual in plain.items():
            strange = rng.random() < 0.4
            dtype, shape = np.dtype(rng.choice(dtypes if strange else ["B"])), rng.choice(shapes) if strange else usual
            values = np.arange(np.prod(shape, dtype=int)).reshape(shape) % rng.choice([1, 2, 3])
            with np.errstate(all="ignore"):
                arrays[key] = values.astype("i8").astype(dtype) if dtype.kind != "V" else np.zeros(shape, dtype)
            if dtype.kind == "f" and arrays[key].size and rng.random() < 0.5:
                arrays[key].flat[0] = rng.choice([np.nan, np.inf, -1, 0.5])
        np.savez(tmp_path / "a.npz", **arrays)
        try:
            check(data.load(tmp_path / "a.npz"))
            taken += 1
        except ValueError as error:
            assert "a.npz" in str(error)
    assert 20 < taken < 380


def evaluated(folder) -> None:
    """What evaluate.py leaves of two pictures under one attack, and of a sweep."""
    said = {"checkpoint": "a", "dataset": "d", "n": 2, "eps": 0.2, "counted": ["clean", "apgd"], "config": {"steps": 3}}
    said |= {"robust": {"accuracy": 0.5, "least": 0.5}, "audit": {"passed": True}, "deterministic": False}
    (folder / "report.json").write_text(json.dumps(said))
    rows = ["picture\tlabel\tattack\tduring\tright\tdraws\tselect"]
    rows += [f"{i}\t{i}\t{name}\t1\t{3 * i}\t4\t0.5" for name in ("clean", "apgd", "worst") for i in range(2)]
    (folder / "rows.tsv").write_text("\n".join(rows) + "\n")
    (folder / "sweep-eps.tsv").write_text("eps\tclean\tnoise\tapgd-ce\tn\n0\t1\t1\t1\t2\n0.1\t1\t0.8\t0.5\t2\n")


def strange(content: str, rng: random.Random) -> bytes:
    """Bytes corrupted, or one value replaced by a nasty one, well-formed."""
    if rng.random() < 0.4:
        return corrupted(content.encode(), rng)
    if content[0] == "{":
        whole = json.loads(content)
        inside = rng.choice([whole, whole["robust"], whole["audit"]])
        inside[rng.choice(list(inside))] = rng.choice([*NASTY, None, -1, 0, 7, 1e300, float("nan"), [], {}, [[]], True])
        return json.dumps(whole).encode()
    lines = [line.split("\t") for line in content.splitlines()]
    column = rng.randrange(len(lines[0]))
    for line in rng.choice([lines[1:], lines[-1:], lines[:1]]):
        line[column] = rng.choice([*NASTY, "$\\frac{$", "-3", "7", '"'])
    return "\n".join("\t".join(line) for line in lines).encode()


@pytest.mark.parametrize("name", ["report.json", "rows.tsv", "sweep-eps.tsv"])
def test_damaged_evaluations_are_compared_and_drawn_or_named(tmp_path, monkeypatch, capsys, name):
    """What is taken has shares between 0 and 1."""
    rng, drawn, refused = random.Random(name), [], 0
    monkeypatch.setattr(plot, "save", lambda figure, path, **_: (drawn.append(path), plot.plt.close(figure)))
    monkeypatch.setattr(compare, "interval", lambda *_: [0.0, 0.0])
    evaluated(tmp_path)
    whole = (tmp_path / name).read_text()
    for _ in range(50):
        (tmp_path / name).write_bytes(content := strange(whole, rng))
        for script in (compare, plot) if name == "rows.tsv" else (compare,) if name == "report.json" else (plot,):
            monkeypatch.setattr(sys, "argv", [script.__name__, str(tmp_path)])
            with at_most(20):
                status, said = script.main(), capsys.readouterr()
            assert status in (0, 2), content
            if status:
                refused += 1
                assert str(tmp_path) in said.err and len(said.err.splitlines()) == 1, content
            elif script is compare:
                cells = said.out.splitlines()[-1].split("|")
                assert 0 <= float(cells[4]) <= 100 and 0 <= float(cells[5]) <= 100, content
    assert 12 < refused


NASTY = ["", " ", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e400", "1/0", "8/255", "1e-320", "eight", "None", "0x10"]
NASTY += ["9" * 30, "9" * 5000, "\0", "ünïcode", "../..", "-", "--", "true", "[]", "*"]


@pytest.mark.parametrize("script", [train, evaluate])
def test_nasty_options(small, tmp_path, monkeypatch, capsys, script):
    """Taken, or refused by a sentence, before anything is written."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(script.__name__)
    parser = script.parse_arguments([] if script is train else ["--ckpt", "a"])
    options = [name for name in vars(parser) if name not in ("ckpt", "published", "model", "device", "plan", "start")]
    (tmp_path / "carso.pt").write_bytes((small / "carso.pt").read_bytes())
    before = files(tmp_path)
    for _ in range(80):
        argv = [] if script is train else ["--ckpt", "carso.pt", "--plan", "--device", "cpu"]
        for name in rng.sample(options, 2):
            argv += ["--" + name.replace("_", "-"), rng.choice(NASTY)]
        try:
            with at_most(20):
                script.prepare(script.parse_arguments(argv))
        except (ValueError, OSError) as error:
            assert str(error), argv
        except SystemExit as stop:
            assert stop.code == 2, argv
        assert files(tmp_path) == before, argv
    capsys.readouterr()


@pytest.mark.parametrize("script", [compare, plot, bench, torture, presets])
def test_nasty_options_of_what_stands_beside(tmp_path, monkeypatch, capsys, script):
    """Options are those of --help; the work itself is left out."""
    for module, work in ((plot, "save"), (bench, "memory_plan"), (torture, "torture")):
        monkeypatch.setattr(module, work, lambda *_, **__: 0)
    monkeypatch.setattr(bench, "table", lambda *_: {"matrix_gflop_per_second": 1.0, "rows": []})
    monkeypatch.setattr(bench, "text", lambda _: "")
    options = re.findall(r"^  (--[\w-]+)", here(script, tmp_path, ["--help"], monkeypatch, capsys), re.M)
    evaluated(tmp_path)
    before, threads, rng = files(tmp_path), torch.get_num_threads(), random.Random(script.__name__)
    for _ in range(40):
        argv = [rng.choice([".", "nowhere", "rows.tsv", "", "A=.", "=", ","])] * (script in (compare, plot))
        for name in rng.sample(options, min(2, len(options))):
            argv += [name, rng.choice(NASTY)]
        monkeypatch.setattr(sys, "argv", [script.__name__, *argv])
        with at_most(20):
            try:
                status = script.main()
            except SystemExit as stop:
                status = stop.code
        said = capsys.readouterr()
        assert status in (0, 2) and (status == 0 or said.err.strip()), argv
        assert files(tmp_path) == before, argv
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------- a script's bad day


def test_a_terminal_that_is_none():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        start_output()
        print("as in a notebook")
    assert said.getvalue() == "as in a notebook\n"


def test_a_launcher_that_is_not_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    with monkeypatch.context() as patch:  # as a shell leaves what it cleared
        patch.setenv("RANK", "")
        patch.setenv("WORLD_SIZE", "")
        assert launched() == (0, 1) and start_ranks("cpu").count == 1
    for given in (
        {"RANK": "0"},
        {"WORLD_SIZE": "8"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2"},
    ):
        with monkeypatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match="unset RANK"):
                launched()
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    assert launched() == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="not below"):
        launched()


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta:-3", ""])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    if device:
        with pytest.raises(ValueError, match="cannot be used here"):
            start_device(device)
    start_device("cpu")
    start_device(None)
    assert torch.backends.cudnn.deterministic  # a resumed run on a GPU is exact


VGG = """
import torch

class VGG(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classifier = torch.nn.Linear(1024, 10)

    def forward(self, x):
        return self.classifier(x.flatten(1))

def wrong():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 9))
"""


EVALUATE = ["--pictures", "2", "--steps", "1", "--eot", "1", "--queries", "1", "--select", "1", "--draws", "1"]
EVALUATE += ["--device", "cpu", "--attack", "noise"]


@pytest.mark.parametrize("script", [train, evaluate])
def test_both_scripts_refuse_before_they_write(small, tmp_path, monkeypatch, capsys, script):
    options = ["--ckpt", str(small / "carso.pt"), "--out", "here"] if script is evaluate else ["--name", "here"]
    if not torch.cuda.is_available():
        text = refusal(script, tmp_path, [*options, "--device", "cuda"], monkeypatch, capsys)
        assert "--device cuda cannot be used here" in text
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "torchrun" in refusal(script, tmp_path, options, monkeypatch, capsys)
    monkeypatch.delenv("WORLD_SIZE")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "load", interrupted)
        assert "stopped" in here(script, tmp_path, options, monkeypatch, capsys, code=130)
    assert not files(tmp_path)


def test_a_full_disk_and_ctrl_c_while_evaluating(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "vgg.py").write_text(VGG)
    options = ["--model", "vgg.py:VGG", "--dataset", "digits", "--out", "here", *EVALUATE]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        text = refusal(evaluate, tmp_path, options, monkeypatch, capsys)
        assert "No space left on device" in text and "the same command goes on" in text and "Traceback" not in text

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "write", interrupted)
        assert "the same command goes on" in here(evaluate, tmp_path, options, monkeypatch, capsys, code=130)
    here(evaluate, tmp_path, options, monkeypatch, capsys)
    assert (tmp_path / "here" / "report.json").is_file() and not list(tmp_path.rglob("*.part"))


def test_a_checkpoint_that_says_nothing_of_its_data(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "carso.pt", fresh_carso(10, 2, condition_dim=8, latent_dim=4, decoder_width=8))
    text = refusal(evaluate, tmp_path, ["--ckpt", "carso.pt", *EVALUATE], monkeypatch, capsys)
    assert "add --dataset" in text
    options = ["--ckpt", "carso.pt", "--dataset", "digits", "--plan", *EVALUATE]
    e, names, _ = evaluate.prepare(evaluate.parse_arguments(options))
    assert e.eps == 8 / 255 and names == ["clean", "noise"]


STATES = [{"config": 3}, {"config": {"eps": "x"}}, {"classes": 3}, {"data_dir": 3}, {"dataset": 3}]


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_that_says_something_strange_of_its_training(small, tmp_path, monkeypatch, capsys, state):
    carso, _ = load_checkpoint(small / "carso.pt")
    save_checkpoint(tmp_path / "carso.pt", carso, **({"dataset": "digits"} | state))
    text = refusal(evaluate, tmp_path, ["--ckpt", "carso.pt", *EVALUATE], monkeypatch, capsys)
    assert ("carso.pt" in text or "--eps x" in text) and len(text.splitlines()) == 1


def test_a_defence_that_does_not_look_at_the_picture_can_be_attacked(small, tmp_path, monkeypatch, capsys):
    """--control zero-condition without the classifier's own answer: all gradients are zero, as the audit says."""
    options = ["--ckpt", str(small / "carso.pt"), "--control", "zero-condition", "--out", "here", *EVALUATE, "rand"]
    text = here(evaluate, tmp_path, options, monkeypatch, capsys, code=3)
    assert "of the gradients are exactly zero" in text


def test_a_damaged_unit_of_an_evaluation_is_named(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "vgg.py").write_text(VGG)
    options = ["--model", "vgg.py:VGG", "--dataset", "digits", "--out", "here", *EVALUATE]
    here(evaluate, tmp_path, options, monkeypatch, capsys)
    for content in (b"", b"junk", (small / "a.npz").read_bytes()):
        (tmp_path / "here" / "work" / "noise-000000.npz").write_bytes(content)
        text = refusal(evaluate, tmp_path, options, monkeypatch, capsys)
        assert "noise-000000.npz is damaged" in text and "Traceback" not in text


def test_a_model_with_a_classifier_of_its_own_is_no_defence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "vgg.py").write_text(VGG)
    options = ["--dataset", "digits", "--out", "here", *EVALUATE, "apgd", "transfer", "--targets", "1"]
    text = here(evaluate, tmp_path, ["--model", "vgg.py:VGG", *options], monkeypatch, capsys)
    assert "Skipped: transfer (the model has no classifier)" in text
    options[3] = "there"
    text = refusal(evaluate, tmp_path, ["--model", "vgg.py:wrong", *options], monkeypatch, capsys)
    assert "float32 (2, 9) for pictures (2, 1, 32, 32) of 10 classes" in text and not (tmp_path / "there").exists()


# ------------------------------------------------------------------------------------------- killed at any moment

STEPS = """
import json, os, pathlib, time
path = pathlib.Path("state.json")
state = json.loads(path.read_text()) if path.is_file() else []
while len(state) < 40:
    time.sleep(0.005)
    state.append(len(state) ** 2)
    pathlib.Path("new.json").write_text(json.dumps(state))
    os.replace("new.json", path)
"""


@pytest.mark.parametrize("sound", [True, False])
def test_torture_tells_a_sound_script_from_one_that_is_not(tmp_path, sound):
    (tmp_path / "steps.py").write_text(
        STEPS if sound else STEPS.replace("state.append(", "state.append(os.getpid() + ")
    )
    command = [sys.executable, str(tmp_path / "steps.py")]
    kills, survived = torture.survive(command, tmp_path, lambda folder: files(folder).popitem()[1], 4, random.Random(0))
    assert survived == sound and (kills >= 4 or not sound)  # by its process number it differs even without a kill
    assert sorted(os.listdir(tmp_path)) == ["steps.py"]
