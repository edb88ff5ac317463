"""Compare evaluations side by side, paired by picture: is one model more robust than another, beyond chance?

    python -m lab.compare runs/digits/eval runs/digits-end-to-end/eval
    python -m lab.compare A0,A1,A2 B0,B1,B2           # commas join the seeds of one model

Each argument is a folder that evaluate.py wrote; only its rows.tsv and report.json are read. A picture counts with its
worst attack. Several seeds are averaged picture by picture. Differences are to the first model; their 95 % intervals
come from bootstrap samples of the pictures, and from Student's t for the spread of the seeds.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluate import bootstrap_means
from models import run_script

NOISE = ("eot", "select", "draws")  # settings that do not matter where a model is deterministic
STRENGTH = ("attacks", "steps", "targets", "queries", "pgd_steps", "pgd_step_size", "view", "bf16", "cascade", *NOISE)
HIDDEN = {"weights", "normalisation"}  # long numbers; the folder and the checkpoint's path tell models apart


class Evaluation(NamedTuple):
    folder: str
    report: dict
    settings: dict  # the report's config, and the checkpoint
    pictures: list[tuple[int, int]]  # number and label of each of the n pictures
    clean: np.ndarray  # (n,) share of the draws that were right
    worst: np.ndarray  # (n,) the same under the worst attack of each picture


def read_evaluation(folder: str) -> Evaluation:
    """Read what evaluate.py left in a folder; the pictures are sorted by their numbers."""
    for path in (Path(folder, "report.json"), Path(folder, "rows.tsv")):
        if not path.is_file():
            raise ValueError(f"'{folder}' is not a finished evaluation: there is no {path}")

    try:
        report = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
        settings = report["config"] | {"checkpoint": report["checkpoint"]}
        with open(Path(folder, "rows.tsv"), encoding="utf-8", newline="") as file:
            rows = sorted(csv.DictReader(file, delimiter="\t"), key=lambda row: int(row["picture"]))
        rows = [row for row in rows if row["model"] == report["model"]]
        pictures = [(int(row["picture"]), int(row["label"])) for row in rows if row["attack"] == "clean"]
        clean, worst = (
            np.array([int(row["right"]) / int(row["draws"]) for row in rows if row["attack"] == attack])
            for attack in ("clean", "worst")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{folder}' holds files that evaluate.py did not write ({error!r}): evaluate anew") from None
    return Evaluation(folder, report, settings, pictures, clean, worst)


def check_comparable(evaluation: Evaluation, first: Evaluation) -> None:
    """Raise ValueError unless both were evaluated on the same pictures, at the same eps."""
    for name in ("pictures", "eps", "data"):  # data: the fingerprint of the pictures
        a, b = evaluation.settings[name], first.settings[name]
        if a != b:
            raise ValueError(f"{evaluation.folder} has {name} {a}, but {first.folder} has {b}: they cannot be paired")
    if evaluation.pictures != first.pictures:
        raise ValueError(f"{evaluation.folder} numbers or labels its pictures differently from {first.folder}")


def find_differing_settings(evaluations: list[Evaluation]) -> list[str]:
    """Names of the settings that are not the same in all evaluations."""
    names = sorted(set().union(*(evaluation.settings for evaluation in evaluations)) - HIDDEN)
    first = evaluations[0].settings
    return [name for name in names if any(other.settings.get(name) != first.get(name) for other in evaluations)]


def describe_settings(names: list[str], seeds: list[Evaluation]) -> str:
    """'samples 8, steps 10', and 'checkpoint a.pt / b.pt' where the seeds of one model differ."""
    values = {name: dict.fromkeys(str(seed.settings.get(name)) for seed in seeds) for name in names}
    return ", ".join(f"{name} {' / '.join(distinct)}" for name, distinct in values.items())


def describe_unlike_budgets(evaluation: Evaluation, first: Evaluation) -> list[str]:
    """A sentence for each difference in what makes an attack strong."""
    deterministic = any(all(e.settings[name] == 1 for name in NOISE) for e in (evaluation, first))
    sentences = []
    for name in find_differing_settings([first, evaluation]):
        if name in STRENGTH and not (deterministic and name in NOISE):
            mine, theirs = evaluation.settings.get(name), first.settings.get(name)
            sentences.append(f"{evaluation.folder}: {name} {mine}, but {theirs} in {first.folder}")
    return sentences


def compute_interval(difference: np.ndarray, *by_seed: np.ndarray) -> list[float]:
    """95 % interval of a mean difference (n,) over pictures, which are resampled. by_seed: the means of single seeds,
    whose own spread is added by Student's t: resampling two or three seeds could not leave their range."""
    means, rng = bootstrap_means(difference), np.random.default_rng(1)
    for seeds in by_seed:
        if len(seeds) > 1:
            error = seeds.std(ddof=1) / len(seeds) ** 0.5
            means = means + error * rng.standard_t(len(seeds) - 1, len(means))
    return np.quantile(means, [0.025, 0.975]).clip(-1, 1).tolist()


