"""evaluate.py: the pieces, and the real script on a tiny checkpoint."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import DEVICE, fresh_carso
from test_purifier import published_folder
from test_train import command, here, refusal, run
from torch.nn.functional import binary_cross_entropy, one_hot
from torch.testing import assert_close

import evaluate
from attacks import apgd, project
from data import load
from evaluate import ATTACKS
from lab.audit import audit, signs_in_sweep, signs_of_masking
from lab.checkpoints import load_checkpoint, save_checkpoint
from lab.presets import BUDGETS, Budget, reduced
from lab.report import reconstruction_quality, resubmission, wilson
from lab.suite import CONTROLS, remember_best, with_fixed_z, without_condition
from lab.target import (
    AGGREGATIONS,
    VIEWS,
    Target,
    climb,
    full_precision,
    naive_log_odds,
    reseed,
    seed_for,
    sum_of_exponentials,
)
from lab.units import Evaluation
from purifier import Purifier

TINY = (
    "--pictures 6 --steps 2 --eot 2 --queries 3 --targets 2 --select 2 --draws 3 --chunk 3 "
    f"--device {DEVICE} --attack standard rand"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a fresh CARSO for the digits."""
    folder = tmp_path_factory.mktemp("evaluate")
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    save_checkpoint(folder / "carso.pt", carso, dataset="digits", data_dir="data", config={"eps": 0.2})
    run(folder, "--ckpt", "carso.pt", "--out", "whole", *TINY, script="evaluate.py")
    return folder


def test_report_has_the_stable_fields(folder):
    report = json.loads((folder / "whole" / "report.json").read_text())
    assert {
        "checkpoint",
        "dataset",
        "n",
        "eps",
        "samples",
        "clean",
        "noise",
        "attacks",
        "robust",
        "audit",
        "config",
    } <= set(report)
    assert set(report["attacks"]) == {"standard", "rand"}
    fields = {"accuracy", "interval", "during", "steps", "eot", "nonfinite_gradients", "zero_gradients", "seconds"}
    assert all(fields <= set(attack) for attack in report["attacks"].values())
    assert report["n"] == 6 and report["eps"] == 0.2 and report["audit"]["passed"]
    names = {path.name for path in (folder / "whole").iterdir()}
    assert names == {"report.json", "report.md", "rows.tsv", "samples.png", "config.json", "work"}


def test_numbers_follow_from_the_rows(folder):
    report = json.loads((folder / "whole" / "report.json").read_text())
    lines = [line.split("\t") for line in (folder / "whole" / "rows.tsv").read_text().splitlines()]
    assert lines[0] == ["picture", "label", "attack", "during", "right", "draws", "select"]
    for name, part in {"clean": report["clean"], "noise": report["noise"], **report["attacks"]}.items():
        mine = [line for line in lines[1:] if line[2] == name]
        assert [int(line[0]) for line in mine] == list(range(6))
        assert part["accuracy"] == pytest.approx(np.mean([int(line[4]) / int(line[5]) for line in mine]))


