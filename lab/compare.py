"""Evaluations side by side, paired by picture: is one model more robust than another, beyond chance?

    python -m lab.compare runs/digits/eval-... runs/digits-end-to-end/eval-...
    python -m lab.compare A0,A1,A2 B0,B1,B2           # the same model over several seeds, with commas

Each argument is a folder that evaluate.py wrote. A picture counts with its worst attack, chosen on one set of draws and
scored on another, as in report.md; several seeds are averaged picture by picture. Differences are to the first model;
their 95 % intervals come from 10,000 bootstrap samples of the pictures.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

from lab.report import bootstrap


def read(folder) -> tuple[dict, np.ndarray, np.ndarray]:
    """What was evaluated, and for each picture how often it was right: clean (n,), and under its worst attack (n,)."""
    folder = Path(folder)
    try:
        report = json.loads((folder / "report.json").read_text())
        with open(folder / "rows.tsv") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except OSError as error:
        raise ValueError(f"{folder} is not a finished evaluation ({error.strerror}: {error.filename})") from None
    right = {"clean": np.full(report["n"], np.nan), "worst": np.full(report["n"], np.nan)}
    least = np.full(report["n"], np.inf)
    rows.sort(key=lambda row: row["attack"] in ("clean", "noise"))  # to the end: among equals the first one counts
    names = {row["attack"] for row in rows}
    for row in rows:
        i, share = int(row["picture"]), int(row["right"]) / int(row["draws"])
        if row["attack"] in right:
            right[row["attack"]][i] = share
        if "worst" not in names and row["attack"] in report["counted"] and float(row["select"]) < least[i]:
            least[i], right["worst"][i] = float(row["select"]), share  # an earlier version wrote no worst rows
    return report, right["clean"], right["worst"]


def compare(groups: list[list[str]]) -> list[dict]:
    """A row for each group of folders (the seeds of one model). Raises ValueError if they are not comparable."""
    rows, first = [], None
    for folders in groups:
        reports, clean, worst = zip(*map(read, folders))
        for report in reports:
            setting = {k: report[k] for k in ("dataset", "n", "eps")}
            if first is not None and setting != first[0]:
                raise ValueError(f"{report['checkpoint']} was evaluated on {setting}, the first one on {first[0]}")
            first = first or (setting, np.mean(clean, 0), np.mean(worst, 0))
        clean, worst = np.mean(clean, 0), np.mean(worst, 0)
        rows.append(
            {
                "models": [report["checkpoint"] for report in reports],
                "n": len(clean),
                "audit": all(report["audit"]["passed"] for report in reports),
                "attacks": reports[0]["counted"],
                "clean": clean.mean(),
                "robust": worst.mean(),
                "by_seed": [report["robust"]["accuracy"] for report in reports],
                "clean_difference": [(clean - first[1]).mean(), *bootstrap(clean - first[1])],
                "robust_difference": [(worst - first[2]).mean(), *bootstrap(worst - first[2])],
            }
        )
    return rows


def points(difference: float) -> str:
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # + 0.0 makes +0.0 of -0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of evaluations; commas join the seeds of one model")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        rows = compare([group.split(",") for group in args.folders])
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("| model | seeds x pictures | clean | robust | by seed | difference, clean | difference, robust | audit |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        differences = [
            f"{points(mean)} ({points(low)} to {points(high)})"
            for mean, low, high in (row["clean_difference"], row["robust_difference"])
        ]
        by_seed = " ".join(f"{100 * value:.1f}" for value in row["by_seed"])
        cells = [row["models"][0], f"{len(row['models'])} x {row['n']}", f"{100 * row['clean']:.1f}"]
        cells += [f"{100 * row['robust']:.1f}", by_seed, *differences, "passed" if row["audit"] else "**failed**"]
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
