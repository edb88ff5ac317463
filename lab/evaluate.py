"""evaluate.py's command line with more rows: the union of attacks, controls, sweeps, models of others.

    python -m lab.evaluate --ckpt runs/digits/carso.pt --attack all                 # the worst of everything we know
    python -m lab.evaluate --ckpt runs/digits/carso.pt --control classifier         # a part of the defence alone
    python -m lab.evaluate --ckpt runs/digits/carso.pt --sweep eps                  # also steps, eot, samples: a curve
    python -m lab.evaluate --ckpt runs/digits/carso.pt --final FILE                 # another classifier labels
    python -m lab.evaluate --model mine.py:build --dataset cifar10 --eps 8/255 --attack all

FILE.py:NAME is an nn.Module or a function that returns one: pixels in [0, 1], (B, C, H, W), to logits (B, K). It is
left in the mode in which it was built, and taken as random unless --deterministic says otherwise.
"""

import argparse
import contextlib
import importlib.util
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data as datasets
import evaluate
from attacks import format_eps, margin, objective, random_point
from evaluate import BASELINES, ONE_DRAW, Evaluation, Seen, bootstrap_means, hold_noise
from lab.attacks import CONTROLS, FOR_CARSO, GROUPS, VIEW_OF_DECISION, WEAKER
from lab.end_to_end import load_end_to_end
from models import load_classifier, run_script, start_device

# ------------------------------------------------------------------------------------------------- models of others


