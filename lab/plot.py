"""Pictures of the tables that evaluate.py leaves, and of the method. Only .tsv files are read, nothing is computed.

python -m lab.plot FOLDER              # every sweep-WHAT.tsv in it as sweep-WHAT.png, rows.tsv as attacks.png
python -m lab.plot "CARSO=FOLDER" "its classifier=FOLDER" --out finding.png --radius 0.2      # their sweep-eps.tsv
python -m lab.plot --method assets/method.svg
"""

import argparse
import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from lab.files import read_rows, read_table, write_atomically
from lab.presets import RADIUS, check_bounds, parse_number
from lab.report import wilson

plt.switch_backend("agg")  # files, never windows
LABELS = {"eps": "eps (pixels in [0, 1])", "steps": "steps", "eot": "draws a gradient", "samples": "S, members"}
SWEEP = {"apgd-ce": (0, 1), "noise": (0, 1), "clean": (0, 1), "n": (1, 1e9)}  # columns of a sweep, and their ranges
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito, for all eyes
INK, GREY = "#1F2933", "#5B6673"


def save(figure, path: Path, **options) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], **options))
    plt.close(figure)


def draw_curves(curves: dict[str, list], what: str, out: Path, ylabel="accuracy (%)", radius=None, masked=None) -> None:
    """Label -> [(value of `what`, accuracy, n)]; radius: (eps, its text) of a line; masked: a label, no gradient."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    looks = zip(itertools.cycle(COLOURS), itertools.cycle("osD^vP"))
    for label, points in curves.items():
        x, share, n = zip(*points)
        colour, marker = (GREY, "o") if label == masked else next(looks)  # grey, dashed, hollow: it is not a result
        style = {"ls": (0, (4, 2)), "mfc": "white"} if label == masked else {}
        low, high = np.transpose([wilson(*point) for point in zip(share, n)])
        axes.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.15, lw=0)
        axes.plot(x, [100 * v for v in share], color=colour, marker=marker, ms=5.5, lw=2, label=label, **style)
    x, _, n = map(sorted, map(set, zip(*itertools.chain(*curves.values()))))
    unit = next(filter(None, x), 1)
    axes.set_xscale("symlog", base=2, linthresh=unit, linscale=0.5)  # evenly spaced where a sweep doubles
    axes.set_xticks(x, [f"{value:.2g}" if what == "eps" else f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set(xlim=(0.9 * x[0] if x[0] else -0.4 * unit, 1.15 * x[-1] or 1), ylim=(-3, 110), yticks=range(0, 101, 20))
    pictures = " to ".join(f"{value:g}" for value in sorted({n[0], n[-1]}))
    axes.set(xlabel=f"{LABELS.get(what, what)}; shaded: 95 % intervals, {pictures} pictures", ylabel=ylabel)
    place = {"color": GREY, "va": "bottom", "transform": axes.get_xaxis_transform()}
    if radius:
        axes.axvline(radius[0], color=GREY, lw=1, ls=(0, (2, 2)), zorder=0)
        axes.text(radius[0], 1.01, f"trained at {radius[1]}", ha="center", **place)
    if masked:
        axes.text(x[-1], 0.94, "no gradient: the attack does not move", ha="right", backgroundcolor="white", **place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, out, dpi=200)


def draw_finding(named: list[str], out: Path, radius, masked: str | None) -> None:
    curves = {}
    for argument in named:
        label, _, folder = argument.rpartition("=")
        if not label or label in curves:
            raise ValueError(f"with --out each folder is LABEL=FOLDER, with a label of its own; '{argument}' is not")
        rows = read_table(Path(folder, "sweep-eps.tsv"), {"eps": (0, 1e9)} | SWEEP)
        curves[label] = [(row["eps"], row["apgd-ce"], row["n"]) for row in rows]
    if radius:
        check_bounds("--radius", radius[0], RADIUS)
    if masked and masked not in curves:
        raise ValueError(f"--no-gradient '{masked}' is none of the labels {', '.join(curves)}")
    draw_curves(curves, "eps", out, "accuracy under attack (%)", radius, masked)


def draw_folder(folder: Path) -> None:
    sweeps, attacks = sorted(folder.glob("sweep-*.tsv")), folder / "rows.tsv"
    if not sweeps and not attacks.is_file():
        raise ValueError(f"{folder} holds neither rows.tsv nor sweep-*.tsv; is it a folder of evaluate.py?")
    for path in sweeps:
        what = path.stem.removeprefix("sweep-")
        rows = read_table(path, {what: (0 if what == "eps" else 1, 1e9)} | SWEEP)
        curves = {name: [(row[what], row[name], row["n"]) for row in rows] for name in ("apgd-ce", "noise", "clean")}
        draw_curves(curves, what, path.with_suffix(".png"))
    if attacks.is_file():
        draw_attacks(attacks)


def draw_attacks(path: Path) -> None:
    shares = {}
    for row in read_rows(path):
        shares.setdefault(row["attack"], []).append(row["right"] / row["draws"])
    figure, axes = plt.subplots(figsize=(5, 0.4 * len(shares) + 1))
    for attack, values in reversed(shares.items()):  # bars grow upwards
        mean = sum(values) / len(values)
        spread = [[100 * abs(mean - bound)] for bound in wilson(mean, len(values))]
        axes.barh(attack, 100 * mean, xerr=spread, color=COLOURS[1], alpha=0.6)
    axes.set(xlim=(0, 102), xlabel="accuracy (%), mean over draws")
    save(figure, path.with_name("attacks.png"), dpi=150, bbox_inches="tight")


# The method in 800 x 400 pixels: inside and edge of the kinds of boxes; centre, text (* marks a name) and box of each
# thing; the arrows' ways as an SVG writes them, solid and dashed (training only); a picture of 8 x 8 (1 is noise).
BLUE, AMBER, GREEN = ("#E3EEF9", "#2F6DA8"), ("#FBE6BF", "#A86A12"), ("#E4F3EC", "#2E7D5B")
PAGE, PANEL, TRAINING = ("white", "#D0D7DE"), ("#FFF9EC", "#E8C78A"), ("white", "#8894A0")
SHAPES = (
    (400, 200, "", 798, 398, PAGE), (594, 204, "", 388, 276, PANEL), (594, 326, "*purifier: a conditional VAE"),
    (62, 157, "picture x\n(B, C, H, W)"), (212, 113, "first: x"), (212, 281, "again: each\nreconstruction"),
    (212, 197, "*classifier\nWideResNet,\nfrozen,\n26 tapped layers", 108, 224, BLUE),
    (332, 157, "representation\n26 x (B, c, h, w)"), (332, 325, "S reconstructions\n(B, S, C, H, W)"),
    *((310 + 15 * i, 113, "", 11, 56 - 10 * i, BLUE) for i in range(4)), (660, 239, "mu, logvar"),
    (475, 113, "*condition\nlayer CNNs, FC", 126, 56, AMBER), (475, 281, "*decoder\ndeconvolutions", 126, 56, AMBER),
    (698, 281, "*z ~ N(0, I)\nS draws, (B, S, Z)", 126, 56, AMBER), (132, 281, "S logits\n\n(B, S, K)"),
    (62, 281, "*logsumexp\nover S", 88, 56, GREEN), (62, 364, "*answer\n(B, K)"), (449, 229, "(B, D)"),
    (698, 113, "*image code\nCNN", 126, 56, TRAINING), (698, 197, "*encoder\nFC", 126, 56, TRAINING),
    (576, 369, "*loss = BCE(reconstruction, clean x) + beta KL", 356, 32, TRAINING),
    (380, 22, "dashed: only in training, where x is perturbed and the clean picture is the target"),
)  # fmt: skip
SOLID = """96,113 157,113; 267,113 301,113; 365,113 411,113; 475,142 475,252; 634,281 539,281; 411,281 375,281;
    301,281 267,281; 157,281 107,281; 62,310 62,346"""
DASHED = """62,84 62,34 698,34 698,84; 698,142 698,168; 475,197 634,197; 698,226 698,252;
    698,239 776,239 776,369 756,369; 332,344 332,369 396,369"""
DIGIT = "00000000 01222200 00000220 00122210 01000220 00010220 00222210 00000000".split()


@plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "method", "font.sans-serif": "DejaVu Sans"})
def draw_method(out: Path) -> None:
    """The paper's figure 1 in this project's letters; in an SVG, text stays text."""
    figure = plt.figure(figsize=(800 / 72, 400 / 72), facecolor="none")  # a pixel is a point
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(400, 0), frameon=False, xticks=[], yticks=[])
    solid, dashed = {"lw": 1.3, "ls": "-"}, {"lw": 1.3, "ls": (0, (4, 2.5))}
    for x, y, text, *box in SHAPES:
        if box:
            w, h, colours = box
            shape = FancyBboxPatch((x - w / 2, y - h / 2), w, h, f"round,pad=0,rounding_size={min(6, w / 5)}")
            axes.add_patch(shape).set(fc=colours[0], ec=colours[1], **(dashed if colours is TRAINING else solid))
        for i, words in enumerate(lines := text.split("\n")):
            look = {"weight": "bold", "size": 12.5, "color": INK} if words[:1] == "*" else {"size": 11, "color": GREY}
            axes.text(x, y + 4 + 15 * (i - (len(lines) - 1) / 2), words.lstrip("*"), ha="center", **look)
    for ways, line in ((SOLID, solid | {"color": INK}), (DASHED, dashed | {"color": TRAINING[1]})):
        for way in ways.split(";"):
            points = [tuple(map(float, point.split(","))) for point in way.split()]
            axes.plot(*zip(*points[:-1]), **line)
            head = FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0)
            axes.add_patch(head).set(**line)
    for x, y, behind, noise in ((62, 113, 0, TRAINING[1]), (332, 281, 12, "none")):
        for shift in range(behind, -1, -4):
            axes.add_patch(Rectangle((x - 28 + shift, y - 28 - shift), 56, 56, fc=INK, ec="white"))
        for mark, colour in (("1", noise), ("2", "white")):
            at = [(x + 7 * j - 24.5, y + 7 * i - 24.5) for i in range(8) for j in range(8) if DIGIT[i][j] == mark]
            axes.scatter(*zip(*at), s=50, marker="s", color=colour, lw=0)
    save(figure, out, **{"metadata": {"Date": None, "Creator": None}} if out.suffix == ".svg" else {})


def main() -> int:
    parser = argparse.ArgumentParser(prog="plot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="that evaluate.py wrote; with --out, LABEL=FOLDER")
    parser.add_argument("--out", type=Path, help="the figure of all folders' sweep-eps.tsv")
    parser.add_argument("--radius", type=lambda text: (parse_number(text), text), help="eps of the training: a line")
    parser.add_argument("--no-gradient", metavar="LABEL", help="the curve that an attack could not follow")
    parser.add_argument("--method", type=Path, metavar="FILE", help="draw the diagram of the method")
    args = parser.parse_args()
    try:
        if args.method and not args.folders:
            draw_method(args.method)
        elif args.out and args.folders:
            draw_finding(args.folders, args.out, args.radius, args.no_gradient)
        elif len(args.folders) == 1 and not args.method:
            draw_folder(Path(args.folders[0]))
        else:
            raise ValueError("give it a FOLDER, or several LABEL=FOLDER and --out FILE, or --method FILE")
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
