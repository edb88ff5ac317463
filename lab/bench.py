"""How fast are the parts of CARSO on this machine, and how near to its limit?

    python -m lab.bench                                                         # WRN-10-2, batch 64, D 512, Z 128, S 8
    python -m lab.bench --preset cifar10 --device cuda --batch-size 64 640 2048 --precision bf16        # and --unfused

Every part is warmed up, then timed in turn with the others, `--repeats` times, in one process; figures are medians.
The limit is the rate of a square matrix product, its fastest. FLOP are counted by PyTorch's formulas (two a
multiply-add; convolutions, matrix products). Memory: on a GPU the peak, elsewhere what the backward pass keeps.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models
from attacks import adversarially_balanced_batch, objective
from evaluate import Seen, batched_objective
from models import WideResNet, record, representation_layers, run_script, start_device
from purifier import CARSO, build_carso, vae_loss
from train import PRESETS, Preset, build_optimizer

SHAPES = {"digits": (10, (1, 32, 32)), "cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32)),
          "tinyimagenet": (200, (3, 64, 64))}  # fmt: skip
EPS, STEPS, STEP_SIZE, DRAWS, EOT_PICTURES = 8 / 255, 40, 0.01, 20, 4  # the paper's, table 12
EOT = f"gradient of {DRAWS} draws, {EOT_PICTURES} pictures"


def make_parts(carso: CARSO, x: torch.Tensor, y: torch.Tensor) -> dict:
    """Part -> a function that does it once, for pictures x (B, C, H, W) in [0, 1] and labels y (B,)."""
    classifier, purifier, lookahead = carso.classifier, carso.purifier, build_optimizer(carso.purifier, Preset())

    def training_step():
        carso.train()
        with torch.no_grad():
            _, representation = record(classifier, carso.layers, x)
        reconstruction, mu, logvar = (out.float() for out in purifier(x, representation))
        lookahead.optimizer.zero_grad()
        with torch.autocast(x.device.type, enabled=False):
            vae_loss(reconstruction, x, mu, logvar, beta=1.0)[0].backward()
        lookahead.step()
        carso.eval()

    few = slice(EOT_PICTURES)
    return {
        "classifier forward": torch.no_grad()(lambda: classifier(x)),
        "classifier gradient": lambda: objective(classifier, y)(x),
        "balanced batch": lambda: adversarially_balanced_batch(classifier, x, y, EPS, 0.5, STEPS, STEP_SIZE),
        "training step": training_step,
        "inference": torch.no_grad()(lambda: carso(x)),
        "gradient of the whole": lambda: objective(carso, y)(x),
        EOT: lambda: batched_objective(Seen(carso, samples=carso.samples, limit=10**9), y[few], "ce", DRAWS)(x[few]),
    }


class FlopCounter(TorchDispatchMode):
    """Counts the FLOP of what runs inside, backward passes too. (PyTorch's own refuses a gradient in the input.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, count = function(*args, **(kwargs or {})), flop_registry.get(function._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


def measure_seconds(work, device: torch.device) -> float:
    """On a single CPU thread its own processor time, so that other programs' turns do not count."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    began = clock()
    work()
    finish()
    return clock() - began


def measure_memory(model: nn.Module, work, device: torch.device) -> float:
    """GB: the peak of a GPU; elsewhere tensors kept for the backward pass, without the model's own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    kept, own = {}, {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in kept.values()) / 1e9


def measure_parts(carso: CARSO, x: torch.Tensor, y: torch.Tensor, repeats: int, dtype: torch.dtype) -> list[dict]:
    """A row for each part: seconds, pictures a second, TFLOP/s, its share of the matrix rate, GB."""
    device, parts = x.device, make_parts(carso, x, y)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    parts = {name: autocast(work) for name, work in parts.items()}
    side = 8192 if device.type == "cuda" else 1024  # a GPU would spend most of a small product's time on starting it
    a, product = torch.randn(side, side, device=device).to(dtype), float("inf")
    flop, memory, times = {}, {}, {name: [] for name in parts}
    for name, work in parts.items():
        work()  # warms up
        with FlopCounter() as counter:
            work()
        flop[name], memory[name] = counter.total, measure_memory(carso, work, device)
    for _ in range(repeats):
        for name, work in parts.items():
            times[name].append(measure_seconds(work, device))
            product = min(product, measure_seconds(lambda: a @ a, device))
    limit, rows = 2 * side**3 / product, []
    for name in parts:
        seconds, pictures = statistics.median(times[name]), EOT_PICTURES if name == EOT else len(x)
        rate = flop[name] / seconds
        rows.append({"part": name, "seconds": seconds, "pictures/s": pictures / seconds, "TFLOP/s": rate / 1e12,
                     "share": rate / limit, "GB": memory[name]})  # fmt: skip
    whole = statistics.median(times["balanced batch"]) + statistics.median(times["training step"])
    both = flop["balanced batch"] + flop["training step"]
    rows.append({"part": "a whole step", "seconds": whole, "pictures/s": len(x) / whole, "TFLOP/s": both / whole / 1e12,
                 "share": both / whole / limit, "GB": memory["training step"]})  # fmt: skip
    print(f"batch {len(x)}: matrix product {limit / 1e12:.2f} TFLOP/s")
    return rows


def build(p: Preset, classes: int, shape, device: torch.device) -> CARSO:
    torch.manual_seed(0)
    classifier = WideResNet(classes, p.depth, p.width, shape[0]).to(device).eval()
    layers = representation_layers(p.depth)
    return build_carso(classifier, layers, shape, p.samples, p.condition_dim, p.latent_dim, p.decoder_width).to(device)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sizes of a preset (default: cifar10's, but for a WRN-10-2)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=1, help="of a CPU (default: 1)")
    add("--batch-size", type=int, nargs="+", default=[64])
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    add("--repeats", type=int, default=5)
    add("--unfused", action="store_true", help="on a GPU, BatchNorm and its activation one after the other")
    args = parser.parse_args(argv)
    if min(args.threads, args.repeats, *args.batch_size) < 1:
        raise ValueError("--threads, --repeats and --batch-size are 1 or more")
    device = start_device(args.device)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
    if args.unfused:
        models.FUSED_ON = ()
    p = PRESETS[args.preset] if args.preset else Preset(depth=10, width=2)
    classes, shape = SHAPES[args.preset or "cifar10"]
    carso = build(p, classes, shape, device)
    print(f"WRN-{p.depth}-{p.width}, S {p.samples}, {device}{', unfused' if args.unfused else ''}, "
          f"{args.threads} CPU thread(s), {args.precision}, PyTorch {torch.__version__}")  # fmt: skip
    for size in args.batch_size:
        x, y = torch.rand(size, *shape, device=device), torch.arange(size, device=device) % classes
        rows = measure_parts(carso, x, y, args.repeats, torch.bfloat16 if args.precision == "bf16" else torch.float32)
        print(f"{'part':<32}{'seconds':>9}{'pictures/s':>12}{'TFLOP/s':>10}{'of limit':>10}{'GB':>7}")
        for row in rows:
            print(f"{row['part']:<32}{row['seconds']:>9.3f}{row['pictures/s']:>12,.1f}{row['TFLOP/s']:>10.3f}"
                  f"{row['share']:>10.0%}{row['GB']:>7.2f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    run_script("bench", main)
