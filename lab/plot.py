"""Draw the curves of the sweeps that lab/evaluate.py leaves.

python -m lab.plot FOLDER                 # every sweep-WHAT.tsv in it as sweep-WHAT.png
python -m lab.plot "CARSO=FOLDER" "its classifier=FOLDER" --out finding.png --radius 0.2      # their sweep-eps.tsv
"""

import argparse
import csv
import itertools
import os
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's own, where its package is not installed, would stop the import
from matplotlib.figure import Figure

from attacks import parse_number
from evaluate import wilson
from models import run_script, write_atomically

LABELS = {"eps": "eps (pixels in [0, 1])", "steps": "steps", "eot": "draws a gradient", "samples": "S, members"}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito, for all eyes
GREY = "#5B6673"
Curve = list[tuple[float, float, float]]  # value of the swept setting, accuracy, number of pictures


def read_sweep(folder: Path, what: str) -> dict[str, Curve]:
    """Read sweep-WHAT.tsv: a curve for each column between the swept value and n; the last is the attack's."""
    path = Path(folder, f"sweep-{what}.tsv")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    try:
        names = [name for name in rows[0] if name not in (what, "n")] if rows else []
        curves = {name: [(float(row[what]), float(row[name]), float(row["n"])) for row in rows] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of lab.evaluate's ({error!r}): make it again") from None
    if len(curves) < 3:
        raise ValueError(f"{path} has no curves of clean pictures, noise and an attack: make it again")
    return curves


def draw_curves(curves: dict[str, Curve], what: str, ylabel="accuracy (%)", radius=None, masked=None) -> Figure:
    """Draw a curve for each label. radius: eps of the training, a line; masked: label of a curve that is no result,
    as the attack had no gradient."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    looks = zip(itertools.cycle(COLOURS), itertools.cycle("osD^vP"))
    for label, points in curves.items():
        x, accuracy, n = zip(*points)
        low, high = zip(*(wilson(*pair) for pair in zip(accuracy, n)))
        colour, marker = (GREY, "o") if label == masked else next(looks)
        style = {"ls": (0, (4, 2)), "mfc": "white"} if label == masked else {}  # dashed and hollow
        axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, lw=0)
        axes.plot(x, [100 * v for v in accuracy], color=colour, marker=marker, ms=5.5, lw=2, label=label, **style)

    x, _, n = (sorted(set(column)) for column in zip(*itertools.chain(*curves.values())))
    unit = next(filter(None, x), 1)
    axes.set_xscale("symlog", base=2, linthresh=unit, linscale=0.5)  # evenly spaced where a sweep doubles
    axes.set_xticks(x, [f"{value:.2g}" if what == "eps" else f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set(xlim=(0.9 * x[0] if x[0] else -0.4 * unit, 1.15 * x[-1] or 1), ylim=(-3, 110), yticks=range(0, 101, 20))
    pictures = " to ".join(f"{value:g}" for value in sorted({n[0], n[-1]}))
    axes.set(xlabel=f"{LABELS.get(what, what)}; shaded: 95 % intervals, {pictures} pictures", ylabel=ylabel)

    place = {"color": GREY, "va": "bottom", "transform": axes.get_xaxis_transform()}
    if radius:
        axes.axvline(radius, color=GREY, lw=1, ls=(0, (2, 2)), zorder=0)
        axes.text(radius, 1.01, f"trained at {radius:.3g}", ha="center", **place)
    if masked:
        axes.text(x[-1], 0.94, "no gradient: the attack does not move", ha="right", backgroundcolor="white", **place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=200))


def plot_sweep(folder: Path, what: str) -> None:
    """Draw sweep-WHAT.tsv of a folder as sweep-WHAT.png beside it."""
    curves = read_sweep(folder, what)
    save_figure(draw_curves(dict(reversed(curves.items())), what), Path(folder, f"sweep-{what}.png"))


def plot_finding(named: list[str], out: Path, radius: float | None, masked: str | None) -> None:
    """Draw the sweeps over eps of several models, LABEL=FOLDER each, in one figure."""
    curves = {}
    for argument in named:
        label, _, folder = argument.rpartition("=")
        if not label or label in curves:
            raise ValueError(f"with --out each folder is LABEL=FOLDER, with a label of its own; '{argument}' is not")
        curves[label] = [*read_sweep(folder, "eps").values()][-1]
    if masked and masked not in curves:
        raise ValueError(f"--no-gradient '{masked}' is none of the labels {', '.join(curves)}")
    save_figure(draw_curves(curves, "eps", "accuracy under attack (%)", radius, masked), out)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of an evaluation; with --out, LABEL=FOLDER")
    parser.add_argument("--out", type=Path, help="the figure of all folders' sweep-eps.tsv")
    parser.add_argument("--radius", type=parse_number, help="eps of the training: a line")
    parser.add_argument("--no-gradient", metavar="LABEL", help="the curve that an attack could not follow")
    args = parser.parse_args(argv)
    if args.out:
        plot_finding(args.folders, args.out, args.radius, args.no_gradient)
        print(f"the figure is {args.out}")
        return 0
    for folder in args.folders:
        sweeps = sorted(Path(folder).glob("sweep-*.tsv"))
        if not sweeps:
            raise ValueError(f"{folder} holds no sweep-*.tsv; python -m lab.evaluate --sweep writes one")
        for path in sweeps:
            plot_sweep(folder, path.stem.removeprefix("sweep-"))
            print(f"the curve is {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    run_script("plot", main)
