"""Evaluations side by side, paired by picture: is one model more robust than another, beyond chance?

    python -m lab.compare runs/digits/eval-... runs/digits-end-to-end/eval-...
    python -m lab.compare A0,A1,A2 B0,B1,B2           # the same model over several seeds, with commas

Each argument is a folder that evaluate.py wrote. A picture counts with its worst attack, chosen on one set of draws and
scored on another, as in report.md; several seeds are averaged picture by picture. Differences are to the first model;
their 95 % intervals come from 10,000 bootstrap samples of the pictures, and Student's t for the spread of the seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from lab.files import read_json, read_rows
from lab.report import interval
from lab.start import start_output

COLUMNS = {"picture": (0, 1e9), "label": (0, 1e9), "select": (0, 1)}
FIELDS = dict(checkpoint=str, dataset=str, n=int, eps=(int, float), counted=list, robust=dict, audit=dict, config=dict)


def sound(report: dict) -> bool:
    """Has a report the fields that are read here, each of its kind?"""
    if not all(isinstance(report.get(field), kind) for field, kind in FIELDS.items()):
        return False
    shares = [report["eps"], report["robust"].get("accuracy"), report["robust"].get("least", 0.0)]
    return (
        all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares)
        and all(isinstance(name, str) for name in report["counted"])
        and isinstance(report["audit"].get("passed"), bool)
    )


def read(folder) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """What was evaluated; the labels (n,); and for each picture how often it was right: clean (n,), and under its worst
    attack (n,)."""
    folder = Path(folder)
    for path in (folder / "report.json", folder / "rows.tsv"):
        if not path.is_file():
            raise ValueError(f"{folder} is not a finished evaluation: there is no {path}")
    report = {"config": {}} | read_json(folder / "report.json")
    if not sound(report):
        raise ValueError(f"{folder}/report.json is damaged, or not one that evaluate.py wrote")
    rows = read_rows(folder / "rows.tsv", COLUMNS)
    label_of = {int(row["picture"]): int(row["label"]) for row in rows}
    if set(label_of) != set(range(len(label_of))) or len(label_of) != report["n"]:
        raise ValueError(f"{folder}/rows.tsv does not have the {report['n']} pictures that report.json names")
    labels, least = np.array([label_of[i] for i in range(report["n"])]), np.full(report["n"], np.inf)
    right = {"clean": np.full(report["n"], np.nan), "worst": np.full(report["n"], np.nan)}
    rows.sort(key=lambda row: row["attack"] in ("clean", "noise"))  # to the end: among equals the first one counts
    names = {row["attack"] for row in rows}
    for row in rows:
        i, share = int(row["picture"]), row["right"] / row["draws"]
        if row["attack"] in right:
            right[row["attack"]][i] = share
        if "worst" not in names and row["attack"] in report["counted"] and row["select"] < least[i]:
            least[i], right["worst"][i] = row["select"], share  # an earlier version wrote no worst rows
    if np.isnan(right["clean"]).any() or np.isnan(right["worst"]).any():
        raise ValueError(f"{folder}/rows.tsv lacks pictures of the {report['n']} that report.json names: is it whole?")
    return report, labels, right["clean"], right["worst"]


NOISE = ("eot", "select", "draws")
# What makes an attack strong, and of which attacks (None: of all).
WORK = dict.fromkeys(("steps", *NOISE, "search_precision")) | {
    "targets": {"apgd", "standard"},
    "queries": {"square", "standard"},
    "pgd_steps": {"pgd-eot"},
    "pgd_step_size": {"pgd-eot"},
}


def unlike(report: dict, other: dict) -> list[str]:
    """How two evaluations differ in what makes an attack strong. What a report does not say is not compared, nor how
    often a deterministic model would have been asked."""
    found, mine, others = [], set(report["counted"]), set(other["counted"])
    deterministic = report.get("deterministic") or other.get("deterministic")
    for number, attacks in WORK.items():
        a, b = report["config"].get(number), other["config"].get(number)
        told = None not in (a, b) and not (deterministic and number in NOISE)
        if told and a != b and (attacks is None or attacks & mine & others):
            found.append(f"{report['checkpoint']}: {number} {a}, but {b} for {other['checkpoint']}")
    if mine != others:
        found.append(f"{report['checkpoint']}: not the same attacks ({', '.join(sorted(mine ^ others))})")
    return found


def compare(groups: list[list[str]]) -> list[dict]:
    """A row for each group of folders (the seeds of one model). Raises ValueError if they are not comparable.

    Where all groups have as many seeds, they are paired; else each is averaged over its seeds first."""
    for folders in groups:
        if len({Path(folder).resolve() for folder in folders}) < len(folders):
            raise ValueError(f"a folder stands twice among the seeds of one model: {', '.join(folders)}")
    read_groups = [[read(folder) for folder in folders] for folders in groups]
    rows, (first, first_labels, _, _) = [], read_groups[0][0]
    paired = len({len(group) for group in read_groups}) == 1
    for group in read_groups:
        for report, labels, _, _ in group:
            known = "pictures" in report["config"] and "pictures" in first["config"]  # their fingerprints
            for field in ("n", "eps") if known else ("dataset", "n", "eps"):
                if report[field] != first[field]:
                    raise ValueError(
                        f"{report['checkpoint']} was evaluated on {field!r}: {report[field]}, "
                        f"{first['checkpoint']} on {first[field]}"
                    )
            if (labels != first_labels).any():
                raise ValueError(f"{report['checkpoint']} was evaluated on other pictures: their labels differ")
            if known and report["config"]["pictures"] != first["config"]["pictures"]:
                raise ValueError(f"{report['checkpoint']} was evaluated on other pictures, or classes of other names")
        reports = [report for report, *_ in group]
        clean, worst = (np.stack([values[k] for values in group]) for k in (2, 3))
        base = [np.stack([values[k] for values in read_groups[0]]) for k in (2, 3)]
        differences = []
        for a, b in zip((clean, worst), base):
            by_seed = [(a - b).mean(1)] if paired else [a.mean(1), b.mean(1)]
            difference = a.mean(0) - b.mean(0)
            differences.append([difference.mean(), *interval(difference, *by_seed)])
        rows.append(
            {
                "models": [report["checkpoint"] for report in reports],
                "n": clean.shape[1],
                "audit": all(report["audit"]["passed"] for report in reports),
                "attacks": reports[0]["counted"],
                "work": {k: reports[0]["config"].get(k) for k in ("steps", *NOISE)}
                | {"deterministic": reports[0].get("deterministic", False)},
                "unlike": [text for report in reports for text in unlike(report, reports[0])]
                + unlike(reports[0], first),
                # how far a noisy choice of the worst candidate may flatter it
                "flattered": max(r["robust"]["accuracy"] - r["robust"].get("least", np.nan) for r in reports),
                "clean": clean.mean(),
                "robust": worst.mean(),
                "by_seed": [report["robust"]["accuracy"] for report in reports],
                "clean_difference": differences[0],
                "robust_difference": differences[1],
            }
        )
    return rows


def warnings(rows: list[dict]) -> list[str]:
    """What a reader must know before believing a difference."""
    found = [sentence for row in rows for sentence in row["unlike"]]
    for row in rows[1:]:
        flattered = np.nanmax([row["flattered"], rows[0]["flattered"], 0.0])
        if flattered > abs(row["robust_difference"][0]):
            found.append(
                f"{row['models'][0]}: choosing the worst candidate by noisy answers may flatter by up to "
                f"{100 * flattered:.1f} points, more than the difference"
            )
        elif np.isnan(row["flattered"]) and (row["work"]["select"] or 0) < 20:
            found.append(f"{row['models'][0]}: {row['work']['select']} draws choose the worst candidate: too few")
    return found


def points(difference: float) -> str:
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # + 0.0 makes +0.0 of -0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of evaluations; commas join the seeds of one model")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    start_output()
    try:
        rows = compare([group.split(",") for group in args.folders])
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for sentence in warnings(rows):
        print(f"compare: {sentence}", file=sys.stderr)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("| model | seeds x pictures | steps, EoT, select, draws | clean | robust | by seed | difference, clean "
          "| difference, robust | flattered by at most | audit |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        differences = [
            f"{points(mean)} ({points(low)} to {points(high)})"
            for mean, low, high in (row["clean_difference"], row["robust_difference"])
        ]
        by_seed = " ".join(f"{100 * value:.1f}" for value in row["by_seed"])
        work = "deterministic" if row["work"].pop("deterministic") else ""
        work = ", ".join(filter(None, [*map(str, row["work"].values()), work]))
        cells = [row["models"][0], f"{len(row['models'])} x {row['n']}", work, f"{100 * row['clean']:.1f}"]
        cells += [f"{100 * row['robust']:.1f}", by_seed, *differences, f"{100 * row['flattered']:.1f}"]
        cells += ["passed" if row["audit"] else "**failed**"]
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
