"""Every number of a training run and of an evaluation: its default, its bounds, what it means. Said once, here; the
command lines, their help and refusals, and the README's table follow.

    python -m lab.presets          # prints the README's table
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field

# ------------------------------------------------------------------------------------------- numbers and their bounds


def parse_number(text: str) -> float:
    """'8/255' or '0.03', as people write eps. Raises ArgumentTypeError, which argparse turns into a sentence."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number such as 8/255 or 0.03")
    return value


def parse_switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def eps_text(eps: float) -> str:
    """8/255 where it is one, else a decimal, which reads as the same number."""
    steps = round(255 * eps)
    return f"{steps}/255" if abs(255 * eps - steps) < 1e-6 and (steps or not eps) else str(float(eps))


# What a number must be: the sentence that refuses it, and the test. (NaN fails every comparison, as it should; beyond a
# million a count is a slip, which would overflow somewhere, or never end.)
COUNT = "must be 1 or more, up to a million", lambda v: 1 <= v <= 1e6
SEVERAL = "must be 2 or more, up to a million: BatchNorm needs them", lambda v: 2 <= v <= 1e6
WHOLE = "must be 0 or more, up to a million", lambda v: 0 <= v <= 1e6
VERSIONS = "must be 0 to 3, or a multiple of 4 up to 100", lambda v: v in range(4) or v in range(4, 101, 4)
NUMBER = "must be 0 or more", lambda v: 0 <= v < math.inf
POSITIVE = "must be positive", lambda v: 0 < v < math.inf
SHARE = "is not a share between 0 and 1", lambda v: 0 <= v <= 1
PART = "is not a share of at least 0 and less than 1", lambda v: 0 <= v < 1
MOMENTUM = "must be more than 0 and at most 1", lambda v: 0 < v <= 1
RADIUS = "is not a distance between pixels in [0, 1]; write 8/255, say", lambda v: 0 < v <= 1
DEPTH = "must be 6n + 4 (10, 16, 22, 28, ...), up to 1000", lambda v: 10 <= v <= 1000 and v % 6 == 4
WIDTH = "must be 8 or more, up to a million: it is halved three times", lambda v: 8 <= v <= 1e6
SWITCH = "is true or false", lambda v: v in (True, False)
SEED = "must be less than 2^32 away from 0", lambda v: abs(v) < 2**32


def check_bounds(option: str, value, bounds) -> None:
    """ValueError, with the option's name, for a value out of its bounds."""
    sentence, allowed = bounds
    if not allowed(value):
        raise ValueError(f"{option} {value if isinstance(value, int) else f'{value:g}'} {sentence}")


OTHERS = {"seed": SEED, "save_every": NUMBER, "micro_batch": COUNT, "limit": COUNT, "samples": WHOLE}


def check_options(args: argparse.Namespace) -> None:
    """What both scripts' options beside presets and budgets must be: the numbers within OTHERS, and no text empty, as a
    variable that is not set leaves it in a shell. ValueError, with the option's name."""
    for name, value in vars(args).items():
        option = "--from" if name == "start" else "--" + name.replace("_", "-")
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError(f"{option} is empty: give it a value, or leave it out")
        if name in OTHERS and value is not None:
            check_bounds(option, value, OTHERS[name])


def setting(default, bounds, meaning: str):
    return field(default=default, metadata={"bounds": bounds, "meaning": meaning})


