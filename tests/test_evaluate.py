"""evaluate.py: the pieces, the audit on honest and planted models, and the real script on a tiny checkpoint."""

import contextlib
import copy
import dataclasses
import io
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
import torch.nn.functional as F
from conftest import DEVICE, ROOT, exit_status, fresh_carso
from torch import nn
from torch.testing import assert_close

import data as datasets
import evaluate
from attacks import measure_slope_error
from data import load, pixels
from evaluate import AGGREGATIONS, ATTACKS, BUDGETS, VIEWS, Attack, Evaluation, Seen, batched_objective, reseed, score
from models import WideResNet, load_tensors, save_tensors
from purifier import CARSO, load_carso, save_carso

SMALL = dict(
    pictures=6, steps=2, eot=2, pgd_steps=2, pgd_step_size=0.05, queries=3, targets=2, select=3, draws=4, chunk=3
)
OPTIONS = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
OPTIONS += ["--device", DEVICE]
CLEAN = ["--attack", "clean", "--eps", "0.001"]  # so near, the audit needs few points


def call(folder, *options) -> tuple[int, str]:
    """The script in this process: its exit status and what it said."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = exit_status("evaluate.py", lambda: evaluate.main([*OPTIONS, *map(str, options)]))
    return status, said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a fresh CARSO for the digits, evaluated in whole/."""
    folder = tmp_path_factory.mktemp("evaluate")
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    state = {"dataset": "digits", "data_dir": "data", "config": {"eps": 0.05}, "classes": list("0123456789")}
    save_carso(folder / "carso.pt", carso, **state)
    status, said = call(folder, "--ckpt", "carso.pt", "--out", "whole")
    assert status == 0, said
    (folder / "said.txt").write_text(said)
    return folder


def read_report(folder, name="whole") -> dict:
    return json.loads((folder / name / "report.json").read_text())


def read_rows(folder, name="whole") -> list[dict]:
    head, *lines = [line.split("\t") for line in (folder / name / "rows.tsv").read_text().splitlines()]
    return [dict(zip(head, line)) for line in lines]


def find_rights(folder, name: str, model="defence", attack="clean") -> list[str]:
    """How many draws of each picture were right."""
    rows = read_rows(folder, name)
    return [row["right"] for row in rows if (row["model"], row["attack"]) == (model, attack)]


# ------------------------------------------------------------------------------------------------------- the script


def test_report_has_the_stable_fields(folder):
    report = read_report(folder)
    fields = "checkpoint dataset n eps samples clean noise attacks robust audit config environment models"
    assert set(fields.split()) <= set(report) and set(report["attacks"]) == {"standard", "rand"}
    fields = "target accuracy interval steps eot standing seconds nonfinite_gradients zero_gradients"
    assert all(set(fields.split()) <= set(attack) for attack in report["attacks"].values())
    assert (report["n"], report["eps"], report["samples"]) == (6, 0.05, 2) and report["audit"]["passed"]
    assert {name: a["target"] for name, a in report["attacks"].items()} == {"standard": "classifier", "rand": "defence"}
    left = {path.name for path in (folder / "whole").iterdir()}
    assert left == {"report.json", "report.md", "rows.tsv", "samples.png", "config.json", "work"}
    said = (folder / "said.txt").read_text()
    assert "Reduced budget" in said and "s left" in said and "\r" not in said


def test_numbers_follow_from_the_rows(folder):
    report, labels = read_report(folder), load("digits").test_labels
    assert [*report["models"]] == ["classifier", "defence"]
    assert report["robust"] == report["models"]["defence"]["robust"]
    for model, found in report["models"].items():
        parts = {"clean": found["clean"], "noise": found["noise"], "worst": found["robust"], **found["attacks"]}
        for name, part in parts.items():
            mine = [row for row in read_rows(folder) if (row["model"], row["attack"]) == (model, name)]
            assert [(int(row["picture"]), int(row["label"])) for row in mine] == list(enumerate(labels[:6].tolist()))
            shares = [int(row["right"]) / int(row["draws"]) for row in mine]
            assert part["accuracy"] == pytest.approx(np.mean(shares))


def test_a_cascade_attacks_what_stands_and_the_worst_is_the_least(folder):
    assert call(folder, "--ckpt", "carso.pt", "--out", "all", "--no-cascade")[0] == 0
    for name, cascade in (("whole", True), ("all", False)):
        by_attack = {}
        for row in read_rows(folder, name):
            if row["model"] == "defence":
                by_attack.setdefault(row["attack"], []).append(row)
        for clean, noise, rand, worst in zip(*(by_attack[k] for k in ("clean", "noise", "rand", "worst"))):
            lost = float(clean["select"]) == 0
            assert rand["attacked"] == noise["attacked"] == ("0" if cascade and lost else "1")
            found = [float(row["select"]) for row in (clean, noise, rand) if row["attacked"] == "1"]
            assert float(worst["select"]) == min(found)
        assert any(float(clean["select"]) == 0 for clean in by_attack["clean"])  # or nothing was tested


def assert_same_result(folder, name: str) -> None:
    for file in ("rows.tsv", "samples.png"):
        assert (folder / name / file).read_bytes() == (folder / "whole" / file).read_bytes()


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_two_processes_find_what_one_does(folder):
    torchrun = "-m torch.distributed.run --nproc_per_node=2 --master-port=29611".split()
    options = ["--ckpt", "carso.pt", "--out", "two", *OPTIONS]
    command = [sys.executable, *torchrun, ROOT / "evaluate.py", *options]
    subprocess.run(command, cwd=folder, env=ONE_THREAD, timeout=240, check=True)
    assert_same_result(folder, "two")


