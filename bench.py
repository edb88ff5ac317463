"""How fast are the parts of CARSO on this machine, and how near to its limit?

    python bench.py --threads 1                        # WRN-10-2, batch 64, D 512, Z 128, S 8: the reference's own
    python bench.py --threads 1 --against naive        # in turn with the same work done the reference's way
    python bench.py --threads 1 --against naive --precision bf16       # our attacks in mixed precision
    python bench.py --preset cifar10 --batch-size 8    # WRN-28-10; on a GPU with --device cuda --batch-size 512
    python bench.py --scaling                          # pictures a second over batch size and S, and what FLOP predict
    python bench.py --against autoattack --ckpt runs/digits/carso.pt   # is our APGD as strong as AutoAttack's?
    python bench.py --memory-plan                      # GPU memory and hours of the paper's scenarios, computed

Every part is warmed up, then timed in turn with the others, `--repeats` times, in one process. The table holds medians
(of the ratios to the naive way, too) and the fastest repeat; the limit is the rate of a 1024 x 1024 matrix product,
measured in the same way between the parts, and shares of it compare the fastest with the fastest. FLOP are counted by
PyTorch (two a multiply-add; convolutions and matrix products only). Memory is what the backward pass keeps.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from functools import partial

import torch
from torch import nn

import data as datasets
from aggregate import robust_logits
from attacks import KINDS, adversarially_balanced_batch, apgd, balanced_kinds, objective, project
from evaluate import Target, climb, random_start
from models import Norm, WideResNet, keep_freed_memory, record, representation_layers
from plan import count_flop
from purifier import CARSO, build_carso, load_checkpoint, vae_loss
from train import PRESETS, Lookahead, Preset

EPS, DRAWS = 8 / 255, 20
IN_BF16 = ("classifier gradient", "(a)", "(d)", "EoT")  # attacks; training and scores stay in float32

# --------------------------------------------------------------------------------------------------- the work, our way


def ours(carso: CARSO, x: torch.Tensor, y: torch.Tensor, bf16: bool = False, compiling: bool = False) -> dict:
    """name -> a function that does it once; with bf16 the attacks only, under autocast; compiling: all but (b), EoT."""
    classifier, purifier, whole = carso.classifier, carso.purifier, carso
    if compiling:
        classifier, whole = compiled(classifier, x), compiled(carso, x)
    optimizer = Lookahead(torch.optim.RAdam(purifier.parameters(), lr=1e-6))
    target = Target(carso, limit=10**9)

    def inference():
        with torch.no_grad():
            whole(x)

    parts = {
        "classifier forward": torch.no_grad()(lambda: classifier(x)),
        "classifier gradient": lambda: objective(classifier, y)(x),
        "(a) balanced batch": lambda: adversarially_balanced_batch(classifier, x, y, EPS, 0.5),
        "(b) training step": lambda: training_step(carso, x, optimizer, through_classifier=False),
        "(c) inference": inference,
        "(d) gradient": lambda: objective(whole, y)(x),
        f"EoT of {DRAWS} draws, 4 pictures": lambda: climb(target, y[:4], "ce", DRAWS)(x[:4]),
    }
    if not bf16:
        return parts
    autocast = torch.autocast(x.device.type, torch.bfloat16)
    return {name: autocast(work) for name, work in parts.items() if name.startswith(IN_BF16)}


def compiled(module: nn.Module, x: torch.Tensor):
    """torch.compile(module), tried on x; the module itself, and a sentence, where that fails (no compiler, say)."""
    try:
        fast = torch.compile(module)
        with torch.no_grad():
            fast(x)
        return fast
    except Exception as error:  # from a missing compiler to a layer that it does not know
        print(f"bench.py: going on uncompiled ({type(error).__name__}: {str(error).splitlines()[0]})", file=sys.stderr)
        return module


def training_loss(carso: CARSO, x: torch.Tensor, through_classifier: bool = False) -> torch.Tensor:
    """The purifier's loss; with or without a graph (and gradients nobody needs) through the classifier."""
    with torch.set_grad_enabled(through_classifier):
        _, representation = record(carso.classifier, carso.layers, x)
    reconstruction, mu, logvar = carso.purifier(x, representation)
    return vae_loss(reconstruction, x, mu, logvar, beta=1.0)[0]


def training_step(carso: CARSO, x: torch.Tensor, optimizer: Lookahead, through_classifier: bool) -> None:
    """One step of the purifier."""
    carso.train()
    loss = training_loss(carso, x, through_classifier)
    optimizer.optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    carso.eval()


# --------------------------------------------------------------------------------------- the same work, the naive way

