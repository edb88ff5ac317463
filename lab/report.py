"""The report of an evaluation, from its units of work: report.json, report.md, rows.tsv, samples.png.

Everything here is counting and formatting; nothing is attacked or drawn again. `e` is evaluate.py's Evaluation.
"""

import json
import math
import platform
import time

import numpy as np
import torch
import torch.nn.functional as F

from lab.audit import during_attacks, signs_of_masking
from lab.files import save_grid, write_text
from lab.presets import eps_text, reduced
from lab.suite import Target, hits

NO_ATTACK = ("clean", "noise")  # they count in the worst of all, but are no attack on this model

# Accuracies in % that the paper reports (its tables 2, 3 and 15): classifier clean, AutoAttack; CARSO rand, PGD+EoT.
PUBLISHED = {
    "cifar10": {"classifier clean": 92.16, "standard": 67.73, "rand": 76.13, "pgd-eot": 76.89},
    "cifar100": {"classifier clean": 73.85, "standard": 39.18, "rand": 66.65},
    "tinyimagenet": {"classifier clean": 65.19, "standard": 31.30, "rand": 53.56},
}


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a mean of n numbers in [0, 1] (Wilson; for expectations between 0 and 1 it is on the wide
    side)."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def summary(values: np.ndarray) -> dict:
    mean = float(np.mean(values))
    return {"accuracy": mean, "interval": wilson(mean, len(values))}


def bootstrap(difference: np.ndarray, samples: int = 10_000, seed: int = 0) -> list[float]:
    """95 % interval of the mean of paired differences (n,), resampling the pictures."""
    draws = np.random.default_rng(seed).integers(0, len(difference), (samples, len(difference)))
    return np.quantile(difference[draws].mean(1), [0.025, 0.975]).tolist()


def resubmission(right: np.ndarray, times=(1, 10, 100)) -> dict[str, float]:
    """Accuracy when the attacker may submit the same picture r times and needs one success: for k of m draws right, the
    chance that r of them drawn without replacement are all right, C(k, r) / C(m, r); unbiased for r <= m."""
    m, k = right.shape[1], right.sum(1)
    return {str(r): float(np.mean([math.comb(int(n), r) / math.comb(m, r) for n in k])) for r in times if r <= m}


