"""Evaluations side by side, paired by picture: is one model more robust than another, beyond chance?

    python -m lab.compare runs/digits/eval-... runs/digits-end-to-end/eval-...
    python -m lab.compare A0,A1,A2 B0,B1,B2           # the same model over several seeds, with commas

Each argument is a folder that evaluate.py wrote. A picture counts with its worst attack, chosen on one set of draws and
scored on another, as in report.md; several seeds are averaged picture by picture. Differences are to the first model;
their 95 % intervals come from 10,000 bootstrap samples of the pictures, and of the seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from lab.files import read_json, read_rows
from lab.report import interval

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


def compare(groups: list[list[str]]) -> list[dict]:
    """A row for each group of folders (the seeds of one model). Raises ValueError if they are not comparable.

    Where all groups have as many seeds, they are paired; else each is averaged over its seeds first."""
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
        differences = [a - b if paired else (a.mean(0) - b.mean(0))[None] for a, b in zip((clean, worst), base)]
        rows.append(
            {
                "models": [report["checkpoint"] for report in reports],
                "n": clean.shape[1],
                "audit": all(report["audit"]["passed"] for report in reports),
                "attacks": reports[0]["counted"],
                "work": {k: reports[0]["config"].get(k) for k in ("steps", "eot", "select", "draws")}
                | {"deterministic": reports[0].get("deterministic", False)},
                # how far a noisy choice of the worst candidate may flatter it
                "flattered": max(r["robust"]["accuracy"] - r["robust"].get("least", np.nan) for r in reports),
                "clean": clean.mean(),
                "robust": worst.mean(),
                "by_seed": [report["robust"]["accuracy"] for report in reports],
                "clean_difference": [differences[0].mean(), *interval(differences[0])],
                "robust_difference": [differences[1].mean(), *interval(differences[1])],
            }
        )
    return rows


def warnings(rows: list[dict]) -> list[str]:
    """What a reader must know before believing a difference."""
    found = []
    for row in rows[1:]:
        unlike = {k: (v, rows[0]["work"][k]) for k, v in row["work"].items() if v != rows[0]["work"][k]}
        unlike.pop("deterministic", None)
        if rows[0]["work"]["deterministic"] or row["work"]["deterministic"]:  # which needs one draw
            unlike = {k: v for k, v in unlike.items() if k == "steps"}
        for k, (mine, other) in unlike.items():
            found.append(f"{row['models'][0]}: {k} {mine}, but {other} for {rows[0]['models'][0]}")
        if set(row["attacks"]) != set(rows[0]["attacks"]):
            differ = sorted(set(row["attacks"]) ^ set(rows[0]["attacks"]))
            found.append(f"{row['models'][0]}: not the same attacks ({', '.join(differ)})")
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
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder may have a name that no terminal can show
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
