"""Do gradients exist, and do accuracies behave as if they did? What must hold before a number can be believed.

`e` is evaluate.py's Evaluation throughout.
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data as datasets
from attacks import LOSSES
from lab.files import write_text
from lab.presets import eps_text
from lab.start import out_of_memory
from lab.suite import OBJECTIVES
from lab.target import VIEWS, Target, deterministic, full_precision, reseed, seed_for

# ------------------------------------------------------------------------------------------------ before the attacks


def audit(e, count: int = 8, draws: int = 10) -> dict:
    """Before any attack: do the gradients that an attack would follow exist, and are they the derivative?

    On pictures of as many classes as there are (up to 2 count), through the view that the attacks see (and, for a
    defence with members, our APGD's others): finite logits; for each single draw a gradient that is finite and not
    exactly zero (of pictures that this draw classifies correctly: DLR is rightly flat elsewhere); in float64 the same
    decisions, gradients that point the same way, and a directional derivative that agrees with finite differences,
    which a detached part or a made-up gradient fails. The worst picture counts.

    Returns passed, messages (a sentence for each fault), notes (what could not be tried), rows (the numbers).
    """
    x, y = pictures_of_all_classes(e, count)
    members = hasattr(e.defence, "member_logits")
    views = {(e.config["view"], loss) for loss in LOSSES} | (set(OBJECTIVES) if members else set())
    rows, messages, notes = [], [], []
    for view, loss in sorted(views):
        if view == "sum-exp" and loss == "ce":
            continue  # a saturated softmax: no attack of ours uses it
        reseed(seed_for("audit", view, loss, e.config["seed"]), e.defence)
        target = Target(e.defence, VIEWS[view], e.samples, e.limit)
        row = {"view": view if members else "output", "loss": loss}
        name = f"{loss.upper()} through {row['view']}"
        with full_precision():
            row |= gradient_shares(target, x, y, loss, draws)
            try:
                row |= against_float64(target, x, y, loss)
            except Exception as error:  # whatever a model says to a float64: a constant of another type, an assertion
                if out_of_memory(error):
                    raise
                row |= dict.fromkeys(("same_decision", "cosine", "derivative"))
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                notes.append(f"{name}: the check in float64 could not be tried ({said})")
        if row["nonfinite_logits"] > 0:
            messages.append(f"{name}: {row['nonfinite_logits']:.1%} of the outputs are not finite")
        if row["nonfinite"] > 0:
            messages.append(
                f"{name}: {row['nonfinite']:.1%} of the gradients are not finite, so an attack does not move"
            )
        if row["zero"] > 0:
            messages.append(f"{name}: {row['zero']:.1%} of the gradients are exactly zero, so an attack does not move")
        if row["same_decision"] is not None and row["same_decision"] < 1:
            messages.append(f"{name}: only {row['same_decision']:.1%} of the decisions are the same in float64")
        if row["cosine"] is not None and not row["cosine"] > 0.99:
            messages.append(f"{name}: gradients in float32 and float64 differ (cosine {row['cosine']:.3f})")
        if row["derivative"] is not None and not abs(row["derivative"] - 1) < 0.02:
            messages.append(
                f"{name}: the gradient is not the derivative of the loss (finite differences give "
                f"{row['derivative']:.3g} of what it claims); something in the path is detached or made up"
            )
        rows.append(row)
    return {"passed": not messages, "messages": messages, "notes": notes, "rows": rows}


def pictures_of_all_classes(e, count: int):
    """The first picture of each class, then the first others: x (B, C, H, W), y (B,), between count and 2 count."""
    firsts = [int((e.labels == k).nonzero()[0]) for k in e.labels.unique()][: 2 * count]
    others = [i for i in range(min(len(e.labels), 2 * count)) if i not in firsts]
    chosen = sorted(firsts + others[: max(0, count - len(firsts))])
    return datasets.pixels(e.images[chosen].to(e.device)), e.labels[chosen].to(e.device)


def gradient_shares(target: Target, x, y, loss: str, draws: int) -> dict:
    """Shares over pictures and single draws: not finite logits, not finite gradients, gradients of exactly zero."""
    counts = dict.fromkeys(("nonfinite_logits", "nonfinite", "zero"), 0.0)
    considered = 0
    for _ in range(draws):
        logits, gradient = logits_and_gradient(target, x, y, loss)
        right = logits.argmax(1) == y
        flat = gradient.flatten(1)
        counts["nonfinite_logits"] += (~logits.isfinite()).any(1).sum().item() / (len(x) * draws)
        counts["nonfinite"] += (~flat.isfinite()).any(1).sum().item() / (len(x) * draws)
        counts["zero"] += ((flat == 0).all(1) & right).sum().item()
        considered += right.sum().item()
    counts["zero"] /= max(considered, 1)
    return counts


def logits_and_gradient(target: Target, x, y, loss: str, z=None):
    """One evaluation of every picture: logits (B, K), and the loss's gradient (B, C, H, W), zero where none exists."""
    lead = x.clone().requires_grad_()
    logits = target(lead) if z is None else target.draws(lead, 1, z)[:, 0]
    values = LOSSES[loss](logits, y)
    gradient = torch.autograd.grad(values.sum(), lead)[0] if values.requires_grad else torch.zeros_like(lead)
    return logits.detach(), gradient


def against_float64(target: Target, x, y, loss: str) -> dict:
    """The same draw in float64: share of equal decisions; over the pictures that both get right, whose gradient is not
    vanishing beside the others' (a saturated softmax leaves nothing but roundings), the smallest cosine of the
    gradients, and of the ratios (finite difference along the gradient) / (what the gradient claims) the one farthest
    from 1. None where a model draws noise of its own, which cannot be held fixed across the two, or where there is no
    gradient."""
    double, z, seed = target.in_float64(), target.draw(x), torch.initial_seed()
    z64 = None if z is None else z.double()

    def again(which, pictures, noise):
        reseed(seed, which.model)  # for a model that draws noise of its own
        return logits_and_gradient(which, pictures, y, loss, noise)

    logits32, g32 = again(target, x, z)
    logits64, g64 = again(double, x.double(), z64)
    g32, g64 = g32.double().flatten(1), g64.flatten(1)
    right = (logits32.argmax(1) == y) & (logits64.argmax(1) == y)
    norm = g64.norm(dim=1)
    usable = right & norm.isfinite() & g32.isfinite().all(1)
    usable &= norm > 1e-3 * norm[usable].max() if usable.any() else usable
    result = {"same_decision": None, "cosine": None, "derivative": None}
    stochastic = z is None and not deterministic(target, x)
    if not stochastic:
        result["same_decision"] = (logits32.argmax(1) == logits64.argmax(1)).double().mean().item()
    if usable.any():
        if not stochastic:
            result["cosine"] = (F.normalize(g32, eps=0) * F.normalize(g64, eps=0)).sum(1)[usable].min().item()
        usable &= norm > 1e-6  # where the loss itself has digits left to show a difference
        if usable.any():
            result["derivative"] = finite_difference(double, x.double(), y, loss, z64, g64, norm, seed, usable)
    return result


@torch.no_grad()
def finite_difference(double: Target, x, y, loss: str, z, gradient, norm, seed: int, usable) -> float:
    """Of the ratios of finite difference and gradient, the usable picture's that is farthest from 1."""
    direction = (gradient / norm.clamp(min=1e-300)[:, None]).nan_to_num().view_as(x)  # of length 1
    ratios = []
    for h in (1e-5, 1e-6):  # a kink between the two points spoils one length, hardly both
        values = []
        for sign in (1, -1):
            reseed(seed, double.model)
            moved = x + sign * h * direction
            logits = double(moved) if z is None else double.draws(moved, 1, z)[:, 0]
            values.append(LOSSES[loss](logits, y))
        ratios.append((values[0] - values[1]) / (2 * h) / norm)
    ratio = torch.where((ratios[0] - 1).abs() < (ratios[1] - 1).abs(), *ratios)[usable]
    return ratio[(ratio - 1).abs().argmax()].item()


# -------------------------------------------------------------------------------- along the attacks, and after them


def during_attacks(table) -> list[str]:
    """The audit along the attacks. Exact zeros are natural once a picture is lost (DLR) or by chance: half is too
    many."""
    messages = []
    for name, t in table.items():
        if t["nonfinite_logits"]:
            messages.append(f"{name}: {t['nonfinite_logits']:.0f} outputs were not finite during the attack")
        for kind, limit in (("nonfinite", 0.0), ("zero", 0.5)):
            share = t[kind] / max(t["gradients"], 1)
            if share > limit:
                word = {"nonfinite": "not finite", "zero": "exactly zero"}[kind]
                messages.append(f"{name}: {share:.1%} of the gradients were {word} during the attack")
    return messages


WHITE_BOX = ("rand", "pgd-eot", "apgd", "apgd-ce")


def signs_of_masking(r: dict, slack: float = 0.03) -> list[str]:
    """What should not happen when gradients guide the attacks (evaluation by Athalye et al. 2018, Carlini et al.
    2019). Without an attack that follows gradients nothing can be seen."""
    found, accuracy = [], {name: a["accuracy"] for name, a in r["attacks"].items() if a["target"] == "defence"}
    white = [accuracy[name] for name in WHITE_BOX if name in accuracy]
    if not white:
        return found
    best = min(white)
    if r["noise"]["accuracy"] < best - slack:
        found.append("uniform noise beats the white-box attacks")
    for name, text in (
        ("square", "the black-box attack (square) beats the white-box attacks"),
        ("transfer", "transfer from the bare classifier beats the direct attacks"),
        ("fixed-noise", "the attack on fixed noise is stronger than the ones that average over draws"),
    ):
        if name in accuracy and accuracy[name] < best - slack:
            found.append(text)
    return found


def signs_in_sweep(what: str, values: list[float], attacked: list[float], noise: list[float], slack=0.03) -> list[str]:
    """The same from a sweep: accuracies under attack and under noise at growing values of `what`."""
    found = []
    if what == "eps":
        if any(later > earlier + slack for earlier, later in zip(attacked, attacked[1:])):
            found.append("accuracy rises somewhere as eps grows")
        if attacked[-1] > 0.05:
            found.append(f"accuracy does not go to zero as eps grows: {attacked[-1]:.1%} at {eps_text(values[-1])}")
        if any(a > n + slack for a, n in zip(attacked[1:], noise[1:])):
            found.append("noise beats the attack at some eps")
    if what == "steps" and attacked[0] < attacked[-1] - slack:
        found.append("one step beats many")
    return found


# ------------------------------------------------------------------------------------------------------------ sweeps

SWEEPS = {
    "eps": [v / 255 for v in (0, 2, 4, 8, 16, 32, 64, 128)],
    "steps": [1, 5, 10, 20, 50, 100, 200],
    "eot": [1, 5, 20, 100],
    "samples": [1, 2, 4, 8, 16, 32],
}


def sweep(e, what: str, loud: bool) -> None:
    """sweep-WHAT.tsv: accuracy under our APGD on cross-entropy (and under noise) at every value of the sweep."""
    names, rows = ["clean", "noise", "apgd-ce"], []
    for value in SWEEPS[what]:
        text = eps_text(value).replace("/", "_") if what == "eps" else str(value)
        point = e.changed(what, value, e.folder / f"sweep-{what}" / text)
        point.run(names, loud)
        if loud:
            rows.append([value, *(point.accuracy(name) for name in names)])
            print(
                f"{what} {value:g}: clean {rows[-1][1]:.1%}, noise {rows[-1][2]:.1%}, attacked {rows[-1][3]:.1%}",
                flush=True,
            )
    if loud:
        lines = ["\t".join([what, *names, "n"])]
        lines += ["\t".join([f"{row[0]:.6g}", *(f"{v:.4f}" for v in row[1:]), str(len(e.labels))]) for row in rows]
        write_text(e.folder / f"sweep-{what}.tsv", "\n".join(lines) + "\n")
        values, _, noise, attacked = zip(*rows)
        signs = "\n".join(signs_in_sweep(what, values, attacked, noise) or ["no sign of masked gradients"])
        write_text(e.folder / f"sweep-{what}.txt", signs + "\n")
        print(signs)
        root = Path(__file__).parent.parent
        subprocess.run([sys.executable, "-m", "lab.plot", e.folder.resolve()], cwd=root, check=False)
