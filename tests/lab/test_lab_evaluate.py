"""lab/evaluate.py and lab/attacks.py: more rows for evaluate.py, and the right number for models of others."""

import contextlib
import copy
import io
import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import exit_status, fresh_carso
from torch.testing import assert_close

import evaluate
import lab.evaluate
from attacks import LOSSES, project
from data import load
from evaluate import AGGREGATIONS, VIEWS, Seen, reseed
from lab.attacks import CONTROLS, GROUPS, ROWS, VIEW_OF_DECISION, apgd, cut_condition, fix_codes
from lab.evaluate import find_masking, find_signs
from purifier import save_carso

SMALL = dict(
    pictures=6, steps=2, eot=2, pgd_steps=2, pgd_step_size=0.05, queries=3, targets=2, select=5, draws=5, chunk=6
)
OPTIONS = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]

# A linear classifier of the digits, a least-squares fit: right on most pictures, at once, without any training.
THEIR_FILE = """
import random
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchless import SCALE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.load("fit.npy")).float())
        self.norm = nn.BatchNorm1d(10, affine=False, track_running_stats=False)
        self.drop = nn.Dropout(0.3)
        {init}

    def answer(self, x):
        return SCALE * F.linear(x.flatten(1), self.weight[:, :-1], self.weight[:, -1])

    def forward(self, x):
        {forward}

def build():
    torch.manual_seed(0)
    return Net()

instance = build()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, digits = tmp_path_factory.mktemp("others"), load("digits")
    x = np.c_[digits.train_images.flatten(1).numpy() / 255, np.ones(len(digits.train_labels))]
    fit = np.linalg.lstsq(x, np.eye(10)[digits.train_labels.numpy()] - 0.1, rcond=None)[0]
    np.save(folder / "fit.npy", fit.T)
    (folder / "torchless.py").write_text("SCALE = 10.0\n")
    (folder / "plain.py").write_text(THEIR_FILE.format(forward=PLAIN, init="pass"))
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    state = {"dataset": "digits", "data_dir": "data", "config": {"eps": 0.05}, "classes": list("0123456789")}
    save_carso(folder / "carso.pt", carso, **state)
    return folder


def call(folder, *options, main=lab.evaluate.main) -> tuple[int, str]:
    """The script in this process: its exit status and what it said."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = exit_status("lab.evaluate", lambda: main([*OPTIONS, *map(str, options)]))
    return status, said.getvalue()


def read_report(folder, name: str) -> dict:
    return json.loads((folder / name / "report.json").read_text())


@pytest.fixture
def attack(folder):
    """Their model, written and attacked: exit status, report.json, what was said."""

    def attack(name, forward, *options, head="", init="pass", what="build", attacks=("pgd-eot",)):
        (folder / f"{name}.py").write_text(head + THEIR_FILE.format(forward=forward, init=init))
        model = ["--model", f"{name}.py:{what}", "--dataset", "digits", "--eps", "0.1", "--out", name]
        status, said = call(folder, *model, "--attack", *attacks, *options)
        report = read_report(folder, name) if (folder / name / "report.json").is_file() else None
        return status, report, said

    return attack


PLAIN = "return self.answer(x)"

# ------------------------------------------------------------------------------------------------- models of others


def test_an_honest_model_is_attacked_whole(attack):
    status, report, said = attack("whole", PLAIN, attacks=["all"])
    assert status == 0 and report["audit"] == {"passed": True, "messages": []}, said
    assert report["clean"]["accuracy"] > 0.8 and report["robust"]["accuracy"] < report["clean"]["accuracy"]
    assert "transfer" not in report["attacks"] and "fixed-noise" not in report["attacks"]  # it has no parts
    assert [*report["attacks"]][-2:] == ["square", "standard"]  # which has a black box inside
    assert report["attacks"]["pgd-eot"]["eot"] == 2 and "eps 0.1" in said
    status, report, _ = attack("whole", PLAIN, "--deterministic", "--out", "once", what="instance")
    assert status == 0


