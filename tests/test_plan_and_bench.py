"""What an evaluation costs, foretold (lab/plan.py) and counted; lab/bench.py; how strong our APGD is."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, fresh_carso
from test_speed import SMALL
from test_train import here, refusal
from torch import nn
from torch.testing import assert_close

import evaluate
from attacks import apgd, objective, pgd, random_point
from evaluate import ATTACKS
from lab import bench, plan
from lab.checkpoints import save_checkpoint
from lab.presets import PRESETS, Budget
from lab.suite import Target
from lab.units import Evaluation

X = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])
BUDGET = Budget(n=3, steps=4, eot=2, pgd_steps=5, queries=6, targets=2, select=2, draws=3, chunk=3)


def evaluation(model, folder=None, eps=0.1, labels=Y, budget=BUDGET, limit=64) -> Evaluation:
    config = dict(
        eps=eps, samples=getattr(model, "samples", 1), view="logsumexp", aggregation="robust", seed=0, classes=5
    )
    images, config = (255 * X).to(torch.uint8), config | {"search_precision": "fp32"}
    return Evaluation(model, images, labels, config, budget, folder, "cpu", limit, ATTACKS)


# ------------------------------------------------------------------------------------------------------- lab/plan.py


def really_made(e: Evaluation, name: str, monkeypatch) -> Counter:
    """(gradient?, bare classifier?, draws at once) -> calls for all pictures, of the real attack on the real model."""
    calls, real = Counter(), Target.draws

    def draws(self, x, n, z):
        bare = self.model is getattr(e.defence, "classifier", None)
        gradient = x.requires_grad and torch.is_grad_enabled()
        if z is None:  # a model without members is fed every picture n times
            calls[gradient, bare, 1] += n * len(x)
        else:
            calls[gradient, bare, z.shape[1] // e.samples] += len(x)
        return real(self, x, n, z)

    monkeypatch.setattr(Target, "draws", draws)
    e.attack(name, 0)
    return calls


EXACT = [name for name in ATTACKS if name not in ("standard", "rand", "square")]  # the others stop where they succeed


@pytest.mark.parametrize("model", ["carso", "classifier"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_plan_counts_what_attacks_do(tiny_carso, tmp_path, monkeypatch, name, model):
    e = evaluation(tiny_carso if model == "carso" else tiny_carso.classifier, tmp_path)
    if ATTACKS[name].needs and not hasattr(e.defence, ATTACKS[name].needs):
        pytest.skip(f"evaluate.py skips it, too: the model has no {ATTACKS[name].needs}")
    planned, real = plan.count_calls(e, name, classes=5), really_made(e, name, monkeypatch)
    assert real.keys() <= planned.keys()
    if name in EXACT:
        for call, count in planned.items():
            assert real[call] == 3 * count if call[0] else real[call] <= 3 * count, call  # a race has fewer finalists
    else:
        assert all(count <= 3 * planned[call] + 8 for call, count in real.items())  # checks of the whole batch


def test_attacks_that_find_nothing_do_all_that_was_planned(tiny_carso, tmp_path, monkeypatch):
    with torch.no_grad():
        labels = tiny_carso.classifier((255 * X).to(torch.uint8) / 255).argmax(1)
    e = evaluation(tiny_carso.classifier, tmp_path, eps=1e-6, labels=labels)
    for name in ("standard", "rand", "square"):
        planned, real = plan.count_calls(e, name, classes=5), really_made(e, name, monkeypatch)
        for call in planned:
            assert real[call] == pytest.approx(3 * planned[call], abs=8), (name, call)
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["standard", "rand", "pgd-eot", "square"])
def test_short_rehearsals_tell_of_long_searches(tiny_carso, name):
    e = evaluation(tiny_carso, budget=replace(BUDGET, steps=11, pgd_steps=9, queries=23))
    assert plan.count_calls(e, name, classes=5) == plan.rehearse(e, name, 5, e.budget)


def test_draws_that_do_not_fit_the_limit_are_several_calls(tiny_carso):
    e = evaluation(tiny_carso, budget=replace(BUDGET, eot=5, pgd_steps=1), limit=6)  # two draws of three members
    calls = plan.count_calls(e, "pgd-eot", classes=5)
    assert calls[True, False, 2] == 2 and calls[True, False, 1] == 1


def test_a_plan_of_the_papers_budget_is_quick_and_touches_nothing(tiny_carso):
    """The stand-in's attacks leave the model alone: it is run for FLOP and for its rate only."""
    e, made = evaluation(tiny_carso, budget=Budget()), []

    def call(x, y, gradient, classifier, draws):
        made.append((gradient, classifier, draws))
        return torch.zeros(len(x), draws, 5) if not gradient else torch.zeros_like(x)

    rows = {row["attack"]: row for row in plan.plan(e, list(ATTACKS), call)}
    assert rows["rand"]["gradients"] == 2 * 101 * 20 and rows["pgd-eot"]["gradients"] == 200 * 20
    assert rows["square"]["passes"] >= 5000 * 20 and rows["standard"]["passes"] >= 5000
    clean = {"attack": "clean", "gradients": 0, "passes": 41, "flop": 3 * 41}
    assert {key: rows["clean"][key] for key in clean} == clean
    assert len(made) < 100 and all(row["hours"] > 0 for row in rows.values())


