"""How fast are the parts of CARSO on this machine, and how near to its limit?

    python bench.py --threads 1                        # WRN-10-2, batch 64, D 512, Z 128, S 8: the reference's
    measurement python bench.py --threads 1 --against naive        # in turn with the same work done the reference's way
    python bench.py --preset cifar10 --batch-size 8    # WRN-28-10; on a GPU with --device cuda --batch-size 512
    python bench.py --json

Every part is warmed up, then timed in turn with the others, `--repeats` times, in one process; the table holds medians.
The limit is the rate of a 1024 x 1024 matrix product, measured in the same way between the parts. FLOP are counted by
PyTorch (two a multiply-add; convolutions and matrix products only).
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aggregate import robust_logits
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, objective, project
from evaluate import Target, climb
from models import WideResNet, keep_freed_memory, record, representation_layers
from purifier import CARSO, build_carso, vae_loss
from train import PRESETS, Lookahead

EPS, DRAWS = 8 / 255, 20

# --------------------------------------------------------------------------------------------------- the work, our way


def ours(carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    """name -> a function that does it once."""
    classifier, purifier = carso.classifier, carso.purifier
    optimizer = Lookahead(torch.optim.RAdam(purifier.parameters(), lr=1e-6))
    target = Target(carso, limit=10**9)

    def inference():
        with torch.no_grad():
            carso(x)

    return {
        "classifier forward": torch.no_grad()(lambda: classifier(x)),
        "classifier gradient": lambda: objective(classifier, y)(x),
        "(a) balanced batch": lambda: adversarially_balanced_batch(classifier, x, y, EPS, 0.5),
        "(b) training step": lambda: training_step(carso, x, optimizer, through_classifier=False),
        "(c) inference": inference,
        "(d) gradient": lambda: objective(carso, y)(x),
        f"EoT of {DRAWS} draws, 4 pictures": lambda: climb(target, y[:4], "ce", DRAWS)(x[:4]),
    }


def training_step(carso: CARSO, x: torch.Tensor, optimizer: Lookahead, through_classifier: bool) -> None:
    """One step of the purifier; with or without a graph (and gradients nobody needs) through the classifier."""
    carso.train()
    with torch.set_grad_enabled(through_classifier):
        _, representation = record(carso.classifier, carso.layers, x)
    reconstruction, mu, logvar = carso.purifier(x, representation)
    loss, _, _ = vae_loss(reconstruction, x, mu, logvar, beta=1.0)
    optimizer.optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    carso.eval()


# --------------------------------------------------------------------------------------- the same work, the naive way

# As the reference does it: a classifier whose parameters require gradients, loss.backward(), the four attacks one after
# another, the members by vmap, the draws of EoT one by one.


def naive(carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    classifier, purifier = carso.classifier, carso.purifier
    optimizer = Lookahead(torch.optim.RAdam(purifier.parameters(), lr=1e-6))

    def gradient(model, pictures, labels):
        lead = pictures.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model(lead), labels, reduction="sum").backward()
        return lead.grad

    def members(pictures):
        _, representation = record(classifier, carso.layers, pictures)
        condition = purifier.condition(representation)
        z = carso.draw(pictures, carso.samples)
        each = torch.func.vmap(lambda z: classifier(purifier.decode(z, condition)), in_dims=1, out_dims=1)
        return robust_logits(each(z))

    def with_parameter_gradients(work):
        def run():
            classifier.requires_grad_(True)
            work()
            classifier.requires_grad_(False)
            classifier.zero_grad()
            purifier.zero_grad()

        return run

    def balanced():
        kinds, out = balanced_kinds(0, len(x), 0.5), x.clone()
        for kind in range(len(KINDS)):
            rows = (kinds == kind).nonzero().squeeze(1)
            clean, eps = x[rows], EPS / 2 if kind % 2 == 0 else EPS
            adversarial = clean
            if kind < 2:
                adversarial = project(clean + eps * torch.empty_like(clean).uniform_(-1, 1), clean, eps)
            for _ in range(40 if kind < 2 else 1):
                step = (0.01 if kind < 2 else eps) * gradient(classifier, adversarial, y[rows]).sign()
                adversarial = project(adversarial + step, clean, eps)
            out[rows] = adversarial

    def inference():
        with torch.no_grad():
            members(x)

    def sequential():
        for _ in range(DRAWS):
            gradient(members, x[:4], y[:4])

    return {
        "classifier forward": lambda: classifier(x),
        "classifier gradient": with_parameter_gradients(lambda: gradient(classifier, x, y)),
        "(a) balanced batch": with_parameter_gradients(balanced),
        "(b) training step": with_parameter_gradients(
            lambda: training_step(carso, x, optimizer, through_classifier=True)
        ),
        "(c) inference": inference,
        "(d) gradient": with_parameter_gradients(lambda: gradient(members, x, y)),
        f"EoT of {DRAWS} draws, 4 pictures": with_parameter_gradients(sequential),
    }


# ------------------------------------------------------------------------------------------------------- measurement


def seconds(work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class CountFlop(TorchDispatchMode):
    """PyTorch's own formulas for each operation. (Its FlopCounterMode also tracks modules, by hooks that forbid
    autograd.grad, which the attacks use.)"""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if formula := flop_registry.get(operation._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_flop(work) -> int:
    with CountFlop() as counter:
        work()
    return counter.total


def measure(ways: dict[str, dict], device: torch.device, repeats: int) -> dict:
    """Median seconds of every part done every way, and the matrix rate in FLOP/s, all in turn."""
    a = torch.randn(1024, 1024, device=device)
    for parts in ways.values():
        for work in parts.values():
            work()
    times = {(way, name): [] for way, parts in ways.items() for name in parts}
    products = []
    for _ in range(repeats):
        for name in ways["ours"]:
            for way in ways:
                times[way, name].append(seconds(ways[way][name], device))
            products.append(min(seconds(lambda: a @ a, device) for _ in range(5)))
    return {key: statistics.median(values) for key, values in times.items()}, 2 * 1024**3 / statistics.median(products)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="depth, width, D, Z and S of a preset (default: WRN-10-2)")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", choices=["naive"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.py: there is no CUDA device here; leave --device out", file=sys.stderr)
        return 2
    if min(args.batch_size, args.repeats, args.threads or 1) < 1 or args.batch_size < 4:
        print("bench.py: --batch-size must be 4 or more, --repeats and --threads 1 or more", file=sys.stderr)
        return 2
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    p = PRESETS[args.preset or "cifar10"]
    depth, width = args.depth or (p.depth if args.preset else 10), args.width or (p.width if args.preset else 2)
    classes, side, channels = {"tinyimagenet": (200, 64, 3), "cifar100": (100, 32, 3), "digits": (10, 32, 1)}.get(
        args.preset, (10, 32, 3)
    )
    device = torch.device(args.device)
    torch.manual_seed(0)
    classifier = WideResNet(classes, depth, width, channels).to(device).eval()
    sizes = dict(condition_dim=p.condition_dim, latent_dim=p.latent_dim, decoder_width=p.decoder_width)
    carso = build_carso(classifier, representation_layers(depth), (channels, side, side), p.samples, **sizes).to(device)
    x = torch.rand(args.batch_size, channels, side, side, device=device)
    y = torch.arange(args.batch_size, device=device) % classes

    ways = {"ours": ours(carso, x, y)} | ({"naive": naive(carso, x, y)} if args.against else {})
    flop = {name: count_flop(work) for name, work in ways["ours"].items()}
    medians, limit = measure(ways, device, args.repeats)
    rows = []
    for name in ways["ours"]:
        t = medians["ours", name]
        row = {"part": name, "seconds": t, "pictures_per_second": (4 if "EoT" in name else len(x)) / t}
        row |= {"gflop_per_second": flop[name] / t / 1e9, "share_of_matrix_rate": flop[name] / t / limit}
        if args.against:
            row |= {"naive_seconds": medians["naive", name], "ratio": medians["naive", name] / t}
        rows.append(row)
    if args.json:
        print(json.dumps({"matrix_gflop_per_second": limit / 1e9, "rows": rows, "config": vars(args)}, indent=1))
        return 0
    print(f"WRN-{depth}-{width}, batch {len(x)}, D {p.condition_dim}, Z {p.latent_dim}, S {p.samples}, {args.device}, "
          f"{torch.get_num_threads()} thread(s), float32; matrix product {limit / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(
        f"{'part':<26}{'seconds':>9}{'pictures/s':>12}{'GFLOP/s':>9}{'of limit':>10}"
        + f"{'naive':>9}{'ratio':>7}" * bool(args.against)
    )
    for row in rows:
        line = f"{row['part']:<26}{row['seconds']:>9.3f}{row['pictures_per_second']:>12.1f}"
        line += f"{row['gflop_per_second']:>9.1f}{row['share_of_matrix_rate']:>10.0%}"
        print(line + (f"{row['naive_seconds']:>9.3f}{row['ratio']:>7.2f}" if args.against else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