class Foreign(nn.Module):
    """Somebody's model with none of its attributes to be seen: a VGG's .classifier is not CARSO's.

    Its random numbers, of torch, numpy and Python, are its own: a seed that it sets inside forward does not reach the
    attack, nor the attack's seeds the model. Where no gradient flows back to the picture, the gradient is zero, and the
    audit says so."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.states, self.refuses_gradients = model, None, False
        floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
        self.dtype = floating[0] if floating else torch.float32
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
        is_attacked = x.requires_grad and torch.is_grad_enabled()
        pictures = x.clone()  # a model may normalise in place
        if is_attacked:  # a pixel of exactly 0 or 1 has no gradient behind a clamp: a hair inside has one
            pictures = x * (1 - 2e-6) + 1e-6
        if self.refuses_gradients:
            pictures = pictures.detach()
        with self.own_random_numbers():
            logits = self.model(pictures.to(self.dtype))
        return logits + 0 * x.flatten(1).sum(1, keepdim=True) if is_attacked else logits


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
    """The model of that name in that file, or what the function of that name returns. A CARSO stays one. Raises
    ValueError; faults of the file end in their own traceback."""
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file() or not name.isidentifier():
        raise ValueError(f"--model {text} is not FILE.py:NAME, or there is no such file")
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location(f"model of {path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up for their types
    with ours_hidden_behind([path.parent, path.parent.parent]):
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            if "no known parent package" in str(error):
                raise ValueError(f"--model {text}: {path.name} is no part of a package here: write `from layers "
                                 "import` instead of `from .layers import`") from None  # fmt: skip
            raise
        model = getattr(module, name, None)
        model = model if isinstance(model, nn.Module) or not callable(model) else model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {text}: {name} is no nn.Module, nor a function that returns one")
    is_carso = hasattr(model, "member_logits") and hasattr(model, "purifier")
    return model.requires_grad_(False) if is_carso else Foreign(model)


@contextlib.contextmanager
def ours_hidden_behind(folders: list[Path]):
    """Inside, modules in these folders are imported instead of ours of the same names; ours of other names stay."""
    here = Path(evaluate.__file__).resolve().parent
    folders = [folder for folder in folders if folder != here]
    beside = {path.stem for folder in folders for path in folder.glob("*.py")}
    beside |= {path.parent.name for folder in folders for path in folder.glob("*/*.py")}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in beside}
    paths = [path for path in sys.path if Path(path).resolve() != here]
    sys.path[:] = [*map(str, folders), *paths]
    try:
        yield
    finally:
        sys.modules.update(ours)
        sys.path.append(str(here))  # behind theirs, which stay: a forward may import, too
        torch.set_default_dtype(torch.float32)  # the file may have set another


# ------------------------------------------------------------------------------ what an audit of gradients does not see


def inspect_model(model: nn.Module, images: torch.Tensor, classes: int, name: str, is_deterministic: bool) -> list[str]:
    """Faults of a model, from pictures (n, C, H, W) uint8. Raises ValueError unless it returns one logit a class, and
    the same under the same seed."""
    x = datasets.pixels(images)
    with torch.no_grad():
        logits = hold_noise(Seen(model), x, seed=0)(x)
        single = model(x[:1]).shape if len(x) > 1 else logits[:1].shape
    if single != logits[:1].shape:
        raise ValueError(
            f"--model {name} returns {tuple(single)} for a single picture; logits (1, {classes}) are wanted"
        )
    size = float(logits.nan_to_num(0, 0, 0).abs().max())
    faults = []
    with torch.no_grad():
        answers = [model(x) for _ in range(5)]
        is_random = not all(torch.equal(answer, answers[0]) for answer in answers)
        if is_random and is_deterministic:
            raise ValueError(f"--model {name} does not answer the same twice: it is not deterministic")
        if not is_random:  # each answer is that of the picture alone, or should be
            alone = torch.cat([model(picture[None]) for picture in x[:8]])
            together = model(x[:8])
            if (alone.argmax(1) != together.argmax(1)).any() or (alone - together).abs().max() > 0.1 * size:
                faults.append("the answer to a picture depends on the others in the batch: is BatchNorm in training "
                              "mode, or without running statistics?")  # fmt: skip
        again = hold_noise(Seen(model), x, seed=0)(x)  # last: a model that remembers may answer otherwise by now
    if not torch.allclose(logits, again, rtol=0.01, atol=0.01 * size, equal_nan=True):
        raise ValueError(f"--model {name} answers otherwise under the same seed, so that no gradient can be checked: "
                         "give it a method manual_seed(seed) for random numbers of its own")  # fmt: skip
    return faults


def check_output(model: nn.Module, images: torch.Tensor, classes: int, name: str) -> list[str]:
    """Notes on a foreign model's answers to a few pictures, (n, C, H, W) uint8. Raises ValueError unless they are
    logits (n, classes). Sets whether the model refuses pictures that ask for a gradient."""
    x = datasets.pixels(images)
    try:
        with torch.no_grad():
            logits = model(x)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(f"--model {name} takes gradients in its forward pass ({error}): have it enable them, by "
                         "torch.enable_grad()") from None  # fmt: skip
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(x), classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"--model {name} returns {found} for {tuple(x.shape)}; logits ({len(x)}, {classes}) are wanted"
        )
    if not logits.is_floating_point():
        raise ValueError(f"--model {name} returns {logits.dtype}: votes or classes; floating-point logits are wanted")
    try:
        asking = model(x.requires_grad_()).detach()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # numpy inside, say, or an assertion that no gradient is wanted
        model.refuses_gradients = True
        return [f"the model refuses a picture that asks for a gradient ({type(error).__name__} {error})"]
    model.manual_seed(0)
    plain = hold_noise(Seen(model), x, 0)(x.detach())
    inside = hold_noise(Seen(model), x, 0)(x)
    if asking.isfinite().all() and (plain - inside).abs().max() > 0.01 * plain.abs().max():
        return ["the answers change when a pixel of exactly 0 or 1 moves by a millionth: attacks see the moved one"]
    return []


def answers_depend_on_mode(model: nn.Module, images: torch.Tensor) -> bool:
    """True if the model would answer otherwise if all of it were in eval mode. images: (n, C, H, W) uint8."""
    x = datasets.pixels(images)
    # A frozen TorchScript module has no mode.
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}
    with torch.no_grad():
        here = hold_noise(Seen(model), x, seed=0)(x).nan_to_num()
        for module in modes:
            module.training = False
        there = hold_noise(Seen(model), x, seed=0)(x).nan_to_num()
    for module, mode in modes.items():
        module.training = mode
    return bool((here - there).abs().max() > 0.01 * here.abs().max())


def collect_answers(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """A model's logits and its margin's gradients, on pictures (n, C, H, W) in [0, 1] with labels (n,)."""
    f = hold_noise(Seen(model), pictures, seed=0)
    with torch.no_grad():
        logits = f(pictures)
    _, gradients = objective(f, labels, margin)(pictures)
    found = {"pictures": pictures, "labels": labels, "logits": logits, "gradients": gradients}
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}


def check_answers(path: Path, model: nn.Module, device: torch.device) -> None:
    """Raise ValueError where a model answers otherwise than the one whose answers are kept at path, or has other
    gradients: its code may have changed, which no hash of its weights shows."""
    kept = datasets.load_npz(path)
    pictures, labels = (torch.from_numpy(kept[name]).to(device) for name in ("pictures", "labels"))
    here = collect_answers(model, pictures, labels)
    for name in ("logits", "gradients"):
        old, new = (np.nan_to_num(arrays[name], posinf=0, neginf=0) for arrays in (kept, here))
        if np.linalg.norm(new - old) > 0.05 * np.linalg.norm(old):  # other hardware differs by less
            raise ValueError(f"{path.parent} holds the work of a model that answers otherwise: choose another --out")


def keep_answers(path: Path, e: Evaluation) -> None:
    """Keep the model's answers at path: to clean pictures, to noise of the radius, and to adversarial pictures, where
    there are some: a model may answer alike on clean pictures alone."""
    x, y = datasets.pixels(e.images[:8].to(e.device)), e.labels[:8].to(e.device)
    torch.manual_seed(0)
    pictures = [x, random_point(x, e.settings["eps"])]
    worst = e.find_path("worst", 0)
    if worst.is_file():
        pictures.append(torch.from_numpy(datasets.load_npz(worst)["adversarial"][:8]).to(e.device))
    datasets.write_npz(path, **collect_answers(e.model, torch.cat(pictures), torch.cat([y] * len(pictures))))


def find_masking(e: Evaluation, table: dict[str, dict]) -> list[str]:
    """Sentences on attacks that should be weaker than those that follow gradients (Athalye et al. 2018, Carlini et al.
    2019), and are significantly stronger: by more than a point, paired by picture, 95 %. A picture that one side took
    before the other had its turn speaks for neither."""
    followers = [table[name] for name in e.attacks if name not in (*WEAKER, "clean", "standard")]
    if not followers:
        return []
    attacked = np.stack([a["attacked"] for a in followers])
    best = np.where(attacked, [a["select"] for a in followers], np.inf).argmin(0)
    right = np.stack([a["right"].mean(1) for a in followers])[best, np.arange(len(best))]
    found = []
    for name in (name for name in e.attacks if name in WEAKER):
        both = table[name]["attacked"] & attacked.any(0)
        stronger = np.where(both, right - table[name]["right"].mean(1), 0.0)
        if np.quantile(bootstrap_means(stronger), 0.025) > 0.01:
            found.append(f"{name} takes {100 * stronger.mean():.1f} points more than attacks that follow gradients do")
    return found


def judge(faults: list[str], e: Evaluation, table: dict[str, dict]) -> list[str]:
    """Instead of evaluate.find_faults: what was seen before any attack comes first, signs of masking last."""
    return faults + evaluate.find_faults(e, table) + find_masking(e, table)


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


def run_sweep(what: str, attack: str, build, settings: dict, folder: Path, about: dict, numbers, judge) -> int:
    """sweep-WHAT.tsv and .png: accuracy under one attack, and under noise, at every value. The exit status: 0, or 3 for
    a failed audit or signs of masked gradients. build(settings, folder) -> the evaluations."""
    from lab.plot import plot_sweep

    last = build(settings, folder)[-1]
    if attack in BASELINES or attack not in last.attacks:
        raise ValueError(f"--sweep {what} --attack {attack} attacks nothing: the model is a {last.name}")
    if what == "samples" and not hasattr(last.model, "member_logits"):
        raise ValueError("--sweep samples is for a CARSO, and this model is none")
    rows, failed = [], False
    for value in SWEEPS[what]:
        text = format_eps(value).replace("/", "_") if what == "eps" else str(value)
        e = build(settings | {what: value}, folder / f"sweep-{what}" / text)[-1]
        if not evaluate.run_chunks([e]):
            continue  # other processes are at work
        report = evaluate.write_report([e], about, numbers, judge)
        parts = report["clean"], report["noise"], report["attacks"][attack]
        rows.append([value, *(part["accuracy"] for part in parts)])
        failed |= not report["audit"]["passed"]
        print("{} {:g}: clean {:.1%}, noise {:.1%}, attacked {:.1%}".format(what, *rows[-1]), flush=True)
    if len(rows) < len(SWEEPS[what]):
        return 0
    lines = ["\t".join([what, "clean", "noise", attack, "n"])]
    lines += ["\t".join([f"{row[0]:.6g}", *(f"{v:.4f}" for v in row[1:]), str(report["n"])]) for row in rows]
    datasets.write_text(folder / f"sweep-{what}.tsv", "\n".join(lines) + "\n")
    values, _, noise, attacked = zip(*rows)
    signs = find_signs(what, values, attacked, noise)
    print("\n".join(signs or ["no sign of masked gradients"]))
    plot_sweep(folder, what)
    print(f"the curve is {folder}/sweep-{what}.png")
    return 3 if failed or signs else 0


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = evaluate.build_parser(__doc__, GROUPS)
    add = parser.add_argument
    add("--model", metavar="FILE.py:NAME", help="a model of yours; with --dataset and --eps")
    add("--deterministic", action="store_true", help="--model answers the same each time: one draw is enough")
    add("--control", choices=CONTROLS, help="a part of the defence, or one with a part cut")
    add("--final", metavar="FILE", help="weights of a second classifier, which labels the reconstructions, while the "
        "first one is looked into (default: one does both)")  # fmt: skip
    add("--sweep", choices=SWEEPS, help="repeat one attack over a range of this, with a plot (default: apgd-ce)")
    args = parser.parse_args(argv)
    if args.model and (not args.dataset or args.eps is None or args.ckpt or args.published):
        raise ValueError("--model goes with --dataset and --eps, and without --ckpt and --published")
    if args.model and (args.control or args.final):
        raise ValueError("--control and --final are for a CARSO of --ckpt: leave them out")
    if args.sweep:
        args.attack = args.attack or ["apgd-ce"]
        if len(args.attack) > 1 or args.attack[0] in GROUPS:
            raise ValueError(f"--sweep {args.sweep} repeats one attack: give --attack one name")
        args.no_cascade = True
    for name in ("out", "data_dir"):  # a model's file may change the folder
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).expanduser().resolve()))
    args.view = args.view or VIEW_OF_DECISION.get(args.aggregation)
    return args


def load_model(args: argparse.Namespace, device: torch.device) -> tuple:
    """evaluate.load_model's four, also of a model of others, of a CARSO trained end to end, and of a control."""
    if args.model:
        data = datasets.load(args.dataset, args.data_dir or "data", keep_size=True)
        source = Path(args.model).expanduser().resolve()
        return load_foreign(args.model).to(device), data, {}, source
    model, data, state, source = evaluate.load_model(args, device, load_end_to_end)
    if (args.control or args.final) and not hasattr(model, "purifier"):
        option = f"--control {args.control}" if args.control else f"--final {args.final}"
        raise ValueError(f"{option} is for a CARSO, and this model is none: leave it out")
    if args.final:
        final = load_classifier(args.final, len(data.classes), data.mean, data.std).to(device)
        model.final = final.requires_grad_(False)
        model.eval()
    return CONTROLS[args.control](model) if args.control else model, data, state, source