# As the reference does it: a classifier whose parameters require gradients, loss.backward(), the four attacks one after
# another, the members by vmap, the draws of EoT one by one; PyTorch's own BatchNorm, and its own memory layout in the
# purifier.


def plain(carso: CARSO) -> CARSO:
    carso = copy.deepcopy(carso)
    carso.purifier.to(memory_format=torch.contiguous_format)
    for module in carso.modules():
        if isinstance(module, Norm):
            module.forward = partial(nn.BatchNorm2d.forward, module)
    return carso


def naive(carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    carso = plain(carso)
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
    """How long it takes; on a single CPU thread its own processor time, so that other programs' turns do not count."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def saved_bytes(model: nn.Module, forward) -> int:
    """What a forward pass keeps for its backward pass, each storage once, the model's own tensors left out."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # held until the end, so that no storage's address is used twice
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    for own in [*model.parameters(), *model.buffers()]:
        storages.pop(own.untyped_storage()._cdata, None)
    del out
    return sum(storages.values())


def activations(carso: CARSO, x: torch.Tensor) -> dict[str, float]:
    """Start of a part's name -> MB a picture that its backward pass needs."""
    found = {
        "classifier gradient": saved_bytes(carso, lambda: carso.classifier(x.clone().requires_grad_())),
        "(d)": saved_bytes(carso, lambda: carso(x.clone().requires_grad_())),
    }
    carso.train()
    found["(b)"] = saved_bytes(carso, lambda: training_loss(carso, x))
    carso.eval()
    return {name: value / len(x) / 1e6 for name, value in found.items()}


def measure(ways: dict[str, dict], device: torch.device, repeats: int, dtype=torch.float32) -> tuple[dict, float]:
    """(way, part) -> seconds of every repeat, all in turn; and the matrix rate in FLOP/s, at its fastest."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    for parts in ways.values():
        for work in parts.values():
            work()
    times = {(way, name): [] for way, parts in ways.items() for name in parts}
    product = float("inf")
    for _ in range(repeats):
        for name in ways["ours"]:
            for way in ways:
                times[way, name].append(seconds(ways[way][name], device))
            product = min(product, *(seconds(lambda: a @ a, device) for _ in range(5)))
    return times, 2 * 1024**3 / product


def parts_table(args, carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    """Every part: seconds, rates, memory, and the naive way beside it."""
    bf16 = args.precision == "bf16"
    eager, ways = ours(carso, x, y, bf16), {"ours": ours(carso, x, y, bf16, args.compile)}
    if args.against:
        ways["naive"] = naive(carso, x, y)
    flop = {name: count_flop(work) for name, work in eager.items()}
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        memory = activations(carso, x)
    times, limit = measure(ways, x.device, args.repeats, torch.bfloat16 if bf16 else torch.float32)
    rows = []
    for name in ways["ours"]:
        own = times["ours", name]
        pictures, fastest = 4 if "EoT" in name else len(x), min(own)
        row = {"part": name, "seconds": statistics.median(own), "fastest": fastest}
        row |= {
            "pictures_per_second": pictures / statistics.median(own),
            "gflop_per_second": flop[name] / fastest / 1e9,
        }
        row |= {"share_of_matrix_rate": flop[name] / fastest / limit}
        row["megabytes"] = next((mb for start, mb in memory.items() if name.startswith(start)), None)
        if args.against:
            theirs = times["naive", name]
            row |= {"naive_seconds": statistics.median(theirs), "naive_fastest": min(theirs)}
            row["ratio"] = statistics.median(b / a for a, b in zip(own, theirs))
        rows.append(row)
    return {"matrix_gflop_per_second": limit / 1e9, "rows": rows, "config": vars(args)}


def print_parts(result: dict) -> None:
    against = bool(result["config"]["against"])
    print(f"matrix product {result['matrix_gflop_per_second']:.0f} GFLOP/s, {result['config']['precision']}")
    print(f"{'part':<26}{'seconds':>9}{'fastest':>9}{'pictures/s':>12}{'GFLOP/s':>9}{'of limit':>10}{'MB/picture':>12}"
          + f"{'naive':>9}{'fastest':>9}{'ratio':>7}" * against)  # fmt: skip
    for row in result["rows"]:
        line = f"{row['part']:<26}{row['seconds']:>9.3f}{row['fastest']:>9.3f}{row['pictures_per_second']:>12.1f}"
        line += f"{row['gflop_per_second']:>9.1f}{row['share_of_matrix_rate']:>10.0%}"
        line += f"{row['megabytes']:>12.1f}" if row["megabytes"] else " " * 12
        if against:
            line += f"{row['naive_seconds']:>9.3f}{row['naive_fastest']:>9.3f}{row['ratio']:>7.2f}"
        print(line)


def scaling(carso: CARSO, x: torch.Tensor, y: torch.Tensor, repeats: int) -> None:
    """Pictures a second of (c) and (d) over batch size and S, beside what FLOP at one rate for all would give."""
    rows, samples = [], carso.samples
    for count in [n for n in (8, 16, 32, 64) if n <= len(x)] or [len(x)]:
        for carso.samples in (1, 2, 4, 8, 16):
            parts = {k: work for k, work in ours(carso, x[:count], y[:count]).items() if k[:3] in ("(c)", "(d)")}
            times, _ = measure({"ours": parts}, x.device, repeats)
            rows.append((count, carso.samples, *((count_flop(parts[k]), min(times["ours", k])) for k in parts)))
    carso.samples = samples
    rates = [sum(row[i][0] for row in rows) / sum(row[i][1] for row in rows) for i in (2, 3)]
    print("pictures a second, measured (predicted from FLOP at "
          f"{rates[0] / 1e9:.0f} GFLOP/s without a gradient, {rates[1] / 1e9:.0f} with one)")  # fmt: skip
    print(f"{'batch':>6}{'S':>4}{'(c) inference':>20}{'(d) gradient':>20}")
    for count, s, *both in rows:
        cells = [f"{count / t:.1f} ({count * rate / flop:.1f})" for (flop, t), rate in zip(both, rates)]
        print(f"{count:>6}{s:>4}" + "".join(f"{cell:>20}" for cell in cells))


# --------------------------------------------------------------------------------------- what is not about one machine


def against_autoattack(args) -> None:
    """Accuracy that is left of a checkpoint's bare classifier after AutoAttack's APGD and after ours, at equally many
    gradients."""
    from pyautoattack.autopgd_base import APGDAttack

    carso, state = load_checkpoint(args.ckpt, args.device)
    data = datasets.load(state["dataset"], state.get("data_dir", "data"))
    x = datasets.pixels(data.test_images[: args.pictures].to(args.device))
    y, eps, model = data.test_labels[: args.pictures].to(args.device), state["config"]["eps"], carso.classifier
    print(f"accuracy of the bare classifier, {len(x)} pictures, eps {eps:g}, {args.steps} steps, seeds 0, 1, 2")
    for loss in ("ce", "dlr"):
        left = {"AutoAttack's": [], "ours": []}
        for seed in range(3):
            settings = dict(eps=eps, norm="Linf", seed=seed, device=x.device, logger=logging.getLogger("auto-attack"))
            theirs = APGDAttack(model, n_restarts=1, n_iter=args.steps, eot_iter=1, rho=0.75, loss=loss, **settings)
            torch.manual_seed(seed)
            mine, _ = apgd(objective(model, y, loss), x, eps, args.steps, random_start(x, eps))
            with torch.no_grad():
                for name, found in (("AutoAttack's", theirs.perturb(x, y)), ("ours", mine)):
                    left[name].append((model(found).argmax(1) == y).double().mean().item())
        print(
            f"{loss:<4}" + "; ".join(f"{name} {', '.join(f'{v:.1%}' for v in values)}" for name, values in left.items())
        )


def scenario(p: Preset, classes: int, side: int) -> dict[str, float]:
    """What one picture of a preset's purifier training costs: FLOP, and GB that the backward passes of the attack, of
    the training step, and of the training step with --micro-batch keep. Run with two pictures, since FLOP and bytes
    are the same on any device."""
    carso, x, y = build(p, classes, (3, side, side), 2, p.depth, p.width, "cpu")
    gradient = count_flop(lambda: objective(carso.classifier, y)(x)) / 2
    step = count_flop(lambda: training_loss(carso.train(), x).backward()) / 2
    attack, train = (saved_bytes(carso, work) / 2e9 for work in (
        lambda: carso.classifier(x.clone().requires_grad_()), lambda: training_loss(carso, x)))  # fmt: skip
    carso.purifier.recompute = True
    micro = saved_bytes(carso, lambda: training_loss(carso, x)) / 2e9
    parameters = sum(q.nbytes for q in carso.purifier.parameters()) / 1e9
    flop = p.fraction * (p.attack_steps + 1) / 2 * gradient + step
    return dict(flop=flop, attack=p.fraction * attack, train=train, micro=micro, parameters=parameters)


def memory_plan(tflops: float) -> None:
    """What the presets' purifier training needs on GPUs, computed: activations of the attack or of the training step,
    whichever is more, and five copies of the parameters (weights, gradient, two moments, slow weights), without the
    convolutions' workspaces."""
    print(f"{'':<14}{'GPUs':>5}{'pictures each':>15}{'GB each':>9}{'with --micro-batch':>20}{'hours':>8}"
          f"  at {tflops:g} TFLOP/s")  # fmt: skip
    for name, classes, side, count in (
        ("cifar10", 10, 32, 50_000), ("cifar100", 100, 32, 50_000), ("tinyimagenet", 200, 64, 100_000)
    ):  # fmt: skip
        p = PRESETS[name]
        cost, chunk = scenario(p, classes, side), 640 if side == 32 else 128
        print(
            ", ".join(f"{k} {v / 1e9:.0f} GFLOP" if k == "flop" else f"{k} {1e3 * v:.1f} MB" for k, v in cost.items())
        )
        for gpus in (8, 4, 1):
            each = p.batch_size / gpus
            whole = 5 * cost["parameters"] + each * max(cost["train"], cost["attack"])
            micro = 5 * cost["parameters"] + max(each * cost["micro"], min(chunk, each) * cost["attack"])
            hours = p.epochs * count * cost["flop"] / gpus / tflops / 3.6e15
            print(f"{name:<14}{gpus:>5}{each:>15.0f}{whole:>9.0f}{f'{micro:.0f} at {chunk}':>20}{hours:>8.1f}")


# ------------------------------------------------------------------------------------------------------- command line


def build(
    p, classes: int, shape, batch_size: int, depth: int, width: int, device
) -> tuple[CARSO, torch.Tensor, torch.Tensor]:
    """A fresh CARSO of a preset's sizes, random pictures, labels."""
    torch.manual_seed(0)
    classifier = WideResNet(classes, depth, width, shape[0]).to(device).eval()
    sizes = dict(condition_dim=p.condition_dim, latent_dim=p.latent_dim, decoder_width=p.decoder_width)
    carso = build_carso(classifier, representation_layers(depth), shape, p.samples, **sizes).to(device)
    return carso, torch.rand(batch_size, *shape, device=device), torch.arange(batch_size, device=device) % classes


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="depth, width, D, Z and S of a preset (default: WRN-10-2)")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of attacks, under autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the classifier and of the whole")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", choices=["naive", "autoattack"])
    parser.add_argument("--scaling", action="store_true", help="(c) and (d) over batch size (up to --batch-size) and S")
    parser.add_argument("--memory-plan", action="store_true", help="GPU memory and hours of the paper's scenarios")
    parser.add_argument("--tflops", type=float, default=31, help="a GPU's rate for that (default: 31, an A100's in the "
                        "paper)")  # fmt: skip
    parser.add_argument("--ckpt", help="for --against autoattack")
    parser.add_argument("--pictures", type=int, default=200, help="for --against autoattack (default: 200)")
    parser.add_argument("--steps", type=int, default=50, help="for --against autoattack (default: 50)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def refuse(args) -> str | None:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        return "there is no CUDA device here; leave --device out"
    if min(args.batch_size, args.repeats, args.threads or 1) < 1 or args.batch_size < 4:
        return "--batch-size must be 4 or more, --repeats and --threads 1 or more"
    if (args.against == "autoattack") != (args.ckpt is not None):
        return "--against autoattack and --ckpt go together"
    return None


def main() -> int:
    args = parse_arguments()
    if sentence := refuse(args):
        print(f"bench.py: {sentence}", file=sys.stderr)
        return 2
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_plan:
        memory_plan(args.tflops)
        return 0
    if args.against == "autoattack":
        against_autoattack(args)
        return 0
    p = PRESETS[args.preset or "cifar10"]
    depth, width = args.depth or (p.depth if args.preset else 10), args.width or (p.width if args.preset else 2)
    shape = {"tinyimagenet": (3, 64, 64), "digits": (1, 32, 32)}.get(args.preset, (3, 32, 32))
    classes = {"tinyimagenet": 200, "cifar100": 100}.get(args.preset, 10)
    carso, x, y = build(p, classes, shape, args.batch_size, depth, width, torch.device(args.device))
    title = (
        f"WRN-{depth}-{width}, D {p.condition_dim}, Z {p.latent_dim}, {args.device}, {torch.get_num_threads()} threads"
    )
    if args.scaling:
        print(title)
        scaling(carso, x, y, args.repeats)
        return 0
    result = parts_table(args, carso, x, y)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{title}, batch {len(x)}, S {p.samples}", end="; ")
        print_parts(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
