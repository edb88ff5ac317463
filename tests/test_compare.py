"""compare.py on evaluations written by hand."""

import json
import sys

import numpy as np
import pytest

from lab import compare


def evaluation(folder, clean, attacks: dict, **report):
    """A folder as evaluate.py leaves it; attacks: name -> (select (n,), right of 4 draws (n,))."""
    folder.mkdir()
    content = {"checkpoint": folder.name, "dataset": "d", "n": len(clean), "eps": 0.2, "counted": ["clean", *attacks]}
    content |= {"robust": {"accuracy": 0.5}, "audit": {"passed": True}} | report
    (folder / "report.json").write_text(json.dumps(content))
    lines = ["picture\tlabel\tattack\tduring\tright\tdraws\tselect"]
    for name, (select, right) in ({"clean": (np.ones(len(clean)), clean)} | attacks).items():
        lines += [f"{i}\t0\t{name}\t1\t{r}\t4\t{s:.3f}" for i, (s, r) in enumerate(zip(select, right))]
    lines += [f"{i}\t0\tstandard\t0\t0\t4\t0.000" for i in range(len(clean))]  # of the bare classifier: never counted
    (folder / "rows.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_each_picture_counts_with_the_attack_that_selection_found_worst(tmp_path):
    attacks = {"a": ([0.5, 0.1, 1.0], [4, 1, 2]), "b": ([0.2, 0.9, 1.0], [3, 0, 0])}
    _, _, clean, worst = compare.read(evaluation(tmp_path / "e", [4, 4, 3], attacks))
    assert clean.tolist() == [1, 1, 0.75]
    assert worst.tolist() == [0.75, 0.25, 0.5]  # the third: among equals an attack, not the clean picture


def test_pairs_and_seeds(tmp_path):
    rng = np.random.default_rng(0)
    n = 400
    one = rng.integers(0, 2, n) * 4
    two = np.where(rng.random(n) < 0.1, 4, one)  # better on some pictures, worse on none
    folders = [evaluation(tmp_path / k, [4] * n, {"a": (np.zeros(n), v)}) for k, v in (("one", one), ("two", two))]
    first, second = compare.compare([[folders[0]], [folders[1]]])
    assert first["robust_difference"] == [0, 0, 0] and second["clean_difference"] == [0, 0, 0]
    difference = (two - one) / 4
    mean, low, high = second["robust_difference"]
    assert mean == pytest.approx(difference.mean())
    normal = 1.96 * difference.std() / np.sqrt(n)  # paired, so much narrower than of two independent proportions
    assert (low, high) == pytest.approx((mean - normal, mean + normal), abs=0.004)
    both = compare.compare([[folders[0]], folders])[1]
    assert both["robust_difference"][0] == pytest.approx(difference.mean() / 2)


def test_seeds_are_paired_where_there_are_as_many_and_one_failed_audit_fails_the_row(tmp_path):
    def seed(name, right, **report):
        return evaluation(tmp_path / name, [4] * 50, {"a": (np.zeros(50), [right] * 50)}, **report)

    first = [seed("one-0", 0), seed("one-1", 0)]
    second = [seed("two-0", 4), seed("two-1", 0, audit={"passed": False})]  # all depends on the seed
    row = compare.compare([first, second])[1]
    mean, low, high = row["robust_difference"]
    assert mean == 0.5 and low < 0 and high == 1 and not row["audit"]  # two seeds say little of how far seeds differ
    unlike = compare.compare([first[:1], second])[1]  # averaged over the seeds, as no two belong together
    mean, low, high = unlike["robust_difference"]
    assert mean == 0.5 and low < 0 and high == 1


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, capsys):
    one = evaluation(tmp_path / "one", [4], {"a": ([0], [0])})
    other = evaluation(tmp_path / "other", [4], {"a": ([0], [0])}, eps=0.1)
    for folders, sentence in (((one, other), "'eps': 0.1"), ((str(tmp_path),), "not a finished evaluation")):
        monkeypatch.setattr(sys, "argv", ["compare.py", *folders])
        assert compare.main() == 2
        assert sentence in capsys.readouterr().err


def test_labels_that_differ_are_refused_and_unlike_budgets_are_named(tmp_path):
    attack = {"a": ([0], [0])}
    one = evaluation(tmp_path / "one", [4], attack, config={"steps": 10, "eot": 1, "select": 3, "draws": 4})
    two = evaluation(tmp_path / "two", [4], attack, config={"steps": 20, "eot": 1, "select": 3, "draws": 4})
    found = compare.warnings(compare.compare([[one], [two]]))
    assert found == ["two: steps 20, but 10 for one", "two: 3 draws choose the worst candidate: too few"]
    rows = (tmp_path / "two" / "rows.tsv").read_text().replace("0\t0\t", "0\t1\t")
    (tmp_path / "two" / "rows.tsv").write_text(rows)
    with pytest.raises(ValueError, match="other pictures: their labels differ"):
        compare.compare([[one], [two]])