def choose_attacks(asked: list[str] | None, model: nn.Module) -> list[str] | None:
    """The attacks that names and groups stand for. A group takes of its attacks those that apply to the model. Raises
    ValueError for another one that does not."""
    missing = () if hasattr(model, "purifier") else FOR_CARSO
    for name in asked or ():
        if name in missing:
            raise ValueError(f"--attack {name} is for a CARSO, and this model is none: leave it out")
    chosen = [name for given in asked or () for name in GROUPS.get(given, [given])]
    return [name for name in chosen if name not in missing] or None


def main(argv=None) -> int:
    args = parse_arguments(argv)
    device = start_device(args.device)
    model, data, state, source = load_model(args, device)
    args.attack = choose_attacks(args.attack, model)
    notes, faults = evaluate.find_notes(data, state, source), []
    some = data.test_images[:128].to(device)
    if isinstance(model, Foreign):
        notes += check_output(model, some[:8], len(data.classes), args.model)
    if args.model:
        faults = inspect_model(model, some, len(data.classes), args.model, args.deterministic)
        if answers_depend_on_mode(model, some[:8]):
            notes.append("the model answers otherwise in eval mode: it stays in training mode, as it was built")

    settings = evaluate.choose_settings(
        args, model, state, data, args.model and f"{source.name}:{args.model.rpartition(':')[2]}"
    )
    settings |= {"control": args.control, "own_answer": getattr(model, "own_answer", 0.0)}
    is_deterministic = args.deterministic or args.control == "fixed-z"
    settings |= ONE_DRAW if is_deterministic else {}
    folder = evaluate.claim_folder(args, settings, source)
    build = lambda settings, folder: evaluate.build_evaluations(model, data, settings, folder, device, args.limit)  # noqa: E731
    evaluations, answers = build(settings, folder), folder / "answers.npz"
    if args.model and answers.is_file():
        check_answers(answers, model, device)
    elif args.model:
        keep_answers(answers, evaluations[-1])
    about = {"checkpoint": args.model or str(source), "dataset": data.name, "notes": notes}
    numbers = data.test_numbers.tolist()
    judged = partial(judge, faults)
    if args.sweep:
        return run_sweep(args.sweep, args.attack[0], build, settings, folder, about, numbers, judged)
    status = evaluate.run(evaluations, about, numbers, judged)
    if args.model:
        keep_answers(answers, evaluations[-1])
    return status


if __name__ == "__main__":
    run_script("lab.evaluate", main)
