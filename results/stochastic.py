"""Tables and figure of results/stochastic.sh: does CARSO hold better where its latent code matters?

    python -m results.stochastic       # in the repository's root, after bash results/stochastic.sh

Shapes: B pictures, S members, K classes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import data as datasets
import lab.attacks  # noqa: F401  its rows of AGGREGATIONS
from evaluate import AGGREGATIONS
from lab.plot import COLOURS, save_figure
from models import run_script
from purifier import load_carso

SEEDS = (0, 1, 2)
CONDITIONS = [(taps, D, KL) for taps in ("all", "last") for D in (64, 8) for KL in ("1", "0.01")]
ONE_SEED = ("fixed-0.2", "S0-0.2", "S1-0.2", "S32-0.2", "S8-long", "eot1", "eot4", "eot20", "eot100")


def read_report(folder: Path) -> dict | None:
    path = folder / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_worst(folder: Path) -> torch.Tensor:
    """An evaluation's adversarial pictures, the worst of each, (B, C, H, W)."""
    paths = sorted(folder.glob("work/defence/worst-*.npz"))
    return torch.cat([torch.from_numpy(datasets.load_npz(path)["adversarial"]) for path in paths])


@torch.no_grad()
def measure_members(folder: Path, digits: datasets.Dataset) -> dict:
    """KL, agreement, deviations, BCE and accuracies of one purifier; kept as members.json beside it."""
    path = folder / "members.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    carso, _ = load_carso(folder / "carso.pt")
    carso.manual_seed(0)
    clean, labels = datasets.pixels(digits.test_images[:200]), digits.test_labels[:200]
    last_row = (folder / "log-purifier.tsv").read_text(encoding="utf-8").splitlines()[-1]
    found = {"kl": float(last_row.split("\t")[-1])}

    reconstructions, logits = compute_members(carso, clean, torch.randn(200, 32, carso.purifier.config["latent_dim"]))
    found["over_draws"] = reconstructions.std(1).mean().item()
    found["over_pictures"] = reconstructions.mean(1).std(0).mean().item()
    targets = clean[:, None].expand_as(reconstructions)
    found["bce"] = F.binary_cross_entropy(reconstructions, targets, reduction="none").sum((2, 3, 4)).mean().item()
    found["clean"] = measure_decisions(logits, labels) | {"agree": measure_agreement(logits)}

    _, of_mean_code = compute_members(carso, clean, torch.zeros(200, 1, carso.purifier.config["latent_dim"]))
    found["clean"]["z=0"] = (of_mean_code[:, 0].argmax(1) == labels).float().mean().item()
    for eps in ("0.1", "0.2"):
        pictures = read_worst(folder / f"S8-{eps}")
        z = torch.randn(len(pictures), 32, carso.purifier.config["latent_dim"])
        _, logits = compute_members(carso, pictures, z)
        found[eps] = measure_decisions(logits, labels[: len(pictures)]) | {"agree": measure_agreement(logits)}
    datasets.write_text(path, json.dumps(found, indent=1))
    return found