@dataclass(frozen=True)
class Preset:
    """A training run. The defaults are the paper's scenario a (tables 12 to 14), but for what is marked "ours"."""

    # The classifier, and its own adversarial training (ours; the paper takes published weights)
    depth: int = setting(28, DEPTH, "of the WideResNet")
    width: int = setting(10, COUNT, "of the WideResNet")
    classifier_epochs: int = setting(100, COUNT, "of its PGD training")
    classifier_batch_size: int = setting(512, SEVERAL, "pictures a step, over all processes")
    classifier_learning_rate: float = setting(0.2, NUMBER, "peak of a one-cycle schedule, SGD with Nesterov momentum")
    classifier_weight_decay: float = setting(5e-4, NUMBER, "of the SGD")
    classifier_ramp: int = setting(5, WHOLE, "epochs over which the attack's radius grows from 0 to eps")
    classifier_attack_steps: int = setting(
        10, WHOLE, "PGD, each step 2.5 eps / steps (Madry et al. 2018); 0: plain training, of clean pictures"
    )
    classifier_bn_momentum: float = setting(0.01, MOMENTUM, "larger where few steps let the running statistics settle")
    augment: bool = setting(True, SWITCH, "random crops (shifts by up to 4 pixels), for the classifier and end to end")
    mirror: bool = setting(True, SWITCH, "of these crops, half mirrored")

    # The purifier
    condition_dim: int = setting(512, COUNT, "D, table 13")
    latent_dim: int = setting(128, COUNT, "Z, table 13")
    decoder_width: int = setting(256, WIDTH, "channels of the decoder's first map, tables 10 and 11")
    samples: int = setting(8, WHOLE, "S, reconstructions a picture, section 5.1; 0: one, of z = 0")

    # Stage two, table 14
    epochs: int = setting(200, COUNT, "of the purifier's training")
    batch_size: int = setting(5120, SEVERAL, "pictures a step, over all processes: 8 GPUs x 640")
    learning_rate: float = setting(0.064, NUMBER, "on the plateau; the same for any number of processes")
    learning_rate_start: float = setting(5e-9, NUMBER, "before the warm-up")
    learning_rate_end: float = setting(8e-6, NUMBER, "after the anneal")
    warmup: int = setting(25, WHOLE, "epochs")
    plateau: int = setting(25, WHOLE, "epochs; the rest anneals")
    kl_from: int = setting(25, WHOLE, "the KL weight is 0 until this epoch")
    kl_to: int = setting(34, WHOLE, "and 1 from this one")

    # Adversarially-balanced batches, table 12
    eps: float = setting(8 / 255, RADIUS, "largest radius, in pixels")
    fraction: float = setting(0.5, SHARE, "perturbed share of each batch")
    attack_steps: int = setting(40, COUNT, "PGD")
    attack_step_size: float = setting(0.01, POSITIVE, "of PGD, in pixels")
    attack_versions: int = setting(0, VERSIONS, "attack the training set so many times, before the training (ours; 4: "
                                   "by every kind once); 0: every batch anew, as the paper")  # fmt: skip

    # Training end to end, --objective end-to-end (ours; see RESULTS.md)
    end_epochs: int = setting(20, COUNT, "of training end to end")
    end_batch_size: int = setting(512, SEVERAL, "pictures a step, over all processes")
    end_learning_rate: float = setting(1e-3, NUMBER, "Adam, falls linearly to 0")
    end_attack_steps: int = setting(5, COUNT, "PGD on the whole defence, each step 2.5 eps / steps")
    end_samples: int = setting(1, COUNT, "S in training")
    end_reconstruction: float = setting(4.0, NUMBER, "weight of the BCE, a mean over the picture's values")
    own_answer: float = setting(0.5, PART, "share of the classifier's answer to the picture itself in each member")

    bf16: bool = setting(False, SWITCH, "mixed precision for attacks and updates; losses stay in float32 (ours)")


