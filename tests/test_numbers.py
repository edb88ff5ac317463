"""Numbers that stand: selection without bias, evaluations that know what they evaluated, memory, processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import DEVICE, ROOT, fresh_carso
from test_evaluate import Around
from test_train import here, refusal

import evaluate
from evaluate import ATTACKS
from lab.audit import audit
from lab.checkpoints import load_checkpoint, save_checkpoint
from lab.files import claim
from lab.presets import Budget
from lab.race import least, lost, race
from lab.report import gather, in_words, write
from lab.suite import Attack, alone
from lab.target import Target, climb, hits
from lab.units import Evaluation

BUDGET = Budget(n=4, steps=2, eot=2, pgd_steps=2, queries=3, targets=2, select=4, draws=3, chunk=2)
TINY = f"--steps 1 --eot 1 --queries 3 --targets 1 --select 3 --draws 3 --chunk 3 --device {DEVICE}".split()


def evaluation(model, folder=None, budget=BUDGET, attacks=ATTACKS, n=4, classes=5, **config) -> Evaluation:
    config = dict(eps=0.1, view="logsumexp", aggregation="robust", seed=0, classes=classes) | config
    config["samples"] = getattr(model, "samples", 1)
    images = torch.randint(0, 256, (n, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    return Evaluation(model, images, labels, config, budget, folder, "cpu", 64, attacks)


class Coin(torch.nn.Module):
    """A stochastic defence whose chance of being right is the first pixel: member s is right where z_s is below it."""

    samples = 1

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def manual_seed(self, seed):
        self.generator.manual_seed(seed)

    def draw(self, x, samples):
        return torch.rand(len(x), samples, 1, generator=self.generator)

    def member_logits(self, x, z):
        right = (z[..., 0] < x[:, 0, 0, 0, None]).float()
        return torch.stack([right, 1 - right], dim=2)


class Noisy(torch.nn.Module):
    """A linear classifier whose logits are disturbed: some pictures fall to a small perturbation, some do not."""

    samples = 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 5))
        self.purifier, self.generator = torch.nn.Identity(), torch.Generator().manual_seed(0)

    def manual_seed(self, seed):
        self.generator.manual_seed(seed)

    def draw(self, x, samples):
        return torch.randn(len(x), samples, 5, generator=self.generator)

    def member_logits(self, x, z):
        return self.classifier(x)[:, None] + 0.03 * z

    def forward(self, x):
        return self.classifier(x)


# ------------------------------------------------------------------------------------------------- 1. the selection


def test_the_race_flatters_less_than_few_draws_and_brackets_the_truth():
    rng, target = torch.Generator().manual_seed(1), Target(Coin(), limit=10**6)
    pictures, each = 400, 9
    chance = torch.rand(pictures, 1, generator=rng) * 0.6 + 0.3 + 0.25 * torch.randn(pictures, each, generator=rng)
    chance = chance.clamp(0, 1)
    of = torch.arange(pictures).repeat_interleave(each)
    x, y = chance.reshape(-1, 1, 1, 1), torch.zeros(pictures, dtype=torch.long)
    truth = chance.min(1).values.mean().item()

    def flattered(draws, racing):
        z = target.draw(x[:pictures], draws)
        right, running = race(target, x, of, y, z, draws)
        if not racing:
            right, running = hits(target, x, y[of], draws, z[of]).sum(1).float(), torch.ones(len(x), dtype=torch.bool)
        chosen = least(right, running, of, pictures)
        return chance.flatten()[chosen].mean().item() - truth, right[chosen].mean().item() / draws - truth

    few, raced, whole = flattered(3, False)[0], flattered(20, True), flattered(20, False)
    assert few > 0.02 and raced[0] < few / 2 and raced[0] < whole[0] + 0.005
    assert raced[1] < 0 < raced[0]  # the least score in the race is below the truth, the chosen candidate's not
    before = target.count["pictures"]
    race(target, x, of, y, target.draw(x[:pictures], 20), 20)
    assert target.count["pictures"] - before < 0.7 * 20 * len(x)


def test_the_least_of_very_many_candidates_is_the_pictures_own():
    """Beyond 2^24, where float32 skips whole numbers."""
    of, right = torch.arange(10_000).repeat(13), torch.full((130_000,), 150.0)
    chosen = least(right, torch.ones(130_000, dtype=torch.bool), of, 10_000)
    assert torch.equal(chosen, torch.arange(10_000))


def test_a_candidate_that_chance_may_have_put_behind_stays_in_the_race(monkeypatch):
    answers = torch.tensor([[1.0] * 2 + [0] * 18, [1.0] + [0] * 4 + [1] * 15])  # the first is the worse one
    monkeypatch.setattr("lab.race.some_draws", lambda target, x, of, y, z, first, last: (
        answers[x.flatten().long(), first:last].sum(1)))  # fmt: skip
    x, of = torch.arange(2.0).view(-1, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    right, running = race(None, x, of, torch.zeros(1), None, 20)
    assert right[0] == 2 and running[0] and least(right, running, of, 1).tolist() == [0]


def test_a_picture_that_one_attack_took_on_every_draw_is_raced_no_further(tiny_carso, tmp_path):
    """It counts with that attack, and its least score is 0, whatever later draws would say."""
    e = evaluation(tiny_carso, tmp_path, n=2)
    x, found = e.pictures(0)[0], torch.ones(2, dtype=torch.bool)
    for name, select in (("noise", 0.5), ("pgd-eot", 0.0), ("apgd-ce", 0.25)):
        e.write(name, 0, 0.0, dict(found=found, select=torch.full((2,), select), worst=x, hits=found[:, None]))
    e.headline("headline", ["noise", "pgd-eot", "apgd-ce"], 0)
    with np.load(e.file("headline", 0)) as chosen:
        assert chosen["attack"].tolist() == [1, 1] and not chosen["select"].any()


def test_a_picture_lost_on_every_draw_is_the_first_such_candidates():
    target, y = Target(Coin()), torch.zeros(2, dtype=torch.long)
    x = torch.tensor([0.5, 0.0, 0.0, 1.0, 0.9]).view(-1, 1, 1, 1)
    of = torch.tensor([0, 0, 0, 1, 1])
    z = target.draw(x[:2], 40)
    right, running = race(target, x, of, y, z, 40)
    assert least(right, running, of, 2).tolist() == [1, 4]
    assert lost(target, x, of, y, z, 40).tolist() == [False, True, True, False, False]
    assert least(right, running, of, 3).tolist() == [1, 4, -1]  # a picture without a candidate


# ------------------------------------------------------------------------------- 2, 3, 7. what was evaluated is known


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    rng = np.random.default_rng(0)
    arrays = {f"{s}_{k}": v for s in ("train", "test") for k, v in (
        ("images", rng.integers(0, 256, (20, 32, 32), dtype=np.uint8)), ("labels", np.arange(20) % 10))}  # fmt: skip
    np.savez(folder / "d.npz", **arrays)
    state = dict(dataset="d.npz", data_dir="data", config={"eps": 0.2}, classes=[str(k) for k in range(10)])
    save_checkpoint(folder / "carso.pt", carso, **state)
    return folder


def test_a_weaker_attack_later_does_not_replace_the_headline(folder, monkeypatch, capsys):
    options = ["--ckpt", "carso.pt", *TINY, "--pictures", "3", "--out", "twice", "--eps", "0.5", "--attack"]
    here(evaluate, folder, [*options, "apgd"], monkeypatch, capsys)
    strong = json.loads((folder / "twice" / "report.json").read_text())
    here(evaluate, folder, [*options, "noise"], monkeypatch, capsys)
    both = json.loads((folder / "twice" / "report.json").read_text())
    assert both["robust"] == strong["robust"] and "apgd" in both["attacks"]
    assert strong["robust"]["accuracy"] <= strong["noise"]["accuracy"]


def test_other_weights_and_other_pictures_are_other_evaluations(folder, monkeypatch, capsys):
    (folder / "mine.py").write_text(
        "import torch\nfrom models import WideResNet\n\ndef build():\n    torch.manual_seed(0)\n"
        "    model = WideResNet(10, 10, 1, in_channels=1)\n    model.load_state_dict(torch.load('weights.pt'))\n"
        "    return model\n"
    )
    from models import WideResNet

    options = ["--model", "mine.py:build", "--dataset", "d.npz", *TINY, "--pictures", "2", "--attack", "noise"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(WideResNet(10, 10, 1, in_channels=1).state_dict(), folder / "weights.pt")
        if seed == 1:
            monkeypatch.chdir(folder)
            e, _, _ = evaluate.prepare(evaluate.parse_arguments([*options, "--out", "weights"]))
            assert evaluate.prepare(evaluate.parse_arguments([*options, "--out", "weights"]))[0].config == e.config
        else:
            assert "weights: " in refusal(evaluate, folder, [*options, "--out", "weights"], monkeypatch, capsys)
    arrays = dict(np.load(folder / "d.npz"))
    np.savez(folder / "e.npz", **arrays | {"test_labels": arrays["test_labels"][::-1]})
    other = [*options, "--out", "weights", "--dataset", "e.npz"]
    assert "pictures: " in refusal(evaluate, folder, other, monkeypatch, capsys)


def test_a_checkpoint_for_other_classes_is_refused(folder, monkeypatch, capsys):
    carso, state = load_checkpoint(folder / "carso.pt")
    save_checkpoint(folder / "animals.pt", carso, **state | {"classes": ["bird", "cat", *"23456789"]})
    output = refusal(evaluate, folder, ["--ckpt", "animals.pt"], monkeypatch, capsys)
    assert "its class 0 is bird, that of d.npz is 0" in output


# ---------------------------------------------------------------------------- 4, 11. candidates, and what is kept


def test_a_candidate_equal_to_the_picture_is_no_attack(tiny_carso, tmp_path):
    nothing = Attack(alone(lambda target, x, y, eps, b: (x[None], torch.ones(len(x), dtype=torch.bool))))
    e = evaluation(tiny_carso, tmp_path, attacks=ATTACKS | {"nothing": nothing})
    e.run(["clean", "noise", "nothing"])
    headline, counted = e.headline_of(["clean", "noise", "nothing"])
    e.run([headline], over=counted)
    with np.load(e.file("nothing", 0)) as unit, np.load(e.file(headline, 0)) as chosen:
        assert not unit["found"].any() and not (chosen["attack"] == 2).any()
    table = gather(e, ["clean", "noise", "nothing", headline])
    assert [name for name in table if "worst" in table[name]] == [headline], "every attack's would be gigabytes"


def test_the_points_of_the_largest_loss_are_candidates_of_rand(tiny_carso, tmp_path):
    e = evaluation(tiny_carso, tmp_path)
    with torch.no_grad():
        x, y = e.pictures(0)
    candidates, _ = ATTACKS["rand"].runs(BUDGET, 5, True)[0](Target(tiny_carso), x, y, 1e-4, BUDGET)
    assert len(candidates) == 3  # flipped or not, and the best points of CE and DLR
    assert (candidates[1:] != x).flatten(2).any(2).all()  # a tiny eps flips nothing, but there are points
    assert (candidates - x).abs().max() <= 1e-4 + 1e-7


def test_a_unit_keeps_one_candidate_a_picture(tiny_carso, tmp_path):
    e = evaluation(tiny_carso, tmp_path)
    e.attack("apgd", 0)
    with np.load(e.file("apgd", 0)) as unit:
        assert unit["worst"].shape == (2, 1, 32, 32) and unit["candidates"] == 6
        assert sum(array.nbytes for array in unit.values()) < 2 * 1024 * 4 + 1000


# ------------------------------------------------------------------------------------------------------ 5. the audit


def straight_through_on(some, model):
    """A gradient that is made up for the pictures numbered `some`, of those that are given together."""

    def change(self, x):
        rounded = x + ((8 * x).round() / 8 - x).detach()
        rows = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool)
        rows[[i for i in some if i < len(x)]] = True
        return self.model(torch.where(rows, rounded, x))

    return Around(model, change)


@pytest.mark.parametrize("some", [[1], [2, 5]])
def test_a_made_up_gradient_on_a_few_pictures_is_seen(tiny_carso, some):
    e = evaluation(straight_through_on(some, tiny_carso.classifier.eval()), n=8)
    e.labels = e.defence(e.images / 255).argmax(1)
    found = audit(e)
    assert any("not the derivative" in message for message in found["messages"]), found


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_raise_no_alarm(classes, tmp_path):
    carso = fresh_carso(classes, samples=3, condition_dim=16, latent_dim=4, decoder_width=16)
    carso.classifier.logits.weight.data /= 10  # else the softmax is saturated, and its gradient nothing but roundings
    e = evaluation(carso, tmp_path, n=6, classes=classes)
    found = audit(e)
    assert found["passed"], found["messages"]
    e.labels = torch.arange(6) % classes  # also where the model is wrong
    assert audit(e)["passed"], audit(e)["messages"]


def only_float32(self, x):
    assert x.dtype == torch.float32
    return self.model(x)


@pytest.mark.parametrize("forward", [lambda self, x: self.model(x) @ torch.eye(5), only_float32])  # a float32 constant
def test_a_model_that_float64_does_not_fit_is_audited_all_the_same(tiny_carso, forward):
    found = audit(evaluation(Around(tiny_carso.classifier.eval(), forward)))
    assert found["passed"] and "could not be tried" in found["notes"][0], found


def test_a_model_outside_autograd_is_evaluated_and_fails_the_audit(folder, monkeypatch, capsys):
    (folder / "outside.py").write_text(
        "import numpy as np, torch\n\nclass Outside(torch.nn.Module):\n    def forward(self, x):\n"
        "        means = x.cpu().numpy().reshape(len(x), 16, -1)[:, :10].mean(2)\n"
        "        return torch.from_numpy(means).to(x.device)\n\n"
        "def build():\n    return Outside()\n"
    )
    options = ["--model", "outside.py:build", "--dataset", "d.npz", *TINY, "--pictures", "3", "--out", "outside"]
    output = here(evaluate, folder, [*options, "--attack", "rand", "square"], monkeypatch, capsys, code=3)
    assert "exactly zero" in output and "square" in output


def test_the_audit_looks_at_every_class(tiny_carso):
    e = evaluation(tiny_carso, n=40)
    e.labels = torch.arange(40) // 8
    from lab.audit import pictures_of_all_classes

    assert set(pictures_of_all_classes(e, 8)[1].tolist()) == set(range(5))


# ------------------------------------------------------------------------------------------------- 8, 10. on a GPU


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_keeps_to_the_limit_and_keeps_no_graph_in_vain(tiny_carso, name, tmp_path):
    tiny_carso.requires_grad_(True)  # as a model from elsewhere may come
    small = dict(steps=1, pgd_steps=1, targets=1, select=2, draws=2)
    e = evaluation(tiny_carso, tmp_path, budget=Budget(**vars(BUDGET) | small))
    watched = tiny_carso.classifier
    largest, graphs, forward = [0], [0], watched.forward

    def watch(x):
        out = forward(x)
        largest[0] = max(largest[0], len(x))
        graphs[0] += out.requires_grad and not x.requires_grad
        return out

    watched.forward = watch
    e.limit = 3  # fewer than the members of two pictures
    e.attack(name, 0)
    assert 0 < largest[0] <= 3
    if name in ("square", "clean", "noise"):
        assert graphs[0] == 0


def test_pieces_give_the_same_answers_and_gradients(tiny_carso):
    x, z = torch.rand(3, 1, 32, 32), torch.randn(3, 6, 4)
    results = []
    for limit in (1000, 4, 1):
        lead = x.clone().requires_grad_()
        logits = Target(tiny_carso, samples=3, limit=limit).draws(lead, 2, z)
        results.append((logits.detach(), torch.autograd.grad(logits.square().sum(), lead)[0]))
    for logits, gradient in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=1e-4, atol=1e-4)
        assert (gradient - results[0][1]).norm() < 1e-3 * gradient.norm()


def test_tf32_is_off_in_audit_scores_and_report(tiny_carso, tmp_path, monkeypatch):
    seen, real = [], Target.draws

    def draws(self, *args):
        seen.append(torch.backends.cudnn.allow_tf32)
        return real(self, *args)

    monkeypatch.setattr(Target, "draws", draws)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    e = evaluation(tiny_carso, tmp_path, checkpoint="c", dataset="d", weights="w", search_precision="fp32")
    audited = audit(e)
    assert seen and not any(seen)
    e.attack("apgd-ce", 0)
    assert seen[-1] is False and torch.backends.cudnn.allow_tf32
    e.run(names := ["clean", "noise"])
    headline, counted = e.headline_of(names)
    e.run([headline], over=counted)
    seen.clear()
    write(e, names, headline, audited, [])
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


def test_counters_stay_on_the_device(tiny_carso):
    target = Target(tiny_carso)
    climb(target, torch.tensor([0, 1]), "ce", 2)(torch.rand(2, 1, 32, 32))
    assert isinstance(target.count["nonfinite"], torch.Tensor) and isinstance(target.count["zero"], torch.Tensor)


def test_every_draw_follows_from_the_unit_and_scores_rest_on_fresh_ones(tiny_carso, tmp_path, monkeypatch):
    """Whatever was drawn before; and the draws that choose a candidate are not those that score it."""
    drawn, real = [], tiny_carso.draw
    monkeypatch.setattr(tiny_carso, "draw", lambda x, samples: drawn.append(real(x, samples)) or drawn[-1])
    e = evaluation(tiny_carso, tmp_path)
    e.is_deterministic()
    seen = []
    for _ in range(2):
        drawn.clear()
        e.attack("noise", 0)
        e.headline("headline", ["noise"], 0)
        seen.append(drawn.copy())
        torch.randn(7), real(torch.zeros(2, 1, 32, 32), 5)
    assert len(seen[0]) == len(seen[1]) >= 4
    for number, (one, other) in enumerate(zip(*seen)):
        assert torch.equal(one, other), f"draw {number}"
    numbers = torch.cat([z.flatten() for z in seen[0]])
    assert len(numbers.unique()) == len(numbers)  # no draw serves twice


# ----------------------------------------------------------------------------------------------------- 9. processes

HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from lab.files import claim
from lab.units import Evaluation
e = Evaluation.__new__(Evaluation)
e.folder = Path({folder!r})
with claim(e.file("apgd-ce", 0)) as claimed:
    print("claimed", claimed, flush=True)
    time.sleep(60)
"""


