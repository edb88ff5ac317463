"""lab/evaluate.py and lab/attacks.py: more rows for evaluate.py, and the right number for models of others."""

import copy
import json
import re
import sys
from pathlib import Path
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
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    state = {"dataset": "digits", "data_dir": "data", "config": {"eps": 0.05}, "classes": list("0123456789")}
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
    assert status == 0 and report["audit"] == {"passed": True, "messages": []}, said
    assert report["clean"]["accuracy"] > 0.8 and report["robust"]["accuracy"] < report["clean"]["accuracy"]
    assert "transfer" not in report["attacks"] and "fixed-noise" not in report["attacks"]  # it has no parts
    assert report["attacks"]["pgd-eot"]["eot"] == 2 and "eps 0.1" in said
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
    _, _, said_of_plain = attack("plain", PLAIN, attacks=["clean"])  # its modules say training, and it does not matter
    assert "in training mode, as it was built" in said and "in training mode" not in said_of_plain
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
    """The recommended attack on a defence without gradients: the accuracy is an upper bound, and is reported as one.
    Levels far finer than the radius are no fault."""
    for levels, expected in ((8, 3), (255, 0)):
        forward = f"return self.answer(x + (({levels} * x).round() / {levels} - x).detach())"
        status, report, said = attack(f"bpda-{levels}", forward, "--pgd-steps", "20")
        assert status == expected and report["robust"]["accuracy"] < 0.5
        assert ("do not explain" in said and "upper bounds" in said) == (status == 3)


NO_GRADIENT = """
class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None
"""
QUANTISED = "self.q = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(1024, 10)), {nn.Linear})"


@pytest.mark.parametrize(
    "head, init, forward",
    [
        (NO_GRADIENT, "pass", "return self.answer(NoGradient.apply(x))"),
        ("", QUANTISED, "return self.q(x.flatten(1))"),
    ],
)
def test_a_gradient_that_comes_back_as_none_is_none(attack, head, init, forward):
    status, report, said = attack(f"none-{len(forward)}", forward, head="import torch\n" + head, init=init)
    assert status == 3 and report["robust"] and ("exactly zero" in said or report["clean"]["accuracy"] < 0.2), said


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "MemoryError"])
def test_memory_that_is_not_enough_is_no_property_of_the_model(attack, error):
    """Only where a gradient is asked for is there too little."""
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        attack(f"memory-{error[:5]}", f"if x.requires_grad: raise {error}('full')\n        {PLAIN}")
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):  # nor in the middle of an attack
        late = f"if x.requires_grad and len(x) < 8: raise {error}('full')\n        {PLAIN}"
        attack(f"late-{error[:5]}", late)


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


def test_a_model_that_normalises_in_place_leaves_the_pictures_as_they_are(attack):
    _, plain, _ = attack("out-of-place", PLAIN)
    _, report, said = attack("in-place", "return self.answer(x.sub_(0.3).div_(0.4).mul(0.4).add(0.3))")
    assert report and report["clean"] == plain["clean"] and report["robust"] == plain["robust"], said


def test_one_models_work_is_not_shown_under_anothers_name(folder, call):
    """In the default folder, which is named after the settings."""
    negated = "\nclass Negated(Net):\n    def answer(self, x):\n        return -super().answer(x)\n"
    (folder / "two.py").write_text(THEIR_FILE.format(forward=PLAIN, init="pass") + negated + "negated = Negated()\n")
    common = ["--dataset", "digits", "--eps", "0.1", "--attack", "clean"]
    for name, is_right in (("build", True), ("negated", False), ("build", True)):
        status, said = call("--model", f"two.py:{name}", *common)
        place = Path(re.search("written to (.*)", said).group(1))
        report = json.loads((place / "report.json").read_text())
        assert report["checkpoint"] == f"two.py:{name}" and (report["clean"]["accuracy"] > 0.5) == is_right


def test_a_model_that_differs_on_noise_alone_is_another_one(folder, attack):
    assert attack("noisy", PLAIN)[0] == 0
    grey = "((x > 0.02) & (x < 0.06)).float().mean((1, 2, 3))[:, None]"
    status, _, said = attack("noisy", f"return torch.where({grey} > 0.01, -self.answer(x), self.answer(x))")
    assert status == 2 and "answers otherwise" in said