PAPER = Preset()
PRESETS = {
    "digits": Preset(  # ours: minutes on two CPU cores
        depth=10, width=1, classifier_epochs=18, classifier_batch_size=64, classifier_learning_rate=0.1,
        classifier_ramp=6, classifier_attack_steps=5, classifier_bn_momentum=0.1,
        classifier_weight_decay=1e-4, augment=False, mirror=False,
        condition_dim=64, latent_dim=16, decoder_width=64,
        epochs=24, batch_size=64, learning_rate=4e-3, learning_rate_start=5e-9, learning_rate_end=4e-6,
        warmup=3, plateau=6, kl_from=3, kl_to=6, eps=0.2, attack_steps=10, attack_step_size=0.05,
        attack_versions=4, end_epochs=14, end_batch_size=64,
    ),
    "cifar10": PAPER,
    "cifar100": dataclasses.replace(PAPER, batch_size=2560, fraction=0.15),  # 4 GPUs x 640
    "tinyimagenet": dataclasses.replace(
        PAPER, condition_dim=768, latent_dim=192, epochs=250, batch_size=1024, fraction=0.01,  # 8 GPUs x 128
        learning_rate=0.0128, learning_rate_end=1.6e-6, warmup=31, plateau=31, kl_from=32, kl_to=43,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much work an evaluation is. The defaults are the paper's protocol (section 5.1, table 12)."""

    n: int = setting(10_000, COUNT, "test pictures, the first ones")
    steps: int = setting(100, COUNT, "APGD's, in AutoAttack and in ours")
    eot: int = setting(20, COUNT, "draws averaged (or, by AutoAttack, summed) a gradient")
    pgd_steps: int = setting(200, COUNT, "PGD+EoT")
    pgd_step_size: float = setting(0.007, POSITIVE, "of PGD+EoT, in pixels")
    queries: int = setting(5000, COUNT, "Square")
    targets: int = setting(9, COUNT, "classes that targeted attacks aim at")
    select: int = setting(20, COUNT, "draws that choose the worst candidate of a picture")
    draws: int = setting(20, COUNT, "fresh draws that score it")
    chunk: int = setting(128, COUNT, "pictures in a unit of work")


BUDGETS = {
    "paper": Budget(),
    # Ours: two minutes on two CPU cores. Enough to see a defence break, too little to prove that one holds.
    "reduced": Budget(
        n=100, steps=10, eot=4, pgd_steps=20, pgd_step_size=0.02, queries=200, targets=3, select=20, draws=10, chunk=50
    ),
}


def reduced(budget: Budget) -> bool:
    """Does an attack work less, or a score rest on fewer draws, than in the paper's budget, the default?"""
    work = ("steps", "eot", "pgd_steps", "queries", "targets", "select", "draws")
    return any(getattr(budget, number) < getattr(Budget(), number) for number in work)


def budget_note(budget: Budget) -> str:
    """What a report says of it before any number."""
    return "**Reduced budget**: upper bounds, not benchmark numbers." if reduced(budget) else "The paper's budget."


# ------------------------------------------------------------------------------------------------------ command lines


def add_options(parser: argparse.ArgumentParser, table: type) -> None:
    """An option for every field of Preset or Budget. Left out, it is the preset's."""
    group = parser.add_argument_group(table.__name__.lower(), "every number of it can be overridden")
    kinds = {float: parse_number, int: int, bool: parse_switch}
    for f in dataclasses.fields(table):
        names = ["--" + f.name.replace("_", "-")]
        if f.name == "n":
            names.insert(0, "--pictures")  # torchrun takes --n for an abbreviation of its own options
        text = f.metadata["meaning"].replace("%", "%%")
        group.add_argument(*names, dest=f.name, type=kinds[f.type], metavar=f.type.__name__, help=text)


def overridden(chosen, args: argparse.Namespace):
    """The preset or budget with what the command line says otherwise. ValueError for a value out of its bounds."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(chosen)}
    chosen = dataclasses.replace(chosen, **{k: v for k, v in given.items() if v is not None})
    for f in dataclasses.fields(chosen):
        check_bounds("--" + f.name.replace("_", "-"), getattr(chosen, f.name), f.metadata["bounds"])
    return chosen


def choose_preset(name: str, args: argparse.Namespace) -> Preset:
    """A row of PRESETS with the command line's changes. A shorter or longer run keeps the schedule's proportions.

    Raises ValueError for a value out of its bounds, or a schedule that does not fit into the training."""
    p = overridden(PRESETS[name], args)
    if p.epochs != PRESETS[name].epochs:
        scaled = {k: max(1, getattr(PRESETS[name], k) * p.epochs // PRESETS[name].epochs)
                  for k in ("warmup", "plateau", "kl_from", "kl_to") if getattr(args, k) is None}  # fmt: skip
        if p.epochs == 1:  # no second epoch for the KL weight to grow in
            scaled |= {k: 0 for k in ("kl_from", "kl_to") if k in scaled}
        if args.plateau is None:
            scaled["plateau"] = min(scaled["plateau"], max(0, p.epochs - scaled.get("warmup", p.warmup)))
        p = dataclasses.replace(p, **scaled)
    if p.warmup + p.plateau > p.epochs:
        raise ValueError(f"--warmup {p.warmup} and --plateau {p.plateau} are longer than the {p.epochs} epochs")
    if p.kl_to < p.kl_from:
        raise ValueError(f"--kl-to {p.kl_to} is before --kl-from {p.kl_from}: the KL weight would not grow")
    return p


def fit_batches(p: Preset, count: int, args: argparse.Namespace) -> Preset:
    """The preset for a training set of `count` pictures: where they make fewer than ten batches an epoch (the paper's
    scenario a has ten), batches of a tenth of them, but not under 16 pictures. The rates fall with the batch: for SGD
    in proportion (Goyal et al. 2017), for RAdam and Adam as its root (Malladi et al. 2022). What `args` give stays."""
    changed, purifier = {}, "end_" if args.objective == "end-to-end" else ""
    for stage, power in (("classifier_", 1), (purifier, 0.5)):
        size, rate = f"{stage}batch_size", f"{stage}learning_rate"
        usual, fitted = getattr(p, size), max(16, math.ceil(count / 10))
        if getattr(args, size) is None and math.ceil(count / usual) < 10 and fitted < usual:
            changed[size] = fitted
            if getattr(args, rate) is None:
                changed[rate] = float(f"{getattr(p, rate) * (fitted / usual) ** power:.2g}")
    return dataclasses.replace(p, **changed)


# ---------------------------------------------------------------------------------------------------- README's table


def table() -> str:
    """The presets side by side, in Markdown: what differs between them, and the paper's figures."""
    rows = {
        "classifier": lambda p: f"WRN-{p.depth}-{p.width}",
        "D, Z, S": lambda p: f"{p.condition_dim}, {p.latent_dim}, {p.samples}",
        "epochs of the purifier: all, warm-up, plateau": lambda p: f"{p.epochs}, {p.warmup}, {p.plateau}",
        "KL weight 0 until, 1 from epoch": lambda p: f"{p.kl_from}, {p.kl_to}",
        "batch, over all GPUs": lambda p: f"{p.batch_size:,}",
        "learning rate on the plateau": lambda p: f"{p.learning_rate:g}",
        "perturbed share": lambda p: f"{p.fraction:g}",
        "eps": lambda p: f"{eps_text(p.eps)} = {p.eps:.2g}",
        "PGD steps x size": lambda p: f"{p.attack_steps} x {p.attack_step_size:g}",
        "pictures attacked": lambda p: f"{p.attack_versions} times" if p.attack_versions else "in each batch",
        "end to end (ours): epochs, batch, PGD steps": lambda p: (
            f"{p.end_epochs}, {p.end_batch_size}, {p.end_attack_steps}"
        ),
    }
    scenario = {"cifar10": " (a)", "cifar100": " (b)", "tinyimagenet": " (c)"}
    lines = [["", *(name + scenario.get(name, "") for name in PRESETS)], ["---"] * (1 + len(PRESETS))]
    lines += [[name, *(text(p) for p in PRESETS.values())] for name, text in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> int:
    argparse.ArgumentParser("presets", description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    print(table())
    return 0


if __name__ == "__main__":
    main()