def test_a_killed_evaluation_ends_as_if_it_had_not_been(folder):
    options = ["--ckpt", "carso.pt", "--out", "killed", *OPTIONS]
    process = subprocess.Popen([sys.executable, ROOT / "evaluate.py", *options], cwd=folder, env=ONE_THREAD)
    while process.poll() is None and not (folder / "killed" / "work" / "defence" / "rand-000000.npz").is_file():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert call(folder, *options)[0] == 0
    assert_same_result(folder, "killed")


def test_work_that_is_missing_is_made_again_and_no_other(folder):
    shutil.copytree(folder / "whole", folder / "missing")
    work = folder / "missing" / "work"
    for name in ("defence/rand-000003.npz", "classifier/clean-000000.npz", "defence/audit-end-000000.npz"):
        (work / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.npz")}
    assert call(folder, "--ckpt", "carso.pt", "--out", "missing")[0] == 0
    assert len(kept) > 10 and kept == {path: path.stat().st_mtime_ns for path in kept}
    assert_same_result(folder, "missing")


def test_work_that_is_damaged_is_named_and_left_as_it_is(folder):
    shutil.copytree(folder / "whole", folder / "damaged")
    path = folder / "damaged" / "work" / "defence" / "rand-000003.npz"
    damaged = path.read_bytes()[:-100]
    path.write_bytes(damaged)
    status, said = call(folder, "--ckpt", "carso.pt", "--out", "damaged")
    assert status == 2 and "work/defence/rand-000003.npz is damaged" in said and path.read_bytes() == damaged


def test_memory_is_bounded_and_a_lower_bound_goes_on_in_the_same_folder(folder, monkeypatch):
    """Also in AutoAttack and in the audit, which ask for gradients."""
    shutil.copytree(folder / "whole", folder / "bounded")
    for path in (folder / "bounded" / "work" / "defence").glob("*-000003.npz"):
        path.unlink()
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_: None)  # 48 reconstructions
    sizes, member_logits = [], CARSO.member_logits

    def noted(carso, x, z):
        sizes.append(len(x) * z.shape[1])
        return member_logits(carso, x, z)

    monkeypatch.setattr(CARSO, "member_logits", noted)
    assert call(folder, "--ckpt", "carso.pt", "--out", "bounded", "--limit", "4")[0] == 0
    assert max(sizes) == 4
    assert find_rights(folder, "bounded") == find_rights(folder, "whole")


def test_work_of_other_days_and_versions_is_named(folder, monkeypatch):
    shutil.copytree(folder / "whole", folder / "mixed")
    (folder / "mixed" / "work" / "defence" / "worst-000003.npz").unlink()
    monkeypatch.setattr(evaluate.time, "strftime", lambda _: "2099-01-01")
    assert call(folder, "--ckpt", "carso.pt", "--out", "mixed")[0] == 0
    (before,) = read_report(folder)["environment"]
    assert torch.__version__ in before
    later = re.sub(r"\d{4}-\d\d-\d\d$", "2099-01-01", before)
    assert read_report(folder, "mixed")["environment"] == [before, later]


@pytest.fixture(scope="module")
def others(folder):
    """Beside carso.pt: one whose pictures are gone, one of another normalisation and one of other weights, a bare
    classifier, and colour pictures."""
    carso, state = load_carso(folder / "carso.pt")
    config = carso.classifier.config | {"mean": [carso.classifier.config["mean"][0] + 0.1]}
    weights = carso.classifier.state_dict()
    carso.classifier = WideResNet(**config).eval()
    carso.classifier.load_state_dict(weights)
    save_carso(folder / "darker.pt", carso, **state)
    carso, state = load_carso(folder / "carso.pt")
    save_carso(folder / "moved.pt", carso, **state | {"dataset": "gone.npz"})
    normalisation = {"mean": carso.classifier.mean.flatten(), "std": carso.classifier.std.flatten()}
    save_tensors(folder / "classifier.pt", {"state_dict": carso.classifier.state_dict() | normalisation})
    carso.classifier.logits.bias.data += 1
    save_carso(folder / "changed.pt", carso, **state)
    pictures, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    np.savez(folder / "colour.npz", test_images=pictures, test_labels=labels)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--ckpt", "nothing.pt"], "no file nothing.pt"),
        (["--ckpt", "classifier.pt"], "classifier.pt does not say what it was trained on: add --dataset"),
        ([], "either --ckpt or --published"),
        (["--published", "cifar10", "--dataset", "digits"], "leave out --dataset"),
        (["--ckpt", "carso.pt", "--eps", "8"], "--eps 8 is no distance between pixels in [0, 1]: write 8/255"),
        (["--ckpt", "carso.pt", "--samples", "-1"], "--samples -1 is not 0 or more"),
        (["--ckpt", "carso.pt", "--steps", "0"], "--steps 0 is not positive"),
        (["--ckpt", "carso.pt", "--limit", "0"], "--limit 0 is not positive"),
        (["--ckpt", "carso.pt", "--dataset", "colour.npz"], "colour.npz has pictures (3, 32, 32)"),
        (["--ckpt", "moved.pt"], "moved.pt says that it was trained on gone.npz, which is not here: add --dataset"),
        (["--ckpt", "carso.pt", "--out", "whole", "--draws", "5"], "whole holds other settings (draws: 4 there, 5 now"),
        (["--ckpt", "changed.pt", "--out", "whole"], "whole holds other settings (weights: "),
        (["--ckpt", "darker.pt", "--out", "whole"], "whole holds other settings (normalisation: "),
        (["--ckpt", "classifier.pt", "--dataset", "digits", "--view", "naive-odds"], "are for a CARSO"),
        (["--ckpt", "classifier.pt", "--dataset", "digits", "--samples", "4"], "are for a CARSO"),
        (["--ckpt", "classifier.pt", "--dataset", "digits", "--aggregation", "mean-logits"], "are for a CARSO"),
    ],
)
def test_wrong_input_gets_a_sentence_and_status_2(folder, others, options, sentence):
    before = (folder / "whole" / "config.json").read_bytes()
    status, said = call(folder, *options)
    assert status == 2 and said.startswith("evaluate.py: ") and said.count("\n") == 1, said
    assert sentence in said
    assert (folder / "whole" / "config.json").read_bytes() == before