SPLIT = {64: list(ATTACKS), 6: ["fixed-noise", "pgd-eot", "rand", "standard", "square"], 2: ["noise", "fixed-noise"]}


@pytest.mark.parametrize("limit", SPLIT)
def test_memory_planned_is_the_memory_that_the_attacks_take(tiny_carso, tmp_path, monkeypatch, limit):
    """Against bytes of all tensors alive while the real attack, which fools nothing, works on the real model, and with
    limits that take apart the chunk, and (2 < S) the members of a picture."""
    tiny_carso.requires_grad_(False)
    own = sum(t.nbytes for t in (*tiny_carso.parameters(), *tiny_carso.buffers()))
    answers = {"defence": tiny_carso, "classifier": tiny_carso.classifier}
    monkeypatch.setattr(plan, "SECONDS", 0.0)  # the rate does not matter
    budget = replace(BUDGET, steps=1, pgd_steps=1, queries=1, targets=1, draws=2)
    for name in SPLIT[limit]:  # not all where a limit makes many small calls, which take long
        labels = answers[ATTACKS[name].on]((255 * X).to(torch.uint8) / 255).argmax(1)
        e = evaluation(tiny_carso, tmp_path, eps=1e-6, labels=labels, budget=budget, limit=limit)
        row = plan.plan(e, [name], e.one_call)[0]
        real = plan.counted(lambda e=e, name=name: e.attack(name, 0)).most
        assert 0.98 * real < row["memory"] - own < 1.35 * real, name


def test_bytes_are_counted_once_and_until_they_are_freed():
    x = torch.rand(10, 10)

    def work():
        y = x + 1  # 400 bytes
        y = y.view(100)[:50].mul_(2).double()  # 400 more, then the first are freed
        return torch.cat([y, y])  # and 800 more

    assert plan.counted(work).most == 400 + 800


def test_a_calls_flop_are_linear_in_its_draws(tiny_carso):
    e = evaluation(tiny_carso)
    x, y = e.pictures(0)
    for gradient in (False, True):
        shared, each, kept, kept_each, rate = plan.measure(e.one_call, x, y, gradient, False)
        counted = plan.counted(lambda gradient=gradient: e.one_call(x[:1], y[:1], gradient, False, 5))
        assert shared + 5 * each == pytest.approx(counted.flop, rel=1e-9) and shared > 0 and rate > 0
        assert kept + 5 * kept_each == pytest.approx(counted.most, rel=0.03)


def test_plan_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    save_checkpoint(tmp_path / "carso.pt", carso, dataset="digits", data_dir="data", config={"eps": 0.2})
    (tmp_path / "mine.py").write_text(
        "from models import WideResNet\n\ndef build():\n    return WideResNet(10, 10, 1, in_channels=1)\n"
    )
    before = sorted(tmp_path.rglob("*"))
    room = "80 GB hold --limit" if DEVICE == "cpu" else " GB hold --limit"  # a GPU's own
    for what in (["--ckpt", "carso.pt"], ["--model", "mine.py:build", "--dataset", "digits", "--eps", "0.2"]):
        options = [*what, *SMALL, "--attack", "all", "--plan", "--out", "planned"]
        said = here(evaluate, tmp_path, options, monkeypatch, capsys)
        assert "4 pictures" in said and "square" in said and said.splitlines()[-4].startswith("all")
        assert float(said.splitlines()[-4].split()[-1]) >= 0 and room in said.splitlines()[-2]
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before


# ------------------------------------------------------------------------------------------------------ lab/bench.py

DIGITS = ["--preset", "digits", "--batch-size", "8", "--repeats", "1"]


@pytest.fixture
def quick(monkeypatch):
    """Where a processor has no bf16 instructions, 20 draws take half a minute."""
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "DRAWS", 2)


def test_bench_measures_every_part_both_ways(quick, tmp_path, monkeypatch, capsys):
    result = json.loads(here(bench, tmp_path, [*DIGITS, "--against", "plain", "--json"], monkeypatch, capsys))
    assert len(result["rows"]) == 9 and result["matrix_gflop_per_second"] > 0
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in result["rows"])
    assert result["config"]["batch_size"] == 8
    rows = {row["part"]: row for row in result["rows"]}
    batch, step, whole, once = (row for name, row in rows.items() if name.startswith(("(a)", "(b)")))
    assert whole["seconds"] == pytest.approx(batch["seconds"] + step["seconds"])
    assert once["seconds"] == pytest.approx(batch["seconds"] * 8 / 200 + step["seconds"])  # 4 of 0.5 an epoch
    assert once["plain_seconds"] == whole["plain_seconds"]


