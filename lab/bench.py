"""How fast are the parts of CARSO on this machine, and how near to its limit?

    python -m lab.bench --threads 1                         # WRN-10-2, batch 64, D 512, Z 128, S 8
    python -m lab.bench --threads 1 --against plain         # in turn with the same work written the plain way
    python -m lab.bench --preset cifar10 --device cuda --batch-size 512 --precision bf16     # WRN-28-10
    python -m lab.bench --memory-plan                       # GPU memory and hours of the paper's scenarios, computed

Every part is warmed up, then timed in turn with the others, `--repeats` times, in one process. Seconds are those of the
fastest repeat, ratios the medians over the repeats. The limit is the rate of a square matrix product, its fastest too.
FLOP are counted by PyTorch (two a multiply-add; convolutions, matrix products). Memory is what the backward pass keeps.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from functools import partial

import torch
from torch import nn

from aggregate import robust_logits
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, fgsm, objective, pgd
from lab.plan import count_flop
from lab.presets import COUNT, DEPTH, PAPER, POSITIVE, PRESETS, Preset, check_bounds
from lab.ranks import keep_freed_memory
from lab.start import out_of_memory, start_device
from lab.target import Target, climb
from models import Norm, WideResNet, record, representation_layers
from purifier import CARSO, build_carso, vae_loss
from train import Lookahead, purifier_optimizer

EPS, STEPS, STEP_SIZE, DRAWS = 8 / 255, 40, 0.01, 20  # the paper's, table 12
EOT = f"EoT of {DRAWS} draws, 4 pictures"
# A whole step, and the share of (a) that it pays: --attack-versions 4 spreads the attacks of 8 epochs over 200.
WHOLE = {"(a) + (b), attacked anew": 1.0, "(a) + (b), 4 versions": 4 / (PAPER.fraction * PAPER.epochs)}
MIXED = "classifier gradient", "(a) balanced batch", "(b) training step", "(d) gradient", EOT  # with --precision bf16

# ---------------------------------------------------------------------------------------------- the work, in two ways


def training_loss(carso: CARSO, x: torch.Tensor) -> torch.Tensor:
    """The purifier's, in float32; no graph goes through the frozen classifier."""
    with torch.no_grad():
        _, representation = record(carso.classifier, carso.layers, x)
    reconstruction, mu, logvar = (out.float() for out in carso.purifier(x, representation))
    with torch.autocast(x.device.type, enabled=False):
        return vae_loss(reconstruction, x, mu, logvar, beta=1.0)[0]


def parts(carso: CARSO, lookahead: Lookahead, whole, balanced_batch, averaged_gradient, x, y) -> dict:
    """Part -> a function that does it once, for pictures x (B, C, H, W) in [0, 1] and labels y (B,)."""
    classifier = carso.classifier

    def training_step():
        lookahead.optimizer.zero_grad()
        training_loss(carso.train(), x).backward()
        lookahead.step()
        carso.eval()

    return {
        "classifier forward": torch.no_grad()(lambda: classifier(x)),
        "classifier gradient": lambda: objective(classifier, y)(x),
        "(a) balanced batch": balanced_batch,
        "(b) training step": training_step,
        "(c) inference": torch.no_grad()(lambda: whole(x)),
        "(d) gradient": lambda: objective(whole, y)(x),
        EOT: averaged_gradient,
    }


