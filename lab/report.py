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

from lab.audit import WHITE_BOX, during_attacks, signs_of_masking
from lab.files import save_grid, write_text
from lab.presets import budget_note, eps_text
from lab.published import figures_of
from lab.target import Target, full_precision, hits
from lab.units import CONTROLS


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a mean of n numbers in [0, 1] (Wilson; for expectations between 0 and 1 it is on the wide
    side)."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def summary(values: np.ndarray) -> dict:
    mean = float(np.mean(values))
    return {"accuracy": mean, "interval": wilson(mean, len(values))}


def interval(difference: np.ndarray, *by_seed: np.ndarray, samples: int = 10_000) -> list[float]:
    """95 % interval of a mean difference (n,) over pictures, which are resampled. by_seed: the means of single seeds,
    whose own spread is added by Student's t: resampling two or three seeds could not leave their range."""
    rng, n = np.random.default_rng(0), len(difference)
    means = np.array([difference[rng.integers(0, n, n)].mean() for _ in range(samples)])
    for seeds in by_seed:
        if (k := len(seeds)) > 1:
            means += seeds.std(ddof=1) / k**0.5 * rng.standard_t(k - 1, samples)
    return np.quantile(means, [0.025, 0.975]).clip(-1, 1).tolist()


def resubmission(right: np.ndarray, times=(1, 10, 100)) -> dict[str, float]:
    """Accuracy when the attacker may submit the same picture r times and needs one success: for k of m draws right, the
    chance that r of them drawn without replacement are all right, C(k, r) / C(m, r); unbiased for r <= m."""
    m, k = right.shape[1], right.sum(1)
    return {str(r): float(np.mean([math.comb(int(n), r) / math.comb(m, r) for n in k])) for r in times if r <= m}