def test_the_authors_head_fails_the_audit_with_status_3(folder):
    carso, state = load_carso(folder / "carso.pt")
    carso.classifier.logits.weight.data *= 30  # logits as large as those of a trained network
    save_carso(folder / "confident.pt", carso, **state)
    options = ["--ckpt", "confident.pt", "--pictures", "3"]
    status, said = call(folder, *options, "--attack", "rand", "--view", "naive-odds", "--out", "odds")
    assert status == 3 and "outputs that are not finite" in said and "Audit: **failed**" in said
    assert "passed" not in said and "classifier | **worst of all" not in said  # which nothing attacked
    assert call(folder, *options, *CLEAN, "--out", "even")[0] == 0
    assert find_rights(folder, "odds") == find_rights(folder, "even")  # whatever attacks see, the decision is the same


def test_another_aggregation_is_evaluated(folder):
    options = ["--aggregation", "mean-probabilities", "--attack", "pgd-eot", "--pictures", "3", "--out", "mean"]
    assert call(folder, "--ckpt", "carso.pt", *options)[0] == 0
    assert "Decision: mean-probabilities" in (folder / "mean" / "report.md").read_text()


def test_one_reconstruction_of_z_0_is_deterministic_and_asked_once(folder):
    options = ["--samples", "0", "--attack", "pgd-eot", "--pictures", "3", "--out", "zero"]
    assert call(folder, "--ckpt", "carso.pt", *options)[0] == 0
    assert read_report(folder, "zero")["attacks"]["pgd-eot"]["eot"] == 1
    assert {row["draws"] for row in read_rows(folder, "zero")} == {"1"}


def test_a_classifier_alone_is_evaluated(folder, others):
    options = ["--ckpt", "classifier.pt", "--dataset", "digits", "--eps", "0.05", "--out", "classifier"]
    status, said = call(folder, *options)
    assert status == 0 and "The classifier keeps" in said and "| defence" not in said
    assert read_rows(folder, "classifier") == [row for row in read_rows(folder) if row["model"] == "classifier"]

    weights = load_tensors(folder / "classifier.pt")["state_dict"]
    save_tensors(folder / "darker.pt", {"state_dict": weights | {"mean": weights["mean"] + 0.1}})
    status, said = call(folder, *options, "--ckpt", "darker.pt")
    assert status == 2 and "classifier holds other settings (normalisation: " in said


def test_a_model_that_nothing_attacked_has_no_worst(folder):
    """Of one that nothing attacked the report must not say how robust it is, nor compare it with the other."""
    options = ["--attack", "standard", "--pictures", "2", "--steps", "1", "--queries", "2", "--targets", "1"]
    assert call(folder, "--ckpt", "carso.pt", *options, "--out", "standard")[0] == 0
    said = (folder / "standard" / "report.md").read_text()
    assert re.findall(r"\| (\w+) \| \*\*worst of all", said) == ["classifier"]
    assert "Nothing attacked the defence: add" in said
    assert "The difference" not in said and "to_classifier" not in read_report(folder, "standard")


def test_test_pictures_alone_are_enough_and_keep_their_numbers(folder):
    labels = DIGITS.test_labels[:6].numpy()  # in the order of their classes, and so they are shuffled
    np.savez(folder / "corrupted.npz", test_images=255 - DIGITS.test_images[:6, 0].numpy(), test_labels=labels)
    options = ["--dataset", "corrupted.npz", *CLEAN, "--out", "corrupted"]
    assert call(folder, "--ckpt", "carso.pt", *options)[0] == 0
    rows = read_rows(folder, "corrupted")[:6]
    assert all(labels[int(row["picture"])] == int(row["label"]) for row in rows)
    assert sorted(int(row["picture"]) for row in rows) == [*range(6)] != [int(row["picture"]) for row in rows]


def test_a_carso_that_says_nothing_of_its_training_is_evaluated(folder):
    save_carso(folder / "bare.pt", load_carso(folder / "carso.pt")[0])
    options = ["--dataset", "digits", "--pictures", "2", *CLEAN, "--out", "bare"]
    assert call(folder, "--ckpt", "bare.pt", *options)[0] == 0
    assert "Nothing attacked the defence" in (folder / "bare" / "report.md").read_text()