def compute_members(carso, pictures: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`CARSO.answers`, ten pictures at a time."""
    parts = [carso.answers(*rows) for rows in zip(pictures.split(10), z.split(10))]
    reconstructions, logits = zip(*parts)
    return torch.cat(reconstructions), torch.cat(logits)


def measure_agreement(logits: torch.Tensor) -> float:
    """The share of pictures to which all members (B, S, K) give one label."""
    labels = logits.argmax(2)
    return (labels == labels[:, :1]).all(1).float().mean().item()


def measure_decisions(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The accuracy of every aggregation, and of single members, over groups of 8 of the members (B, 32, K)."""
    groups = logits.unflatten(1, (-1, 8)).flatten(0, 1)
    labels = labels.repeat_interleave(4)
    accuracies = {"member": (groups.argmax(2) == labels[:, None]).float().mean().item()}
    for name, aggregate in AGGREGATIONS.items():
        accuracies[name] = (aggregate(groups).argmax(1) == labels).float().mean().item()
    return accuracies


def join(values, scale=100, digits=1) -> str:
    return ", ".join(f"{scale * value:.{digits}f}" for value in values)


def draw_figure(points: dict) -> Figure:
    """Accuracy over agreement, a point for each purifier: filled on clean pictures, hollow at eps 0.1, crosses 0.2."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    marks = {"clean": dict(marker="o"), "0.1": dict(marker="o", mfc="white"), "0.2": dict(marker="x")}
    for colour, (taps, label) in zip(COLOURS, {"all": "all layers", "last": "the last group alone"}.items()):
        for what, mark in marks.items():
            x, y = zip(*points[taps, what])
            title = f"{label}, {'not attacked' if what == 'clean' else 'eps ' + what}"
            axes.plot(x, y, ls="", color=colour, ms=6, label=title, **mark)
    axes.set(xlabel="clean pictures to which all of 32 members give one label (%)", ylabel="accuracy (%), S = 8")
    axes.set(xlim=(0, 102), ylim=(-3, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv=None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args(argv)
    digits, runs, points = datasets.load("digits"), Path("runs"), {}
    print("| taps, D, KL weight | KL | over draws / pictures | agree: clean, 0.1, 0.2 | BCE | clean, S = 8; z = 0 "
          "| eps 0.1 | eps 0.2 | audits failed |")  # fmt: skip
    decisions = []
    for taps, D, KL in CONDITIONS:
        folders = [runs / f"{taps}-{D}-{KL}-{seed}" for seed in SEEDS]
        folders = [folder for folder in folders if read_report(folder / "S8-0.1") and read_report(folder / "S8-0.2")]
        if not folders:
            continue
        found = [measure_members(folder, digits) for folder in folders]
        reports = {eps: [read_report(folder / f"S8-{eps}") for folder in folders] for eps in ("0.1", "0.2")}
        robust = {eps: [report["robust"]["accuracy"] for report in reports[eps]] for eps in reports}
        failed = sum(not report["audit"]["passed"] for eps in reports for report in reports[eps])
        mean = {key: np.mean([f[key] for f in found]) for key in ("over_draws", "over_pictures", "bce")}
        agree = ", ".join(f"{100 * np.mean([f[what]['agree'] for f in found]):.0f}" for what in ("clean", "0.1", "0.2"))
        cells = [f"{taps}, {D}, {KL}", join([f["kl"] for f in found], 1, 2)]
        cells += [f"{mean['over_draws']:.3f} / {mean['over_pictures']:.3f}", agree, f"{mean['bce']:.1f}"]
        cells.append(f"{join([f['clean']['robust'] for f in found])}; {join([f['clean']['z=0'] for f in found])}")
        cells += [join(robust["0.1"]), join(robust["0.2"]), str(failed)]
        print("| " + " | ".join(cells) + " |")
        for f, *attacked in zip(found, robust["0.1"], robust["0.2"]):
            for what, accuracy in zip(("clean", "0.1", "0.2"), (f["clean"]["robust"], *attacked)):
                points.setdefault((taps, what), []).append((100 * f["clean"]["agree"], 100 * accuracy))
        for what in ("clean", "0.1", "0.2"):
            of = {name: np.mean([f[what][name] for f in found]) for name in ("member", *AGGREGATIONS)}
            decisions.append(
                f"| {taps}, {D}, {KL} | {what} | " + " | ".join(join([value]) for value in of.values()) + " |"
            )

    print("\n| taps, D, KL weight | pictures | " + " | ".join(("member", *AGGREGATIONS)) + " |")
    print("\n".join(decisions))
    print("\n| purifier | evaluation | n | clean | attacks | worst | audit |")
    for folder in sorted(runs.glob("*-*-1-0")):
        for name in ("S8-0.2", *ONE_SEED):
            report = read_report(folder / name)
            if report:
                attacks = ", ".join(f"{attack} {100 * a['accuracy']:.1f}" for attack, a in report["attacks"].items())
                low, high = (100 * bound for bound in report["robust"]["interval"])
                robust = f"{100 * report['robust']['accuracy']:.1f} ({low:.1f} to {high:.1f})"
                cells = [folder.name, name, str(report["n"]), join([report["clean"]["accuracy"]]), attacks, robust]
                print("| " + " | ".join([*cells, "passed" if report["audit"]["passed"] else "**failed**"]) + " |")
    save_figure(draw_figure(points), Path("assets/agreement.png"))
    return 0


if __name__ == "__main__":
    run_script("results.stochastic", main)