@pytest.mark.parametrize("how", ["two processes", "some files missing"])
def test_result_depends_neither_on_processes_nor_on_interruptions(folder, how):
    if how == "two processes":
        run(folder, "--ckpt", "carso.pt", "--out", "other", *TINY, script="evaluate.py", ranks=2)
    else:
        shutil.copytree(folder / "whole", folder / "other", dirs_exist_ok=True)
        for name in ("rand-000003.npz", "clean-000000.npz"):
            (folder / "other" / "work" / name).unlink()
        run(folder, "--ckpt", "carso.pt", "--out", "other", *TINY, script="evaluate.py")
    for name in ("rows.tsv", "samples.png"):
        assert (folder / "other" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    shutil.rmtree(folder / "other")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--ckpt", "nothing.pt"], "no file nothing.pt"),
        (["--ckpt", "page.pt"], "web page"),
        (["--ckpt", "other.pt"], "not a CARSO checkpoint"),
        (["--ckpt", "carso.pt", "--eps", "8"], "write 8/255"),
        (["--ckpt", "carso.pt", "--eps", "x"], "not a number such as 8/255"),
        (["--ckpt", "carso.pt", "--samples", "-1"], "must be 0 or more"),
        (["--ckpt", "carso.pt", "--n", "-5"], "must be 1 or more"),
        (["--ckpt", "carso.pt", "--own-answer", "1"], "less than 1"),
        (["--ckpt", "carso.pt", "--control", "classifier", "--own-answer", "0.5"], "is for a CARSO"),
        (["--ckpt", "carso.pt", "--dataset", "colour.npz"], "takes pictures \\(1, 32, 32\\) of 10 classes"),
        (["--ckpt", "carso.pt", "--out", "whole", "--n", "5"], "n: 6 there, 5 now"),
        (["--ckpt", "carso.pt", "--judge", "nothing.pt"], "no file nothing.pt"),
        (["--ckpt", "carso.pt", "--control", "classifier", "--judge", "carso.pt"], "this model makes none"),
        (["--ckpt", "carso.pt", "--attack", "magic"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_input_gets_a_sentence(folder, monkeypatch, capsys, options, sentence):
    (folder / "page.pt").write_text("<!doctype html>")
    torch.save({"a": torch.zeros(1)}, folder / "other.pt")
    pictures, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    np.savez(
        folder / "colour.npz", train_images=pictures, train_labels=labels, test_images=pictures, test_labels=labels
    )
    budget = TINY if "whole" in options else []
    assert re.search(sentence, refusal(evaluate, folder, [*budget, *options], monkeypatch, capsys))


# ----------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("number", ["steps", "eot", "pgd_steps", "queries", "targets", "select", "draws"])
def test_one_smaller_number_makes_a_budget_a_reduced_one(number):
    few_pictures = Budget(n=100, chunk=10)
    assert not reduced(few_pictures)
    assert reduced(dataclasses.replace(few_pictures, **{number: getattr(few_pictures, number) - 1}))


def test_eot_in_one_batch_is_the_mean_of_single_draws(tiny_carso):
    x, y = torch.rand(2, 1, 32, 32).double(), torch.tensor([1, 2])
    target = Target(tiny_carso.double(), samples=3)
    z = torch.randn(2, 4 * 3, 4).double()
    losses, gradient = climb(target, y, "ce", 4, z)(x)
    singles = [climb(target, y, "ce", 1, part)(x) for part in z.split(3, dim=1)]
    assert_close(losses, torch.stack([l for l, _ in singles]).mean(0))
    assert_close(gradient, torch.stack([g for _, g in singles]).mean(0))
    assert target.count["pictures"] == 2 * (4 + 4) and target.count["gradients"] == 2 * (1 + 4)


def test_target_counts_gradients_that_are_not_there(tiny_carso):
    x, y = torch.rand(2, 1, 32, 32), torch.tensor([1, 2])
    for view, kind in (
        (lambda l: l.detach().sum(1) + 0 * l.sum(1), "zero"),
        (lambda l: l.sum(1) * torch.nan, "nonfinite"),
    ):
        target = Target(tiny_carso, view)
        climb(target, y, "ce", 1)(x)
        assert target.count[kind] == 2, kind


def test_views_decide_alike():
    logits = torch.randn(200, 8, 10, generator=torch.Generator().manual_seed(0))
    decision = AGGREGATIONS["robust"][0](logits).argmax(1)
    assert torch.equal(VIEWS["logsumexp"](logits).argmax(1), decision)
    assert torch.equal(sum_of_exponentials(logits).argmax(1), decision)
    small = 0.1 * logits  # where the naive view does not saturate
    assert torch.equal(naive_log_odds(small).argmax(1), AGGREGATIONS["robust"][0](small).argmax(1))
    assert sum_of_exponentials(1e4 * logits).isfinite().all()
    for decide, view in AGGREGATIONS.values():  # the view that stands in for a decision agrees with it where all agree
        alike = logits + 20 * one_hot(torch.arange(200) % 10, 10)[:, None]
        assert torch.equal(VIEWS[view](alike).argmax(1), decide(alike).argmax(1))


def test_wilson_interval_of_textbook_values():
    assert_close(wilson(0.5, 100), [0.40383, 0.59617], rtol=1e-4, atol=0)
    low, high = wilson(0.0, 20)
    assert low == 0 and high == pytest.approx(0.16113, rel=1e-3)


# ----------------------------------------------------------------------------------- the audit, and planted failures


def audited(model, view="logsumexp") -> dict:
    config = dict(eps=0.1, samples=getattr(model, "samples", 1), view=view, aggregation="robust", seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 32, 32), generator=generator, dtype=torch.uint8)
    with torch.no_grad():  # labels that the model gets right: DLR is rightly flat elsewhere
        labels = model(images / 255).argmax(1)
    return audit(Evaluation(model, images, labels, config, BUDGETS["reduced"], None, "cpu", 64, ATTACKS), draws=8)


class Around(torch.nn.Module):
    """A model with something between it and its caller."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.calls = model, change, 0

    def forward(self, x):
        self.calls += 1
        return self.change(self, x)


def confident(model):
    """The same decisions with logits that are large, as those of a trained network are."""
    model.classifier.logits.weight.data *= 30
    model.classifier.logits.bias.data *= 30
    return model


def detached_half(self, x):
    return self.model(x) + self.model(x.detach())


def nan_once_in_many(self, x):
    return self.model(x) * (torch.nan if self.calls % 8 == 5 and torch.is_grad_enabled() else 1.0)


PLANTED = {
    "detached": (lambda self, x: self.model(x.detach()), "exactly zero"),
    "detached in a part": (detached_half, "not the derivative"),
    "argmax": (lambda self, x: one_hot(self.model(x).argmax(1), 5).float(), "exactly zero"),
    "saturated": (lambda self, x: (1e6 * self.model(x)).softmax(1), "exactly zero"),
    "straight through": (lambda self, x: self.model(x + ((8 * x).round() / 8 - x).detach()), "not the derivative"),
    "NaN in one draw of many": (nan_once_in_many, "not finite"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_audit_catches_a_planted_failure(tiny_carso, kind):
    change, sentence = PLANTED[kind]
    found = audited(Around(tiny_carso.classifier.eval(), change))
    assert not found["passed"] and any(sentence in message for message in found["messages"]), found


def test_audit_catches_the_references_output(tiny_carso):
    found = audited(confident(tiny_carso), view="naive-odds")
    assert not found["passed"] and "through naive-odds" in " ".join(found["messages"])


def test_audit_passes_what_masks_nothing(tiny_carso):
    for model in (tiny_carso, tiny_carso.classifier):
        found = audited(model)
        assert found["passed"], found["messages"]
    noisy = Around(tiny_carso.classifier, lambda self, x: self.model(x + 0.01 * torch.randn_like(x)))
    found = audited(noisy)
    assert found["passed"], found["messages"]


def test_a_failed_audit_is_status_3_and_the_numbers_are_written(folder):
    (folder / "masked.py").write_text(
        "import torch\nfrom models import WideResNet\n\n"
        "class Masked(WideResNet):\n"
        "    def forward(self, x):\n"
        "        return super().forward((x * 4).round() / 4)\n\n"
        "def build():\n    torch.manual_seed(0)\n    return Masked(10, 10, 1, in_channels=1)\n"
    )
    options = [
        "--model",
        "masked.py:build",
        "--dataset",
        "digits",
        "--eps",
        "0.2",
        *TINY[:-3],
        "--attack",
        "apgd",
        "transfer",
    ]
    output = run(folder, *options, "--out", "masked", code=3, script="evaluate.py")
    assert "exactly zero" in output and "Skipped: transfer (the model has no classifier)" in output
    report = json.loads((folder / "masked" / "report.json").read_text())
    assert not report["audit"]["passed"] and report["attacks"]["apgd"]["accuracy"] >= 0


def test_controls_cut_what_they_name(folder, tiny_carso):
    x = torch.rand(3, *tiny_carso.purifier.config["image_shape"])
    assert CONTROLS["classifier"](tiny_carso) is tiny_carso.classifier
    fixed = with_fixed_z(copy.deepcopy(tiny_carso))
    assert torch.equal(fixed(x), fixed(x)) and not torch.equal(tiny_carso(x), tiny_carso(x))
    many = fixed.draw(x, 2 * fixed.samples)
    assert torch.equal(many[:, : fixed.samples], fixed.draw(x, fixed.samples))
    assert len(many[0].unique(dim=0)) == 2 * fixed.samples  # also for an S larger than the checkpoint's
    blind = without_condition(copy.deepcopy(fixed))
    assert torch.equal(blind(x), blind(1 - x)) and not torch.equal(fixed(x), fixed(1 - x))
    blind.own_answer = 0.5
    assert not torch.equal(blind(x), blind(1 - x))  # the classifier's own answer is still there


def test_pictures_that_are_alike_are_all_remembered():
    class Attack:
        def attack_single_run(self, pictures):
            return (pictures + 1,)

    x, attack = torch.rand(3, 1, 4, 4), Attack()
    x[1] = x[0]
    points = remember_best(attack, x)
    attack.attack_single_run(x[:2])
    assert torch.equal(points[0], torch.cat([x[:2] + 1, x[2:]]))


IN_PLACE = "return self.layer(x.sub_(0.5).div_(0.25).flatten(1))"
STRANGE = {  # a forward pass, and whether its gradient exists
    "normalises in place": (IN_PLACE, True),
    "inference mode": ("with torch.inference_mode():\n            return self.layer(x.flatten(1))", False),
    "no gradient wanted": ("assert not x.requires_grad\n        return self.layer(x.flatten(1))", False),
    "breaks its graph": ("h = self.layer(x.flatten(1)).exp()\n        h.add_(1)\n        return h", False),
    "sparse": ("return self.layer(x.flatten(1)) + 0 * self.eye.to_dense().sum()", True),
    "noise of numpy and of Python": (
        "return self.layer(x.flatten(1)) + torch.tensor([random.gauss(0, 1) for _ in range(10)]) "
        "+ torch.from_numpy(np.random.randn(10)).float()", True
    ),
}  # fmt: skip
ITS_FILE = """
import os, random
import numpy as np
import torch

class Strange(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1024, 10)
        self.layer.bias.data[1] += 5  # the first picture is a 1, and stays one
        self.register_buffer("eye", torch.eye(2).to_sparse())

    def forward(self, x):
        {}

def build():
    os.chdir("/")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return Strange().float()
"""


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_models_of_others_are_attacked_alike_each_time(folder, monkeypatch, capsys, kind):
    """Random weights, the working folder and PyTorch's settings are as they were, whatever their file does."""
    forward, has_gradient = STRANGE[kind]
    (folder / "strange.py").write_text(ITS_FILE.format(forward))
    options = ["--model", "strange.py:build", "--dataset", "digits", *TINY, "--attack", "apgd", "standard"]
    rows, code = [], 0 if has_gradient else 3
    for name, limit in (("one", 1000), ("two", 1000 if "noise" in kind else 1)):  # such noise depends on the calls
        shutil.rmtree(folder / name, ignore_errors=True)
        here(evaluate, folder, [*options, "--out", name, "--limit", limit], monkeypatch, capsys, code)
        rows.append((folder / name / "rows.tsv").read_text())
    assert rows[0] == rows[1]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def test_a_model_that_fails_under_attack_gets_a_sentence(folder, monkeypatch, capsys):
    (folder / "strange.py").write_text(
        ITS_FILE.format("assert len(x) < 3, 'two at most'; return self.layer(x.flatten(1))")
    )
    options = ["--model", "strange.py:build", "--dataset", "digits", *TINY, "--out", "fails"]
    output = refusal(evaluate, folder, options, monkeypatch, capsys)
    assert re.search("strange.py:build failed under attack \\(two at most; .*strange.py, line 14\\)", output), output


def test_a_defence_of_others_may_have_a_config_of_its_own(folder, monkeypatch, capsys):
    (folder / "theirs.py").write_text(
        "from conftest import fresh_carso\n\ndef build():\n"
        "    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)\n"
        "    carso.config = {'theirs': 1}\n    return carso\n"
    )
    options = ["--model", "theirs.py:build", "--dataset", "digits", *TINY, "--attack", "clean", "--out", "their-config"]
    assert "Audit passed" in here(evaluate, folder, options, monkeypatch, capsys)


def test_a_control_is_of_the_same_classes_as_the_whole(folder, monkeypatch, capsys):
    carso, state = load_checkpoint(folder / "carso.pt")
    save_checkpoint(folder / "named.pt", carso, **state | {"classes": list("9876543210")})
    options = ["--ckpt", "named.pt", "--control", "classifier", *TINY]
    assert "trained on other classes" in refusal(evaluate, folder, options, monkeypatch, capsys)


def test_a_folder_whose_name_no_terminal_can_show(folder, monkeypatch, capsys):
    name = os.fsdecode(b"caf\xe9")
    (folder / name).mkdir()
    shutil.copy(folder / "carso.pt", folder / name)
    output = here(evaluate, folder, ["--ckpt", f"{name}/carso.pt", *TINY, "--attack", "clean"], monkeypatch, capsys)
    assert "caf\\udce9/carso.pt" in output and list((folder / name).glob("eval-*/report.md"))


def test_a_bare_classifier_is_evaluated_like_a_defence(folder, monkeypatch, capsys):
    options = ["--ckpt", "carso.pt", "--control", "classifier", "--out", "bare", *TINY]
    output = here(evaluate, folder, options, monkeypatch, capsys)
    report = json.loads((folder / "bare" / "report.json").read_text())
    assert "standard" in report["counted"] and report["config"]["control"] == "classifier", output
    carso = load_checkpoint(folder / "carso.pt")[0]
    weights = carso.classifier.state_dict() | {"mean": carso.classifier.mean, "std": carso.classifier.std}
    torch.save({"state_dict": weights}, folder / "classifier.pt")
    options = ["--ckpt", "classifier.pt", "--dataset", "digits", "--eps", "0.2", "--out", "file", *TINY]
    here(evaluate, folder, options, monkeypatch, capsys)
    rows = [(folder / name / "rows.tsv").read_text() for name in ("bare", "file")]
    assert rows[0] == rows[1]
    options = ["--ckpt", "carso.pt", "--out", "judged", "--judge", "classifier.pt", *TINY, "--attack", "noise"]
    options += ["--own-answer", "0.7"]
    here(evaluate, folder, options, monkeypatch, capsys)
    report = json.loads((folder / "judged" / "report.json").read_text())
    assert report["config"]["own_answer"] == 0.7
    quality = report["reconstructions"]["clean"]
    data, bce, right, carso = load("digits", "data"), [], [], carso.to(DEVICE)
    for start in (0, 3):  # the chunks, as evaluate.py seeds them
        rows = slice(start, start + 3)
        x, y = (data.test_images[rows] / 255).to(DEVICE), data.test_labels[rows].to(DEVICE)
        carso.manual_seed(start)
        with full_precision():
            members = carso.purify(x, carso.draw(x, 2))
            answers = carso.classifier(members.flatten(0, 1)).argmax(1)
        bce.append(binary_cross_entropy(members, x[:, None].expand_as(members)).item())
        right.append((answers == y.repeat_interleave(2)).float().mean().item())
    assert quality == {"bce": pytest.approx(np.mean(bce)), "judge": pytest.approx(np.mean(right))}


def test_reconstructions_are_judged_within_the_limit_and_alike_for_any(tiny_carso, monkeypatch):
    """A whole chunk's members at once are more than a GPU holds at WRN-28-10, where the judge is one."""
    seen, labels = [], torch.zeros(7, dtype=torch.int64)
    monkeypatch.setattr(Purifier, "decode", lambda self, *given, decode=Purifier.decode: (
        seen.append(len(given[0])) or decode(self, *given)))  # fmt: skip
    found = []
    for limit in (1024, 5):
        config, budget = {"eps": 0.2, "samples": 2, "aggregation": "robust", "view": "logsumexp"}, Budget(chunk=7)
        images = torch.arange(7 * 1024).remainder(256).to(torch.uint8).view(7, 1, 32, 32)
        e = Evaluation(tiny_carso, images, labels, config, budget, None, "cpu", limit, ATTACKS)
        e.judge, seen[:] = tiny_carso.classifier, []
        found.append(reconstruction_quality(e, e.pictures(0)[0].numpy()))
        assert max(seen) <= limit and sum(seen) == 14
    assert found[0] == pytest.approx(found[1])


def test_the_authors_defence_from_its_four_files(folder, reference_carso):
    """Formula weights in the authors' layout through the whole evaluation, at the smallest budget."""
    published_folder(folder / "theirs", reference_carso)
    pictures, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    pictures[:] = np.random.default_rng(0).integers(0, 256, pictures.shape)
    arrays = dict(train_images=pictures, train_labels=labels, test_images=pictures, test_labels=labels)
    np.savez(folder / "ten.npz", **arrays)
    options = [
        "--published",
        "theirs",
        "--dataset",
        "ten.npz",
        *TINY,
        "--pictures",
        "2",
        "--steps",
        "1",
        "--attack",
        "rand",
    ]
    done = subprocess.run(**command(folder, *options, "--out", "theirs-out", script="evaluate.py"), timeout=200)
    assert done.returncode in (0, 3), done.stdout  # formula weights need not pass the audit
    assert json.loads((folder / "theirs-out" / "report.json").read_text())["samples"] == 8


# ------------------------------------------------------------------------------------------------------- the attacks


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_stays_in_the_ball_and_follows_its_seed(tiny_carso, name):
    x, y = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    budget = Budget(n=3, steps=3, eot=2, pgd_steps=2, queries=3, targets=2, select=2, draws=2, chunk=3)
    found = []
    for _ in range(2):
        reseed(seed_for(name), tiny_carso)
        model = tiny_carso.classifier if ATTACKS[name].on == "classifier" else tiny_carso
        target, found_now = Target(model, limit=5), []
        for run_of_it in ATTACKS[name].runs(budget, 5, target.has_members):
            candidates, during = run_of_it(target, x, y, 0.1, budget)
            assert (candidates - x).abs().max() <= 0.1 + 1e-6 and candidates.min() >= 0 and candidates.max() <= 1
            assert candidates.shape[1:] == x.shape and during.shape == (3,) and during.dtype == torch.bool
            found_now.append(candidates)
        found.append(torch.cat(found_now))
    assert torch.equal(*found)
    assert all(p.grad is None for p in tiny_carso.parameters())


def test_memory_limit_changes_nothing(tiny_carso):
    x, y = torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 2])
    z = torch.randn(3, 6 * 2, 4)
    results = [climb(Target(tiny_carso, samples=2, limit=n), y, "ce", 6, z)(x) for n in (1000, 7, 1)]
    for losses, gradient in results[1:]:
        assert_close(losses, results[0][0])
        assert (gradient - results[0][1]).norm() < 1e-3 * gradient.norm()