@pytest.mark.parametrize("trained_on", ["same", "other"])
def test_pictures_that_may_have_been_trained_on_are_pointed_out(folder, trained_on):
    """The fingerprint of the training pictures is in the checkpoint."""
    carso, state = load_carso(folder / "carso.pt")
    images = DIGITS.train_images if trained_on == "same" else 255 - DIGITS.train_images
    state["fingerprint"] = datasets.fingerprint(images, DIGITS.train_labels, DIGITS.classes)
    save_carso(folder / f"{trained_on}.pt", carso, **state)
    options = [*CLEAN, "--pictures", "2", "--out", trained_on]
    assert call(folder, "--ckpt", f"{trained_on}.pt", *options)[0] == 0
    notes = "".join(read_report(folder, trained_on)["notes"])
    assert ("was trained on other pictures than the training split" in notes) == (trained_on == "other")


def test_a_published_defence_is_fetched_checked_and_evaluated(folder, monkeypatch):
    """Its four files are tested in test_purifier.py; here a stand-in for them."""
    carso = load_carso(folder / "carso.pt")[0]
    monkeypatch.setattr(evaluate, "fetch_published", lambda name, data_dir: folder)
    monkeypatch.setattr(evaluate, "load_published", lambda *_: copy.deepcopy(carso))
    monkeypatch.setattr(evaluate.datasets, "load", lambda *_: DIGITS)
    options = ["--published", "cifar10", *CLEAN, "--pictures", "2", "--out", "published"]
    status, said = call(folder, *options)
    assert status == 2 and "not 92.2%" in said  # it is not what was published
    monkeypatch.setattr(evaluate, "PUBLISHED", {"cifar10": {"its": ("address", 0.0)}})
    assert call(folder, *options)[0] == 0


DIGITS = load("digits")

# ----------------------------------------------------------------------------------------------------------- pieces


def test_one_smaller_number_makes_a_budget_a_reduced_one():
    few_pictures = BUDGETS["paper"] | {"pictures": 100, "chunk": 10}
    assert not evaluate.is_reduced(few_pictures)
    for number in ("steps", "eot", "pgd_steps", "queries", "targets", "select", "draws"):
        assert evaluate.is_reduced(few_pictures | {number: few_pictures[number] - 1}), number


def test_one_draw_of_a_deterministic_model_is_no_reduced_budget():
    assert not evaluate.is_reduced(BUDGETS["paper"] | evaluate.ONE_DRAW)
    assert evaluate.is_reduced(BUDGETS["paper"] | {"eot": 1, "select": 1, "draws": 1})
    assert evaluate.is_reduced(BUDGETS["paper"] | evaluate.ONE_DRAW | {"steps": 10})


def test_eot_in_one_batch_is_the_mean_of_single_draws(tiny_carso):
    x, y = torch.rand(2, 1, 32, 32).double(), torch.tensor([1, 2])
    seen = Seen(tiny_carso.double(), samples=3)
    z = torch.randn(2, 4 * 3, 4).double()
    losses, gradient = batched_objective(seen, y, "ce", 4, z)(x)
    singles = [batched_objective(seen, y, "ce", 1, part)(x) for part in z.split(3, dim=1)]
    assert_close(losses, torch.stack([l for l, _ in singles]).mean(0))
    assert_close(gradient, torch.stack([g for _, g in singles]).mean(0))
    assert seen.count["gradients"] == 2 * (1 + 4)


def test_the_memory_limit_changes_nothing(tiny_carso):
    x, y, z = torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 2]), torch.randn(3, 6 * 2, 4)
    found = [batched_objective(Seen(tiny_carso, samples=2, limit=n), y, "ce", 6, z)(x) for n in (1000, 7, 1)]
    scores = [score(Seen(tiny_carso, samples=2, limit=n), x, y, 6, z) for n in (1000, 7, 1)]
    for (losses, gradient), right in zip(found[1:], scores[1:]):
        assert_close(losses, found[0][0])
        assert (gradient - found[0][1]).norm() < 1e-3 * gradient.norm()
        assert torch.equal(right, scores[0])


def test_views_decide_alike():
    logits = torch.randn(200, 8, 10, generator=torch.Generator().manual_seed(0))
    small = 0.1 * logits  # where the naive view does not saturate
    assert torch.equal(VIEWS["naive-odds"](small).argmax(1), AGGREGATIONS["robust"](small).argmax(1))


@pytest.mark.parametrize("name", ["noise", "pgd-eot", "rand", "standard"])  # lab adds others, and tests them
def test_every_attack_stays_in_the_ball_and_follows_its_seed(tiny_carso, name):
    x, y = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    found = []
    for _ in range(2):
        reseed(1, tiny_carso)
        seen = Seen(tiny_carso.classifier if name == "standard" else tiny_carso, samples=3)
        candidates = ATTACKS[name].run(seen, x, y, SMALL | {"eps": 0.1})
        assert candidates.shape[1:] == x.shape and (candidates - x).abs().max() <= 0.1 + 1e-6
        assert candidates.min() >= 0 and candidates.max() <= 1
        found.append(candidates)
    assert torch.equal(*found) and all(p.grad is None for p in tiny_carso.parameters())


def test_rand_attacks_also_what_a_draw_mislabels(networks):
    """AutoAttack's own wrapper gives such pictures back clean."""
    model = Around(networks["max-pool"], lambda m, x: m(x) * (2.0 * (torch.rand(len(x), 1) > 0.5) - 1))
    x, y = pixels(DIGITS.test_images[:24]), DIGITS.test_labels[:24]
    torch.manual_seed(0)
    candidates = ATTACKS["rand"].run(Seen(model), x, y, SMALL | {"eps": 0.1})
    assert len(candidates) == 4  # of each loss the point of the largest one, and the last that fooled a draw
    for candidate in candidates:
        assert (candidate != x).flatten(1).any(1).all()


