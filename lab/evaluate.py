"""evaluate.py's command line with more rows: the union of attacks, controls, sweeps, models of others.

    python -m lab.evaluate --ckpt runs/digits/carso.pt --attack all                 # the worst of everything we know
    python -m lab.evaluate --ckpt runs/digits/carso.pt --control classifier         # a part of the defence alone
    python -m lab.evaluate --ckpt runs/digits/carso.pt --sweep eps                  # also steps, eot, samples: a curve
    python -m lab.evaluate --model mine.py:build --dataset cifar10 --eps 8/255 --attack all

FILE.py:NAME is an nn.Module or a function that returns one: pixels in [0, 1], (B, C, H, W), to logits (B, K). It is
left in the mode in which it was built, and taken as random unless --deterministic says otherwise.
"""

import contextlib
import dataclasses
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data as datasets
from attacks import format_eps
from evaluate import (
    Evaluation,
    Seen,
    build_parser,
    evaluate_losses,
    load_model,
    prepare,
    reseed,
    run,
    run_chunks,
    write_report,
)
from lab.attacks import ALL, CONTROLS, GROUPS
from models import run_script, start_device

# ------------------------------------------------------------------------------------------------- models of others


class Foreign(nn.Module):
    """Somebody's model with none of its attributes to be seen: a VGG's .classifier is not CARSO's.

    Its random numbers, of torch, numpy and Python, are its own: a seed that it sets inside forward does not reach the
    attack, nor the attack's seeds the model. Where no gradient flows back to the picture, the gradient is zero, and the
    audit says so."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.states = model, None
        self.manual_seed(0)

    def manual_seed(self, seed: int) -> None:
        with self.own_random_numbers():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            if hasattr(self.model, "manual_seed"):
                self.model.manual_seed(seed)

    @contextlib.contextmanager
    def own_random_numbers(self):
        outside = get_random_states()
        set_random_states(self.states or outside)
        try:
            yield
        finally:
            self.states = get_random_states()
            set_random_states(outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A pixel of exactly 0 or 1 has no gradient behind a clamp, and would stick there: a hair inside has one."""
        inside = x * (1 - 2e-6) + 1e-6
        with self.own_random_numbers():
            try:
                logits = self.model(inside)
            except Exception:  # numpy inside, say, or an assertion that no gradient is wanted
                if not x.requires_grad:
                    raise
                logits = self.model(inside.detach())
        if x.requires_grad and not logits.requires_grad:
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)
        return logits


def get_random_states() -> list:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()]


def set_random_states(states: list) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
    np.random.set_state(states[2])
    random.setstate(states[3])


def load_foreign(text: str) -> nn.Module:
    """The model of that name in that file, or what the function of that name returns. A CARSO stays one. Modules beside
    the file come before ours of the same name. Raises ValueError; faults of the file end in their own traceback."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"--model {text} is not FILE.py:NAME, or there is no such file")
    torch.manual_seed(0)
    others = path.resolve().parent.iterdir()
    beside = {other.stem for other in others if other.suffix == ".py" or (other / "__init__.py").is_file()}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in beside}
    sys.path.insert(0, str(path.resolve().parent))  # and stays: a forward may import, too
    spec = importlib.util.spec_from_file_location(f"model of {path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up for their types
    spec.loader.exec_module(module)
    model = getattr(module, name, None)
    model = model if isinstance(model, nn.Module) or not callable(model) else model()
    sys.modules.update(ours)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {text}: {name} is no nn.Module, nor a function that returns one")
    return model if hasattr(model, "member_logits") and hasattr(model, "purifier") else Foreign(model)


@torch.no_grad()
def inspect_model(model: nn.Module, images: torch.Tensor, classes: int, name: str) -> list[str]:
    """Faults of a model that an audit of gradients does not see, from pictures (n, C, H, W) uint8. Raises ValueError
    unless it returns one logit a class, and the same under the same seed."""
    x = datasets.pixels(images)
    reseed(0, model)
    logits = model(x)
    reseed(0, model)
    again = model(x)
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(x), classes) or not logits.is_floating_point():
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"--model {name} returns {found} for {tuple(x.shape)}; logits ({len(x)}, {classes}) are wanted"
        )
    size = float(logits.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(logits, again, rtol=0.01, atol=0.01 * size, equal_nan=True):
        raise ValueError(f"--model {name} answers otherwise under the same seed, so that no gradient can be checked: "
                         "give it a method manual_seed(seed) for random numbers of its own")  # fmt: skip
    faults = []
    if all(torch.equal(logits, model(x)) for _ in range(5)):  # not random: each answer is that of the picture alone
        alone = torch.cat([model(picture[None]) for picture in x])
        if (alone.argmax(1) != logits.argmax(1)).any() or (alone - logits).abs().max() > 0.1 * logits.abs().max():
            faults.append("the answer to a picture depends on the others in the batch (BatchNorm without running "
                          "statistics?): what one picture alone would get is not measured")  # fmt: skip
    return faults


def check_answers(folder: Path, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Keep a model's logits and gradients on fixed pictures in the folder, or compare them with those that are there:
    its code may have changed, which no hash of its weights shows. Raises ValueError where they differ."""
    path = folder / "answers.npz"
    logits, _, gradients = evaluate_losses(Seen(model), datasets.pixels(images), labels, None, seed=0)
    here = {name: tensor.cpu().numpy() for name, tensor in {"logits": logits, **gradients}.items()}
    if not path.is_file():
        datasets.write_npz(path, **here)
    there = datasets.load_npz(path)
    for name in here:
        old, new = (np.nan_to_num(arrays[name], posinf=0, neginf=0) for arrays in (there, here))
        if np.linalg.norm(new - old) > 0.05 * np.linalg.norm(old):  # other hardware differs by less
            raise ValueError(f"{folder} holds the work of a model that answers otherwise: choose another --out")