def test_out_of_memory_halves_and_goes_on(tiny_carso):
    config = dict(eps=0.1, samples=2, view="logsumexp", aggregation="robust")
    e = Evaluation(tiny_carso, torch.zeros(1), torch.zeros(1), config, BUDGETS["reduced"], None, "cpu", 64, ATTACKS)

    def hungry():
        if e.limit > 16:
            raise torch.cuda.OutOfMemoryError
        return "done"

    assert e.patiently(hungry) == "done" and e.limit == 16


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


def test_resubmission_is_the_chance_that_all_are_right():
    right = np.array([[1] * 10, [1] * 9 + [0], [0] * 10], dtype=bool)
    assert resubmission(right, (1, 2, 10, 100)) == {
        "1": pytest.approx((1 + 0.9 + 0) / 3),
        "2": pytest.approx((1 + 36 / 45 + 0) / 3),
        "10": pytest.approx(1 / 3),
    }


def test_signs_of_masking_are_seen():
    noise = [0.9, 0.9, 0.9, 0.8]
    assert signs_in_sweep("eps", [0, 1, 2, 3], [0.9, 0.5, 0.2, 0.0], noise) == []
    assert "accuracy rises" in signs_in_sweep("eps", [0, 1, 2, 3], [0.9, 0.5, 0.7, 0.0], noise)[0]
    masked = signs_in_sweep("eps", [0, 1, 2, 0.5], [0.9, 0.9, 0.9, 0.88], noise)
    assert len(masked) == 2 and "does not go to zero" in masked[0] and "noise beats" in masked[1]
    assert signs_in_sweep("steps", [1, 10], [0.2, 0.5], [1, 1]) == ["one step beats many"]

    def result(noise, **attacks):
        attacks = {k.replace("_", "-"): {"accuracy": v, "target": "defence"} for k, v in attacks.items()}
        return {"noise": {"accuracy": noise}, "attacks": attacks}

    assert signs_of_masking(result(0.9, rand=0.3, square=0.6, transfer=0.8, fixed_noise=0.3)) == []
    found = signs_of_masking(result(0.7, rand=0.9, apgd=0.8, square=0.5, transfer=0.5, fixed_noise=0.1))
    assert len(found) == 4


def test_sweep_has_a_row_a_value_and_a_plot(folder, monkeypatch, capsys):
    options = ["--ckpt", "carso.pt", "--out", "swept", *TINY, "--sweep", "eot", "--pictures", "1", "--steps", "1"]
    here(evaluate, folder, options, monkeypatch, capsys)
    lines = (folder / "swept" / "sweep-eot.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["eot", "clean", "noise", "apgd-ce", "n"] and len(lines) == 5
    assert (folder / "swept" / "sweep-eot.png").stat().st_size > 1000