def test_pictures_are_the_same_by_their_fingerprint_not_by_the_name_of_the_data(tmp_path):
    attack, seen, others = {"a": ([0], [0])}, {"pictures": "b1a2"}, {"pictures": "c3d4"}
    one = evaluation(tmp_path / "one", [4], attack, config=seen)
    elsewhere = evaluation(tmp_path / "elsewhere", [4], attack, config=seen, dataset="copy/d")
    changed = evaluation(tmp_path / "changed", [4], attack, config=others)
    older = evaluation(tmp_path / "older", [4], attack)
    assert len(compare.compare([[one], [elsewhere]])) == len(compare.compare([[older], [changed]])) == 2
    with pytest.raises(ValueError, match="changed was evaluated on other pictures"):
        compare.compare([[one], [changed]])


def test_a_choice_too_noisy_for_the_difference_is_named(tmp_path):
    attacks = {"a": (np.zeros(2), [4, 2])}
    one = evaluation(tmp_path / "one", [4, 4], {"a": (np.zeros(2), [4, 1])}, deterministic=True)
    two = evaluation(tmp_path / "two", [4, 4], attacks, robust={"accuracy": 0.75, "least": 0.5})
    assert "may flatter by up to 25.0 points" in compare.warnings(compare.compare([[one], [two]]))[0]


def test_the_interval_covers_the_choice_of_seeds():
    """Of three seeds that differ by more than pictures do, 19 of 20 intervals should hold the truth, which is 0;
    resampling the seeds, 83 of 100 did."""
    rng, trials, holds = np.random.default_rng(1), 400, 0
    for _ in range(trials):
        seeds = rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.05, (3, 50))
        low, high = compare.interval(seeds.mean(0), seeds.mean(1), samples=500)
        holds += low < 0 < high
    assert 0.92 < holds / trials
    low, high = compare.interval(seeds.mean(0))
    assert -0.1 < low < seeds.mean() < high < 0.1


def test_the_worst_is_what_the_headline_chose(tmp_path):
    """Which need not be the attack with the smallest share in its own race."""
    one = evaluation(tmp_path / "one", [4, 4], {"a": ([0.5, 0.5], [4, 4]), "b": ([0.75, 0.75], [1, 2])})
    with open(tmp_path / "one" / "rows.tsv", "a") as rows:
        rows.write("0\t0\tworst\t1\t1\t4\t0.5\n1\t0\tworst\t1\t2\t4\t0.5\n")
    assert compare.read(one)[3].tolist() == [0.25, 0.5]


def test_evaluations_that_were_not_made_alike_are_named(tmp_path):
    def seed(name, attacks=("apgd",), **config):
        work = {"steps": 100, "eot": 20, "select": 20, "draws": 20, "targets": 9, "queries": 5000, "pgd_steps": 200}
        report = {"config": work | config, "counted": ["clean", *attacks], "robust": {"accuracy": 0.5, "least": 0.5}}
        return evaluation(tmp_path / name, [4], dict.fromkeys(attacks, ([0], [0])), **report)

    def said(*groups):
        return compare.warnings(compare.compare(list(groups)))

    paper = seed("paper")
    assert said([paper], [seed("same", queries=1, pgd_steps=1)]) == []  # what apgd does not use
    assert "targets 1, but 9 for paper" in said([paper], [seed("few", targets=1)])[0]
    assert "search_precision bf16, but fp32 for full" in said(
        [seed("full", search_precision="fp32")], [seed("half", search_precision="bf16")])[0]  # fmt: skip
    one, weak = seed("one", ("apgd", "square")), seed("weak", ("square",), queries=1)
    found = said([one, weak])
    assert "queries 1, but 5000 for one" in found[0] and "not the same attacks (apgd)" in found[1]
    with pytest.raises(ValueError, match="stands twice"):
        compare.compare([[one, one]])


@pytest.mark.parametrize("damage", ["", "picture\tlabel\n0\t0\n", "nonsense"])
def test_damaged_rows_get_a_sentence(tmp_path, damage, monkeypatch, capsys):
    one = evaluation(tmp_path / "one", [4], {"a": ([0], [0])})
    (tmp_path / "one" / "rows.tsv").write_text(damage)
    monkeypatch.setattr(sys, "argv", ["compare", one])
    assert compare.main() == 2 and "rows.tsv" in capsys.readouterr().err