def test_each_gradient_is_counted_once(tiny_carso):
    """AutoAttack asks for all draws of a step from one leaf."""
    seen = Seen(tiny_carso, samples=3)
    ATTACKS["rand"].run(seen, torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 2]), SMALL | {"eps": 0.1})
    steps_and_start, losses = SMALL["steps"] + 1, 2
    assert seen.count["gradients"] == 3 * losses * steps_and_start * SMALL["eot"]


def test_nan_is_neither_a_candidate_nor_an_answer():
    x = torch.full((2, 1, 4, 4), 0.5)
    broken = x.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert evaluate.is_allowed(x[None], x, 0.1) and not evaluate.is_allowed(broken[None], x, 0.1)
    model = Around(None, lambda _, x: torch.full((len(x), 3), torch.nan))
    assert not score(Seen(model), x, torch.zeros(2, dtype=torch.int64), 2).any()


def test_wilson_interval_of_textbook_values():
    assert_close(evaluate.wilson(0.5, 100), [0.40383, 0.59617], rtol=1e-4, atol=0)
    low, high = evaluate.wilson(0.0, 20)
    assert low == 0 and high == pytest.approx(0.16113, rel=1e-3)


# --------------------------------------------------------------------------------------- choosing and scoring, masking


class Coin(nn.Module):
    """A stochastic defence of one reconstruction: right where the noise's first number is above a threshold."""

    def __init__(self, threshold=0.0):
        super().__init__()
        self.threshold, self.samples, self.weight = threshold, 1, nn.Parameter(torch.ones(1))
        self.generator = torch.Generator().manual_seed(0)

    def manual_seed(self, seed):
        self.generator.manual_seed(seed)

    def draw(self, x, samples):
        return torch.randn(len(x), samples, 1, generator=self.generator, dtype=x.dtype)

    def member_logits(self, x, z):
        right = z + x.mean((1, 2, 3))[:, None, None] - self.threshold
        return torch.cat([right, -right], 2) * self.weight