def ours(carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    def balanced_batch():
        adversarially_balanced_batch(carso.classifier, x, y, EPS, 0.5, STEPS, STEP_SIZE)

    target, lookahead = Target(carso, limit=10**9), purifier_optimizer(carso.purifier, PAPER)
    return parts(carso, lookahead, carso, balanced_batch, lambda: climb(target, y[:4], "ce", DRAWS)(x[:4]), x, y)


def plain(carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    """The same as the paper's text reads and its authors' code does it: PyTorch's own BatchNorm and memory layout, four
    attacks one after another, members by vmap, draws of EoT one by one. It, too, takes no gradient nobody needs."""
    carso = copy.deepcopy(carso)
    classifier, purifier = carso.classifier, carso.purifier.to(memory_format=torch.contiguous_format)
    for module in carso.modules():
        if isinstance(module, Norm):
            module.forward = partial(nn.BatchNorm2d.forward, module)

    def balanced_batch():
        kinds, out = balanced_kinds(0, len(x), 0.5).to(x.device), x.clone()
        for kind in range(len(KINDS)):
            rows, radius = (kinds == kind).nonzero().squeeze(1), EPS / 2 if kind % 2 == 0 else EPS
            attack = partial(pgd, steps=STEPS, step_size=STEP_SIZE) if kind < 2 else fgsm
            out[rows] = attack(classifier, x[rows], y[rows], radius)

    def whole(x):
        _, representation = record(classifier, carso.layers, x)
        condition = purifier.condition(representation)
        members = torch.func.vmap(lambda z: classifier(purifier.decode(z, condition)), in_dims=1, out_dims=1)
        return robust_logits(members(carso.draw(x, carso.samples)))

    lookahead = Lookahead(torch.optim.RAdam(purifier.parameters(), lr=PAPER.learning_rate_start))
    return parts(carso, lookahead, whole, balanced_batch, lambda: objective(whole, y[:4], eot=DRAWS)(x[:4]), x, y)


# ------------------------------------------------------------------------------------------------------- measurement


def seconds(work, device: torch.device) -> float:
    """How long it takes; on a single CPU thread its own processor time, so that other programs' turns do not count."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    began = clock()
    work()
    finish()
    return clock() - began


def measure(ways: dict[str, dict], device: torch.device, repeats: int, dtype: torch.dtype) -> tuple[dict, float]:
    """(way, part) -> seconds of every repeat, all in turn; and the matrix rate in FLOP/s, at its fastest."""
    side = 8192 if device.type == "cuda" else 1024  # a GPU would spend most of a small product's time on starting it
    a, product = torch.randn(side, side, device=device).to(dtype), float("inf")
    times = {(way, name): [] for name in ways["ours"] for way in ways}
    for _ in range(repeats + 1):
        for way, name in times:
            times[way, name].append(seconds(ways[way][name], device))
            product = min(product, seconds(lambda: a @ a, device))
    return {key: each[1:] for key, each in times.items()}, 2 * side**3 / product  # the first one warms up


def saved_bytes(model: nn.Module, forward) -> int:
    """What a forward pass keeps for its backward pass, each storage once, the model's own tensors left out."""
    kept = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = forward()  # held until the end, so that no storage's address is used twice
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    for own in [*model.parameters(), *model.buffers()]:
        storages.pop(own.untyped_storage()._cdata, None)
    del out
    return sum(storages.values())


def table(carso: CARSO, x: torch.Tensor, y: torch.Tensor, repeats: int, bf16: bool, against: bool) -> dict:
    """Every part's seconds, rates, memory (MB a picture); `against`: the plain way's seconds, too; bf16: only MIXED."""
    mine, autocast = ours(carso, x, y), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16)
    ways = {"ours": {name: autocast(mine[name]) for name in MIXED} if bf16 else mine}
    ways |= {"plain": plain(carso, x, y)} if against else {}
    flop = {name: count_flop(work) for name, work in ways["ours"].items()}
    with autocast:
        memory = {
            "classifier gradient": saved_bytes(carso, lambda: carso.classifier(x.clone().requires_grad_())),
            "(d) gradient": saved_bytes(carso, lambda: carso(x.clone().requires_grad_())),
            "(b) training step": saved_bytes(carso, lambda: training_loss(carso.train(), x)),
        }
    carso.eval()
    times, limit = measure(ways, x.device, repeats, torch.bfloat16 if bf16 else torch.float32)
    rows, batch, step = [], "(a) balanced batch", "(b) training step"
    for name, share in WHOLE.items():  # the plain way always attacks anew
        flop[name] = share * flop[batch] + flop[step]
        for way, paid in zip(ways, (share, 1)):
            times[way, name] = [paid * a + b for a, b in zip(times[way, batch], times[way, step])]
    for name in flop:
        own, pictures = times["ours", name], 4 if name == EOT else len(x)
        rate = flop[name] / min(own)
        row = {"part": name, "seconds": min(own), "pictures_per_second": pictures / min(own)}
        row |= {"gflop_per_second": rate / 1e9, "share_of_matrix_rate": rate / limit}
        row["megabytes"] = memory[name] / len(x) / 1e6 if name in memory else None
        if against:
            theirs = times["plain", name]
            row |= {"plain_seconds": min(theirs), "ratio": statistics.median(b / a for a, b in zip(own, theirs))}
        rows.append(row)
    return {"matrix_gflop_per_second": limit / 1e9, "rows": rows}


def text(rows: list[dict]) -> str:
    lines = [f"{'part':<28}{'seconds':>9}{'pictures/s':>12}{'GFLOP/s':>11}{'of limit':>10}{'MB/picture':>12}"
             + f"{'plain':>9}{'ratio':>7}" * ("ratio" in rows[0])]  # fmt: skip
    for row in rows:
        memory = f"{row['megabytes']:.1f}" if row["megabytes"] else ""
        line = f"{row['part']:<28}{row['seconds']:>9.3f}{row['pictures_per_second']:>12,.1f}"
        line += f"{row['gflop_per_second']:>11,.1f}{row['share_of_matrix_rate']:>10.0%}{memory:>12}"
        lines.append(line + (f"{row['plain_seconds']:>9.3f}{row['ratio']:>7.2f}" if "ratio" in row else ""))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- what holds for any machine


SIZES = {"digits": (10, (1, 32, 32)), "cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32)),
         "tinyimagenet": (200, (3, 64, 64))}  # fmt: skip


def build(p: Preset, classes: int, shape, batch: int, device) -> tuple[CARSO, torch.Tensor, torch.Tensor]:
    """A fresh CARSO of a preset's sizes, random pictures (batch, *shape), labels."""
    torch.manual_seed(0)
    classifier = WideResNet(classes, p.depth, p.width, shape[0]).to(device).eval()
    sizes = dict(condition_dim=p.condition_dim, latent_dim=p.latent_dim, decoder_width=p.decoder_width)
    carso = build_carso(classifier, representation_layers(p.depth), shape, p.samples, **sizes).to(device)
    return carso, torch.rand(batch, *shape, device=device), torch.arange(batch, device=device) % classes


def scenario(p: Preset, classes: int, shape) -> dict[str, float]:
    """What one picture of a preset's purifier training costs: FLOP, and GB that the backward passes of the attack, of
    the training step, and of the training step with --micro-batch keep: the same on any device, hence two pictures."""
    carso, x, y = build(p, classes, shape, 2, "cpu")
    gradient = count_flop(lambda: objective(carso.classifier, y)(x)) / 2
    step = count_flop(lambda: training_loss(carso.train(), x).backward()) / 2
    attack = saved_bytes(carso, lambda: carso.classifier(x.clone().requires_grad_())) / 2e9
    train = saved_bytes(carso, lambda: training_loss(carso, x)) / 2e9
    carso.purifier.recompute = True
    micro = saved_bytes(carso, lambda: training_loss(carso, x)) / 2e9
    parameters = sum(q.nbytes for q in carso.purifier.parameters()) / 1e9
    attacks = p.attack_versions / p.epochs or p.fraction  # an epoch; half of them are FGSM, which is one gradient
    flop = attacks * (p.attack_steps + 1) / 2 * gradient + step
    return dict(flop=flop, attack=p.fraction * attack, train=train, micro=micro, parameters=parameters)


def memory_plan(tflops: float) -> None:
    """What the presets' purifier training needs on GPUs, computed: activations of the attack or of the training step,
    whichever are more, and five copies of the parameters (weights, gradient, two moments, slow weights)."""
    print(f"{'':<14} GPUs  pictures each  GB each  with --micro-batch   hours  at {tflops:g} TFLOP/s")
    for name, count, chunk in (("cifar10", 50_000, 640), ("cifar100", 50_000, 640), ("tinyimagenet", 100_000, 128)):
        p = PRESETS[name]
        cost = scenario(p, *SIZES[name])
        kept = ", ".join(f"{what} {1e3 * value:.1f} MB" for what, value in cost.items() if what != "flop")
        print(f"a picture: {cost['flop'] / 1e9:.0f} GFLOP; {kept}")
        for gpus in (8, 4, 1):
            each = p.batch_size / gpus
            whole = 5 * cost["parameters"] + each * max(cost["train"], cost["attack"])
            micro = 5 * cost["parameters"] + max(each * cost["micro"], min(chunk, each) * cost["attack"])
            hours = p.epochs * count * cost["flop"] / gpus / tflops / 3.6e15
            print(f"{name:<14}{gpus:>5}{each:>15.0f}{whole:>9.0f}{f'{micro:.0f} at {chunk}':>20}{hours:>8.1f}")


# ------------------------------------------------------------------------------------------------------- command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sizes of a preset (default: cifar10's, but for a WRN-10-2)")
    for name, default in {"--depth": None, "--width": None, "--threads": None, "--batch-size": 64}.items():
        add(name, type=int, default=default)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="bf16: our attacks and training step")
    add("--repeats", type=int, default=5)
    add("--against", choices=["plain"])
    add("--memory-plan", action="store_true", help="GPU memory and hours of the paper's scenarios")
    add("--tflops", type=float, default=31, help="a GPU's rate for that (default: 31, an A100's in the paper)")
    add("--json", action="store_true")
    return parser.parse_args(argv)


