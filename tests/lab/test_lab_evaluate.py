"""lab/evaluate.py and lab/attacks.py: more rows for evaluate.py, and the right number for models of others."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import exit_status, fresh_carso
from torch.testing import assert_close

import evaluate
import lab.evaluate
from attacks import LOSSES, project
from data import load
from evaluate import Seen, reseed
from lab.attacks import ALL, CONTROLS, GROUPS, apgd, cut_condition, fix_codes
from lab.evaluate import find_signs
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
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    state = {"dataset": "digits", "data_dir": "data", "config": {"eps": 0.2}, "classes": list("0123456789")}
    save_carso(folder / "carso.pt", carso, **state)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    def call(*options, main=lab.evaluate.main):
        monkeypatch.chdir(folder)
        status = exit_status("lab.evaluate", lambda: main([*OPTIONS, *map(str, options)]))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.fixture
def attack(folder, call):
    """Their model, written and attacked: exit status, report.json, what was said."""

    def attack(name, forward, *options, head="", init="pass", what="build", attacks=("pgd-eot",)):
        (folder / f"{name}.py").write_text(head + THEIR_FILE.format(forward=forward, init=init))
        common = ["--model", f"{name}.py:{what}", "--dataset", "digits", "--eps", "0.1", "--out", name]
        status, said = call(*common, "--attack", *attacks, *options)
        path = folder / name / "report.json"
        return status, json.loads(path.read_text()) if path.is_file() else None, said

    return attack


PLAIN = "return self.answer(x)"
SEEDED = f"torch.manual_seed(0); np.random.seed(0); random.seed(0); {PLAIN}"

# ------------------------------------------------------------------------------------------------- models of others


def test_an_honest_model_is_attacked_whole(attack):
    status, report, said = attack("plain", PLAIN, attacks=["all"])
    assert status == 0 and report["audit"] == {"passed": True, "messages": [], "notes": []}, said
    assert report["clean"]["accuracy"] > 0.8 and report["robust"]["accuracy"] < report["clean"]["accuracy"]
    assert "transfer" not in report["attacks"] and "fixed-noise" not in report["attacks"]  # it has no parts
    assert not report["deterministic"] and report["attacks"]["pgd-eot"]["eot"] == 2 and "eps 0.1" in said
    status, report, _ = attack("plain", PLAIN, "--deterministic", "--out", "plain once", what="instance")
    assert status == 0


def test_numbers_of_a_model_that_was_edited_are_not_taken_for_the_new_ones(folder, attack):
    assert attack("edited", PLAIN)[0] == 0
    assert attack("edited", PLAIN)[0] == 0  # the same again: nothing changed
    (folder / "torchless.py").write_text("SCALE = -10.0\n")  # a module that it imports
    status, _, said = attack("edited", PLAIN)
    (folder / "torchless.py").write_text("SCALE = 10.0\n")
    assert status == 2 and "answers otherwise" in said


def test_numbers_under_other_gradients_are_not_taken_for_the_new_ones(attack):
    """After a failed audit one mends the gradients: the answers stay what they were."""
    steps = "(8 * x).round() / 8"
    assert attack("mended", f"return self.answer({steps})")[0] == 3
    status, _, said = attack("mended", f"return self.answer(x + ({steps} - x).detach())")
    assert status == 2 and "answers otherwise" in said


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
    _, report, _ = attack(f"random-{kind.replace(' ', '-')}", forward, *options, attacks=["clean"])
    _, plain, _ = attack("certain", PLAIN, *options, attacks=["clean"])
    assert not report["deterministic"]
    assert report["clean"]["accuracy"] == pytest.approx(share * plain["clean"]["accuracy"], abs=0.1)


def test_a_false_claim_of_being_deterministic_is_refused(attack):
    status, _, said = attack("claim", "return self.answer(x) + torch.randn(len(x), 10)", "--deterministic")
    assert status == 2 and "it is not deterministic" in said


def test_a_seed_inside_forward_does_not_reach_the_attack(attack):
    """Square and the random starts would else try the same direction again and again."""
    found = []
    for name, forward in (
        ("seeds", f"torch.manual_seed(0); np.random.seed(0); random.seed(0); {PLAIN}"),
        ("not", PLAIN),
    ):
        _, report, _ = attack(name, forward, "--queries", "100", attacks=["square", "pgd-eot"])
        found.append({key: report[key] for key in ("clean", "noise", "robust")} | {"attacks": [
            part["accuracy"] for part in report["attacks"].values()]})  # fmt: skip
    assert found[0] == found[1]


def test_a_model_is_left_in_the_mode_in_which_it_was_built(attack):
    status, report, said = attack("dropout", "return self.answer(self.drop(x))", "--draws", "40", attacks=["clean"])
    _, still, _ = attack("still", "return self.answer(self.drop(x))", init="self.eval()", attacks=["clean"])
    assert "in training mode, as it was built" in said
    assert report["clean"]["worst_draw"] < report["clean"]["accuracy"]  # dropout was on
    assert still["clean"]["worst_draw"] == still["clean"]["accuracy"]


def test_random_numbers_that_no_seed_reaches_are_refused_in_a_sentence(folder, attack):
    """No gradient of such a model can be checked: honest ones were accused, and masked ones passed."""
    noise = "0.1 * torch.from_numpy(self.rng.normal(size=x.shape)).to(x)"
    options = {"init": "self.rng = np.random.default_rng()", "attacks": ["clean"]}
    status, _, said = attack("unseeded", f"return self.answer(x + {noise})", **options)
    assert status == 2 and "give it a method manual_seed(seed)" in said
    assert not (folder / "unseeded").exists()
    method = "Net.manual_seed = lambda self, seed: setattr(self, 'rng', np.random.default_rng(seed))"
    options["init"] += f"; {method}"
    assert attack("seeded-noise", f"return self.answer(x + {noise})", **options)[0] == 0


def test_draws_that_are_sometimes_alike_are_not_taken_for_a_deterministic_answer(attack):
    """Random resizing and padding (Xie et al. 2018)."""
    forward = (
        "k = 30 + 2 * int(torch.rand(()) > 0.4); "  # under seed 0 the first two draws are alike
        "return self.answer(F.pad(F.interpolate(x, (k, k), mode='bilinear'), [0, 32 - k] * 2))"
    )
    status, _, said = attack("resized", forward)
    assert status == 0, said


def test_an_answer_that_depends_on_the_batch_is_named(attack):
    status, report, _ = attack("batch", "return self.norm(self.answer(x)) if len(x) > 1 else self.answer(x)")
    assert status == 3 and any("depends on the others in the batch" in text for text in report["audit"]["messages"])


def test_a_straight_through_gradient_finds_what_it_finds(attack):
    """The recommended attack on a defence without gradients: the accuracy is an upper bound, and is reported as one."""
    status, report, said = attack(
        "bpda", "return self.answer(x + ((8 * x).round() / 8 - x).detach())", "--pgd-steps", "20"
    )
    assert status == 3 and report["robust"]["accuracy"] < 0.5
    assert "has steps" in said and "upper bounds" in said and "made up" not in said and "nothing about" not in said


@pytest.mark.parametrize(
    "forward, sentence",
    [
        ("return torch.from_numpy(self.answer(x).detach().numpy())", "exactly zero"),
        ("return torch.from_numpy(self.answer(x).numpy())", "exactly zero"),  # PyTorch refuses that with a graph
        ("return self.answer(x) * torch.nan", "not finite"),
        ("return self.answer(x) / 0", "not finite"),
        ("return self.answer(x.detach())", "exactly zero"),
        ("assert not x.requires_grad; return self.answer(x)", "exactly zero"),
    ],
)
def test_a_model_without_gradients_is_judged_and_not_refused(attack, forward, sentence):
    status, report, said = attack(f"without-{abs(hash(forward))}", forward, init="self.requires_grad_(False)")
    assert status == 3 and sentence in said, said


def test_a_model_with_a_sparse_part_is_attacked(attack):
    init = 'self.register_buffer("eye", torch.eye(10).to_sparse())'
    status, report, said = attack("sparse", "return self.answer(x) @ self.eye.to_dense()", init=init)
    assert status == 0 and report["clean"]["accuracy"] > 0.8, said


def test_a_clamp_inside_does_not_make_pixels_stick(attack):
    """torch's clamp has gradient 0 at exactly 0 and 1: an attack would leave a third of the pixels as they are."""
    forwards, options = ("return self.answer(x.clamp(0, 1))", PLAIN), ("--pgd-steps", "10", "--draws", "1")
    clamped, plain = (attack(f"clamp-{len(text)}", text, *options)[1]["robust"]["accuracy"] for text in forwards)
    assert clamped <= plain + 0.01


