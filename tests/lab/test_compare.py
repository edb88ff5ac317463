"""lab/compare.py on evaluations written by hand."""

import functools
import json

import numpy as np
import pytest
from conftest import exit_status

from lab import compare

SETTINGS = {"attacks": ["rand"], "steps": 100, "eot": 20, "select": 20, "draws": 4, "samples": 8, "eps": 0.2}


def write_evaluation(folder, worst, clean=None, numbers=None, passed=True, least=0.5, **settings):
    """Write a folder as evaluate.py leaves it. worst, clean: how many of 4 draws were right, for each picture."""
    n = len(worst)
    numbers = range(n) if numbers is None else numbers
    report = {
        "checkpoint": "runs/digits/carso.pt",  # the same name everywhere: it tells nothing apart
        "robust": {"accuracy": float(np.mean(worst)) / 4, "least": least},
        "audit": {"passed": passed},
        "model": "defence",
        "config": SETTINGS | {"pictures": n, "data": "b1a2"} | settings,
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    lines = ["picture\tlabel\tmodel\tattack\tright\tdraws\tselect", "0\t0\tclassifier\tclean\t1\t1\t1.0"]
    shares = {"clean": [4] * n if clean is None else clean, "rand": [0] * n, "worst": worst}
    for attack, right in shares.items():
        lines += [f"{number}\t0\tdefence\t{attack}\t{share}\t4\t0.5" for number, share in zip(numbers, right)]
    (folder / "rows.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_pictures_are_paired_by_their_numbers(tmp_path):
    one = write_evaluation(tmp_path / "one", [4, 1, 2], clean=[4, 4, 3], numbers=[70, 5, 31])
    two = write_evaluation(tmp_path / "two", [1, 2, 4], clean=[4, 3, 4], numbers=[5, 31, 70])
    evaluation = compare.read_evaluation(one)
    assert evaluation.pictures == [(5, 0), (31, 0), (70, 0)]
    assert evaluation.clean.tolist() == [1, 0.75, 1] and evaluation.worst.tolist() == [0.25, 0.5, 1]
    (first, second), warnings = compare.compare([[one], [two]])
    assert second["robust_difference"] == second["clean_difference"] == [0, 0, 0] and warnings == []


def test_the_interval_is_that_of_paired_differences(tmp_path):
    rng, n = np.random.default_rng(0), 400
    one = rng.integers(0, 2, n) * 4
    two = np.where(rng.random(n) < 0.1, 4, one)  # better on some pictures, worse on none
    folders = [write_evaluation(tmp_path / name, worst) for name, worst in (("one", one), ("two", two))]
    (first, second), _ = compare.compare([[folders[0]], [folders[1]]])
    difference = (two - one) / 4
    mean, low, high = second["robust_difference"]
    assert mean == pytest.approx(difference.mean())
    normal = 1.96 * difference.std() / np.sqrt(n)  # much narrower than of two independent proportions
    assert (low, high) == pytest.approx((mean - normal, mean + normal), abs=0.004)


def test_seeds_are_averaged_and_their_spread_counts(tmp_path):
    first = [write_evaluation(tmp_path / f"one-{seed}", [0] * 50) for seed in (0, 1)]
    second = [
        write_evaluation(tmp_path / "two-0", [4] * 50, least=0.9),  # all depends on the seed
        write_evaluation(tmp_path / "two-1", [0] * 50, least=0.0, passed=False),
    ]
    for groups in ([first, second], [first[:1], second]):  # paired seeds, and not as many
        row = compare.compare(groups)[0][1]
        mean, low, high = row["robust_difference"]
        assert mean == 0.5 and low < 0 and high == 1  # two seeds say little of how far seeds differ
        assert row["robust"].tolist() == [1, 0] and row["audit"] == "**failed**"
        assert row["flattered"] == pytest.approx(0.1)
    third = [write_evaluation(tmp_path / f"three-{k}", [k] * 50) for k in (4, 0)]
    row = compare.compare([second, third])[0][1]
    assert row["robust_difference"] == [0, 0, 0]  # as many are paired, however far they lie apart


def test_the_interval_covers_the_choice_of_seeds(monkeypatch):
    """Of three seeds that differ by more than pictures do, 19 of 20 intervals should hold the truth, which is 0;
    resampling the seeds, 83 of 100 did."""
    monkeypatch.setattr(compare, "bootstrap_means", functools.partial(compare.bootstrap_means, times=500))
    rng, trials, holds = np.random.default_rng(1), 400, 0
    for _ in range(trials):
        seeds = rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.05, (3, 50))
        low, high = compare.compute_interval(seeds.mean(0), seeds.mean(1))
        holds += low < 0 < high
    assert 0.92 < holds / trials < 0.99


def test_evaluations_are_named_by_their_folders_and_by_what_differs(tmp_path, capsys):
    one = write_evaluation(tmp_path / "one", [4, 0], least=0.25)
    seeds = [
        write_evaluation(tmp_path / f"two-{seed}", [0, 1], samples=2, control=seed, weights="9ad6") for seed in "ab"
    ]
    assert compare.main([one, ",".join(seeds)]) == 0
    output = capsys.readouterr()
    *_, first, second = output.out.splitlines()
    assert first.startswith(f"| {one} | control None, samples 8 | 1 x 2 | 100.0 | 50.0 |")
    assert first.endswith("| +0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) | 25.0 | passed |")
    assert second.startswith(f"| {','.join(seeds)} | control a / b, samples 2 | 2 x 2 | 100.0 | 12.5 | 12.5 12.5 |")
    assert not any(text in output.out for text in ("carso.pt", "eps", "9ad6")) and output.err == ""


def test_unlike_budgets_are_named(tmp_path, capsys):
    one = write_evaluation(tmp_path / "one", [4])
    two = write_evaluation(tmp_path / "two", [4], steps=10, attacks=["rand", "square"], select=3)
    plain = write_evaluation(tmp_path / "plain", [4], select=1, eot=1, draws=1)
    assert compare.main([one, two, plain]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"compare: {two}: attacks ['rand', 'square'], but ['rand'] in {one}",
        f"compare: {two}: select 3, but 20 in {one}",
        f"compare: {two}: steps 10, but 100 in {one}",  # and none for plain, which is asked once
    ]


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    one, unfinished, broken = (write_evaluation(tmp_path / name, [4]) for name in ("one", "unfinished", "broken"))
    (tmp_path / "unfinished" / "rows.tsv").unlink()
    (tmp_path / "broken" / "report.json").write_text("{}")
    for folders, sentence in (
        ([one, write_evaluation(tmp_path / "eps", [4], eps=0.1)], "has eps 0.1, but"),
        ([one, write_evaluation(tmp_path / "others", [4], data="c3d4")], "has data c3d4, but"),
        ([one, write_evaluation(tmp_path / "renumbered", [4], numbers=[1])], "numbers or labels its pictures"),
        ([f"{one},{tmp_path}/eps/../one"], "a folder stands twice"),
        ([unfinished], "not a finished evaluation: there is no"),
        ([broken], "broken' holds files that evaluate.py did not write"),
    ):
        assert exit_status("compare", functools.partial(compare.main, folders)) == 2
        error = capsys.readouterr().err
        assert error.startswith("compare: ") and sentence in error and error.count("\n") == 1
