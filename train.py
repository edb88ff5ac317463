"""Train CARSO: stage one, an adversarially-trained classifier (or a published one); stage two, the purifier.

    python train.py                                                    # digits, a laptop, minutes
    python train.py --dataset mine.npz --preset cifar10 --epochs 50    # your own pictures; options override the preset
    torchrun --nproc_per_node=8 train.py --dataset cifar10             # the paper's scenario a on one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --dataset cifar10

Everything lands in runs/NAME: carso.pt (all that evaluate.py needs), classifier.pt, log-STAGE.tsv (means over the epoch
and all ranks), reconstructions.png (clean | attacked | reconstructions), config.json. The same command goes on where it
was stopped.

Shapes: B batch, C, H, W image in [0, 1], K classes, S members, Z latent, D condition.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import math
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data as datasets
from attacks import adversarially_balanced_batch, format_eps, parse_eps, pgd
from models import (
    PUBLISHED,
    WideResNet,
    fetch_classifier,
    hash_weights,
    is_under_torchrun,
    load_classifier,
    load_tensors,
    load_weights,
    measure_accuracy,
    read_ranks,
    record,
    representation_layers,
    run_script,
    save_tensors,
    start_device,
)
from purifier import CARSO, build_carso, save_carso, vae_loss

# ---------------------------------------------------------------------------------------------------------- presets


def setting(default, low: float, high: float, meaning: str):
    """A number of a preset, from low to high; its meaning is the help text of its option."""
    return dataclasses.field(default=default, metadata={"bounds": (low, high), "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Preset:
    """A training run. The defaults are the paper's scenario a (tables 12 to 14), but for those marked "ours"."""

    # Stage one, ours (the paper takes published weights): PGD adversarial training of the classifier.
    depth: int = setting(28, 10, 1000, "6n + 4, of the WideResNet")
    width: int = setting(10, 1, 100, "of the WideResNet")
    classifier_epochs: int = setting(100, 1, 1e6, "of its training")
    classifier_batch_size: int = setting(512, 2, 1e6, "pictures a step, over all processes")
    classifier_learning_rate: float = setting(0.2, 0, 1e3, "peak of a one-cycle schedule, SGD with Nesterov momentum")
    classifier_weight_decay: float = setting(5e-4, 0, 1, "of the SGD")
    classifier_ramp: int = setting(5, 0, 1e6, "epochs over which the attack's radius grows to eps")
    classifier_attack_steps: int = setting(10, 0, 1e4, "of PGD, each 2.5 eps / steps; 0: plain training, not attacked")
    classifier_bn_momentum: float = setting(0.01, 1e-6, 1, "larger where few steps let the running statistics settle")
    augment: bool = setting(True, 0, 1, "random crops, shifted by up to 4 pixels, for the classifier")
    mirror: bool = setting(True, 0, 1, "half of these crops mirrored")

    # The purifier.
    condition_dim: int = setting(512, 1, 1e6, "D, table 13")
    latent_dim: int = setting(128, 1, 1e6, "Z, table 13")
    decoder_width: int = setting(256, 8, 1e6, "channels of the decoder's first map, tables 10 and 11")
    samples: int = setting(8, 0, 1e4, "S, reconstructions a picture, section 5.1; 0: one, of z = 0")

    # Stage two, table 14.
    epochs: int = setting(200, 1, 1e6, "of the purifier's training")
    batch_size: int = setting(5120, 2, 1e6, "pictures a step, over all processes: 8 GPUs x 640")
    learning_rate: float = setting(0.064, 0, 1e3, "on the plateau; the same for any number of processes")
    learning_rate_start: float = setting(5e-9, 0, 1e3, "before the warm-up")
    learning_rate_end: float = setting(8e-6, 0, 1e3, "after the anneal")
    warmup: int = setting(25, 0, 1e6, "epochs")
    plateau: int = setting(25, 0, 1e6, "epochs; the rest anneals")
    kl_from: int = setting(25, 0, 1e6, "the KL weight is 0 until this epoch")
    kl_to: int = setting(34, 0, 1e6, "and 1 from this one")

    # Adversarially-balanced batches, table 12.
    eps: float = setting(8 / 255, 0, 1, "largest radius, in pixels of [0, 1]: write 8/255, say")
    fraction: float = setting(0.5, 0, 1, "perturbed share of each batch")
    attack_steps: int = setting(40, 1, 1e4, "of PGD")
    attack_step_size: float = setting(0.01, 0, 1, "of PGD, in pixels")

    bf16: bool = setting(False, 0, 1, "mixed precision for attacks and updates; losses stay in float32 (ours)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), field.metadata["bounds"]
            if not low <= value <= high:
                raise ValueError(f"--{field.name.replace('_', '-')} {value:g} is not between {low:g} and {high:g}")


PAPER = Preset()
PRESETS = {
    "digits": Preset(  # ours: minutes on two CPU cores
        depth=10, width=1, classifier_epochs=18, classifier_batch_size=64, classifier_learning_rate=0.1,
        classifier_ramp=6, classifier_attack_steps=5, classifier_bn_momentum=0.1,
        classifier_weight_decay=1e-4, augment=False, mirror=False,
        condition_dim=64, latent_dim=16, decoder_width=64,
        epochs=24, batch_size=64, learning_rate=4e-3, learning_rate_end=4e-6, warmup=3, plateau=6, kl_from=3, kl_to=6,
        eps=0.2, attack_steps=10, attack_step_size=0.05,
    ),
    "cifar10": PAPER,
    "cifar100": dataclasses.replace(PAPER, batch_size=2560, fraction=0.15),  # 4 GPUs x 640
    "tinyimagenet": dataclasses.replace(
        PAPER, condition_dim=768, latent_dim=192, epochs=250, batch_size=1024, fraction=0.01,  # 8 GPUs x 128
        learning_rate=0.0128, learning_rate_end=1.6e-6, warmup=31, plateau=31, kl_from=32, kl_to=43,
    ),
}  # fmt: skip


def choose_preset(name: str, args: argparse.Namespace) -> Preset:
    """A row of PRESETS with the command line's changes. A shorter or longer run keeps the schedule's proportions.

    Raises ValueError for a number out of its bounds, or a schedule that does not fit into the training."""
    usual, given = PRESETS[name], {}
    for field in dataclasses.fields(Preset):
        if getattr(args, field.name) is not None:
            given[field.name] = getattr(args, field.name)
    epochs = given.get("epochs", usual.epochs)
    if epochs != usual.epochs:
        scale = lambda knot: max(1, getattr(usual, knot) * epochs // usual.epochs)  # noqa: E731
        scaled = {knot: scale(knot) for knot in ("warmup", "plateau", "kl_from", "kl_to")}
        if epochs == 1:
            scaled |= {"plateau": 0, "kl_from": 0, "kl_to": 0}  # no second epoch for the KL weight to grow in
        given = scaled | given
    p = dataclasses.replace(usual, **given)
    if p.warmup + p.plateau > p.epochs:
        raise ValueError(f"--warmup {p.warmup} and --plateau {p.plateau} are longer than the {p.epochs} epochs")
    if not p.kl_from <= p.kl_to <= p.epochs:
        raise ValueError(f"--kl-from {p.kl_from} and --kl-to {p.kl_to} are not in order within the {p.epochs} epochs")
    return p


def fit_batches(p: Preset, count: int, args: argparse.Namespace) -> Preset:
    """The preset for a training set of `count` pictures: where these make fewer than ten batches an epoch (the paper's
    scenario a has ten), batches of a tenth of them, but not under 16 pictures. The rates fall with the batch: for SGD
    in proportion (Goyal et al. 2017), for RAdam as its root (Malladi et al. 2022). What `args` give stays."""
    changed = {}
    for stage, power in (("classifier_", 1), ("", 0.5)):
        size, rate = f"{stage}batch_size", f"{stage}learning_rate"
        usual, fitted = getattr(p, size), max(16, math.ceil(count / 10))
        if getattr(args, size) is None and math.ceil(count / usual) < 10 and fitted < usual:
            changed[size] = fitted
            if getattr(args, rate) is None:
                changed[rate] = float(f"{getattr(p, rate) * (fitted / usual) ** power:.2g}")
    return dataclasses.replace(p, **changed)


# ------------------------------------------------------------------------------------- schedules and the optimizer


def schedule_epoch(epoch: int, number: int, steps: int, p: Preset) -> float:
    """Epoch at which the schedules are read for step `number` of an epoch of `steps`. As in the paper they move once an
    epoch. Where an epoch has five steps or fewer, or the warm-up one epoch or less, they move at every step. The first
    five steps of such a run keep the starting rate: there RAdam follows the bare gradient of a summed loss."""
    if steps > 5 and p.warmup > 1:
        return float(epoch)
    done = epoch * steps + number
    return done / steps if done >= 5 else 0.0


def learning_rate(epoch: float, p: Preset) -> float:
    """Linear warm-up, plateau, linear anneal (table 14). At epoch 0 the rate is that before the warm-up."""
    if epoch == 0:
        return p.learning_rate_start
    knots = [0, p.warmup, p.warmup + p.plateau, p.epochs]
    rates = [p.learning_rate_start, p.learning_rate, p.learning_rate, p.learning_rate_end]
    return float(np.interp(epoch, knots, rates))


def kl_weight(epoch: float, p: Preset) -> float:
    """0 until kl_from, then linear to 1 at kl_to (table 14)."""
    return float(np.interp(epoch, [p.kl_from, p.kl_to], [0, 1]))


class Lookahead:
    """Lookahead (Zhang et al. 2019) around an optimizer: after every k steps the slow weights take a share alpha of the
    way to the fast ones, and the fast ones restart there. The slow weights are the result of training."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 6, alpha: float = 0.8):
        self.optimizer, self.k, self.alpha, self.steps = optimizer, k, alpha, 0
        self.fast = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.fast]

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k == 0:
            torch._foreach_lerp_(self.slow, self.fast, self.alpha)
            torch._foreach_copy_(self.fast, self.slow)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the slow weights in the model."""
        torch._foreach_copy_(self.fast, self.slow)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        for mine, saved in zip(self.slow, state["slow"], strict=True):
            mine.copy_(saved)


def build_optimizer(purifier: nn.Module, p: Preset) -> Lookahead:
    """RAdam in Lookahead (section 5.1). foreach updates all tensors in one call: twice as fast on a CPU."""
    settings = dict(lr=p.learning_rate_start, betas=(0.9, 0.999), eps=1e-8, foreach=True)
    return Lookahead(torch.optim.RAdam(purifier.parameters(), **settings), k=6, alpha=0.8)


@torch.no_grad()
def refresh_batchnorm(network: nn.Module, pass_batches) -> None:
    """Recompute BatchNorm's running statistics as the plain mean over `pass_batches()`: Lookahead's slow weights are
    the result, but the statistics collected on the way belong to the fast ones."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    network.train()
    pass_batches()
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum


# ---------------------------------------------------------------------------------- many processes that act as one


@dataclasses.dataclass
class Ranks:
    """The processes that torchrun started, or the only one. No result depends on their number, but for the order of
    summation."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor that spans the global batch."""
        return batch.tensor_split(self.count)[self.rank]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def load(self, path: Path) -> dict | None:
        """A file of tensors as rank 0 finds it, on the CPU; None where there is none. Folders need not be shared."""
        content = [None]
        if self.first and path.is_file():
            content = [load_tensors(path)]
        if self.count > 1:
            dist.broadcast_object_list(content, device=self.device)
        return content[0]

    def wrap(self, module: nn.Module, trained: nn.Module | None = None) -> nn.Module:
        """The module with gradients averaged over the ranks, and BatchNorm over the global batch in the part of it that
        is trained (default: all)."""
        if self.count == 1:
            return module
        trained = module if trained is None else trained
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(trained)
        else:
            for layer in trained.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.forward = partial(global_batch_norm, layer)  # SyncBatchNorm is for GPUs only
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in older versions
            return DistributedDataParallel(
                module,
                device_ids=[self.device.index] if on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )


def global_batch_norm(layer: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm over the pictures of all ranks, from plain collectives that also run on CPUs: (B, C, ...) -> the
    same."""
    if not layer.training:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast x is bfloat16
    sums = AllSum.apply(torch.cat([x.sum(dims), x.new_full((1,), x.numel() / x.shape[1])]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centred = x - mean.view(shape)
    variance = AllSum.apply(centred.square().sum(dims)) / count
    with torch.no_grad():
        layer.num_batches_tracked += 1
        momentum = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
        layer.running_mean.lerp_(mean, momentum)
        layer.running_var.lerp_(variance * count / (count - 1), momentum)
    normalised = centred * (variance + layer.eps).rsqrt().view(shape)
    return (normalised * layer.weight.view(shape) + layer.bias.view(shape)).to(given)


class AllSum(torch.autograd.Function):
    """The sum over all ranks. Each rank's loss sees it, so its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return AllSum.forward(ctx, gradient)


def start_ranks(device: torch.device) -> Ranks:
    """Join the processes that torchrun started; a plain `python train.py` is the only one."""
    rank, count = read_ranks()
    if not is_under_torchrun():
        return Ranks(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return Ranks(device, rank, count)


# ---------------------------------------------------------------------------------------------------------- the loop


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C arrived; the step was finished and saved."""


class Run:
    """One folder, one configuration, one set of ranks: the loop that steps, logs, saves and resumes.

    All random numbers are drawn for the global batch by a generator that follows from (seed, stage, epoch, step), and
    each rank takes its own rows: the result does not depend on the number of ranks, and resuming needs no generator's
    state."""

    def __init__(self, folder: Path, config: dict, ranks: Ranks, save_every: float):
        self.folder, self.config, self.ranks, self.save_every = folder, config, ranks, save_every
        self.stopping, self.last_save, self.last_line = False, time.monotonic(), time.monotonic()
        self.window = 1 if ranks.device.type == "cpu" else 10  # steps between two looks at sums: a GPU is waited for

    def is_complete(self) -> bool:
        """True if rank 0 finds the result of this run: folders need not be shared."""
        path = self.folder / "carso.pt"
        found = torch.tensor(float(self.ranks.first and path.is_file()), device=self.ranks.device)
        if self.ranks.sum(found) == 0:
            return False
        self.say(f"{path} is complete: attack it with evaluate.py --ckpt, or choose another --name")
        return True

    def say(self, text: str) -> None:
        self.last_line = time.monotonic()
        if self.ranks.first:
            tqdm.write(text)
            sys.stdout.flush()  # a file that it goes to is looked into, too

    def generator(self, stage: str, epoch: int, number: int) -> torch.Generator:
        """The random numbers of one step, the same on every rank, for whole global batches."""
        key = f"{self.config['seed']} {stage} {epoch} {number}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little")
        return torch.Generator(self.ranks.device).manual_seed(seed)

    def pictures(self, data: datasets.Dataset, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of a global batch: x (b, C, H, W) in [0, 1], y (b,)."""
        mine = self.ranks.share(indices).to(self.ranks.device)
        return datasets.pixels(data.train_images[mine]), data.train_labels[mine]

    def uniform(self, x: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """PGD's random start for this rank's pictures, in [-1, 1], of x's shape; drawn for the global batch."""
        noise = 2 * torch.rand((len(indices), *x.shape[1:]), generator=generator, device=x.device) - 1
        return self.ranks.share(noise)

    def train(self, stage: str, epochs: int, count: int, batch_size: int, parts: dict, columns, step, after_epoch=None):
        """Call step(epoch, number, indices, first) for every batch of every epoch, from where a saved run stopped.

        parts: name -> anything with a state_dict; saved and restored together.
        step: trains on the global batch `indices` (of which it takes its rank's rows), whose first picture is number
            `first` since the start, and returns the sums over its rows of what `columns` names.
        Every epoch's means over all pictures become a row of log-STAGE.tsv. Raises Stopped, or ValueError where a sum
        or a weight is not finite.
        """
        path = self.folder / f"{stage}.resume.pt"
        saved = self.ranks.load(path) or {"epoch": 0, "step": 0, "rows": [], "sums": torch.zeros(len(columns)).double()}
        for name, state in saved.pop("parts", {}).items():
            parts[name].load_state_dict(state)
        rows, sums, step_now = saved["rows"], saved["sums"], saved["step"]
        self.say(f"{stage}: {epochs} epochs of {count} pictures in batches of {batch_size}"
                 + (f", going on at epoch {saved['epoch']}, step {step_now}" if path.is_file() else ""))  # fmt: skip
        self.say("  ".join(f"{name:>10}" for name in ["epoch", *columns, "pictures/s", "left"]))

        def save(epoch, step):
            self.last_save = time.monotonic()
            if self.ranks.first:
                states = {name: part.state_dict() for name, part in parts.items()}
                save_tensors(path, {"parts": states, "epoch": epoch, "step": step, "rows": rows, "sums": sums})

        with self.stopping_gently():
            for epoch in range(saved["epoch"], epochs):
                order = datasets.batches(count, batch_size, self.config["seed"], epoch)
                gathered = torch.zeros_like(sums, device=self.ranks.device)  # over this rank's last steps
                began, done, speed, left = time.monotonic(), 0, 0.0, ""
                quiet = None if self.ranks.first else True
                for number in tqdm(range(step_now, len(order)), f"{stage} {epoch}", leave=False, disable=quiet):
                    first = epoch * count + sum(len(indices) for indices in order[:number])
                    gathered += step(epoch, number, order[number], first).double()
                    done += len(order[number])
                    speed = done / max(time.monotonic() - began, 1e-9)
                    left = clock((count * epochs - first - len(order[number])) / speed)
                    if time.monotonic() - self.last_line > 60:
                        self.say(f"{stage}: epoch {epoch}, batch {number + 1} of {len(order)}, {left} left")
                    alone = self.stopping and self.ranks.count == 1
                    if (number + 1) % self.window and number + 1 < len(order) and not alone:
                        continue
                    values = torch.cat([gathered, gathered.new_tensor([float(self.stopping)])])
                    *values, stopping = self.ranks.sum(values).cpu()
                    sums += torch.stack(values)
                    gathered.zero_()
                    if not sums.isfinite().all():
                        raise ValueError(f"{stage}: the loss is not finite at epoch {epoch}, step {number}: choose a "
                                         "lower learning rate, and another --name")  # fmt: skip
                    if stopping > 0 or time.monotonic() - self.last_save > self.save_every:
                        save(epoch, number + 1)
                    if stopping > 0:
                        raise Stopped(f"stopped at {stage} epoch {epoch}, step {number + 1}, and saved")
                rows.append([epoch, *(sums / count).tolist()])
                shown = [f"{epoch}", *(f"{value:.5g}" for value in rows[-1][1:]), f"{speed:.0f}", left]
                self.say("  ".join(f"{text:>10}" for text in shown))
                sums, step_now = torch.zeros_like(sums), 0
                self.write_log(stage, columns, rows)
                if after_epoch:
                    after_epoch(epoch)
        networks = [part for part in parts.values() if isinstance(part, nn.Module)]
        if not all(value.isfinite().all() for network in networks for value in network.state_dict().values()):
            raise ValueError(f"{stage}: a weight is not finite: choose a lower learning rate, and another --name")
        save(epochs, 0)

    @contextlib.contextmanager
    def stopping_gently(self):
        """Inside, SIGTERM and Ctrl-C only ask to stop after the current step; a second one does not wait."""

        def ask(*_):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        before = {name: signal.signal(name, ask) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def write_log(self, stage: str, columns, rows) -> None:
        """Rewritten whole from the rows so far, so that a resumed run never repeats or loses one."""
        if self.ranks.first:
            lines = ["\t".join(["epoch", *columns])]
            lines += ["\t".join(f"{value:.8g}" for value in row) for row in rows]
            datasets.write_text(self.folder / f"log-{stage}.tsv", "\n".join(lines) + "\n")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


# ---------------------------------------------------------------------------------------- stage one: the classifier


def attack_piecewise(attack, x: torch.Tensor, micro_batch: int | None) -> torch.Tensor:
    """attack(rows), a function of indices into x, at most `micro_batch` pictures at a time."""
    return torch.cat([attack(rows) for rows in torch.arange(len(x)).split(micro_batch or len(x))])


def train_classifier(run: Run, data: datasets.Dataset, classifier: WideResNet, p: Preset, micro_batch) -> WideResNet:
    """PGD adversarial training (Madry et al. 2018), or plain training where the attack has no steps, on from the given
    weights. An averaged copy of the weights is the result."""
    ranks, device = run.ranks, run.ranks.device
    for layer in classifier.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = p.classifier_bn_momentum
    optimizer = torch.optim.SGD(
        classifier.parameters(), momentum=0.9, nesterov=True, weight_decay=p.classifier_weight_decay
    )
    network = ranks.wrap(classifier)
    count, size = len(data.train_labels), p.classifier_batch_size
    steps_an_epoch = len(datasets.batches(count, size, 0, 0))
    # An exponential average of weights and BatchNorm's statistics that reaches back about an epoch is the result.
    decay = get_ema_multi_avg_fn(1 - 1 / steps_an_epoch)
    average = AveragedModel(classifier, multi_avg_fn=decay, use_buffers=True)

    def step(epoch, number, indices, first):
        at = epoch + number / steps_an_epoch
        ramp = np.interp(at, [0, 0.3 * p.classifier_epochs, p.classifier_epochs], [0.1, 1, 0])
        optimizer.param_groups[0]["lr"] = float(ramp * p.classifier_learning_rate)
        eps = p.eps * min(1.0, (at + 0.5) / max(p.classifier_ramp, 1e-9))
        (x, y), generator = run.pictures(data, indices), run.generator("classifier", epoch, number)
        noise = run.uniform(x, indices, generator)
        if p.augment:
            draws = torch.rand((len(indices), 3), generator=generator, device=device)
            x = datasets.augment(x, ranks.share(draws), p.mirror)
        classifier.eval().requires_grad_(False)
        if steps := p.classifier_attack_steps:
            step_size = 2.5 * eps / steps  # the steps could cross the ball (Madry et al.)
            attack = lambda i: pgd(classifier, x[i], y[i], eps, steps, step_size, noise=noise[i])  # noqa: E731
            with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
                x = attack_piecewise(attack, x, micro_batch)
        network.train().requires_grad_(True)
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            logits = network(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        optimizer.zero_grad()
        (loss * ranks.count / len(indices)).backward()  # DDP averages over ranks: this is the global batch's mean
        optimizer.step()
        average.update_parameters(classifier)
        return torch.stack([loss.detach(), (logits.argmax(1) == y).sum()])

    parts = {"network": classifier, "average": average, "optimizer": optimizer}
    run.train("classifier", p.classifier_epochs, count, size, parts, ("loss", "robust"), step)
    result = WideResNet(**classifier.config)
    result.load_state_dict(average.module.state_dict())
    return result.to(device).eval()


def make_classifier(run: Run, data: datasets.Dataset, fresh: WideResNet, p: Preset, micro_batch) -> WideResNet:
    """Stage one: train `fresh`, keep the result as classifier.pt, measure it; or take the one that this run made
    before."""
    path = run.folder / "classifier.pt"
    if kept := run.ranks.load(path):
        weights = {name: tensor for name, tensor in kept.get("state_dict", {}).items() if name not in ("mean", "std")}
        load_weights(fresh, weights, path)
        return fresh.eval()
    classifier = train_classifier(run, data, fresh, p, micro_batch)
    if run.ranks.first:
        normalisation = {"mean": classifier.mean.flatten(), "std": classifier.std.flatten()}
        save_tensors(path, {"state_dict": classifier.state_dict() | normalisation})
        (run.folder / "classifier.resume.pt").unlink(missing_ok=True)
    torch.manual_seed(0)
    images, labels = data.test_images[:500], data.test_labels[:500]
    attack = partial(pgd, eps=p.eps, steps=20, step_size=p.eps / 4)
    limit = min(250, micro_batch or p.classifier_batch_size // run.ranks.count)  # what the training had room for
    clean = measure_accuracy(classifier, images, labels, batch_size=limit)
    robust = measure_accuracy(classifier, images, labels, attack, limit)
    run.say(f"classifier: clean {clean:.1%}, PGD-20 {robust:.1%} on {len(labels)} test pictures")
    return classifier


# ------------------------------------------------------------------------------------------- stage two: the purifier


def attack_every_batch(run: Run, data: datasets.Dataset, classifier: nn.Module, p: Preset, micro_batch: int | None):
    """Where the perturbed part of a batch comes from: the classifier is attacked anew for every batch (section 4.4).

    Returns perturb(clean, y, indices, epoch, first, generator), which gives this rank's pictures (b, C, H, W) of the
    global batch `indices`, a share of them perturbed; first: the batch's first picture's number since the start."""

    def perturb(clean, y, indices, epoch, first, generator):
        noise = run.uniform(clean, indices, generator)
        first += int(run.ranks.share(torch.arange(len(indices)))[0])

        def attack(rows):
            return adversarially_balanced_batch(
                classifier, clean[rows], y[rows], p.eps, p.fraction, p.attack_steps, p.attack_step_size,
                first=first + int(rows[0]), noise=noise[rows],
            )  # fmt: skip

        with torch.autocast(clean.device.type, torch.bfloat16, enabled=p.bf16):
            # A piece's memory is that of the pictures that it attacks.
            return attack_piecewise(attack, clean, micro_batch and math.ceil(micro_batch / max(p.fraction, 0.01)))

    return perturb


@torch.no_grad()
def record_piecewise(classifier: nn.Module, layers: list[str], x: torch.Tensor, micro_batch) -> list[torch.Tensor]:
    """The representation of x, `micro_batch` pictures at a time: the classifier's other tensors need less memory."""
    if micro_batch is None or micro_batch >= len(x):
        return record(classifier, layers, x)[1]
    pieces = [record(classifier, layers, part)[1] for part in x.split(micro_batch)]
    return [torch.cat(layer) for layer in zip(*pieces)]


def train_purifier(run: Run, data: datasets.Dataset, carso: CARSO, p: Preset, micro_batch, make_perturb) -> None:
    """The paper's recipe (sections 4.4 and 5.1): adversarially-balanced batches, summed BCE and KL, RAdam in
    Lookahead."""
    ranks, device = run.ranks, run.ranks.device
    classifier, purifier = carso.classifier, carso.purifier
    network = ranks.wrap(purifier)
    purifier.recompute = micro_batch is not None
    lookahead = build_optimizer(purifier, p)
    count = len(data.train_labels)
    steps = len(datasets.batches(count, p.batch_size, 0, 0))
    perturb = make_perturb(run, data, classifier, p, micro_batch)

    def pass_batch(stage, epoch, number, indices, first):
        """This rank's part of a balanced batch through the purifier: clean (b, C, H, W), its reconstruction, mu,
        logvar (b, Z)."""
        (clean, y), generator = run.pictures(data, indices), run.generator(stage, epoch, number)
        perturbed = perturb(clean, y, indices, epoch, first, generator)
        noise = torch.randn((len(indices), p.latent_dim), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            representation = record_piecewise(classifier, carso.layers, perturbed, micro_batch)
            outputs = network(perturbed, representation, ranks.share(noise))
        return clean, *(output.float() for output in outputs)

    def step(epoch, number, indices, first):
        at = schedule_epoch(epoch, number, steps, p)
        lookahead.optimizer.param_groups[0]["lr"] = learning_rate(at, p)
        carso.train()  # but for its classifier, which stays frozen and in eval mode
        clean, reconstruction, mu, logvar = pass_batch("purifier", epoch, number, indices, first)
        loss, bce, kld = vae_loss(reconstruction, clean, mu, logvar, kl_weight(at, p))
        lookahead.optimizer.zero_grad()
        (loss * ranks.count).backward()  # DDP averages over ranks: this is the global batch's sum
        lookahead.step()
        return torch.stack([loss, bce, kld]).detach()

    def collect(epoch, number, indices, first):
        """The pass is for BatchNorm's statistics; the losses go to the log alone."""
        clean, reconstruction, mu, logvar = pass_batch("batchnorm", epoch, number, indices, first)
        return torch.stack(vae_loss(reconstruction, clean, mu, logvar, 1.0))

    columns, parts = ("loss", "bce", "kld"), {"purifier": purifier, "lookahead": lookahead}
    draw = partial(draw_reconstructions, run, carso, data, p, p.epochs)
    run.train("purifier", p.epochs, count, p.batch_size, parts, columns, step, draw)
    lookahead.finish()
    # One more epoch, attacked anew, with the slow weights: only BatchNorm's statistics are collected.
    last = partial(run.train, "batchnorm", 1, count, p.batch_size, {"purifier": purifier}, columns, collect)
    refresh_batchnorm(purifier, last)
    carso.eval()


def draw_reconstructions(run: Run, carso: CARSO, data: datasets.Dataset, p: Preset, epochs: int, epoch: int) -> None:
    """reconstructions.png, every fifth epoch and the last: clean | attacked (PGD eps on the classifier) | six
    reconstructions; a row a test picture."""
    if not run.ranks.first or (epoch % 5 != 4 and epoch != epochs - 1):
        return
    was_training, device = carso.purifier.training, run.ranks.device
    carso.eval()
    x, y = datasets.pixels(data.test_images[:8].to(device)), data.test_labels[:8].to(device)
    attacked = pgd(carso.classifier, x, y, p.eps, p.attack_steps, p.attack_step_size, noise=torch.zeros_like(x))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((len(x), 6, carso.purifier.config["latent_dim"]), generator=generator).to(device)
    with torch.no_grad():
        tiles = torch.cat([x[:, None], attacked[:, None], carso.purify(attacked, z)], dim=1)
    headings = ["clean", "attacked", *["drawn anew"] * 6]
    datasets.save_pictures(run.folder / "reconstructions.png", tiles, headings)
    carso.train(was_training)


def finish(run: Run, data: datasets.Dataset, data_dir: str, carso: CARSO) -> None:
    """Keep the whole defence as carso.pt, measure it, and remove what only resuming needed."""
    if not run.ranks.first:
        return
    state = {"dataset": run.config["dataset"], "data_dir": data_dir, "config": run.config, "classes": data.classes}
    save_carso(run.folder / "carso.pt", carso, **state)
    for path in [*run.folder.glob("*.resume.pt"), *run.folder.glob(".*.part")]:  # .part: of a run that was killed
        path.unlink()
    images, labels = data.test_images[:500], data.test_labels[:500]
    clean = measure_accuracy(carso, images, labels, batch_size=max(1, 250 // max(1, carso.samples)))
    run.say(f"CARSO: clean {clean:.1%} on {len(labels)} test pictures")
    reduced = "" if data.name in PRESETS else " --budget reduced"  # of the paper's it would take hours
    run.say(f"now: python evaluate.py --ckpt {run.folder / 'carso.pt'}{reduced}")


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(datasets.NAMES)}, or a path (see data.py)")
    add("--data-dir", default="data", help="where downloads and caches go (default: data)")
    add("--stage", choices=["all", "classifier"], default="all", help="classifier: end after stage one (default: all)")
    add("--preset", choices=PRESETS, help="default: the data set's own, cifar10's for a path")
    add("--name", help="folder under runs/ (default: the data set's name)")
    add("--classifier", help="'train'; 'published' (the paper's) or another's name in models.py, downloaded; or a file "
        "of weights (default: published for cifar10, cifar100 and tinyimagenet, train elsewhere)")  # fmt: skip
    add("--train-on", metavar="FILE", help="stage one goes on from these weights, of the same depth and width")
    add("--final", metavar="FILE", help="weights of a second classifier, which labels the reconstructions, while the "
        "first one is looked into (default: one does both)")  # fmt: skip
    add("--tap", nargs="+", default=["*"], metavar="LAYER", help="layers of the classifier that the purifier sees: "
        "names, as init_conv, or patterns, as 'layer.2.*', the last group (default: the paper's, table 5)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--micro-batch", type=int, help="to save memory: attacks and representations so many pictures at a time, the "
        "purifier's activations computed twice; the same result")  # fmt: skip
    add("--save-every", type=float, default=10, help="minutes between checkpoints (default: 10)")
    group = parser.add_argument_group("preset", "every number of the preset can be overridden")
    for field in dataclasses.fields(Preset):
        kind = {"action": argparse.BooleanOptionalAction}
        if field.type is not bool:
            kind = {"type": {int: int, float: parse_eps}[field.type], "metavar": field.type.__name__}
        group.add_argument("--" + field.name.replace("_", "-"), help=field.metadata["meaning"], **kind)
    args = parser.parse_args(argv)
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError(f"--micro-batch {args.micro_batch} is not 1 or more")
    if args.train_on and args.classifier:
        raise ValueError("--train-on and --classifier exclude each other: is the classifier to be trained or not?")
    if args.stage == "classifier" and (args.classifier or args.final):
        raise ValueError("--stage classifier trains a classifier alone: leave out --classifier and --final")
    return args


def load_data(args: argparse.Namespace, ranks: Ranks, p: Preset | None = None) -> tuple[datasets.Dataset, Preset]:
    """The data set, its training pictures on the device, and its preset (or p) with batches that fit it. Raises
    ValueError where batches are too small for BatchNorm or the processes."""
    data = datasets.load(args.dataset, args.data_dir)
    count = len(data.train_labels)
    if p is None:
        name = args.preset or (data.name if data.name in PRESETS else "cifar10")
        p = choose_preset(name, args)
        if not args.preset and data.name not in PRESETS and ranks.first:
            print("the preset is cifar10's: a network for a GPU; --preset digits has a small one")
    usual, p = p, fit_batches(p, count, args)
    for name in ("batch_size", "classifier_batch_size"):
        option, size = "--" + name.replace("_", "-"), getattr(p, name)
        smallest = min(len(b) for b in datasets.batches(count, size, 0, 0))
        if smallest < max(2, ranks.count):
            raise ValueError(f"{option} {size} leaves a batch of {smallest} for {ranks.count} process(es): enlarge it")
        if size != getattr(usual, name) and ranks.first:
            print(f"{option} {size} for ten batches an epoch of {count} pictures; its learning rate falls with it")
    on_device = {name: getattr(data, name).to(ranks.device) for name in ("train_images", "train_labels")}
    return dataclasses.replace(data, **on_device), p


def load_given(weights: str, data: datasets.Dataset, data_dir: str, device) -> WideResNet:
    """A classifier from a file, or a published one by its name."""
    if Path(weights).is_file():
        return load_classifier(weights, len(data.classes), data.mean, data.std).to(device)
    return fetch_classifier(data, weights, data_dir, device)


def build_defence(classifier: WideResNet, data: datasets.Dataset, p: Preset, tap: list[str], seed: int) -> CARSO:
    """A fresh purifier around the classifier. tap: names of layers, or patterns for those of table 5 that they
    match."""
    papers = representation_layers(classifier.config["depth"])
    layers = dict.fromkeys(layer for name in tap for layer in fnmatch.filter(papers, name) or [name])
    torch.manual_seed(seed)
    shape = tuple(data.train_images.shape[1:])
    return build_carso(classifier, list(layers), shape, p.samples, p.condition_dim, p.latent_dim, p.decoder_width)


def main(argv=None, perturb=attack_every_batch, **more) -> int:
    """The exit status. perturb: makes the function that perturbs a batch; more: its settings, for config.json."""
    args = parse_arguments(argv)
    ranks = start_ranks(start_device(args.device))
    data, p = load_data(args, ranks)

    # Stage one trains a classifier, from fresh weights or on from given ones, or it takes given ones as they are.
    given = args.train_on or args.classifier
    if given is None and args.stage == "all" and data.name in PUBLISHED and (p.depth, p.width) == (28, 10):
        given = "published"
    given = None if given == "train" else given
    torch.manual_seed(args.seed)
    if given:
        classifier = load_given(given, data, args.data_dir, ranks.device)
        sizes = {name: classifier.config[name] for name in ("depth", "width")}
        for name, size in sizes.items():
            if getattr(args, name) not in (None, size):
                raise ValueError(f"--{name} {getattr(args, name)} is not that of {given}, {size}: leave it out")
        p = dataclasses.replace(p, **sizes)
    else:
        sizes = len(data.classes), p.depth, p.width, data.train_images.shape[1]
        classifier = WideResNet(*sizes, data.mean, data.std).to(ranks.device)
    final = load_given(args.final, data, args.data_dir, ranks.device) if args.final else None

    if args.stage == "all":
        build_defence(classifier, data, p, args.tap, args.seed)  # what cannot be built is refused before the training

    asked = {name: getattr(args, name) for name in ("dataset", "classifier", "train_on", "final", "tap", "seed")}
    config = asked | dataclasses.asdict(p) | more
    config["data"] = datasets.fingerprint(data.train_images, data.train_labels, data.classes)
    networks = (classifier if given else None, final)
    config["weights"] = [hash_weights(network) for network in networks if network is not None]
    folder = Path("runs") / (args.name or Path(os.path.abspath(args.dataset)).stem)
    if ranks.first:
        datasets.check_config(folder / "config.json", config, "--name")
    run = Run(folder, config, ranks, 60 * args.save_every)
    if run.is_complete():
        return 0
    run.say(f"{data.name}: {len(data.train_labels)} training pictures {tuple(data.train_images.shape[1:])}, "
            f"{len(data.classes)} classes; {ranks.count} process(es) on {ranks.device.type}")  # fmt: skip
    for note in data.notes:
        run.say(note)

    if args.train_on or not given:
        classifier = make_classifier(run, data, classifier.requires_grad_(True), p, args.micro_batch)
    if args.stage == "classifier":
        run.say(f"now: python evaluate.py --ckpt {folder / 'classifier.pt'} --dataset {args.dataset} "
                f"--eps {format_eps(p.eps)}")  # fmt: skip
        return 0
    carso = build_defence(classifier, data, p, args.tap, args.seed).to(ranks.device)
    carso.final = final and final.requires_grad_(False)
    train_purifier(run, data, carso, p, args.micro_batch, perturb)
    finish(run, data, args.data_dir, carso)
    return 0


if __name__ == "__main__":
    run_script("train.py", main)