def test_a_model_that_remembers_fails_the_audit(attack):
    init = "self.calls = 0"
    forward = "self.calls += 1; return self.answer(x) if self.calls < 60 else self.answer(x).roll(1, 1)"
    status, _, said = attack("quota", forward, init=init)
    assert status == 3 and "other answers than at the beginning" in said, said


def test_a_model_whose_quota_is_used_up_before_any_attack_is_refused(attack):
    forward = "self.calls += 1; return self.answer(x) * (self.calls < 9)"
    status, _, said = attack("small-quota", forward, init="self.calls = 0")
    assert status == 2 and "answers otherwise under the same seed" in said, said


def test_own_pictures_keep_their_size_for_an_own_model(folder, attack):
    digits = load("digits")
    large = digits.test_images[:20].repeat_interleave(3, 2).repeat_interleave(3, 3)[:, 0].numpy()
    np.savez(folder / "large.npz", train_images=large, train_labels=np.arange(20) % 10, test_images=large,
             test_labels=digits.test_labels[:20].numpy())  # fmt: skip
    forward = "assert x.shape[2:] == (96, 96); return self.answer(x[:, :, 1::3, 1::3])"
    status, report, said = attack("large", forward, "--dataset", "large.npz", attacks=["clean"])
    assert report["clean"]["accuracy"] > 0.8, said


@pytest.mark.parametrize(
    "files, head, sentence",
    [
        ({"layers.py": "OWN = 1\n"}, "from .layers import OWN\n", "write `from layers import`"),
        ({"data.py": "OWN = 1\n"}, "from data import OWN\n", ""),
        ({"models/__init__.py": "OWN = 1\n"}, "from models import OWN\n", ""),
        ({"models/own.py": "OWN = 1\n"}, "from models.own import OWN\n", ""),
        ({"../models/own.py": "OWN = 1\n"}, "from models.own import OWN\n", ""),
        ({"../data.py": "OWN = 1\n"}, "from data import OWN\n", ""),
    ],
)
def test_modules_beside_their_file_or_its_folder_come_before_ours(tmp_path, files, head, sentence):
    place = tmp_path / "project" / "code"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    place.mkdir(parents=True, exist_ok=True)
    (place / "mine.py").write_text(head + "import torch\nnet = torch.nn.Linear(1, 1)\nnet.own = OWN\n")
    text, before = f"{place / 'mine.py'}:net", dict(sys.modules)
    path = list(sys.path)
    try:
        if sentence:
            with pytest.raises(ValueError, match=sentence):
                lab.evaluate.load_foreign(text)
        else:
            assert lab.evaluate.load_foreign(text).model.own == 1
    finally:
        sys.path[:] = path
    assert all(sys.modules[name] is before[name] for name in ("models", "data", "evaluate"))  # ours are back


def test_a_models_file_may_change_folder_and_default_type(folder, attack):
    head = "import torch\ntorch.set_default_dtype(torch.float64)\n"
    init = "self.double(); import os, tempfile; os.chdir(tempfile.mkdtemp())"
    status, report, said = attack("moves", PLAIN, head=head, init=init, what="instance")
    assert torch.get_default_dtype() == torch.float32
    assert status == 0 and report["clean"]["accuracy"] > 0.8, said