CERTAIN = ["--model", "certain.py:build", "--dataset", "digits", "--eps", "0.1"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--model", "none.py:build", "--dataset", "digits", "--eps", "0.1"], "--model none.py:build is not"),
        (["--model", "certain.py:SCALE", "--dataset", "digits", "--eps", "0.1"], "SCALE is no nn.Module"),
        (["--model", "certain.py:build", "--dataset", "digits"], "goes with --dataset and --eps"),
        (["--model", "certain.py:build", "--ckpt", "carso.pt"], "goes with --dataset and --eps"),
        (["--model", "five.py:build", "--dataset", "digits", "--eps", "0.1"], r"returns .8, 5."),
        ([*CERTAIN, "--attack", "transfer"], "--attack transfer is for a CARSO"),
        ([*CERTAIN, "--control", "fixed-z"], "--control fixed-z is for a CARSO"),
        (["--ckpt", "carso.pt", "--attack", "magic"], "argument --attack: invalid choice: 'magic'"),
    ],
)  # fmt: skip
def test_wrong_input_gets_a_sentence(folder, call, options, sentence):
    for name, forward in (("certain", PLAIN), ("five", "return self.answer(x)[:, :5]")):
        (folder / f"{name}.py").write_text(THEIR_FILE.format(forward=forward, init="pass"))
    status, said = call(*options)
    assert status == 2 and re.search(sentence, said), said


