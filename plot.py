"""Draw the curves of an evaluation from its rows: python plot.py FOLDER

FOLDER is what evaluate.py wrote. Every sweep-WHAT.tsv in it becomes sweep-WHAT.png (accuracy under attack, under noise
of the same size, and clean), rows.tsv becomes attacks.png (accuracy and 95 % interval of each attack). Nothing is
computed
again: only the .tsv files are read.
"""

import csv
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {"eps": "eps (pixels in [0, 1])", "steps": "steps", "eot": "draws a gradient", "samples": "S, members"}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def draw_sweep(path: Path) -> None:
    what = path.stem.removeprefix("sweep-")
    rows = read(path)
    values = [float(row[what]) for row in rows]
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for name, style in (("clean", ":"), ("noise", "--"), ("apgd-ce", "-")):
        axes.plot(values, [100 * float(row[name]) for row in rows], style, marker="o", markersize=3, label=name)
    axes.set_xscale("symlog", linthresh=1 / 255) if what == "eps" else axes.set_xscale("log")
    axes.set(xlabel=LABELS.get(what, what), ylabel="accuracy (%)", ylim=(-2, 102), title=f"n = {rows[0]['n']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_attacks(path: Path) -> None:
    right: dict[str, list[float]] = {}
    for row in read(path):
        right.setdefault(row["attack"], []).append(int(row["right"]) / int(row["draws"]))
    figure, axes = plt.subplots(figsize=(5, 0.4 * len(right) + 1))
    for i, shares in enumerate(right.values()):
        mean, n = sum(shares) / len(shares), len(shares)
        spread = 1.96 * math.sqrt(sum((s - mean) ** 2 for s in shares) / max(n - 1, 1) / n)
        axes.barh(i, 100 * mean, xerr=100 * spread, color="tab:blue", alpha=0.6)
    axes.set(yticks=range(len(right)), yticklabels=list(right), xlim=(0, 102), xlabel="accuracy (%), mean over draws")
    axes.invert_yaxis()
    figure.savefig(path.with_name("attacks.png"), dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("plot.py: give it one folder that evaluate.py wrote", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    sweeps, rows = sorted(folder.glob("sweep-*.tsv")), folder / "rows.tsv"
    if not sweeps and not rows.is_file():
        print(
            f"plot.py: {folder} holds neither rows.tsv nor sweep-*.tsv; is it a folder of evaluate.py?", file=sys.stderr
        )
        return 2
    for path in sweeps:
        draw_sweep(path)
    if rows.is_file():
        draw_attacks(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