def gather(e, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """All units of work put together: attack -> arrays over the pictures, and sums of counts."""
    table = {}
    for name in names:
        files = [dict(np.load(e.file(name, start))) for start in e.starts]
        scores = [dict(np.load(e.file(f"score-{name}", start))) for start in e.starts]
        table[name] = {k: np.concatenate([s[k] for s in scores]) for k in ("worst", "hits", "select")}
        table[name]["during"] = np.concatenate([f["during"] for f in files])
        table[name]["candidates"] = len(files[0]["candidates"])
        for count in ("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits", "seconds"):
            table[name][count] = float(sum(f[count] for f in files))
    return table


def worst_attacks(table: dict, names: list[str]) -> np.ndarray:
    """For each picture the attack that the selection draws found worst, as an index into names; what is reported are
    its fresh draws. Among equals an attack, not the clean picture: few draws make many equals, which would flatter a
    stochastic defence."""
    return np.stack([table[name]["select"] + 1e-6 * (name in NO_ATTACK) for name in names]).argmin(0)


def write(e, names: list[str], audited: dict, skipped: list[str]) -> dict:
    """report.json, report.md, rows.tsv and samples.png from the units of work. Returns what report.json holds."""
    table, n = gather(e, names), len(e.labels)
    bare = not hasattr(e.defence, "classifier")  # then what attacks the classifier attacks the model
    counted = [n for n in names if bare or e.attacks[n].on == "defence"]
    chosen = worst_attacks(table, counted)
    fresh = np.stack([table[name]["hits"] for name in counted])[chosen, np.arange(n)]
    result = {
        "checkpoint": e.config["checkpoint"],
        "dataset": e.config["dataset"],
        "n": n,
        "eps": e.eps,
        "samples": e.samples,
        "clean": summary(table["clean"]["hits"].mean(1)) | {"resubmitted": resubmission(table["clean"]["hits"])},
        "noise": summary(table["noise"]["hits"].mean(1)),
        "classifier": {} if bare else {"clean": summary(classifier_right(e))},
        "attacks": {},
        "robust": summary(fresh.mean(1))
        | {"worst_draw": float(fresh.all(1).mean()), "resubmitted": resubmission(fresh)},
        "counted": counted,
        "skipped": skipped,
        "config": e.config,
        "environment": environment(e.device),
    }
    for name in names:
        t = table[name]
        if name in NO_ATTACK:
            continue
        result["attacks"][name] = {
            "target": e.attacks[name].on,
            "eps": e.eps,
            **summary(t["hits"].mean(1)),
            "worst_draw": float(t["hits"].all(1).mean()),
            "during": float(t["during"].mean()),
            "steps": {"pgd-eot": e.budget.pgd_steps, "square": e.budget.queries}.get(name, e.budget.steps),
            "eot": 1 if e.attacks[name].on == "classifier" or name in ("fixed-noise", "transfer") else e.budget.eot,
            "candidates": t["candidates"],
            "nonfinite_gradients": t["nonfinite"] / max(t["gradients"], 1),
            "zero_gradients": t["zero"] / max(t["gradients"], 1),
            "passes_per_picture": t["pictures"] / n,
            "seconds": t["seconds"],
        }
    if hasattr(e.defence, "purify"):
        adversarial = np.stack([table[counted[k]]["worst"][i] for i, k in enumerate(chosen)])
        result["reconstructions"] = {
            "clean": reconstruction_quality(e, table["clean"]["worst"]),
            "attacked": reconstruction_quality(e, adversarial),
        }
    if "standard" in names and not bare:
        difference = fresh.mean(1) - table["standard"]["hits"].mean(1)
        result["to_classifier"] = {"difference": float(difference.mean()), "interval": bootstrap(difference)}
    messages = audited["messages"] + during_attacks(table)
    result["audit"] = {"passed": not messages, "messages": messages, "rows": audited["rows"]}
    result["masking"] = signs_of_masking(result)
    write_text(e.folder / "report.json", json.dumps(result, indent=1))
    write_text(e.folder / "report.md", markdown(result, e))
    worst = {k: np.stack([table[name][k] for name in counted])[chosen, np.arange(n)] for k in ("during", "select")}
    write_text(e.folder / "rows.tsv", rows(table | {"worst": worst | {"hits": fresh}}, e))
    draw_samples(e, table, counted, chosen)
    return result


@torch.no_grad()
def reconstruction_quality(e, pictures: np.ndarray) -> dict:
    """Are the members still the picture? bce: the mean over members and values of the binary cross-entropy towards the
    clean picture (0.69 is a grey square's). judge: how many of them a second, independently trained classifier
    labels correctly; None without --judge."""
    bce, right = [], []
    for start in e.starts:
        x, y = e.pictures(start)
        given = torch.from_numpy(pictures[start : start + len(x)]).to(x)
        e.defence.manual_seed(start)
        members = e.defence.purify(given, e.defence.draw(given, e.samples))  # (B, S, C, H, W)
        bce.append(F.binary_cross_entropy(members, x[:, None].expand_as(members), reduction="none").flatten(1).mean(1))
        if e.judge is not None:
            answers = e.judge(members.flatten(0, 1)).argmax(1)
            right.append((answers == y.repeat_interleave(e.samples)).float().unflatten(0, (len(x), -1)).mean(1))
    return {"bce": torch.cat(bce).mean().item(), "judge": torch.cat(right).mean().item() if right else None}


def classifier_right(e) -> np.ndarray:
    """Is the bare classifier right about each clean picture? (n,)"""
    target = Target(e.defence.classifier, limit=e.limit)
    return torch.cat([hits(target, *e.pictures(start))[:, 0].cpu() for start in e.starts]).double().numpy()


def environment(device) -> dict:
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def percent(part: dict) -> str:
    low, high = part["interval"]
    return f"{100 * part['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def markdown(r: dict, e) -> str:
    c, b, published = e.config, e.budget, PUBLISHED.get(r["dataset"], {})
    shown = r["robust"]["resubmitted"]
    lines = [
        f"# {r['dataset']}: {c['checkpoint']} at eps {eps_text(r['eps'])}, S = {r['samples']}, {r['n']} test pictures",
        "",
        ("**Reduced budget**: upper bounds, not benchmark numbers. " if reduced(b) else "The paper's budget. ")
        + f"Accuracies in % with 95 % intervals, each the expectation over {b.draws} fresh draws of the noise after "
        f"the worst candidate was chosen on {b.select} others. Decision: {c['aggregation']}; attacks see: {c['view']}."
        + (" Attacks searched in bfloat16; all is scored in float32." if c["search_precision"] == "bf16" else ""),
        "",
        "| model | attack | steps x draws | accuracy | every draw right | during the attack | published "
        "| gradients not finite / zero | passes a picture | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def line(model, attack, part, **more):
        cells = [more.get(k, "") for k in ("work", "worst", "during", "published", "shares", "passes", "seconds")]
        work, *rest = cells
        lines.append("| " + " | ".join([model, attack, work, percent(part), *rest]) + " |")

    if r["classifier"]:
        line("classifier", "none", r["classifier"]["clean"], published=str(published.get("classifier clean", "")))
    line("defence", "none", r["clean"])
    line("defence", "uniform noise", r["noise"])
    for name, a in r["attacks"].items():
        line(
            a["target"],
            name,
            a,
            work=f"{a['steps']} x {a['eot']}",
            worst=f"{100 * a['worst_draw']:.1f}",
            during=f"{100 * a['during']:.1f}",
            published=str(published.get(name, "")),
            shares=f"{100 * a['nonfinite_gradients']:.1f} / {100 * a['zero_gradients']:.1f} %",
            passes=f"{a['passes_per_picture']:.0f}",
            seconds=f"{a['seconds']:.0f}",
        )
    line("**defence**", "**worst of all**", r["robust"], worst=f"{100 * r['robust']['worst_draw']:.1f}")
    for given, quality in r.get("reconstructions", {}).items():
        text = f"Reconstructions of {given} pictures: BCE {quality['bce']:.3f} a value towards the clean picture"
        if quality["judge"] is not None:
            text += f"; the judge labels {100 * quality['judge']:.1f} % of them correctly"
        lines += ["", text + "."]
    lines += ["", "Audit passed." if r["audit"]["passed"] else "**Audit failed**: these numbers are not robustness."]
    lines += [f"- {message}" for message in r["audit"]["messages"]]
    lines += [
        "",
        "No sign of masked gradients in the accuracies." if not r["masking"] else "**Signs of masked gradients**:",
    ]
    lines += [f"- {message}" for message in r["masking"]]
    lines += [f"\nSkipped: {name}" for name in r["skipped"]]
    lines += [
        "",
        "Submitted "
        + ", ".join(
            f"{k} times: {100 * v:.1f} (clean {100 * r['clean']['resubmitted'][k]:.1f})" for k, v in shown.items()
        ),
        "",
        f"Checkpoint sha256 {c['sha256'][:16]}, seed {c['seed']}; "
        + ", ".join(f"{k} {v}" for k, v in r["environment"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def rows(table, e) -> str:
    lines = ["picture\tlabel\tattack\tduring\tright\tdraws\tselect"]
    for name, t in table.items():
        for i, right in enumerate(t["hits"]):
            cells = (i, int(e.labels[i]), name, int(t["during"][i]), right.sum(), len(right), f"{t['select'][i]:.3f}")
            lines.append("\t".join(map(str, cells)))
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw_samples(e, table, names, chosen, count: int = 8) -> None:
    """samples.png, a row a picture: clean | adversarial (the worst) | their difference, magnified | six
    reconstructions."""
    x, _ = e.pictures(0)
    x = x[:count]
    worst = np.stack([table[names[chosen[i]]]["worst"][i] for i in range(len(x))])
    adversarial = torch.from_numpy(worst).to(x)
    difference = 0.5 + (adversarial - x) / (2 * e.eps) if e.eps else torch.full_like(x, 0.5)
    tiles = [x, adversarial, difference.clamp(0, 1)]
    if hasattr(e.defence, "purify"):
        e.defence.manual_seed(0)
        tiles += e.defence.purify(adversarial, e.defence.draw(x, 6)).unbind(1)
    save_grid(e.folder / "samples.png", torch.stack(tiles, 1))


def in_words(r: dict) -> str:
    """What the table means, and which command to try next."""
    if not r["audit"]["passed"]:
        return "The audit failed: accuracies seen through such gradients say nothing about robustness."
    sentences = []
    if versus := r.get("to_classifier"):
        low, high = (100 * v for v in versus["interval"])
        what = "more" if low > 0 else "less" if high < 0 else "neither more nor less"
        sentences.append(
            f"CARSO keeps {100 * r['robust']['accuracy']:.1f} % of these {r['n']} pictures under its worst attack, its "
            f"own classifier {100 * r['attacks']['standard']['accuracy']:.1f} %: it is {what} robust than that, by "
            f"{100 * versus['difference']:+.1f} points ({low:+.1f} to {high:+.1f})."
        )
        if low <= 0 and not r["config"]["own_answer"]:
            sentences.append("To train a purifier against attacks on the whole: train.py --objective end-to-end.")
    if not {"apgd", "pgd-eot"} <= set(r["attacks"]):
        sentences.append("More attacks, of which the worst counts: the same command with --attack all.")
    return "\n".join(sentences)