def test_both_ways_compute_the_same():
    p = replace(PRESETS["digits"], samples=3)
    carso, x, y = bench.build(p, 5, (1, 32, 32), 8, "cpu")
    for part in ("classifier forward", "classifier gradient", "(c) inference", "(d) gradient"):
        results = []
        for way in (bench.ours, bench.plain):
            carso.manual_seed(0)
            results.append(way(carso, x, y)[part]())
        assert_close(*results)


def test_neither_way_wants_gradients_of_the_classifier(quick):
    carso, x, y = bench.build(PRESETS["digits"], 5, (1, 32, 32), 8, "cpu")
    for way in (bench.ours, bench.plain):
        for work in way(carso, x, y).values():
            work()
        assert all(p.grad is None and not p.requires_grad for p in carso.classifier.parameters())
        assert not carso.training


def test_bench_in_bf16_measures_what_training_and_attacks_do(quick, tmp_path, monkeypatch, capsys):
    seen, real = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda *args: seen.append(args[-1]) or real(*args))
    result = json.loads(here(bench, tmp_path, [*DIGITS, "--precision", "bf16", "--json"], monkeypatch, capsys))
    assert [row["part"][:3] for row in result["rows"]] == ["cla", "(a)", "(b)", "(d)", "EoT", "(a)", "(a)"]
    assert all(row["share_of_matrix_rate"] > 0 for row in result["rows"]) and seen == [torch.bfloat16]


def test_benchs_table_and_refusals(quick, tmp_path, monkeypatch, capsys):
    said = here(bench, tmp_path, DIGITS, monkeypatch, capsys).splitlines()
    assert len(said) == 11 and said[0].startswith("WRN-10-1, batch 8, S 8, cpu") and "ratio" not in said[1]
    for options, sentence in (
        (["--depth", "11"], "--depth 11 must be 6n + 4"),
        (["--batch-size", "4"], "--batch-size 4 must be 8 or more"),
        (["--threads", "0"], "--threads 0 must be 1 to 1000"),
        (["--width", "9" * 30], f"--width {'9' * 30} must be 1 or more"),
        (["--memory-plan", "--tflops", "nan"], "--tflops nan must be positive"),
        (["--device", "cuda"], "--device cuda cannot be used here"),
    ):
        if torch.cuda.is_available() and "cuda" in options:
            continue
        said = refusal(bench, tmp_path, options, monkeypatch, capsys)
        assert said.startswith(f"bench: {sentence}") and len(said.splitlines()) == 1


def test_what_the_backward_pass_keeps():
    """A linear layer keeps its input; activations of its own tensors do not count."""
    layer, x = nn.Linear(4, 4), torch.rand(2, 4, requires_grad=True)
    assert bench.saved_bytes(layer, lambda: layer(x).relu()) == 2 * (2 * 4 * 4)  # the input, and relu's output
    p = replace(PRESETS["digits"], attack_steps=3, fraction=0.5)
    cost = bench.scenario(p, 3, (3, 32, 32))
    assert cost["micro"] < cost["train"]
    anew = bench.scenario(replace(p, attack_versions=0), 3, (3, 32, 32))  # half of the pictures in each of 24 epochs
    part = lambda n: bench.scenario(replace(p, attack_versions=24 * n), 3, (3, 32, 32))["flop"]  # noqa: E731
    assert 0 < cost["flop"] < anew["flop"] and 2 * (anew["flop"] - part(0.25)) == pytest.approx(part(0.75) - part(0.25))


# ---------------------------------------------------------------------------------------------------------- our APGD


@pytest.mark.parametrize("loss, eps", [("ce", 0.1), ("dlr", 0.01)])
def test_our_apgd_is_as_strong_as_autoattacks(loss, eps):
    """At equally many gradients, over three seeds, on a network that is far from linear: plain PGD is weaker."""
    from pyautoattack.autopgd_base import APGDAttack

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 5, 2), nn.SiLU(), nn.Conv2d(16, 16, 3, 2), nn.SiLU(),
                          nn.Conv2d(16, 5, 5), nn.Flatten()).requires_grad_(False)  # fmt: skip
    for layer in model[0:5:2]:
        layer.weight.mul_(4)
    x, steps, reached, left = torch.rand(40, 1, 28, 28), 20, Counter(), Counter()
    y = model(x).argmax(1)
    climb = objective(model, y, loss)
    for seed in range(3):
        settings = dict(eps=eps, norm="Linf", seed=seed, device="cpu", logger=logging.getLogger("auto-attack"))
        theirs = APGDAttack(model, n_restarts=1, n_iter=steps, eot_iter=1, rho=0.75, loss=loss, **settings)
        torch.manual_seed(seed)
        found = {
            "theirs": theirs.perturb(x, y, best_loss=True),
            "ours": apgd(climb, x, eps, steps, random_point(x, eps))[0],
            "pgd": pgd(model, x, y, eps, steps, 2.5 * eps / steps, loss=loss),
        }
        for name, adversarial in found.items():
            reached[name] += climb(adversarial)[0].sum().item()
            left[name] += (model(adversarial).argmax(1) == y).sum().item()
    assert reached["pgd"] < 0.997 * reached["theirs"] < reached["ours"]
    assert left["ours"] <= left["theirs"] + 1