def gather(e, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """All units of work put together: attack or headline -> arrays over the pictures, and sums of counts. Of the
    adversarial pictures themselves only the last name's: every attack's would be gigabytes."""
    table = {}
    for name in names:
        files = [e.read(name, start) for start in e.starts]
        kept = [k for k in files[0] if k != "worst" or name == names[-1]]
        table[name] = {k: np.concatenate([f[k] for f in files]) for k in kept if files[0][k].ndim}
        table[name] |= {k: float(sum(f[k] for f in files)) for k in kept if not files[0][k].ndim}
    return table


@full_precision()
def write(e, names: list[str], headline: str, audited: dict, skipped: list[str]) -> dict:
    """report.json, report.md, rows.tsv and samples.png from the units of work. names: the finished attacks; headline:
    the name of the units that chose among them. Returns what report.json holds."""
    table, n, bare = gather(e, [*names, headline]), len(e.labels), not hasattr(e.defence, "purifier")
    worst, (_, counted) = table.pop(headline), e.headline_of(names)
    clean, fresh = table["clean"]["hits"], worst["hits"]
    result = {
        "checkpoint": e.config["checkpoint"],
        "dataset": e.config["dataset"],
        "n": n,
        "eps": e.eps,
        "samples": e.config["samples"],
        "clean": summary(clean.mean(1)) | {"resubmitted": resubmission(clean)},
        "noise": summary(table["noise"]["hits"].mean(1)),
        "classifier": {} if bare else {"clean": summary(classifier_right(e))},
        "attacks": {name: attack_summary(e, name, table[name]) for name in names if name not in CONTROLS},
        "robust": summary(fresh.mean(1))
        | {"worst_draw": float(fresh.all(1).mean()), "resubmitted": resubmission(fresh)}
        | {"least": min(float(worst["select"].mean()), float(fresh.mean()))},
        "counted": counted,
        "skipped": skipped,
        "deterministic": e.is_deterministic(),
        "config": e.config,
        "environment": environment(e.device),
    }
    if not bare:
        result["reconstructions"] = {
            "clean": reconstruction_quality(e),
            "attacked": reconstruction_quality(e, worst["worst"]),
        }
    if "standard" in names and not bare:
        difference = fresh.mean(1) - table["standard"]["hits"].mean(1)
        result["to_classifier"] = {"difference": float(difference.mean()), "interval": interval(difference)}
    messages = audited["messages"] + during_attacks(table)
    result["audit"] = {"passed": not messages, "messages": messages}
    result["audit"] |= {"notes": audited["notes"], "rows": audited["rows"]}
    result["masking"] = signs_of_masking(result)
    missing = sorted(set(range(e.config["classes"])) - set(e.labels.tolist()))
    result["missing_classes"] = missing
    write_text(e.folder / "report.json", json.dumps(result, indent=1))
    write_text(e.folder / "report.md", markdown(result, e))
    write_text(e.folder / "rows.tsv", rows(table | {"worst": worst}, e))
    draw_samples(e, worst["worst"])
    return result


def attack_summary(e, name: str, t: dict) -> dict:
    """What report.json says of one attack. In a cascade its accuracy is what is left of all pictures after it and the
    earlier ones took theirs; `standing` is how many it attacked."""
    once, attacked = e.is_deterministic(e.bare(name)), int(t["attacked"].sum())
    return {
        "target": e.attacks[name].on,
        "eps": e.eps,
        **summary(t["hits"].mean(1)),
        "standing": attacked,
        "worst_draw": float(t["hits"].all(1).mean()),
        "during": float((t["during"] & t["attacked"]).mean()),
        "steps": {"pgd-eot": e.budget.pgd_steps, "square": e.budget.queries}.get(name, e.budget.steps),
        "eot": 1 if once or not e.attacks[name].eot else e.budget.eot,
        "select": e.budget_for(name).select,
        "draws": t["hits"].shape[1],
        "candidates": round(t["candidates"] / len(e.starts)),
        "nonfinite_gradients": t["nonfinite"] / max(t["gradients"], 1),
        "zero_gradients": t["zero"] / max(t["gradients"], 1),
        "passes_per_picture": t["pictures"] / max(attacked, 1),
        "seconds": t["seconds"],
    }


@torch.no_grad()
def reconstruction_quality(e, pictures: np.ndarray | None = None) -> dict:
    """Are the members still the picture? Of the clean pictures, or of adversarial ones, (n, C, H, W). bce: the mean
    over members and values of the binary cross-entropy towards the clean picture (0.69 is a grey square's). judge: how
    many members a second, independently trained classifier labels correctly; None without --judge."""
    bce, right = [], []
    for start in e.starts:
        x, y = e.pictures(start)
        given = x if pictures is None else torch.from_numpy(pictures[start : start + len(x)]).to(x)
        e.defence.manual_seed(start)
        z = e.defence.draw(given, e.samples)
        for rows, _, _ in e.target(False, e.view).parts(len(x), 1):  # within the limit of memory
            members = e.defence.purify(given[rows], z[rows])  # (b, S, C, H, W)
            clean = x[rows, None].expand_as(members)
            bce.append(F.binary_cross_entropy(members, clean, reduction="none").flatten(1).mean(1))
            if e.judge is not None:
                answers = e.judge(members.flatten(0, 1)).argmax(1).unflatten(0, members.shape[:2])
                right.append((answers == y[rows, None]).float().mean(1))
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
    c, b, published = e.config, e.budget, figures_of(r)
    scored = "the model is deterministic: one answer says everything" if r["deterministic"] else (
        f"each the expectation over {b.draws} fresh draws of the noise after candidates raced over {b.select}, and "
        f"the attacks' worst over {2 * b.select} more"
    )  # fmt: skip
    lines = [
        f"# {r['dataset']}: {c['checkpoint']} at eps {eps_text(r['eps'])}, S = {r['samples']}, {r['n']} test pictures",
        "",
        f"{budget_note(b)} Accuracies in % with 95 % intervals; {scored}. "
        f"Decision: {c['aggregation']}; attacks see: {c['view']}."
        + (" Attacks searched in bfloat16; all is scored in float32." if c["search_precision"] == "bf16" else ""),
        "",
        "| model | attack | steps x draws | standing | accuracy | every draw right | during the attack | published "
        "| gradients not finite / zero | passes a picture | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def line(model, attack, part, work="", standing="", worst="", during="", shares="", passes="", seconds=""):
        known = str(published.get("classifier clean" if (model, attack) == ("classifier", "none") else attack, ""))
        cells = [model, attack, work, standing, percent(part), worst, during, known, shares, passes, seconds]
        lines.append("| " + " | ".join(cells) + " |")

    if r["classifier"]:
        line("classifier", "none", r["classifier"]["clean"])
    line("defence", "none", r["clean"])
    line("defence", "uniform noise", r["noise"])
    for name, a in r["attacks"].items():
        line(
            a["target"],
            name,
            a,
            f"{a['steps']} x {a['eot']}",
            str(a["standing"]),
            f"{100 * a['worst_draw']:.1f}",
            f"{100 * a['during']:.1f}",
            f"{100 * a['nonfinite_gradients']:.1f} / {100 * a['zero_gradients']:.1f} %",
            f"{a['passes_per_picture']:.0f}",
            f"{a['seconds']:.0f}",
        )
    line("**defence**", "**worst of all**", r["robust"], worst=f"{100 * r['robust']['worst_draw']:.1f}")
    lines.append("")
    if c.get("cascade"):
        lines.append("A cascade: what an attack took on every draw, the next did not attack; an accuracy is what "
                     "is left of all pictures, standing says how many were attacked. Transfer and fixed noise ran "
                     "before the direct attacks and cannot be compared with them: --no-cascade.\n")  # fmt: skip
    if not r["deterministic"]:
        low, high = 100 * r["robust"]["least"], 100 * r["robust"]["accuracy"]
        lines.append(f"Choosing the worst by noisy answers is not perfect: in expectation the worst of all is between "
                     f"{low:.1f} (the least score in the race) and {high:.1f} (scored anew).\n")  # fmt: skip
    for given, quality in r.get("reconstructions", {}).items():
        judged = "" if quality["judge"] is None else (
            f"; the judge labels {100 * quality['judge']:.1f} % of them correctly"
        )  # fmt: skip
        lines.append(f"Reconstructions of {given} pictures: BCE {quality['bce']:.3f} a value towards the clean picture"
                     f"{judged}.\n")  # fmt: skip
    if r["missing_classes"]:
        lines.append(f"**No picture of these classes** among the {r['n']}: {r['missing_classes']}.\n")
    lines += ["Audit passed." if r["audit"]["passed"] else "**Audit failed**: these numbers are not robustness."]
    lines += [f"- {message}" for message in r["audit"]["messages"] + r["audit"]["notes"]]
    seen = any(name in WHITE_BOX and a["target"] == "defence" for name, a in r["attacks"].items())
    none = "No sign of masked gradients in the accuracies." if seen else "No attack that could show masked gradients."
    lines += ["", "**Signs of masked gradients**:" if r["masking"] else none]
    lines += [f"- {message}" for message in r["masking"]]
    lines += [f"\nSkipped: {name}" for name in r["skipped"]]
    clean, robust = r["clean"]["resubmitted"], r["robust"]["resubmitted"]
    again = ", ".join(f"{k} times: {100 * v:.1f} (clean {100 * clean[k]:.1f})" for k, v in robust.items())
    again += "" if r["deterministic"] or "100" in robust else "; for 100 times: --draws 100"
    where = ", ".join(f"{k} {v}" for k, v in r["environment"].items())
    lines += ["", f"Submitted {again}", "", f"Weights {c['weights'][:16]}, seed {c['seed']}; {where}."]
    return "\n".join(lines) + "\n"


def rows(table, e) -> str:
    """A line for each picture and attack, and one for its worst: during (survived by the attack's own count), right of
    so many fresh draws, the share that was right in the race (select)."""
    lines = ["picture\tlabel\tattack\tduring\tright\tdraws\tselect"]
    for name, t in table.items():
        during = t.get("during", t["hits"].all(1))
        for i, right in enumerate(t["hits"]):
            cells = (i, int(e.labels[i]), name, int(during[i]), right.sum(), len(right), f"{t['select'][i]:.3f}")
            lines.append("\t".join(map(str, cells)))
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw_samples(e, worst: np.ndarray, count: int = 8) -> None:
    """samples.png, a row a picture: clean | adversarial (the worst) | their difference, magnified | six
    reconstructions."""
    x = e.pictures(0)[0][:count]
    adversarial = torch.from_numpy(worst[: len(x)]).to(x)
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
        flattered = 100 * (r["robust"]["accuracy"] - r["robust"]["least"])  # by noisy answers, at most
        what = "more" if low > flattered else "less" if high < 0 else "neither more nor less"
        sentences.append(
            f"CARSO keeps {100 * r['robust']['accuracy']:.1f} % of these {r['n']} pictures under its worst attack, its "
            f"own classifier {100 * r['attacks']['standard']['accuracy']:.1f} %: it is {what} robust than that: "
            f"{100 * versus['difference']:+.1f} points ({low:+.1f} to {high:+.1f})."
        )
        if what != "more" and not r["config"]["own_answer"]:
            sentences.append("To train a purifier against attacks on the whole: train.py --objective end-to-end.")
    if not {"apgd", "pgd-eot"} <= set(r["attacks"]):
        sentences.append("More attacks, of which the worst counts: the same command with --attack all.")
    return "\n".join(sentences)