SEEDED_NOISE = """
        self.rng = np.random.default_rng()
        Net.manual_seed = lambda self, seed: setattr(self, "rng", np.random.default_rng(seed))
"""
HONEST = {  # forward, and what else is special
    # Random resizing and padding (Xie et al. 2018): under seed 0 the first two draws are alike.
    "draws that are sometimes alike": (
        "k = 30 + 2 * int(torch.rand(()) > 0.4); "
        "return self.answer(F.pad(F.interpolate(x, (k, k), mode='bilinear'), [0, 32 - k] * 2))",
        {},
    ),
    "random numbers of its own": (
        "return self.answer(x + 0.1 * torch.from_numpy(self.rng.normal(size=x.shape)).to(x))",
        {"init": SEEDED_NOISE},
    ),
    "a sparse part": (
        "return self.answer(x) @ self.eye.to_dense()",
        {"init": 'self.register_buffer("eye", torch.eye(10).to_sparse())'},
    ),
    "another folder and default type": (
        PLAIN,
        {
            "head": "import torch\ntorch.set_default_dtype(torch.float64)\n",
            "init": "self.double(); import os, tempfile; os.chdir(tempfile.mkdtemp())",
            "what": "instance",
        },
    ),
}


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_model_with_something_special_passes(attack, kind):
    forward, more = HONEST[kind]
    status, report, said = attack(kind.replace(" ", "_"), forward, **more)
    assert status == 0 and report["clean"]["accuracy"] > 0.8, said
    assert torch.get_default_dtype() == torch.float32


NO_GRADIENT = """
import torch
class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None
"""
FROZEN = {"init": "self.requires_grad_(False)"}
QUANTISED = "self.q = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(1024, 10)), {nn.Linear})"
WITHOUT_GRADIENTS = {  # forward, what else is special, and what the audit says
    "numpy inside": ("return torch.from_numpy(self.answer(x).detach().numpy())", FROZEN, "exactly zero"),
    "numpy, which refuses a graph": ("return torch.from_numpy(self.answer(x).numpy())", FROZEN, "exactly zero"),
    "an assertion against gradients": ("assert not x.requires_grad; return self.answer(x)", {}, "exactly zero"),
    "a gradient of None": ("return self.answer(NoGradient.apply(x))", {"head": NO_GRADIENT}, "exactly zero"),
    "quantised weights": ("return self.q(x.flatten(1))", {"init": QUANTISED}, "do not explain"),
}


@pytest.mark.parametrize("kind", WITHOUT_GRADIENTS)
def test_a_model_without_gradients_is_judged_and_not_refused(attack, kind):
    forward, more, sentence = WITHOUT_GRADIENTS[kind]
    status, report, said = attack(kind.replace(" ", "_"), forward, **more)
    assert status == 3 and report["robust"] and sentence in said and "upper bounds" in said, said


def test_an_answer_that_depends_on_the_batch_is_named(attack):
    forward = "return self.norm(self.answer(x)) if len(x) > 1 else self.answer(x)"
    status, report, _ = attack("batch", forward, attacks=["clean"])
    assert status == 3 and any("depends on the others in the batch" in text for text in report["audit"]["messages"])