def test_modules_beside_their_file_come_before_ours(folder, attack):
    (folder / "models.py").write_text("OWN = 1\n")
    (folder / "torch.md").write_text("Notes, and no module.\n")
    status, _, said = attack("imports", f"assert OWN; {PLAIN}", head="from models import OWN\n")
    (folder / "models.py").unlink()
    assert status == 0, said
    from models import WideResNet  # ours is in its place again

    assert WideResNet is evaluate.WideResNet


# -------------------------------------------------------------------------------------------- attacks and controls


def test_the_same_attack_through_either_door_gives_the_same_rows(folder, call):
    assert call("--ckpt", "carso.pt", "--attack", "pgd-eot", "--out", "here", main=evaluate.main)[0] == 0
    assert call("--ckpt", "carso.pt", "--attack", "pgd-eot", "--out", "there")[0] == 0
    assert (folder / "here" / "rows.tsv").read_bytes() == (folder / "there" / "rows.tsv").read_bytes()


def test_the_union_has_a_row_for_each_attack(folder, call):
    assert call("--ckpt", "carso.pt", "--attack", "all", "--out", "union", "--no-cascade")[0] in (0, 3)
    report = json.loads((folder / "union" / "report.json").read_text())
    assert list(report["attacks"]) == GROUPS["all"]
    least = min(part["accuracy"] for part in report["attacks"].values() if part["target"] == "defence")
    assert report["robust"]["least"] <= least + 0.2


def test_a_black_box_has_its_turn_before_standard_which_has_one_inside():
    assert [*ALL][-2:] == ["square", "standard"]


@pytest.mark.parametrize("name", [name for name in ALL if name not in evaluate.ATTACKS])
def test_every_attack_stays_in_the_ball_and_follows_its_seed(tiny_carso, name):
    x, y = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    found = []
    for _ in range(2):
        reseed(1, tiny_carso)
        candidates = ALL[name].run(Seen(tiny_carso, samples=3), x, y, 0.1, SMALL)
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
    first, second = ALL["apgd-t"].run(Seen(classifier), x, y, 0.05, SMALL | {"steps": 20})
    order = before.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    for candidate, wanted in ((first, order[:, 0]), (second, order[:, 1])):
        after = classifier(candidate)
        gap = lambda logits, k: logits.gather(1, k[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]  # noqa: E731
        assert (gap(after, wanted) > gap(before, wanted)).all()


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
def test_every_control_is_evaluated(folder, call, control):
    assert call("--ckpt", "carso.pt", "--control", control, "--attack", "apgd-ce", "--out", control)[0] in (0, 3)
    report = json.loads((folder / control / "report.json").read_text())
    assert report["config"]["control"] == control
    assert report["deterministic"] == (control in ("classifier", "final", "fixed-z"))


# ------------------------------------------------------------------------------------------------------------ sweeps


def test_signs_of_masking_in_a_sweep_are_seen():
    noise = [0.9, 0.9, 0.9, 0.8]
    assert find_signs("eps", [0, 1, 2, 3], [0.9, 0.5, 0.2, 0.0], noise) == []
    assert "accuracy rises" in find_signs("eps", [0, 1, 2, 3], [0.9, 0.5, 0.7, 0.0], noise)[0]
    masked = find_signs("eps", [0, 1, 2, 0.5], [0.9, 0.9, 0.9, 0.88], noise)
    assert len(masked) == 2 and "does not go to zero" in masked[0] and "noise beats" in masked[1]
    assert find_signs("steps", [1, 10], [0.2, 0.5], [1, 1]) == ["one step beats many"]


def test_a_sweep_has_a_row_a_value_and_a_plot(folder, call, monkeypatch):
    monkeypatch.setitem(lab.evaluate.SWEEPS, "eps", [0.0, 0.1, 0.5])
    status, said = call("--ckpt", "carso.pt", "--out", "swept", "--sweep", "eps", "--pictures", "3")
    assert status in (0, 3) and "the curve is swept/sweep-eps.png" in said
    lines = [line.split("\t") for line in (folder / "swept" / "sweep-eps.tsv").read_text().splitlines()]
    assert lines[0] == ["eps", "clean", "noise", "apgd-ce", "n"] and len(lines) == 4
    assert lines[1][1] == lines[1][2] == lines[1][3]  # at eps 0 nothing differs from clean
    assert (folder / "swept" / "sweep-eps.png").stat().st_size > 1000