# ------------------------------------------------------------------------------------------------------------ sweeps

SWEEPS = {
    "eps": [v / 255 for v in (0, 2, 4, 8, 16, 32, 64, 128)],
    "steps": [1, 5, 10, 20, 50, 100, 200],
    "eot": [1, 5, 20, 100],
    "samples": [1, 2, 4, 8, 16, 32],
}


def find_signs(what: str, values: list[float], attacked: list[float], noise: list[float], slack=0.03) -> list[str]:
    """Sentences on signs of masked gradients, from accuracies under attack and under noise at growing values."""
    found = []
    if what == "eps":
        if any(later > earlier + slack for earlier, later in zip(attacked, attacked[1:])):
            found.append("accuracy rises somewhere as eps grows")
        if attacked[-1] > 0.05:
            found.append(f"accuracy does not go to zero as eps grows: {attacked[-1]:.1%} at {format_eps(values[-1])}")
        if any(a > n + slack for a, n in zip(attacked[1:], noise[1:])):
            found.append("noise beats the attack at some eps")
    if what == "steps" and attacked[0] < attacked[-1] - slack:
        found.append("one step beats many")
    return found


def run_sweep(e: Evaluation, what: str) -> int:
    """sweep-WHAT.tsv and .png: accuracy under our APGD on cross-entropy, and under noise, at every value. The exit
    status: 0, or 3 for a failed audit or signs of masked gradients."""
    from lab.plot import plot_sweep

    rows, failed = [], False
    for value in SWEEPS[what]:
        text = format_eps(value).replace("/", "_") if what == "eps" else str(value)
        point = dataclasses.replace(e, config=e.config | {what: value}, folder=e.folder / f"sweep-{what}" / text)
        if not run_chunks(point, lambda _: None):
            continue  # other processes are at work
        report = write_report(point)
        parts = report["clean"], report["noise"], report["attacks"]["apgd-ce"]
        rows.append([value, *(part["accuracy"] for part in parts)])
        failed |= not report["audit"]["passed"]
        print("{} {:g}: clean {:.1%}, noise {:.1%}, attacked {:.1%}".format(what, *rows[-1]), flush=True)
    if len(rows) < len(SWEEPS[what]):
        return 0
    lines = ["\t".join([what, "clean", "noise", "apgd-ce", "n"])]
    lines += ["\t".join([f"{row[0]:.6g}", *(f"{v:.4f}" for v in row[1:]), str(len(e.labels))]) for row in rows]
    datasets.write_text(e.folder / f"sweep-{what}.tsv", "\n".join(lines) + "\n")
    values, _, noise, attacked = zip(*rows)
    signs = find_signs(what, values, attacked, noise)
    print("\n".join(signs or ["no sign of masked gradients"]))
    plot_sweep(e.folder, what)
    print(f"the curve is {e.folder}/sweep-{what}.png")
    return 3 if failed or signs else 0


# ------------------------------------------------------------------------------------------------------ command line


def main(argv=None) -> int:
    parser = build_parser(ALL, GROUPS, __doc__)
    add = parser.add_argument
    add("--model", metavar="FILE.py:NAME", help="a model of yours; with --dataset and --eps")
    add("--deterministic", action="store_true", help="--model answers the same each time: one draw is enough")
    add("--control", choices=CONTROLS, help="a part of the defence, or one with a part cut")
    add("--sweep", choices=SWEEPS, help="repeat one attack over a range of this, with a plot")
    args = parser.parse_args(argv)
    device, more = start_device(args.device), {"control": args.control, "deterministic": args.deterministic}
    if args.model:
        if not args.dataset or args.eps is None or args.ckpt or args.published:
            raise ValueError("--model goes with --dataset and --eps, and without --ckpt and --published")
        data = datasets.load(args.dataset, args.data_dir or "data")
        model, state, source = load_foreign(args.model).to(device), {}, Path(args.model)
        more["weights"] = "see answers.npz"  # its code counts as well, and no hash shows that
    else:
        model, data, state, source = load_model(args, device)
    if args.control and not hasattr(model, "purifier"):
        raise ValueError(f"--control {args.control} is for a CARSO, and this model is none: leave it out")
    model = CONTROLS[args.control](model) if args.control else model
    if args.sweep:
        args.attack, args.no_cascade = ["apgd-ce"], True
    faults = inspect_model(model, data.test_images[:8].to(device), len(data.classes), args.model or "")
    e = prepare(args, model, data, state, source, ALL, GROUPS, **more)
    e.faults, e.deterministic = tuple(faults), e.deterministic or args.deterministic or args.control == "fixed-z"
    if args.model:
        check_answers(e.folder, model, data.test_images[:8].to(device), data.test_labels[:8].to(device))
    if any(module.training for module in model.modules() if module is not model):
        print("note: parts of the model are in training mode, as it was built", flush=True)
    return run_sweep(e, args.sweep) if args.sweep else run(e)


if __name__ == "__main__":
    run_script("lab.evaluate", main)
