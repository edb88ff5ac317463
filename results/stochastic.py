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
RADII = ("0.1", "0.2")
ONE_SEED = ("S8-0.2", "S0-0.2", "S1-0.2", "S32-0.2", "fixed-0.2", "S8-long", "eot4", "eot20", "eot100")


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
    torch.manual_seed(0)
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
    for eps in RADII:
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


def read_condition(taps: str, D: int, KL: str, digits: datasets.Dataset) -> list[dict]:
    """For each seed that is evaluated what `measure_members` found, and the accuracies left at the two radii."""
    found = []
    for seed in SEEDS:
        folder = Path(f"runs/{taps}-{D}-{KL}-{seed}")
        reports = {eps: read_report(folder / f"S8-{eps}") for eps in RADII}
        if all(reports.values()):
            seen = measure_members(folder, digits)
            for eps, report in reports.items():
                seen[eps]["attacked"] = report["robust"]["accuracy"]
                seen[eps]["passed"] = report["audit"]["passed"]
            found.append(seen)
    return found


def print_row(cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def print_heading(cells) -> None:
    print_row(cells)
    print_row(["---"] * len(cells))


def percent(values) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)


def print_conditions(conditions: dict) -> None:
    """A row a condition: numbers by seed, but for agreement, deviations and BCE, which are means over the seeds."""
    print_heading(["taps, D, KL weight", "KL", "deviation over draws, pictures", "BCE", "agree: clean, 0.1, 0.2",
                   "clean: S = 8", "clean: z = 0", "eps 0.1", "eps 0.2", "audits failed"])  # fmt: skip
    for (taps, D, KL), found in conditions.items():
        mean = {key: np.mean([seen[key] for seen in found]) for key in ("over_draws", "over_pictures", "bce")}
        agree = [100 * np.mean([seen[what]["agree"] for seen in found]) for what in ("clean", *RADII)]
        print_row(
            [
                f"{taps}, {D}, {KL}",
                ", ".join(f"{seen['kl']:.1f}" for seen in found),
                f"{mean['over_draws']:.3f}, {mean['over_pictures']:.2f}",
                f"{mean['bce']:.0f}",
                ", ".join(f"{share:.0f}" for share in agree),
                percent(seen["clean"]["robust"] for seen in found),
                percent(seen["clean"]["z=0"] for seen in found),
                *(percent(seen[eps]["attacked"] for seen in found) for eps in RADII),
                sum(not seen[eps]["passed"] for seen in found for eps in RADII),
            ]
        )


def print_decisions(conditions: dict) -> None:
    """A row a condition and kind of pictures: what single members and every aggregation make of the same members."""
    names = ["member", *AGGREGATIONS]
    print_heading(["taps, D, KL weight", "pictures", *names])
    for (taps, D, KL), found in conditions.items():
        for what in ("clean", *RADII):
            means = [percent([np.mean([seen[what][name] for seen in found])]) for name in names]
            print_row([f"{taps}, {D}, {KL}", what, *means])


def print_one_seed() -> None:
    """A row for each evaluation of seed 0's purifiers of KL weight 1."""
    print_heading(["taps, D", "evaluation", "n", "clean", "attacks", "worst", "audit"])
    for taps, D in (("all", 64), ("all", 8), ("last", 64), ("last", 8)):
        for name in ONE_SEED:
            report = read_report(Path(f"runs/{taps}-{D}-1-0/{name}"))
            if report:
                attacks = ", ".join(f"{attack} {100 * a['accuracy']:.1f}" for attack, a in report["attacks"].items())
                low, high = (100 * bound for bound in report["robust"]["interval"])
                worst = f"{100 * report['robust']['accuracy']:.1f} ({low:.1f} to {high:.1f})"
                audit = "passed" if report["audit"]["passed"] else "**failed**"
                clean = f"{100 * report['clean']['accuracy']:.1f}"
                print_row([f"{taps}, {D}", name, report["n"], clean, attacks, worst, audit])


def draw_figure(conditions: dict) -> Figure:
    """Accuracy over agreement, a point for each purifier: full on clean pictures, hollow at eps 0.1, crosses at 0.2."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    marks = {"clean": dict(marker="o"), "0.1": dict(marker="o", mfc="white"), "0.2": dict(marker="x")}
    for colour, (taps, label) in zip(COLOURS, {"all": "all layers", "last": "the last group alone"}.items()):
        seen_of_all = [seen for condition, found in conditions.items() if condition[0] == taps for seen in found]
        agreement = [100 * seen["clean"]["agree"] for seen in seen_of_all]
        for what, mark in marks.items():
            accuracy = [100 * seen[what]["robust" if what == "clean" else "attacked"] for seen in seen_of_all]
            title = f"{label}, {'not attacked' if what == 'clean' else 'eps ' + what}"
            axes.plot(agreement, accuracy, ls="", color=colour, ms=6, label=title, **mark)
    axes.set(xlabel="clean pictures to which all of 32 members give one label (%)", ylabel="accuracy (%), S = 8")
    axes.set(xlim=(0, 102), ylim=(-3, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(argv=None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args(argv)
    digits = datasets.load("digits")
    conditions = {condition: read_condition(*condition, digits) for condition in CONDITIONS}
    conditions = {condition: found for condition, found in conditions.items() if found}
    print_conditions(conditions)
    print()
    print_decisions(conditions)
    print()
    print_one_seed()
    save_figure(draw_figure(conditions), Path("assets/agreement.png"))
    return 0


if __name__ == "__main__":
    run_script("results.stochastic", main)