def test_a_unit_has_one_owner_and_is_taken_over_when_it_dies(tmp_path):
    e = Evaluation.__new__(Evaluation)
    e.folder = tmp_path
    code = HOLDER.format(root=str(ROOT), folder=str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "claimed True\n"
    with claim(e.file("apgd-ce", 0)) as claimed:
        assert not claimed
    assert e.owner("apgd-ce", 0).startswith(f"process {holder.pid} on ")
    with claim(e.file("apgd-ce", 2)) as claimed:
        assert claimed  # another unit is free
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with claim(e.file("apgd-ce", 0)) as claimed:
        assert claimed
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("cascade", [False, True])
def test_processes_share_the_units_and_a_cascade_keeps_its_order(cascade, tmp_path):
    """Threads stand for the processes: a lock is that of an open file. Every unit is made once."""
    names, made = ["clean", "noise", "transfer", "apgd"], []
    e = evaluation(Noisy(), tmp_path, Budget(**vars(BUDGET) | {"n": 20, "chunk": 2}), n=20, cascade=cascade)

    def attack(name, start):
        time.sleep(0.3 if (name, start) == ("clean", 0) else 0)  # the others would overtake it
        made.append((name, start))
        e.write(name, start, 0.0, dict(hits=torch.ones(2, 3), select=torch.ones(2)))

    e.attack = attack
    threads = [threading.Thread(target=e.run, args=(names,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted((name, start) for name in names for start in e.starts)
    for start in e.starts if cascade else ():
        assert [name for name, at in made if at == start] == names


# -------------------------------------------------------------------------------------------- 12. nothing in vain


def test_a_deterministic_model_is_asked_once(tiny_carso, tmp_path):
    e = evaluation(tiny_carso.classifier.eval(), tmp_path)
    assert e.is_deterministic() and e.budget_for("apgd-ce").eot == 1
    e.attack("apgd-ce", 0)
    with np.load(e.file("apgd-ce", 0)) as unit:
        assert unit["hits"].shape == (2, 1)
        assert unit["pictures"] == 2 * (BUDGET.steps + 1) + 2  # a gradient each, and whether the picture survived
    assert not evaluation(tiny_carso).is_deterministic()
    assert evaluation(tiny_carso).is_deterministic(bare=True)


def test_a_cascade_finds_the_same_headline_with_less_work(tmp_path):
    budget = Budget(**vars(BUDGET) | {"n": 40, "chunk": 20, "steps": 5, "select": 8})
    names, results, passes = ["clean", "noise", "fixed-noise", "transfer", "apgd", "pgd-eot"], [], []
    for cascade in (False, True):
        e = evaluation(Noisy(), tmp_path / str(cascade), budget, n=40, cascade=cascade, eps=0.01)
        e.run(names)
        headline, counted = e.headline_of(names)
        e.run([headline], over=counted)
        units = [dict(np.load(e.file(headline, start))) for start in e.starts]
        results.append({k: np.concatenate([unit[k] for unit in units]) for k in ("attack", "hits", "select")})
        passes.append(sum(np.load(e.file(name, start))["pictures"] for name in names for start in e.starts))
    gone = (results[0]["select"] == 0).sum()
    assert 5 < gone < 35, "the test needs pictures that fall and pictures that stand"
    for key in results[0]:
        np.testing.assert_array_equal(results[0][key], results[1][key], err_msg=key)
    assert passes[1] < 0.8 * passes[0]


def test_a_cascade_counts_what_an_earlier_command_only_began(tmp_path):
    """Else a later attack would leave out the pictures that this one took, and nothing would count them."""
    budget = Budget(**vars(BUDGET) | {"n": 40, "chunk": 20, "steps": 5, "select": 8})
    results = []
    for broken_off in (False, True):
        e = evaluation(Noisy(), tmp_path / str(broken_off), budget, n=40, cascade=True, eps=0.01)
        if broken_off:
            e.attack("apgd", 0)
            e.run(["clean", "noise", "pgd-eot"])
        else:
            e.run(["clean", "noise", "apgd", "pgd-eot"])
        assert "apgd" in e.finished()
        headline, counted = e.headline_of(e.finished())
        e.run([headline], over=counted)
        results.append(e.accuracy(headline))
    assert results[0] == results[1] < 0.9


def test_the_report_counts_each_pictures_worst_and_tells_more_from_less(tmp_path):
    budget = Budget(**vars(BUDGET) | {"n": 12, "chunk": 6, "draws": 8, "select": 8})
    e = evaluation(Noisy(), tmp_path, budget, n=12, eps=0.02, checkpoint="c", dataset="d", weights="w")
    e.config |= {"search_precision": "fp32", "control": None}
    e.defence.purify = lambda x, z: x[:, None].expand(-1, z.shape[1], -1, -1, -1)
    e.run(names := ["clean", "noise", "pgd-eot", "standard"])
    headline, counted = e.headline_of(names)
    e.run([headline], over=counted)
    audited = {"messages": [], "notes": [], "rows": []}
    r = write(e, names, headline, audited, [])
    lines = [line.split("\t") for line in (tmp_path / "rows.tsv").read_text().splitlines()[1:]]
    share = {name: np.array([int(l[4]) / int(l[5]) for l in lines if l[2] == name]) for name in (*names, "worst")}
    assert r["robust"]["accuracy"] == pytest.approx(share["worst"].mean()) != pytest.approx(share["clean"].mean())
    assert r["robust"]["least"] <= r["robust"]["accuracy"] <= r["clean"]["accuracy"]
    assert r["to_classifier"]["difference"] == pytest.approx((share["worst"] - share["standard"]).mean()) != 0
    assert "No sign of masked" in (tmp_path / "report.md").read_text()
    report_without = write(e, ["clean", "noise", "standard"], headline, audited, [])
    assert "pgd-eot" not in report_without["attacks"]
    assert "No attack that could show masked gradients" in (tmp_path / "report.md").read_text()
    assert "for 100 times: --draws 100" in (tmp_path / "report.md").read_text()


def test_a_black_box_attack_on_a_stochastic_model_without_members_averages_as_it_says():
    class Dice(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :5] + torch.randn(len(x), 5) + torch.tensor([100.0, 0, 0, 0, 0])  # never wrong

    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    target = Target(Dice())
    ATTACKS["square"].runs(Budget(queries=5, eot=6), 5, False)[0](target, x, y, 0.1, Budget(queries=5, eot=6))
    assert target.count["pictures"] >= 5 * 6 * len(x)


def test_a_class_that_no_picture_has_is_named(folder, monkeypatch, capsys):
    options = ["--ckpt", "carso.pt", *TINY, "--pictures", "3", "--out", "few", "--attack", "noise"]
    assert "**No picture of these classes** among the 3: [3, 4" in here(evaluate, folder, options, monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------------- in words


def test_the_last_lines_say_what_the_table_means():
    result = {
        "audit": {"passed": True}, "n": 100, "config": {"own_answer": 0.0}, "robust": {"accuracy": 0.02, "least": 0.01},
        "to_classifier": {"difference": -0.7, "interval": [-0.8, -0.6]},
        "attacks": {"standard": {"accuracy": 0.72}, "rand": {"accuracy": 0.02}},
    }  # fmt: skip
    said = in_words(result)
    assert (
        "keeps 2.0 % of these 100 pictures" in said and "less robust than that: -70.0 points (-80.0 to -60.0)" in said
    )
    assert "--objective end-to-end" in said and "--attack all" in said
    better = result | {"to_classifier": {"difference": 0.1, "interval": [0.02, 0.2]}}
    assert "is more robust" in in_words(better) and "end-to-end" not in in_words(better)
    flattered = better | {"robust": {"accuracy": 0.82, "least": 0.79}}
    assert "neither more nor less" in in_words(flattered)  # the choice of the worst may make that much
    neither = {"to_classifier": {"difference": 0.0, "interval": [-0.005, 0.005]}}
    assert "neither more nor less" in in_words(result | neither)
    assert "say nothing about robustness" in in_words(result | {"audit": {"passed": False}})