def make_evaluation(model, folder, attacks=None, n=40, data=None, **changes) -> Evaluation:
    settings = BUDGETS["reduced"] | dict(eps=0.1, samples=1, aggregation="robust", view=None, seed=0, pictures=n)
    settings |= dict(cascade=True, bf16=False, chunk=20, select=20, draws=20) | changes
    images, labels = torch.full((n, 1, 32, 32), 128, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    if data:
        images, labels = data.test_images[:n], data.test_labels[:n]
    attacks = {"clean": ATTACKS["clean"]} | (attacks or {}) | {"noise": ATTACKS["noise"]}
    return Evaluation("model", model, images, labels, attacks, settings, folder, torch.device("cpu"))


def finish(e: Evaluation) -> dict:
    """The report on the one model."""
    assert evaluate.run_chunks([e])
    about = {"checkpoint": "c", "dataset": "d", "notes": []}
    return evaluate.write_report([e], about, list(range(len(e.labels))))


def read(e: Evaluation, name: str, start: int) -> dict:
    return datasets.load_npz(e.find_path(name, start))


def test_the_score_is_on_other_noise_than_the_selection(tmp_path):
    """Of many candidates that are all alike the selection takes the luckiest; fresh draws are not fooled."""
    many = Attack(lambda seen, x, y, settings: torch.stack([(x + 0.001 * k).clamp(0, 1) for k in range(-5, 5)]))
    e = make_evaluation(Coin(0.5), tmp_path, {"many": many}, n=100)
    report = finish(e)
    assert report["robust"]["accuracy"] == pytest.approx(0.5, abs=0.06)
    same_noise = np.concatenate([read(e, "many", start)["select"] for start in e.starts])
    fresh = np.concatenate([read(e, "many", start)["right"].mean(1) for start in e.starts])
    assert abs(np.corrcoef(same_noise, fresh)[0, 1]) < 0.5  # else it is the noise of the selection
    assert report["robust"]["least"] <= report["robust"]["accuracy"]


def test_all_candidates_of_a_picture_see_the_same_noise(tmp_path):
    e = make_evaluation(Coin(0.5), tmp_path, {"same": Attack(lambda seen, x, y, settings: torch.stack([x] * 8))})
    finish(e)
    clean, same = ([read(e, name, start)["select"] for start in e.starts] for name in ("clean", "same"))
    stood = np.concatenate(clean) > 0
    assert np.array_equal(np.concatenate(clean)[stood], np.concatenate(same)[stood])


def shift(distance):
    return Attack(lambda seen, x, y, settings: (x + distance)[None])


def test_the_worst_is_the_candidate_with_the_least_share(tmp_path):
    """Coin is right the more often, the brighter a picture is."""
    e = make_evaluation(Coin(0.5), tmp_path, {"brighter": shift(0.1), "darker": shift(-0.1), "as it is": shift(0.0)})
    finish(e)
    for start in e.starts:
        shares = {name: read(e, name, start) for name in ("brighter", "darker", "as it is", "clean")}
        worst = read(e, "worst", start)["adversarial"].mean((1, 2, 3)).round(3)
        found = np.where([f["attacked"] for f in shares.values()], [f["select"] for f in shares.values()], np.inf)
        assert (worst[found.min(0) < found[[0, 2, 3]].min(0)] == np.float32(0.402)).all()
        assert (worst[found.min(0) == found[0]] == np.float32(0.602)).all()  # among equals the first one
    assert (worst == np.float32(0.402)).any()


def test_an_attack_counts_with_its_best_candidate(tmp_path):
    both = Attack(lambda seen, x, y, settings: torch.stack([x + 0.1, x - 0.1]))
    attacks = {"brighter": shift(0.1), "darker": shift(-0.1), "both": both}
    e = make_evaluation(Coin(0.5), tmp_path, attacks, cascade=False)
    finish(e)
    brighter, darker, found = (read(e, name, 0)["select"] for name in attacks)
    assert np.array_equal(found, np.minimum(brighter, darker)) and (brighter > darker).any()


def test_the_audit_looks_where_the_attack_ended(tmp_path, networks):
    """Only where the attack arrives is the gradient a lie."""

    def lie(m, x):
        return torch.where((x.mean((1, 2, 3)) < 0.43)[:, None], m(Lie.apply(x, lambda g: -g)), m(x))

    e = make_evaluation(Around(networks["max-pool"], lie), tmp_path, {"darker": shift(-0.1)}, n=6)
    e.labels[:] = networks["max-pool"](pixels(e.images[:1])).argmax()
    messages = finish(e)["audit"]["messages"]
    assert messages and all("where the attacks ended" in message for message in messages), messages


def test_the_report_needs_no_pictures_in_memory(tmp_path):
    e = make_evaluation(Coin(), tmp_path, n=3)
    finish(e)
    assert not any("adversarial" in table for table in evaluate.gather(e).values())


def test_an_attack_that_leaves_the_ball_is_a_fault(tmp_path):
    e = make_evaluation(Coin(), tmp_path, {"far": Attack(lambda seen, x, y, settings: (x + 0.2)[None])})
    with pytest.raises(RuntimeError, match="far left the eps-ball"):
        finish(e)


def test_a_model_that_is_no_better_than_guessing_is_pointed_out(tmp_path):
    finish(make_evaluation(Coin(5.0), tmp_path))
    assert "No better than always answering the commonest class (100.0 %)" in (tmp_path / "report.md").read_text()


# ----------------------------------------------------------------------------------- the audit, and planted failures


class Around(nn.Module):
    """A model with something between it and its caller."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.calls = model, change, 0

    def forward(self, x):
        self.calls += 1
        return self.change(self.model, x)


class Lie(torch.autograd.Function):
    """x, with a gradient that how(gradient) makes up."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.how(gradient), None


class MedianFilter(nn.Module):
    def forward(self, x):
        patches = F.unfold(F.pad(x, [1] * 4, mode="reflect"), 3).view(len(x), 9, -1)
        return patches.median(1).values.view_as(x)


def make_cnn(pool=nn.MaxPool2d, bias=True) -> nn.Module:
    layers = nn.Conv2d(1, 8, 3, 2, 1, bias=bias), nn.ReLU(), pool(2), nn.Conv2d(8, 16, 3, 1, 1, bias=bias), nn.ReLU()
    return nn.Sequential(*layers, pool(2), nn.Flatten(), nn.Linear(256, 10, bias=bias))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.read = nn.Linear(64, 32), nn.Linear(512, 10)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        tokens = self.embed(F.unfold(x, 8, stride=8).transpose(1, 2))
        return self.read((tokens + self.attend(tokens, tokens, tokens)[0]).flatten(1))


def train_on_digits(network: nn.Module, steps=100) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        rows = torch.randint(0, len(DIGITS.train_labels), (64,))
        loss = F.cross_entropy(network(pixels(DIGITS.train_images[rows])), DIGITS.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    built = {"max-pool": make_cnn(), "no bias": make_cnn(bias=False), "average": make_cnn(nn.AvgPool2d)}
    built |= {"attention": Attention(), "median filter": nn.Sequential(MedianFilter(), make_cnn())}
    return {name: train_on_digits(network) for name, network in built.items()}


def find_faults(model: nn.Module, folder, **changes) -> set[str]:
    """The faults that the audit finds in the pictures of a short evaluation."""
    short = dict(pgd_steps=5, pgd_step_size=0.1, eot=1, select=2, draws=1, chunk=24, eps=0.2) | changes
    e = make_evaluation(model, folder, {"pgd-eot": ATTACKS["pgd-eot"]}, n=24, data=DIGITS, **short)
    assert evaluate.run_chunks([e])
    return {fault for fault in evaluate.find_faults(e, evaluate.gather(e)) if " pictures have " in fault}


HONEST = {
    "as it is": lambda net: net,
    "clamps its input": lambda net: Around(net, lambda m, x: m(x.clamp(0, 1))),
    "resizes": lambda net: Around(net, lambda m, x: m(F.interpolate(F.interpolate(x, 24, mode="bilinear"), 32))),
    "noise": lambda net: Around(net, lambda m, x: m(x + 0.1 * torch.randn_like(x))),
    "logits of 1,000": lambda net: Around(net, lambda m, x: 1000 * m(x)),
    "probabilities": lambda net: Around(net, lambda m, x: m(x).softmax(1)),
    "fine levels, straight through": lambda net: Around(
        net, lambda m, x: m(x + ((255 * x).round() / 255 - x).detach())
    ),
    "bfloat16 inside": lambda net: Around(net, lambda m, x: m(x.bfloat16().to(x))),
    "a steep sine": lambda net: Around(net, lambda m, x: m(x + 0.1 * torch.sin(30 * x))),
}


@pytest.mark.parametrize("kind", HONEST)
def test_the_audit_accuses_no_honest_model(networks, tmp_path, kind):
    assert not find_faults(HONEST[kind](networks["max-pool"]), tmp_path)


@pytest.mark.parametrize("name", ["no bias", "attention", "median filter", "ensemble"])
def test_the_audit_accuses_no_honest_network(networks, tmp_path, name):
    pair = nn.ModuleList([networks["max-pool"], networks["average"]])
    model = Around(pair, lambda m, x: (m[0](x) + m[1](x)) / 2) if name == "ensemble" else networks[name]
    assert not find_faults(model, tmp_path)
    assert not find_faults(model, tmp_path / "bf16", bf16=True)


def compute_in_bfloat16(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m(x).to(x.dtype)


def test_rounding_inside_a_network_is_no_hidden_slope(tmp_path):
    """On the way to a random corner of a small ball the answer changes by little more than bfloat16 rounds. What is
    planted in such a network is still seen."""
    torch.manual_seed(0)
    network = train_on_digits(Attention())
    small = dict(eps=2 / 255, pgd_step_size=1 / 255)
    assert not find_faults(Around(network, compute_in_bfloat16), tmp_path / "honest", **small)
    change, sentence = PLANTED["one pixel in 20"]
    masked = Around(network, lambda m, x: change(lambda x: compute_in_bfloat16(m, x), x))
    assert any(sentence in fault for fault in find_faults(masked, tmp_path / "masked", **small))


def test_the_audit_accuses_no_carso(tiny_carso, tmp_path):
    data = dataclasses.replace(DIGITS, test_labels=DIGITS.test_labels % 5)
    for model in (tiny_carso, tiny_carso.classifier):
        e = make_evaluation(model, tmp_path / type(model).__name__, n=6, data=data, samples=3, eps=0.03)
        assert finish(e)["audit"]["passed"]


FIXED = F.normalize(torch.randn(1024, generator=torch.Generator().manual_seed(1)), dim=0).view(1, 1, 32, 32)
KEPT = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.05).float()
UNEXPLAINED, ZERO = "do not explain", "exactly zero"


def quantise(x: torch.Tensor) -> torch.Tensor:
    return (4 * x).round() / 4


def add_random_linear(logits: torch.Tensor, x: torch.Tensor, size: float) -> torch.Tensor:
    return logits + size * (x * FIXED).sum((1, 2, 3))[:, None] * torch.arange(10).to(x)


def attack_inside(m, x: torch.Tensor, step: float) -> torch.Tensor:
    """Published defences: the picture moves by signed steps towards (step < 0: away from) the model's own answer."""
    moved, answer = x.detach(), m(x).argmax(1).detach()
    for _ in range(5):
        with torch.enable_grad():
            asked = moved.clone().requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(m(asked), answer), asked)[0]
        moved = moved - step * gradient.sign()
    return m(x + (moved - x).detach())


def vote(m, x: torch.Tensor) -> torch.Tensor:
    """Hard votes of shifted pictures, and a little of one soft answer, which has a gradient."""
    return sum(F.one_hot(m(x.roll(k, 3)).argmax(1), 10).to(x) for k in (-1, 0, 1)) + 1e-3 * m(x)


PLANTED = {
    "flipped": (lambda m, x: m(Lie.apply(x, lambda g: -g)), UNEXPLAINED),
    "shrunk and flipped": (lambda m, x: m(Lie.apply(x, lambda g: -1e-9 * g)), UNEXPLAINED),
    "on one direction": (lambda m, x: m(Lie.apply(x, lambda g: (g * FIXED).sum((1, 2, 3), True) * FIXED)), UNEXPLAINED),
    "one pixel in 20": (lambda m, x: m(Lie.apply(x, lambda g: g * KEPT)), UNEXPLAINED),
    "random": (lambda m, x: m(Lie.apply(x, torch.randn_like)), UNEXPLAINED),
    "detached": (lambda m, x: m(x.detach()) + 0 * x.sum(), ZERO),
    "detached in a part": (lambda m, x: m(x) + m(x.detach()), UNEXPLAINED),
    "argmax": (lambda m, x: F.one_hot(m(x).argmax(1), 10).to(x) + 0 * x.sum(), ZERO),
    "saturated": (lambda m, x: (1e6 * m(x)).softmax(1), ZERO),
    "NaN": (lambda m, x: m(x) * torch.nan, "not finite"),
    "infinite": (lambda m, x: m(x) / 0, "not finite"),
    "coarse levels, straight through": (lambda m, x: m(x + ((8 * x).round() / 8 - x).detach()), UNEXPLAINED),
    # The true derivative of a fast wiggle leads nowhere: 96 % seemed to stand where at most 44 did.
    "a fast sine": (lambda m, x: m(x + 0.02 * torch.sin(2000 * x)), UNEXPLAINED),
    "votes": (vote, UNEXPLAINED),
    "attacks inside": (lambda m, x: attack_inside(m, x, -0.03), UNEXPLAINED),
    "counter-attacks inside": (lambda m, x: attack_inside(m, x, 0.03), UNEXPLAINED),
    "bright pictures alone": (
        lambda m, x: torch.where((x.mean((1, 2, 3)) > 0.36)[:, None], m(Lie.apply(x, lambda g: -g)), m(x)), UNEXPLAINED
    ),
    "steps, and 1e-9 of a slope": (lambda m, x: add_random_linear(m(quantise(x)), x, 1e-9), UNEXPLAINED),
    "steps, and 0.01 of a slope": (lambda m, x: add_random_linear(m(quantise(x)), x, 0.01), UNEXPLAINED),
    "steps and a slope, for bright pictures alone": (
        lambda m, x: torch.where((x.mean((1, 2, 3)) > 0.36)[:, None], add_random_linear(m(quantise(x)), x, 1e-9), m(x)),
        UNEXPLAINED,
    ),
    "in float32 alone": (lambda m, x: m(Lie.apply(x, lambda g: -g) if x.dtype == torch.float32 else x), UNEXPLAINED),
}  # fmt: skip


def test_pictures_that_did_not_move_accuse_nobody(networks):
    x, y = pixels(DIGITS.test_images[:8]), DIGITS.test_labels[:8]
    errors = measure_slope_error(networks["max-pool"], x, (x + 1e-7).clamp(max=1), y)
    assert (errors < 0.2).all() and (measure_slope_error(networks["max-pool"], x, x, y) == 0).all()


def test_one_flat_loss_among_others_fails_no_audit(networks, tmp_path):
    """Cross-entropy of logits of 10,000 is flat, DLR is not."""
    model = Around(networks["max-pool"], lambda m, x: 1e4 * m(x))
    attacks = {name: ATTACKS[name] for name in ("pgd-eot", "rand")}
    passed = finish(make_evaluation(model, tmp_path / "both", attacks, n=12, data=DIGITS, steps=5, pgd_steps=3))
    assert passed["audit"]["passed"] and passed["attacks"]["pgd-eot"]["zero_gradients"] > 0.5
    alone = finish(make_evaluation(model, tmp_path / "one", {"pgd-eot": ATTACKS["pgd-eot"]}, n=12, data=DIGITS))
    assert any("most gradients of every attack were zero" in message for message in alone["audit"]["messages"])


@pytest.mark.parametrize("kind", PLANTED)
def test_the_audit_catches_a_planted_failure(networks, tmp_path, kind):
    change, sentence = PLANTED[kind]
    found = find_faults(Around(networks["max-pool"], change), tmp_path)
    assert any(sentence in fault for fault in found), found


def test_a_gradient_that_is_right_along_itself_alone_is_seen_before_any_attack(networks, tmp_path):
    """The way uphill moves only the pixels that have a gradient; the way to a random corner moves all."""
    model = Around(networks["max-pool"], lambda m, x: m(Lie.apply(x, lambda g: g * KEPT)))
    e = make_evaluation(model, tmp_path, n=24, data=DIGITS, eps=0.2)
    found = evaluate.audit_start(e, 0, pixels(e.images), e.labels)
    assert found[evaluate.UNEXPLAINED].float().mean() > 0.5


def test_a_defence_that_optimises_inside_is_caught_under_another_seed(networks, tmp_path):
    """Differences along the gradient found it with every other seed: its slope is right almost everywhere."""
    model = Around(networks["max-pool"], lambda m, x: attack_inside(m, x, 0.03))
    assert find_faults(model, tmp_path, seed=1)


def test_a_lie_in_bfloat16_alone_is_seen_where_attacks_search_in_it(networks, tmp_path):
    def lie(m, x):
        return m(Lie.apply(x, lambda g: -g) if torch.is_autocast_enabled("cpu") else x)

    model = Around(networks["max-pool"], lie)
    assert not find_faults(model, tmp_path / "float32") and find_faults(model, tmp_path / "bf16", bf16=True)


def test_a_model_that_remembers_fails_the_audit(networks, tmp_path):
    """A quota that is used up: the clean pictures are answered otherwise in the end."""
    model = Around(networks["max-pool"], None)
    model.change = lambda m, x: m(x) if model.calls < 40 else m(x).roll(1, 1)
    assert any("other answers than at the beginning" in fault for fault in find_faults(model, tmp_path))


def test_one_masked_picture_of_a_chunk_fails_the_evaluation(tmp_path, networks):
    brightness = pixels(DIGITS.test_images[:12]).mean((1, 2, 3))

    def lie(m, x):
        is_brightest = x.mean((1, 2, 3)) > brightness.max() - 0.02
        return torch.where(is_brightest[:, None], m(x.detach()) + 0 * m(x), m(x))

    e = make_evaluation(Around(networks["max-pool"], lie), tmp_path, n=12, data=DIGITS, eps=0.02)
    assert not finish(e)["audit"]["passed"]


def test_chunks_that_the_audit_cannot_look_into_stand_beside_others(tmp_path, networks):
    """Of a chunk without one finite picture there is no derivative to check; the report says what there is."""
    bright = float(pixels(DIGITS.test_images[:12]).mean((1, 2, 3)).median())

    def break_down(m, x):
        return torch.where((x.mean((1, 2, 3)) > bright)[:, None], torch.nan, m(x))

    model = Around(networks["max-pool"], break_down)
    messages = finish(make_evaluation(model, tmp_path, n=12, data=DIGITS, eps=0.02, chunk=1))["audit"]["messages"]
    assert any(re.search("[5-7] of 12 pictures have outputs that are not finite", message) for message in messages)
    assert not any(UNEXPLAINED in message for message in messages)


def test_nan_in_the_middle_of_an_attack_fails_the_evaluation(tmp_path, networks):
    model = Around(networks["max-pool"], None)
    model.change = lambda m, x: m(x) * (torch.nan if model.calls % 7 == 5 and x.requires_grad and len(x) < 12 else 1.0)
    e = make_evaluation(model, tmp_path, {"pgd-eot": ATTACKS["pgd-eot"]}, n=12, data=DIGITS)
    messages = finish(e)["audit"]["messages"]
    assert any("pgd-eot: outputs or gradients were not finite" in message for message in messages)