def subtract(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Mean difference of two models' shares (seeds, n), and its interval. As many seeds of both are paired."""
    by_seed = [(a - b).mean(1)] if len(a) == len(b) else [a.mean(1), b.mean(1)]
    difference = a.mean(0) - b.mean(0)
    return [difference.mean().item(), *compute_interval(difference, *by_seed)]


def compare(groups: list[list[str]]) -> tuple[list[dict], list[str]]:
    """A row for each group of folders (the seeds of one model), and warnings."""
    folders = [folder for group in groups for folder in group]
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a folder stands twice among {', '.join(folders)}")
    models = [[read_evaluation(folder) for folder in group] for group in groups]
    evaluations = [evaluation for seeds in models for evaluation in seeds]

    warnings = []
    for evaluation in evaluations[1:]:
        check_comparable(evaluation, evaluations[0])
        warnings += describe_unlike_budgets(evaluation, evaluations[0])

    names, rows = find_differing_settings(evaluations), []
    all_clean = [np.stack([seed.clean for seed in seeds]) for seeds in models]  # (seeds, n) each
    all_worst = [np.stack([seed.worst for seed in seeds]) for seeds in models]
    for group, seeds, clean, worst in zip(groups, models, all_clean, all_worst):
        rows.append(
            {
                "folders": ",".join(group),
                "settings": describe_settings(names, seeds),
                "size": f"{len(seeds)} x {worst.shape[1]}",
                "clean": clean.mean(1),  # (seeds,)
                "robust": worst.mean(1),
                "clean_difference": subtract(clean, all_clean[0]),
                "robust_difference": subtract(worst, all_worst[0]),
                "flattered": max(seed.report["robust"]["accuracy"] - seed.report["robust"]["least"] for seed in seeds),
                "audit": "passed" if all(seed.report["audit"]["passed"] for seed in seeds) else "**failed**",
            }
        )
    return rows, warnings


def format_row(row: dict) -> str:
    differences = [
        "{:+z.1f} ({:+z.1f} to {:+z.1f})".format(*(100 * value for value in row[name]))
        for name in ("clean_difference", "robust_difference")
    ]
    means = [f"{100 * row[name].mean():.1f}" for name in ("clean", "robust")]
    by_seed = " ".join(f"{100 * value:.1f}" for value in row["robust"])
    cells = [row["folders"], row["settings"], row["size"], *means, by_seed, *differences]
    cells += [f"{100 * row['flattered']:.1f}", row["audit"]]
    return "| " + " | ".join(cells) + " |"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of evaluations; commas join the seeds of one model")
    args = parser.parse_args(argv)
    rows, warnings = compare([group.split(",") for group in args.folders])
    for sentence in warnings:
        print(f"compare: {sentence}", file=sys.stderr)
    print("| evaluation | differs in | seeds x pictures | clean | robust | by seed | difference, clean "
          "| difference, robust | flattered by at most | audit |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(format_row(row))
    return 0


if __name__ == "__main__":
    run_script("compare", main)