UNSEEDED = "return self.answer(x + 0.1 * torch.from_numpy(self.rng.normal(size=x.shape)).to(x))"
GRADIENT_INSIDE = "torch.autograd.grad(self.answer(x).sum(), self.weight); return self.answer(x)"
NOT_DETERMINISTIC = "return self.answer(x) + torch.randn(len(x), 10)"
REFUSED = {  # forward, init, options, sentence
    "classes": ("return self.answer(x).argmax(1)", "pass", [], "returns (8,) for (8, 1, 32, 32)"),
    "votes": ("return F.one_hot(self.answer(x).argmax(1), 10)", "pass", [], "returns torch.int64: votes or classes"),
    "a pair": ("return (self.answer(x), x)", "pass", [], "returns tuple"),
    "no batch of one": ("return self.answer(x).squeeze()", "pass", [], "returns (10,) for a single picture"),
    "gradients in forward": (GRADIENT_INSIDE, "pass", [], "have it enable them, by torch.enable_grad()"),
    "a false claim": (NOT_DETERMINISTIC, "pass", ["--deterministic"], "it is not deterministic"),
    # No gradient of such a model can be checked: honest ones were accused, and masked ones passed.
    "no seed": (UNSEEDED, "self.rng = np.random.default_rng()", [], "give it a method manual_seed(seed)"),
    "a small quota": (
        "self.calls += 1; return self.answer(x) * (self.calls < 9)",
        "self.calls = 0",
        [],
        "answers otherwise under the same seed",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_evaluated_gets_a_sentence(folder, attack, kind):
    forward, init, options, sentence = REFUSED[kind]
    status, _, said = attack(kind.replace(" ", "_"), forward, *options, init=init)
    assert status == 2 and sentence in said and said.count("\n") == 1, said
    assert not (folder / kind.replace(" ", "_")).exists()


def test_numbers_of_a_model_that_was_edited_are_not_taken_for_the_new_ones(folder, attack):
    assert attack("edited", PLAIN)[0] == 0
    assert attack("edited", PLAIN)[0] == 0  # the same again: nothing changed
    (folder / "torchless.py").write_text("SCALE = -10.0\n")  # a module that it imports
    status, _, said = attack("edited", PLAIN)
    (folder / "torchless.py").write_text("SCALE = 10.0\n")
    assert status == 2 and "answers otherwise" in said


@pytest.mark.parametrize(
    "kind, before, after",
    [
        # After a failed audit one mends the gradients: the answers stay what they were.
        (
            "gradients",
            "return self.answer((8 * x).round() / 8)",
            "return self.answer(x + ((8 * x).round() / 8 - x).detach())",
        ),
        (
            "noise alone",
            PLAIN,
            "grey = ((x > 0.02) & (x < 0.06)).float().mean((1, 2, 3))[:, None]; "
            "return torch.where(grey > 0.01, -self.answer(x), self.answer(x))",
        ),
    ],
)
def test_a_model_that_differs_in_little_is_another_one(attack, kind, before, after):
    name = f"differs-in-{kind.replace(' ', '-')}"
    assert attack(name, before)[0] in (0, 3)
    status, _, said = attack(name, after)
    assert status == 2 and "answers otherwise" in said


def test_a_seed_inside_forward_does_not_reach_the_attack():
    """Square and the random starts would else try the same direction again and again."""

    class Seeding(torch.nn.Module):
        def forward(self, x):
            set_seeds(0)
            return x.flatten(1)

    def set_seeds(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    model, drawn = lab.evaluate.Foreign(Seeding()), []
    for is_asked in (False, True):
        set_seeds(1)
        if is_asked:
            model(torch.rand(1, 1, 2, 2, generator=torch.Generator()))
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_a_model_that_normalises_in_place_leaves_the_pictures_as_they_are(attack):
    _, plain, _ = attack("out-of-place", PLAIN)
    _, report, said = attack("in-place", "return self.answer(x.sub_(0.3).div_(0.4).mul(0.4).add(0.3))")
    assert report and report["clean"] == plain["clean"] and report["robust"] == plain["robust"], said


RANDOM = {  # a forward pass and the clean accuracy that its expectation has, relative to that of the plain model
    "a coin a picture": ("return self.answer(x) * (2.0 * (torch.rand(len(x), 1) > 0.1) - 1)", 0.9),
    "one pass in ten": ("return self.answer(x) * (1.0 if torch.rand(()) > 0.1 else -1.0)", 0.9),
    "of numpy": ("return self.answer(x) * (1.0 if np.random.rand() > 0.2 else -1.0)", 0.8),
    "of Python": ("return self.answer(x) * (1.0 if random.random() > 0.2 else -1.0)", 0.8),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_defence_is_taken_for_one_and_each_draw_is_a_pass(attack, kind):
    forward, share = RANDOM[kind]
    options = ["--draws", "100", "--pictures", "20", "--chunk", "20"]
    _, report, _ = attack(kind.replace(" ", "_"), forward, *options, attacks=["clean"])
    _, plain, _ = attack("certain", PLAIN, *options, attacks=["clean"])
    assert report["clean"]["accuracy"] == pytest.approx(share * plain["clean"]["accuracy"], abs=0.1)


def test_a_model_is_left_in_the_mode_in_which_it_was_built(attack):
    forward = "return self.answer(self.drop(x))"
    _, report, said = attack("dropout", forward, "--draws", "40", attacks=["clean"])
    _, still, _ = attack("still", forward, init="self.eval()", attacks=["clean"])
    _, _, said_of_plain = attack("modeless", PLAIN, attacks=["clean"])  # its modules say training: it does not matter
    assert "in training mode, as it was built" in said and "in training mode" not in said_of_plain
    assert report["clean"]["worst_draw"] < report["clean"]["accuracy"]  # dropout was on
    assert still["clean"]["worst_draw"] == still["clean"]["accuracy"]


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "MemoryError"])
def test_memory_that_is_not_enough_is_no_property_of_the_model(attack, error):
    """Only where a gradient is asked for is there too little."""
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        attack(f"memory-{error[:5]}", f"if x.requires_grad: raise {error}('full')\n        {PLAIN}")


def test_a_background_of_exactly_0_keeps_its_meaning(attack):
    """Scores are of the pictures themselves; a hair inside only where a gradient is taken."""
    forward = "return self.answer(x) * (2.0 * (x == 0).any(1).any(1).any(1, keepdim=True) - 1)"
    _, report, _ = attack("background", forward, attacks=["clean"])
    _, plain, _ = attack("no-background", PLAIN, attacks=["clean"])
    assert report["clean"] == plain["clean"]
    assert any("moves by a millionth" in note for note in report["notes"])


def test_a_background_that_speaks_against_one_class_alone_is_named(attack):
    """The largest logit need not be the one that changes."""
    other = "torch.arange(10) == 0"
    forward = f"z = self.answer(x); return torch.where({other}, -50.0 - 50.0 * (x == 0).any(), z)"
    _, report, _ = attack("one-class", forward, attacks=["clean"])
    assert any("moves by a millionth" in note for note in report["notes"])


def test_one_models_work_is_not_shown_under_anothers_name(folder):
    """In the default folder, which is named after the settings."""
    negated = "\nclass Negated(Net):\n    def answer(self, x):\n        return -super().answer(x)\n"
    (folder / "two.py").write_text(THEIR_FILE.format(forward=PLAIN, init="pass") + negated + "negated = Negated()\n")
    common = ["--dataset", "digits", "--eps", "0.1", "--attack", "clean"]
    for name, is_right in (("build", True), ("negated", False), ("build", True)):
        status, said = call(folder, "--model", f"two.py:{name}", *common)
        report = read_report(folder, re.search("written to (.*)", said).group(1))
        assert report["checkpoint"] == f"two.py:{name}" and (report["clean"]["accuracy"] > 0.5) == is_right


def test_own_pictures_keep_their_size_for_an_own_model(folder, attack):
    digits = load("digits")
    large = digits.test_images[:20].repeat_interleave(3, 2).repeat_interleave(3, 3)[:, 0].numpy()
    labels = {"train_labels": np.arange(20) % 10, "test_labels": digits.test_labels[:20].numpy()}
    np.savez(folder / "large.npz", train_images=large, test_images=large, **labels)
    forward = "assert x.shape[2:] == (96, 96); return self.answer(x[:, :, 1::3, 1::3])"
    status, report, said = attack("large", forward, "--dataset", "large.npz", attacks=["clean"])
    assert report["clean"]["accuracy"] > 0.8, said


@pytest.mark.parametrize(
    "file, statement, sentence",
    [
        ("data.py", "from data import OWN", ""),
        ("models/own.py", "from models.own import OWN", ""),
        ("../data.py", "from data import OWN", ""),
        ("../models/__init__.py", "from models import OWN", ""),
        ("layers.py", "from .layers import OWN", "write `from layers import`"),
    ],
)
def test_modules_beside_their_file_or_its_folder_come_before_ours(tmp_path, monkeypatch, file, statement, sentence):
    place = tmp_path / "project" / "code"
    place.mkdir(parents=True)
    (place / file).parent.mkdir(exist_ok=True)
    (place / file).write_text("OWN = 1\n")
    (place / "mine.py").write_text(f"{statement}\nimport torch\nnet = torch.nn.Linear(1, 1)\nnet.own = OWN\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    ours = {name: sys.modules[name] for name in ("models", "data", "evaluate")}
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            lab.evaluate.load_foreign(f"{place}/mine.py:net")
    else:
        assert lab.evaluate.load_foreign(f"{place}/mine.py:net").model.own == 1
    assert all(sys.modules[name] is module for name, module in ours.items())


@pytest.mark.parametrize(
    "what",
    [
        "torch.jit.freeze(torch.jit.trace(plain, torch.rand(2, 1, 32, 32)))",
        pytest.param("torch.compile(plain)", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_attacked(folder, what):
    plain = "import numpy as np, torch\nfit = torch.from_numpy(np.load('fit.npy')).float()\n"
    plain += "plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)).eval()\n"
    plain += "plain[1].weight.data, plain[1].bias.data = 10 * fit[:, :-1], 10 * fit[:, -1]\n"
    (folder / "frozen.py").write_text(plain + f"net = {what}\n")
    options = ["--dataset", "digits", "--eps", "0.1", "--attack", "pgd-eot"]
    status, said = call(folder, "--model", "frozen.py:net", *options)
    assert status == 0, said


def test_a_clamp_inside_does_not_make_pixels_stick(attack):
    """torch's clamp has gradient 0 at exactly 0 and 1: an attack would leave a third of the pixels as they are."""
    options = ("--pgd-steps", "10", "--draws", "1")
    _, clamped, _ = attack("clamped", "return self.answer(x.clamp(0, 1))", *options)
    _, plain, _ = attack("unclamped", PLAIN, *options)
    assert clamped["robust"]["accuracy"] <= plain["robust"]["accuracy"] + 0.01


PLAIN_MODEL = ["--model", "plain.py:build", "--dataset", "digits", "--eps", "0.1"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ([*PLAIN_MODEL, "--model", "none.py:build"], "--model none.py:build is not FILE.py:NAME, or there is no such"),
        ([*PLAIN_MODEL, "--model", "plain.py:SCALE"], "SCALE is no nn.Module, nor a function that returns one"),
        (["--model", "plain.py:build", "--dataset", "digits"], "--model goes with --dataset and --eps"),
        ([*PLAIN_MODEL, "--attack", "transfer"], "--attack transfer is for a CARSO, and this model is none"),
        ([*PLAIN_MODEL, "--control", "fixed-z"], "--control and --final are for a CARSO of --ckpt"),
        (["--ckpt", "carso.pt", "--attack", "magic"], "argument --attack: invalid choice: 'magic'"),
        (["--ckpt", "carso.pt", "--sweep", "eps", "--attack", "rand", "pgd-eot"], "--sweep eps repeats one attack"),
        (["--ckpt", "carso.pt", "--sweep", "eps", "--attack", "standard"], "attacks nothing: the model is a defence"),
        (["--ckpt", "carso.pt", "--sweep", "eps", "--attack", "noise"], "attacks nothing: the model is a defence"),
        ([*PLAIN_MODEL, "--sweep", "samples"], "--sweep samples is for a CARSO"),
    ],
)
def test_wrong_input_gets_a_sentence(folder, options, sentence):
    status, said = call(folder, *options)
    assert status == 2 and sentence in said, said


# -------------------------------------------------------------------------------------------- attacks and controls


def test_the_same_attack_through_either_door_gives_the_same_rows(folder):
    options = ["--ckpt", "carso.pt", "--attack", "pgd-eot", "--pictures", "3", "--out"]
    assert call(folder, *options, "here", main=evaluate.main)[0] == 0
    assert call(folder, *options, "there")[0] == 0
    assert (folder / "here" / "rows.tsv").read_bytes() == (folder / "there" / "rows.tsv").read_bytes()


def test_the_union_has_a_row_for_each_attack(folder):
    assert call(folder, "--ckpt", "carso.pt", "--attack", "all", "--out", "union", "--no-cascade")[0] in (0, 3)
    report = read_report(folder, "union")
    assert list(report["attacks"]) == ["standard", *GROUPS["all"][:-1]]  # of the classifier, then of the defence
    least = min(part["accuracy"] for part in report["attacks"].values() if part["target"] == "defence")
    assert report["robust"]["least"] <= least + 0.2


@pytest.mark.parametrize("name", ROWS)
def test_every_attack_stays_in_the_ball_and_follows_its_seed(tiny_carso, name):
    x, y = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    found = []
    for _ in range(2):
        reseed(1, tiny_carso)
        candidates = ROWS[name].run(Seen(tiny_carso, samples=3), x, y, SMALL | {"eps": 0.1})
        assert candidates.shape[1:] == x.shape and (candidates - x).abs().max() <= 0.1 + 1e-6
        assert candidates.min() >= 0 and candidates.max() <= 1
        assert name == "square" or not torch.equal(candidates[0], x)  # three queries may find nothing
        found.append(candidates)
    assert torch.equal(*found) and all(p.grad is None for p in tiny_carso.parameters())


def test_a_targeted_attack_raises_the_class_that_it_wants(tiny_carso):
    classifier, x = tiny_carso.classifier, torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = classifier(x)
    y = before.argmax(1)
    found = ROWS["apgd-t"].run(Seen(classifier), x, y, SMALL | {"steps": 20, "eps": 0.05})
    order = before.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    rows = torch.arange(4)
    for candidate, wanted in zip(found, order.T):
        after = classifier(candidate)
        assert (after[rows, wanted] - after[rows, y] > before[rows, wanted] - before[rows, y]).all()


def test_apgd_finds_the_planted_adversarial_example():
    """A binarisation test (Zimmermann et al. 2022): a random network's readout is trained so that its surroundings are
    one class, but for a planted point. An attack that fails here finds nothing anywhere."""
    torch.manual_seed(0)
    x, eps = torch.full((1, 1, 8, 8), 0.5), 0.1
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 200), torch.nn.Tanh()).double()
    inner = project(x + 0.5 * eps * torch.empty(300, 1, 8, 8).uniform_(-1, 1), x, eps)
    planted = x + eps * torch.empty_like(x).uniform_(-1, 1).sign()
    with torch.no_grad():
        points = features(torch.cat([x, inner, planted]).double())
        sides = torch.cat([-torch.ones(301), torch.ones(1)]).double()
        weights = torch.linalg.lstsq(points, 3 * sides[:, None], driver="gelsd").solution[:, 0]

    def losses_and_gradient(pictures):
        lead = pictures.double().requires_grad_()
        values = features(lead) @ weights
        (gradient,) = torch.autograd.grad(values.sum(), lead)
        return values.detach().float(), gradient.float()

    assert losses_and_gradient(x)[0].item() < 0 and (losses_and_gradient(inner)[0] < 0).all()
    best, loss = apgd(losses_and_gradient, x, eps, 50, x)
    assert loss.item() > 0 and (best - x).abs().max() <= eps + 1e-6


def test_apgd_returns_the_largest_loss_that_it_saw(tiny_carso):
    x, y, seen = torch.rand(2, 1, 32, 32), torch.tensor([0, 1]), []

    def objective(pictures):
        with torch.enable_grad():
            lead = pictures.detach().requires_grad_()
            losses = LOSSES["ce"](tiny_carso.classifier(lead), y)
            gradient = torch.autograd.grad(losses.sum(), lead)[0]
        seen.append(losses.detach())
        return losses.detach(), gradient

    best, loss = apgd(objective, x, 0.1, 20, x)
    assert_close(loss, torch.stack(seen).amax(0))
    assert_close(objective(best)[0], loss)


def test_attacks_that_beat_gradients_are_a_sign_of_masking():
    everywhere = np.ones(50, dtype=bool)

    def find(attacked=everywhere, **shares):
        table = {}
        for name, share in shares.items():
            right = np.arange(10)[None] < np.round(10 * np.array(share))[:, None]
            table[name] = {"right": right, "select": np.array(share), "attacked": everywhere}
        table["noise"]["attacked"] = attacked
        table["pgd-eot"] = table.pop("gradients")
        return find_masking(SimpleNamespace(attacks=table), table)

    stand, ten_fall, one_falls = [1.0] * 50, [0.0] * 10 + [1.0] * 40, [0.0] + [1.0] * 49
    assert "noise takes 20.0 points more" in find(gradients=stand, noise=ten_fall)[0]
    assert not find(gradients=ten_fall, noise=stand)  # the gradients are stronger
    assert not find(gradients=stand, noise=one_falls)  # one picture in fifty is chance
    earlier = np.arange(50) >= 10  # the gradients took ten, most of their draws, before the other's turn
    assert not find(gradients=[0.2] * 10 + [1.0] * 40, noise=ten_fall, attacked=earlier)
    # AutoAttack's standard has a black box: it does not speak for the attacks that follow gradients.
    assert find(gradients=stand, noise=ten_fall, standard=ten_fall)


def test_a_decision_without_gradients_is_attacked_through_another_output(folder):
    options = ["--aggregation", "majority", "--attack", "pgd-eot", "--pictures", "3", "--out", "majority"]
    assert call(folder, "--ckpt", "carso.pt", *options)[0] == 0
    report = read_report(folder, "majority")
    assert report["config"]["view"] == "mean-probability"
    assert report["attacks"]["pgd-eot"]["zero_gradients"] < 0.5


def test_views_decide_alike():
    logits = torch.randn(200, 8, 10, generator=torch.Generator().manual_seed(0))
    decision = AGGREGATIONS["robust"](logits).argmax(1)
    assert torch.equal(VIEWS["logsumexp"](logits).argmax(1), decision)
    assert torch.equal(VIEWS["sum-exp"](logits).argmax(1), decision)
    assert VIEWS["sum-exp"](1e4 * logits).isfinite().all()
    alike = logits + 20 * F.one_hot(torch.arange(200) % 10, 10)[:, None]
    for name, view in VIEW_OF_DECISION.items():  # the output agrees with the decision where all members agree
        assert torch.equal(VIEWS[view](alike).argmax(1), AGGREGATIONS[name](alike).argmax(1))


def test_controls_cut_what_they_name(tiny_carso):
    x = torch.rand(3, *tiny_carso.purifier.config["image_shape"])
    assert CONTROLS["classifier"](tiny_carso) is tiny_carso.classifier
    fixed = fix_codes(copy.deepcopy(tiny_carso))
    assert torch.equal(fixed(x), fixed(x)) and not torch.equal(tiny_carso(x), tiny_carso(x))
    many = fixed.draw(x, 2 * fixed.samples)
    assert torch.equal(many[:, : fixed.samples], fixed.draw(x, fixed.samples))
    assert len(many[0].unique(dim=0)) == 2 * fixed.samples  # also for an S larger than the checkpoint's
    blind = cut_condition(copy.deepcopy(fixed))
    assert torch.equal(blind(x), blind(1 - x)) and not torch.equal(fixed(x), fixed(1 - x))


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_is_evaluated(folder, control):
    options = ["--control", control, "--attack", "clean", "--eps", "0.001", "--pictures", "2", "--out", control]
    assert call(folder, "--ckpt", "carso.pt", *options)[0] in (0, 3)
    config = read_report(folder, control)["config"]
    assert config["control"] == control
    assert (config["draws"] == 1) == (control in ("classifier", "final", "fixed-z"))  # they are asked once


# ------------------------------------------------------------------------------------------------------------ sweeps


def test_signs_of_masking_in_a_sweep_are_seen():
    noise = [0.9, 0.9, 0.9, 0.8]
    assert find_signs("eps", [0, 1, 2, 3], [0.9, 0.5, 0.2, 0.0], noise) == []
    assert "accuracy rises" in find_signs("eps", [0, 1, 2, 3], [0.9, 0.5, 0.7, 0.0], noise)[0]
    masked = find_signs("eps", [0, 1, 2, 0.5], [0.9, 0.9, 0.9, 0.88], noise)
    assert len(masked) == 2 and "does not go to zero" in masked[0] and "noise beats" in masked[1]
    assert find_signs("steps", [1, 10], [0.2, 0.5], [1, 1]) == ["one step beats many"]


def test_a_sweep_has_a_row_a_value_and_a_plot(folder, monkeypatch):
    monkeypatch.setitem(lab.evaluate.SWEEPS, "eps", [0.0, 0.1, 0.5])
    status, said = call(folder, *PLAIN_MODEL, "--out", "swept", "--sweep", "eps")
    assert status in (0, 3) and f"the curve is {folder}/swept/sweep-eps.png" in said
    lines = [line.split("\t") for line in (folder / "swept" / "sweep-eps.tsv").read_text().splitlines()]
    assert lines[0] == ["eps", "clean", "noise", "apgd-ce", "n"] and len(lines) == 4
    assert lines[1][1] == lines[1][2] == lines[1][3]  # at eps 0 nothing differs from clean
    assert (folder / "swept" / "sweep-eps.png").stat().st_size > 1000


def test_a_sweep_of_a_carso_repeats_the_attack_that_was_asked_for(folder, monkeypatch):
    monkeypatch.setitem(lab.evaluate.SWEEPS, "steps", [1])
    options = ["--attack", "rand", "--pictures", "3", "--out", "rand", "--sweep", "steps"]
    assert call(folder, "--ckpt", "carso.pt", *options)[0] in (0, 3)
    assert (folder / "rand" / "sweep-steps.tsv").read_text().startswith("steps\tclean\tnoise\trand\tn\n")
