"""evaluate.py: the pieces, and the real script on a tiny checkpoint."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_train import run
from torch.testing import assert_close

from evaluate import AGGREGATIONS, Target, climb, naive_log_odds, sum_of_exponentials, wilson
from models import WideResNet, representation_layers
from purifier import build_carso, save_checkpoint

TINY = (
    "--pictures 6 --steps 2 --eot 2 --queries 3 --targets 2 --select 2 --draws 3 --chunk 3 --device cpu "
    "--attack standard rand"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a fresh CARSO for the digits."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    classifier = WideResNet(10, 10, 1, in_channels=1)
    sizes = dict(condition_dim=8, latent_dim=4, decoder_width=8)
    carso = build_carso(classifier, representation_layers(10), (1, 32, 32), samples=2, **sizes)
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
        for name in ("rand-000003.npz", "score-rand-000003.npz", "score-clean-000000.npz"):
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
        (["--ckpt", "carso.pt", "--samples", "-1"], "must be 1 or more"),
        (["--ckpt", "carso.pt", "--n", "-5"], "must be positive"),
        (["--ckpt", "carso.pt", "--dataset", "colour.npz"], "takes pictures \\(1, 32, 32\\) of 10 classes"),
        (["--ckpt", "carso.pt", "--out", "whole", "--n", "5"], "n: 6 there, 5 now"),
        (["--ckpt", "carso.pt", "--attack", "magic"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_input_gets_a_sentence(folder, options, sentence):
    (folder / "page.pt").write_text("<!doctype html>")
    torch.save({"a": torch.zeros(1)}, folder / "other.pt")
    pictures, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    np.savez(
        folder / "colour.npz", train_images=pictures, train_labels=labels, test_images=pictures, test_labels=labels
    )
    budget = TINY if "whole" in options else []
    output = run(folder, *budget, *options, code=2, script="evaluate.py")
    assert re.search(sentence, output) and "Traceback" not in output


# ----------------------------------------------------------------------------------------------------------- pieces


def test_eot_in_one_batch_is_the_mean_of_single_draws(tiny_carso):
    x, y = torch.rand(2, 1, 32, 32), torch.tensor([1, 2])
    target = Target(tiny_carso, samples=3)
    z = torch.randn(2, 4 * 3, 4)
    losses, gradient = climb(target, y, "ce", 4, z)(x)
    singles = [climb(target, y, "ce", 1, part)(x) for part in z.split(3, dim=1)]
    assert_close(losses, torch.stack([l for l, _ in singles]).mean(0))
    assert_close(gradient, torch.stack([g for _, g in singles]).mean(0), rtol=1e-3, atol=1e-6)
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
    decision = AGGREGATIONS["robust"](logits).argmax(1)
    assert torch.equal(sum_of_exponentials(logits).argmax(1), decision)
    small = 0.1 * logits  # where the naive view does not saturate
    assert torch.equal(naive_log_odds(small).argmax(1), AGGREGATIONS["robust"](small).argmax(1))
    assert sum_of_exponentials(1e4 * logits).isfinite().all()


def test_wilson_interval_of_textbook_values():
    assert_close(wilson(0.5, 100), [0.40383, 0.59617], rtol=1e-4, atol=0)
    low, high = wilson(0.0, 20)
    assert low == 0 and high == pytest.approx(0.16113, rel=1e-3)