@pytest.mark.parametrize(
    "forward, sentence",
    [
        ("return self.answer(x).argmax(1)", r"returns .8,. for"),
        ("return F.one_hot(self.answer(x).argmax(1), 10)", "returns torch.int64: votes or classes"),
        ("return (self.answer(x), x)", "returns tuple"),
        ("return self.answer(x).squeeze()", r"returns .10,. for a single picture"),
        ("torch.autograd.grad(self.answer(x).sum(), self.weight); return self.answer(x)", "enable_grad"),
    ],
)
def test_an_output_that_is_no_logits_gets_a_sentence(attack, forward, sentence):
    status, _, said = attack(f"output-{len(forward)}", forward)
    assert status == 2 and re.search(sentence, said) and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "what",
    [
        "torch.jit.freeze(torch.jit.trace(plain, torch.rand(2, 1, 32, 32)))",
        pytest.param("torch.compile(plain)", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_attacked(folder, call, what):
    plain = "import numpy as np, torch\nfit = torch.from_numpy(np.load('fit.npy')).float()\n"
    plain += "plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)).eval()\n"
    plain += "plain[1].weight.data, plain[1].bias.data = 10 * fit[:, :-1], 10 * fit[:, -1]\n"
    (folder / "frozen.py").write_text(plain + f"net = {what}\n")
    status, said = call("--model", "frozen.py:net", "--dataset", "digits", "--eps", "0.1", "--attack", "pgd-eot")
    assert status == 0, said


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
        ([*CERTAIN, "--control", "fixed-z"], "--control and --final are for a CARSO"),
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
    assert list(report["attacks"]) == ["standard", *GROUPS["all"][:-1]]  # of the classifier, then of the defence
    least = min(part["accuracy"] for part in report["attacks"].values() if part["target"] == "defence")
    assert report["robust"]["least"] <= least + 0.2


def test_a_black_box_has_its_turn_before_standard_which_has_one_inside():
    assert [*evaluate.ATTACKS][-2:] == ["square", "standard"]


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
    first, second = ROWS["apgd-t"].run(Seen(classifier), x, y, SMALL | {"steps": 20, "eps": 0.05})
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


def test_attacks_that_beat_gradients_are_a_sign_of_masking():
    def find(follower, weaker, attacked=None, **more):
        right = lambda share: np.arange(10)[None] < np.round(10 * np.array(share))[:, None]  # noqa: E731
        everywhere = np.ones(len(follower), dtype=bool)
        rows = {"pgd-eot": (follower, everywhere), "noise": (weaker, everywhere if attacked is None else attacked)}
        rows |= {name: (share, everywhere) for name, share in more.items()}
        table = {k: {"right": right(s), "select": np.array(s), "attacked": a} for k, (s, a) in rows.items()}
        return find_masking(SimpleNamespace(attacks=table), table)

    assert "noise takes 20.0 points more" in find([1.0] * 50, [0.0] * 10 + [1.0] * 40)[0]
    assert not find([0.0] * 25 + [1.0] * 25, [1.0] * 50)  # the gradients are stronger
    assert not find([1.0] * 50, [0.0] + [1.0] * 49)  # one picture in fifty is chance
    earlier = np.arange(50) >= 10  # the gradients took ten before the other's turn
    assert not find([0.0] * 10 + [1.0] * 40, [0.0] * 10 + [1.0] * 40, earlier)
    # AutoAttack's standard has a black box: it does not speak for the attacks that follow gradients.
    assert find([1.0] * 50, [0.0] * 10 + [1.0] * 40, standard=[0.0] * 10 + [1.0] * 40)


@pytest.mark.parametrize("aggregation", VIEW_OF_DECISION)
def test_a_decision_without_gradients_is_attacked_through_another_output(folder, call, aggregation):
    options = ["--aggregation", aggregation, "--attack", "pgd-eot", "--pictures", "3", "--out", f"by-{aggregation}"]
    assert call("--ckpt", "carso.pt", *options)[0] == 0
    report = json.loads((folder / f"by-{aggregation}" / "report.json").read_text())
    assert report["config"]["view"] == VIEW_OF_DECISION[aggregation]
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
def test_every_control_is_evaluated(folder, call, control):
    assert call("--ckpt", "carso.pt", "--control", control, "--attack", "apgd-ce", "--out", control)[0] in (0, 3)
    report = json.loads((folder / control / "report.json").read_text())
    assert report["config"]["control"] == control
    is_asked_once = report["config"]["draws"] == 1
    assert is_asked_once == (control in ("classifier", "final", "fixed-z"))


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
    assert status in (0, 3) and f"the curve is {folder}/swept/sweep-eps.png" in said
    lines = [line.split("\t") for line in (folder / "swept" / "sweep-eps.tsv").read_text().splitlines()]
    assert lines[0] == ["eps", "clean", "noise", "apgd-ce", "n"] and len(lines) == 4
    assert lines[1][1] == lines[1][2] == lines[1][3]  # at eps 0 nothing differs from clean
    assert (folder / "swept" / "sweep-eps.png").stat().st_size > 1000


def test_a_sweep_repeats_the_attack_that_was_asked_for(folder, call, monkeypatch):
    monkeypatch.setitem(lab.evaluate.SWEEPS, "steps", [1, 2])
    options = ["--ckpt", "carso.pt", "--out", "rand", "--sweep", "steps", "--pictures", "3", "--attack"]
    assert call(*options, "rand")[0] in (0, 3)
    assert (folder / "rand" / "sweep-steps.tsv").read_text().startswith("steps\tclean\tnoise\trand\tn\n")
    status, said = call(*options, "rand", "pgd-eot")
    assert status == 2 and "--sweep steps repeats one attack: give --attack one name" in said