BOUNDS = {"depth": DEPTH, "width": COUNT, "repeats": COUNT, "tflops": POSITIVE}
BOUNDS["threads"] = "must be 1 to 1000", lambda v: 1 <= v <= 1000
BOUNDS["batch_size"] = "must be 8 or more: half of it is divided among four attacks", lambda v: 8 <= v <= 1e6


def prepare(args) -> tuple[CARSO, torch.Tensor, torch.Tensor]:
    """What is to be timed. ValueError for what makes no sense."""
    for name, bounds in BOUNDS.items():
        if (value := getattr(args, name)) is not None:
            check_bounds("--" + name.replace("_", "-"), value, bounds)
    start_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
    p = PRESETS[args.preset] if args.preset else dataclasses.replace(PAPER, depth=10, width=2)
    p = dataclasses.replace(p, depth=args.depth or p.depth, width=args.width or p.width)
    return build(p, *SIZES[args.preset or "cifar10"], args.batch_size, args.device)


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    try:
        carso, x, y = prepare(args)
        if args.memory_plan:
            memory_plan(args.tflops)
            return 0
        result = table(carso, x, y, args.repeats, args.precision == "bf16", args.against is not None)
    except (ValueError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError) and not out_of_memory(error):
            raise
        print(f"bench: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result | {"config": vars(args)}, indent=1))
    else:
        size = f"WRN-{carso.classifier.config['depth']}-{carso.classifier.config['width']}, batch {len(x)}"
        print(f"{size}, S {carso.samples}, {args.device}, {torch.get_num_threads()} threads, {args.precision}; "
              f"matrix product {result['matrix_gflop_per_second']:,.0f} GFLOP/s\n{text(result['rows'])}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
