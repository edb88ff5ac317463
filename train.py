"""Train CARSO: stage one, an adversarially-trained classifier (or a published one); stage two, the purifier.

    python train.py                                                    # digits, a laptop, minutes
    python train.py --dataset mine.npz --preset cifar10 --epochs 50    # your own pictures; options override the preset
    python train.py --dataset cifar10 --micro-batch 640 --bf16         # the paper's scenario a on one GPU of 40 GB
    torchrun --nproc_per_node=8 train.py --dataset cifar10             # the same on eight
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --dataset cifar10

Everything lands in runs/NAME: carso.pt (all that evaluate.py needs), classifier.pt, log-STAGE.tsv (means over the epoch
and all ranks), reconstructions.png (clean | attacked | reconstructions), config.json. The same command goes on from
the last checkpoint.

Shapes: B batch, b this process's part of it, C, H, W image in [0, 1], K classes, S members, Z latent, D condition.
"""

import argparse
import copy
import dataclasses
import fnmatch
import hashlib
import itertools
import math
import os
import shlex
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only

import data as datasets
from attacks import adversarially_balanced_batch, balanced_kinds, format_eps, parse_number, pgd
from models import (
    PUBLISHED,
    WideResNet,
    fetch_classifier,
    find_batchnorms,
    hash_weights,
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
    kl_to: int = setting(34, 0, 1e6, "and kl_end from this one")
    kl_end: float = setting(1.0, 0, 1e3, "the KL weight at last; less lets the latent code carry more")

    # Adversarially-balanced batches, table 12.
    eps: float = setting(8 / 255, 0, 1, "largest radius, in pixels of [0, 1]: write 8/255, say")
    fraction: float = setting(0.5, 0, 1, "perturbed share of each batch")
    attack_steps: int = setting(40, 1, 1e4, "of PGD")
    attack_step_size: float = setting(0.01, 0, 1, "of PGD, in pixels")

    # Ours; losses stay in float32.
    bf16: bool = setting(False, 0, 1, "mixed precision for attacks and updates (slow on a CPU without bfloat16)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), field.metadata["bounds"]
            if not low <= value <= high:
                raise ValueError(f"--{field.name.replace('_', '-')} {value:g} is not between {low:g} and {high:g}")


PRESETS = {
    "digits": Preset(  # ours: minutes on two CPU cores
        depth=10, width=1, classifier_epochs=18, classifier_batch_size=64, classifier_learning_rate=0.1,
        classifier_ramp=6, classifier_attack_steps=5, classifier_bn_momentum=0.1,
        classifier_weight_decay=1e-4, augment=False, mirror=False,
        condition_dim=64, latent_dim=16, decoder_width=64,
        epochs=24, batch_size=64, learning_rate=4e-3, learning_rate_end=4e-6, warmup=3, plateau=6, kl_from=3, kl_to=6,
        eps=0.2, attack_steps=10, attack_step_size=0.05,
    ),
    "cifar10": Preset(),
    "cifar100": Preset(batch_size=2560, fraction=0.15),  # 4 GPUs x 640
    "tinyimagenet": Preset(
        condition_dim=768, latent_dim=192, epochs=250, batch_size=1024, fraction=0.01,  # 8 GPUs x 128
        learning_rate=0.0128, learning_rate_end=1.6e-6, warmup=31, plateau=31, kl_from=32, kl_to=43,
    ),
}  # fmt: skip


def choose_preset(name: str, given: dict) -> Preset:
    """A row of PRESETS with the given numbers. A shorter or longer run keeps the schedules' proportions.

    Raises ValueError for a number out of its bounds, or a schedule that does not fit into the training."""
    usual = PRESETS[name]
    epochs = given.get("epochs", usual.epochs)
    scaled = {}
    for knot in ("warmup", "plateau", "kl_from", "kl_to"):
        scaled[knot] = max(1, getattr(usual, knot) * epochs // usual.epochs)
    classifier_epochs = given.get("classifier_epochs", usual.classifier_epochs)
    scaled["classifier_ramp"] = usual.classifier_ramp * classifier_epochs // usual.classifier_epochs
    if epochs == 1:
        scaled |= {"plateau": 0, "kl_from": 0, "kl_to": 0}  # no second epoch for the KL weight to grow in
    p = dataclasses.replace(usual, **scaled | given)

    if p.warmup + p.plateau > p.epochs:
        raise ValueError(f"--warmup {p.warmup} and --plateau {p.plateau} are longer than the {p.epochs} epochs")
    if not p.kl_from <= p.kl_to <= p.epochs:
        raise ValueError(f"--kl-from {p.kl_from} and --kl-to {p.kl_to} are not in order within the {p.epochs} epochs")
    return p


def fit_batches(p: Preset, pictures: int, given: dict, processes: int) -> Preset:
    """The preset for a training set of so many pictures. If it makes fewer than ten batches an epoch (the paper's
    scenario a has ten), a batch gets a tenth of it, but not under 16 pictures. The learning rate falls with the batch:
    for SGD in proportion (Goyal et al. 2017), for RAdam as its root (Malladi et al. 2022). Given numbers stay.

    Raises ValueError where a batch is too small for BatchNorm or the processes."""
    tenth = max(16, math.ceil(pictures / 10))
    for prefix, power in ("classifier_", 1.0), ("", 0.5):
        size_name, rate_name = f"{prefix}batch_size", f"{prefix}learning_rate"
        size = getattr(p, size_name)
        if size_name not in given and math.ceil(pictures / size) < 10 and tenth < size:
            rate = getattr(p, rate_name) * (tenth / size) ** power
            size = tenth
            p = dataclasses.replace(p, **{size_name: size, rate_name: given.get(rate_name, rate)})

        smallest = pictures // math.ceil(pictures / size)  # batches are as equal as possible
        if smallest < max(2, processes):
            option = "--" + size_name.replace("_", "-")
            raise ValueError(f"{option} {size} leaves a batch of {smallest} for {processes} process(es): enlarge it")
    return p


# ------------------------------------------------------------------------------------- schedules and the optimizer


def schedule_epoch(epoch: int, step: int, steps: int, p: Preset) -> float:
    """The point of the schedules, in epochs, that a step reads; an epoch has `steps`. As in the paper they move once an
    epoch. Where an epoch has five steps or fewer, or the warm-up one epoch or less, they move at every step. The first
    five steps of such a run keep the starting rate: there RAdam follows the bare gradient of a summed loss."""
    if steps > 5 and p.warmup > 1:
        return float(epoch)
    done = epoch * steps + step
    return done / steps if done >= 5 else 0.0


def learning_rate(epoch: float, p: Preset) -> float:
    """Linear warm-up, plateau, linear anneal (table 14). At epoch 0 the rate is that before the warm-up."""
    if epoch == 0:
        return p.learning_rate_start
    knots = [0, p.warmup, p.warmup + p.plateau, p.epochs]
    rates = [p.learning_rate_start, p.learning_rate, p.learning_rate, p.learning_rate_end]
    return float(np.interp(epoch, knots, rates))


def kl_weight(epoch: float, p: Preset) -> float:
    """0 until kl_from, then linear to kl_end, the paper's 1, at kl_to (table 14)."""
    return float(np.interp(epoch, [p.kl_from, p.kl_to], [0, p.kl_end]))


class Lookahead:
    """Lookahead (Zhang et al. 2019) around an optimizer: after every k steps the slow weights take a share alpha of the
    way to the fast ones, and the fast ones restart there. The slow weights are the result of training."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 6, alpha: float = 0.8):
        self.optimizer, self.k, self.alpha, self.steps = optimizer, k, alpha, 0
        self.fast = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.slow = [weight.detach().clone() for weight in self.fast]

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
    radam = torch.optim.RAdam(
        purifier.parameters(), lr=p.learning_rate_start, betas=(0.9, 0.999), eps=1e-8, foreach=True
    )
    return Lookahead(radam)


# ---------------------------------------------------------------------------------- many processes that act as one


@dataclasses.dataclass
class Ranks:
    """The processes that torchrun started, or the only one. No result depends on their number, but for the order of
    summation."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor that spans the global batch."""
        return batch.tensor_split(self.count)[self.rank]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """Every rank's plain value, on every rank."""
        values = [value]
        if self.count > 1:
            values *= self.count
            dist.all_gather_object(values, value)
        return values

    def run_where(self, condition: bool, action):
        """action() on the ranks where the condition is true, None on the others. Where it raises ValueError or OSError,
        every rank ends, or the others would wait for one that has ended."""
        result, sentence = None, ""
        if condition:
            try:
                result = action()
            except (ValueError, OSError) as error:
                sentence = str(error)
        sentences = [text for text in self.gather(sentence) if text]
        if sentences:
            self.refuse(sentences[0])
        return result

    def refuse(self, sentence: str) -> NoReturn:
        """Raises ValueError on rank 0, which speaks for all; the others end after it, without a word."""
        if self.is_first:
            raise ValueError(sentence)
        time.sleep(1)  # rank 0 speaks first: torchrun ends all processes as soon as one has ended
        raise SystemExit(2)

    def take_turns(self, load):
        """load(), on one process of each machine first, which may download and unpack for the others."""
        is_early = os.environ.get("LOCAL_RANK", "0") == "0"
        early = self.run_where(is_early, load)
        late = self.run_where(not is_early, load)
        return early if is_early else late

    def check_alike(self, settings: dict) -> None:
        """Raises ValueError where the ranks have different settings."""
        everyone = self.gather(settings)
        keys = dict.fromkeys(itertools.chain(*everyone))
        different = [key for key in keys if any(theirs.get(key) != everyone[0].get(key) for theirs in everyone)]
        if different:
            names = ", ".join(different)
            self.refuse(f"the processes differ in {names}: give all the same data, weights and options")

    def load(self, path: Path) -> dict | None:
        """A file of tensors as rank 0 finds it, on the CPU; None where there is none. Folders need not be shared."""
        content = self.run_where(self.is_first, lambda: load_tensors(path) if path.is_file() else None)
        if self.count == 1:
            return content

        # First an outline without the numbers, then tensor by tensor: no process holds more than the content.
        outline = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), content)
        outline = self.gather(outline)[0]
        if not self.is_first:
            content = tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), outline)
        tree_map_only(torch.Tensor, lambda tensor: dist.broadcast(tensor, 0), content)
        return content

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the ranks, and BatchNorm over the global batch where it trains."""
        if self.count == 1:
            return network
        if self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        else:
            for layer in find_batchnorms(network):
                layer.forward = partial(global_batch_norm, self, layer)  # SyncBatchNorm is for GPUs only
        return DistributedDataParallel(network)


def global_batch_norm(ranks: Ranks, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm over the pictures of all ranks, on CPUs: each rank gets all rows, and keeps its own. x (b, C, ...)."""
    if not layer.training:
        return type(layer).forward(layer, x)
    counts = torch.zeros(ranks.count, dtype=torch.long)
    counts[ranks.rank] = len(x)
    counts = ranks.sum(counts).tolist()
    # Zeros stand where the other ranks' rows belong: the sum over the ranks is all rows.
    before = x.new_zeros(sum(counts[: ranks.rank]), *x.shape[1:])
    after = x.new_zeros(sum(counts[ranks.rank + 1 :]), *x.shape[1:])
    whole = AllSum.apply(torch.cat([before, x, after]))
    return type(layer).forward(layer, whole)[len(before) : len(before) + len(x)]


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
    if count > 1:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=2))  # so long may one load data, and the others wait
    return Ranks(device, rank, count)


# ---------------------------------------------------------------------------------------------------------- the loop

# A killed run loses what came after its last checkpoint. Checkpoints take this share of the time, but one is made every
# ten minutes, however slow the disk is.
SAVING = 0.02


@dataclasses.dataclass
class Batch:
    """Which pictures a step takes, those of all ranks together."""

    epoch: int
    step: int  #                   in its epoch
    indices: torch.Tensor  #       (B,), of the pictures in the training set
    first: int  #                  how many pictures the stage has seen before
    generator: torch.Generator  #  of this step's random numbers, the same ones on every rank


class Run:
    """One training: a folder, a data set, a preset, and the processes that share the work.

    All random numbers are drawn for the global batch by a generator that follows from (seed, stage, epoch, step), and
    each rank takes its own rows: the result does not depend on the number of ranks, and resuming needs no generator's
    state.

    Args:
        folder: holds one training only, by its config.json: preset, seed, hashes of the training set and of the given
            network, and `settings`, which are any other plain values that the result depends on.
        given_network: the one that is trained, or that the purifier goes around; None: all weights follow from seed.
        micro_batch: pictures attacked or looked into at a time, to save memory; None: all that a rank has.
    Raises ValueError where the folder holds another training, or where the ranks differ in any of this.
    """

    def __init__(
        self, folder, data: datasets.Dataset, p: Preset, given_network: nn.Module | None, ranks: Ranks, seed: int = 0,
        micro_batch: int | None = None, **settings,
    ):  # fmt: skip
        self.folder = Path(folder)
        self.data = data
        self.p = p
        self.ranks = ranks
        self.seed = seed
        self.micro_batch = micro_batch
        self.last_line = time.monotonic()

        self.fingerprint = datasets.fingerprint(data.train_images, data.train_labels, data.classes)
        weights = None if given_network is None else hash_weights(given_network)
        self.config = {"data": self.fingerprint, "weights": weights, "seed": seed}
        self.config |= settings | dataclasses.asdict(p)
        ranks.check_alike(self.config | {"micro_batch": micro_batch})
        ranks.run_where(ranks.is_first, self.claim_folder)

        self.images = data.train_images.to(ranks.device)
        self.labels = data.train_labels.to(ranks.device)

    def claim_folder(self) -> None:
        """Raises ValueError where the folder holds another training."""
        datasets.check_config(self.folder / "config.json", self.config, "folder (--name)")
        needless = [*self.folder.glob(".*.part")]  # of a run that was killed while it wrote
        if (self.folder / "carso.pt").is_file():
            needless += self.folder.glob("*.resume.pt")  # of one that was killed at its very end
        for path in needless:
            path.unlink()

    def is_complete(self) -> bool:
        """True if rank 0 finds the result of this run: folders need not be shared."""
        path = self.folder / "carso.pt"
        if not self.ranks.gather(path.is_file())[0]:
            return False
        self.say(f"{path} is complete: choose another --name for another training")
        return True

    def say(self, text: str, after: float = 0) -> None:
        """Print it, unless something was said in the last `after` seconds."""
        now = time.monotonic()
        if now - self.last_line < after:
            return
        self.last_line = now
        if self.ranks.is_first:
            print(text, flush=True)  # at once, also into a file

    def make_generator(self, stage: str, epoch: int, step: int) -> torch.Generator:
        """The random numbers of one step, the same on every rank, for whole global batches."""
        key = f"{self.seed} {stage} {epoch} {step}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little")
        return torch.Generator(self.ranks.device).manual_seed(seed)

    def draw(self, distribution, batch: Batch, *shape: int) -> torch.Tensor:
        """Random numbers for this rank's part of a batch, (b, *shape). distribution: torch.rand or torch.randn."""
        sizes = (len(batch.indices), *shape)
        return self.ranks.share(distribution(sizes, generator=batch.generator, device=self.ranks.device))

    def load_pictures(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of a batch: x (b, C, H, W) in [0, 1], y (b,)."""
        rows = self.ranks.share(batch.indices).to(self.ranks.device)
        return datasets.pixels(self.images[rows]), self.labels[rows]

    def draw_noise(self, batch: Batch) -> torch.Tensor:
        """PGD's random start for this rank's part of a batch, uniform in [-1, 1], (b, C, H, W)."""
        return 2 * self.draw(torch.rand, batch, *self.images.shape[1:]) - 1

    def augment(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """This rank's part of a batch, x (b, C, H, W), cropped and mirrored where the preset says so."""
        if not self.p.augment:
            return x
        return datasets.augment(x, self.draw(torch.rand, batch, 3), self.p.mirror)

    def count_steps(self, batch_size: int) -> int:
        """Batches an epoch."""
        return math.ceil(len(self.labels) / batch_size)

    def autocast(self):
        """Inside, networks compute in bfloat16 where the preset asks for it."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.p.bf16)


class Stage:
    """One stage of a run: its batches, the sums that become its log, its checkpoints. A stage is trained by

        for epoch in stage.epochs():
            for batch in stage.batches(epoch):
                ...
                stage.add(batch, sums)

    and begins where a saved run stopped.

    Args:
        parts: name -> anything with a state_dict; saved and restored together.
        columns: names of the sums. Their means over all pictures of an epoch become a row of log-NAME.tsv.
    """

    def __init__(self, run: Run, name: str, epoch_count: int, batch_size: int, parts: dict, columns: tuple[str, ...]):
        self.run = run
        self.name = name
        self.epoch_count = epoch_count
        self.batch_size = batch_size
        self.parts = parts
        self.columns = columns
        self.pictures = len(run.labels)
        self.path = run.folder / f"{name}.resume.pt"
        self.next_save = time.monotonic()  # the first step tries a checkpoint, and learns how long one takes

        saved = run.ranks.load(self.path)
        nothing = {"epoch": 0, "step": 0, "rows": [], "sums": torch.zeros(len(columns)).double(), "parts": {}}
        state = saved or nothing
        self.epoch, self.step = state["epoch"], state["step"]  # the next one
        self.rows = state["rows"]  # of past epochs
        self.sums = state["sums"]  # over all ranks, since this epoch began
        for part, content in state["parts"].items():
            if isinstance(parts[part], nn.Module):
                load_weights(parts[part], content, self.path)  # refuses those of another network
            else:
                parts[part].load_state_dict(content)

        going_on = f", going on at epoch {self.epoch}, step {self.step}" if saved else ""
        run.say(f"{name}: {epoch_count} epochs of {self.pictures} pictures in batches of {batch_size}{going_on}")
        run.say("  ".join(f"{title:>10}" for title in ["epoch", *columns, "pictures/s", "left"]))

    def epochs(self):
        """The epochs that are left. After each, its row is added to the log; after the last one the parts are saved."""
        for epoch in range(self.epoch, self.epoch_count):
            yield epoch
            self.write_row()
            self.epoch, self.step = epoch + 1, 0
        self.save()

    def batches(self, epoch: int):
        """The epoch's batches that are left."""
        order = datasets.batches(self.pictures, self.batch_size, self.run.seed, epoch)
        # seen: pictures of finished steps. first: pictures handed out, which run ahead where several batches are
        # attacked at once.
        self.seen = epoch * self.pictures + sum(len(indices) for indices in order[: self.step])
        self.began, self.began_at = time.monotonic(), self.seen  # to measure the speed
        first = self.seen
        for step in range(self.step, len(order)):
            generator = self.run.make_generator(self.name, epoch, step)
            yield Batch(epoch, step, order[step], first, generator)
            first += len(order[step])

    def add(self, batch: Batch, sums: torch.Tensor) -> None:
        """Count a finished step; sums: (columns,), over this rank's pictures. Saves when it is time.

        Raises ValueError where a sum or, to be saved, a weight is not finite."""
        run = self.run
        self.sums += run.ranks.sum(sums.detach().double()).cpu()
        self.check_finite(f"epoch {batch.epoch}, step {batch.step}: the loss", self.sums)
        self.epoch, self.step = batch.epoch, batch.step + 1
        self.seen = batch.first + len(batch.indices)

        _, left = self.measure_speed()
        steps = run.count_steps(self.batch_size)
        run.say(f"{self.name}: epoch {self.epoch}, batch {self.step} of {steps}, {left} left", after=60)
        if time.monotonic() >= self.next_save:
            self.save()

    def check_finite(self, what: str, *tensors: torch.Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            advice = "choose a lower learning rate, and another --name"
            self.run.ranks.refuse(f"{self.name}: {what} is not finite: {advice}")

    def measure_speed(self) -> tuple[str, str]:
        """Pictures a second since the epoch began here, and the time that is left."""
        speed = (self.seen - self.began_at) / max(time.monotonic() - self.began, 1e-9)
        pictures_left = self.epoch_count * self.pictures - self.seen
        left = timedelta(seconds=int(pictures_left / speed)) if speed > 0 else ""
        return f"{speed:.0f}", str(left)

    def save(self) -> None:
        """On rank 0, whose weights are those of all."""
        if not self.run.ranks.is_first:
            return
        began = time.monotonic()
        networks = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        self.check_finite("a weight", *[tensor for network in networks for tensor in network.state_dict().values()])
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        content = {"parts": parts, "epoch": self.epoch, "step": self.step, "rows": self.rows, "sums": self.sums}
        save_tensors(self.path, content)
        now = time.monotonic()
        self.next_save = now + min((now - began) / SAVING, 600)

    def write_row(self) -> None:
        """The log is rewritten whole from the rows so far, so that a resumed run never repeats or loses one."""
        means = (self.sums / self.pictures).tolist()
        self.sums = torch.zeros_like(self.sums)
        self.rows.append([self.epoch, *means])
        shown = [f"{self.epoch}", *(f"{mean:.5g}" for mean in means), *self.measure_speed()]
        self.run.say("  ".join(f"{text:>10}" for text in shown))
        if self.run.ranks.is_first:
            lines = ["\t".join(["epoch", *self.columns])]
            lines += ["\t".join(f"{value:.8g}" for value in row) for row in self.rows]
            datasets.write_text(self.run.folder / f"log-{self.name}.tsv", "\n".join(lines) + "\n")


def split_rows(pictures: int, size: int | None) -> list[slice]:
    """So many pictures in pieces of a size; None: in one."""
    size = size or pictures
    return [slice(begin, begin + size) for begin in range(0, pictures, size)]


# ---------------------------------------------------------------------------------------- stage one: the classifier


def train_classifier(run: Run, classifier: WideResNet) -> None:
    """PGD adversarial training (Madry et al. 2018), or plain training where the attack has no steps. The classifier
    gets an average of the weights, and is in eval mode."""
    ranks, p = run.ranks, run.p
    trained = copy.deepcopy(classifier).requires_grad_(True)
    for layer in find_batchnorms(trained):
        layer.momentum = p.classifier_bn_momentum
    decay = p.classifier_weight_decay
    optimizer = torch.optim.SGD(trained.parameters(), momentum=0.9, nesterov=True, weight_decay=decay)
    network = ranks.wrap(trained)
    steps = run.count_steps(p.classifier_batch_size)
    # An exponential average of weights and BatchNorm's statistics that reaches back about an epoch is the result.
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps), use_buffers=True)

    parts = {"network": trained, "average": average, "optimizer": optimizer}
    stage = Stage(run, "classifier", p.classifier_epochs, p.classifier_batch_size, parts, ("loss", "right"))
    for epoch in stage.epochs():
        for batch in stage.batches(epoch):
            passed = epoch + batch.step / steps  # epochs
            # One cycle: from a tenth of the peak up to it in 30 % of the training, then down to 0.
            cycle = np.interp(passed, [0, 0.3 * p.classifier_epochs, p.classifier_epochs], [0.1, 1, 0])
            optimizer.param_groups[0]["lr"] = float(cycle * p.classifier_learning_rate)
            growth = (passed + 0.5) / p.classifier_ramp if p.classifier_ramp > 0 else 1.0
            eps = p.eps * min(1.0, growth)  # from that of half an epoch on: a radius of 0 would be no attack

            x, y = run.load_pictures(batch)
            noise = run.draw_noise(batch)
            x = run.augment(x, batch)
            if p.classifier_attack_steps > 0:
                trained.eval().requires_grad_(False)
                step_size = 2.5 * eps / p.classifier_attack_steps  # the steps could cross the ball (Madry et al.)
                with run.autocast():
                    x = torch.cat([
                        pgd(trained, x[rows], y[rows], eps, p.classifier_attack_steps, step_size, noise=noise[rows])
                        for rows in split_rows(len(x), run.micro_batch)
                    ])  # fmt: skip

            network.train().requires_grad_(True)
            with run.autocast():
                logits = network(x).float()
            loss = F.cross_entropy(logits, y, reduction="sum")
            optimizer.zero_grad()
            (loss * ranks.count / len(batch.indices)).backward()  # DDP averages over ranks: the global batch's mean
            optimizer.step()
            average.update_parameters(trained)
            stage.add(batch, torch.stack([loss.detach(), (logits.argmax(1) == y).sum()]))
    classifier.load_state_dict(average.module.state_dict())
    classifier.eval()


def make_classifier(run: Run, classifier: WideResNet) -> None:
    """Stage one: train the classifier, keep it as classifier.pt, measure it; or take what this run made before."""
    path = run.folder / "classifier.pt"
    kept = run.ranks.load(path)
    if kept is not None:
        # It has mean and std for other readers; this classifier knows its own.
        weights = {name: tensor for name, tensor in kept.get("state_dict", {}).items() if name not in ("mean", "std")}
        load_weights(classifier, weights, path)
        return
    train_classifier(run, classifier)
    if run.ranks.is_first:
        normalisation = {"mean": classifier.mean.flatten(), "std": classifier.std.flatten()}
        weights = classifier.state_dict() | normalisation
        save_tensors(path, {"state_dict": weights, "fingerprint": run.fingerprint})
        (run.folder / "classifier.resume.pt").unlink(missing_ok=True)
    torch.manual_seed(0)  # for PGD's random starts
    images, labels = run.data.test_images[:500], run.data.test_labels[:500]
    attack = partial(pgd, eps=run.p.eps, steps=20, step_size=run.p.eps / 4)
    clean = measure_accuracy(classifier, images, labels)
    robust = measure_accuracy(classifier, images, labels, attack, batch_size=50)  # to need little memory
    run.say(f"classifier: clean {clean:.1%}, PGD-20 {robust:.1%} on {len(labels)} test pictures")


# ------------------------------------------------------------------------------------------- stage two: the purifier


def attack_batches(run: Run, classifier: nn.Module, batches):
    """Yield each batch with this rank's pictures of it (b, C, H, W), a share of which is attacked (section 4.4).

    Several batches are attacked in one call; the pictures are the same, up to rounding."""
    p, ranks = run.p, run.ranks
    group_size = choose_group_size(run)
    piece = run.micro_batch
    if piece is not None:  # memory goes to the attacked pictures: a piece has so many of these
        piece = math.ceil(piece / max(p.fraction, 0.01))
    batches = iter(batches)
    while group := list(itertools.islice(batches, group_size)):
        pictures, labels = zip(*[run.load_pictures(batch) for batch in group])
        x, y = torch.cat(pictures), torch.cat(labels)
        noise = torch.cat([run.draw_noise(batch) for batch in group])
        kinds = [balanced_kinds(batch.first, len(batch.indices), p.fraction) for batch in group]
        kinds = torch.cat([ranks.share(of_batch) for of_batch in kinds])
        with run.autocast():
            attacked = torch.cat([
                adversarially_balanced_batch(
                    classifier, x[rows], y[rows], p.eps, p.fraction, p.attack_steps, p.attack_step_size,
                    noise=noise[rows], kinds=kinds[rows],  # which say more than the fraction: these are several batches
                )
                for rows in split_rows(len(x), piece)
            ])  # fmt: skip
        sizes = [len(x) for x in pictures]
        yield from zip(group, attacked.split(sizes))


def choose_group_size(run: Run) -> int:
    """Batches that `attack_batches` attacks in one call: on a GPU, most of which a small call leaves idle, as many as
    have 640 pictures for PGD, but at most 16."""
    if run.ranks.device.type != "cuda":
        return 1
    attacked = max(run.p.fraction, 0.01) * run.p.batch_size / run.ranks.count  # of a rank's batch
    for_pgd = attacked / 2  # FGSM gets the others
    return min(max(round(640 / for_pgd), 1), 16)


@torch.no_grad()
def record_piecewise(classifier: nn.Module, layers: list[str], x: torch.Tensor, micro_batch) -> list[torch.Tensor]:
    """The representation of x, `micro_batch` pictures at a time: the classifier's other tensors need less memory. The
    pieces are written into the whole one by one, which would be held twice if they were joined at the end."""
    if micro_batch is None or micro_batch >= len(x):
        return record(classifier, layers, x)[1]
    whole = []
    for rows in split_rows(len(x), micro_batch):
        _, pieces = record(classifier, layers, x[rows])
        if not whole:
            how = dict(device=x.device, memory_format=torch.channels_last)
            whole = [torch.empty((len(x), *piece.shape[1:]), dtype=piece.dtype, **how) for piece in pieces]
        for layer, piece in zip(whole, pieces):
            layer[rows] = piece
    return whole


def train_purifier(run: Run, carso: CARSO, perturb=attack_batches) -> None:
    """The paper's recipe (sections 4.4 and 5.1): adversarially-balanced batches, summed BCE and KL, RAdam in Lookahead.

    perturb: a generator like `attack_batches`, which makes the pictures of an epoch's batches."""
    ranks, p, purifier = run.ranks, run.p, carso.purifier
    network = ranks.wrap(purifier)
    purifier.recompute = run.micro_batch is not None  # to save memory, too
    lookahead = build_optimizer(purifier, p)
    steps = run.count_steps(p.batch_size)

    parts = {"purifier": purifier, "lookahead": lookahead}
    stage = Stage(run, "purifier", p.epochs, p.batch_size, parts, ("loss", "bce", "kld"))
    carso.train()  # but for its classifier, which stays frozen and in eval mode
    for epoch in stage.epochs():
        batches = stage.batches(epoch)
        for batch, perturbed in perturb(run, carso.classifier, batches):
            passed = schedule_epoch(epoch, batch.step, steps, p)
            lookahead.optimizer.param_groups[0]["lr"] = learning_rate(passed, p)
            loss, bce, kld = compute_losses(run, carso, network, batch, perturbed, kl_weight(passed, p))
            lookahead.optimizer.zero_grad()
            (loss * ranks.count).backward()  # DDP averages over ranks: this is the global batch's sum
            lookahead.step()
            stage.add(batch, torch.stack([loss, bce, kld]))
        draw_reconstructions(run, carso, epoch)
    # BatchNorm's statistics are those of the fast weights. As the rate ends near 0, the slow ones are so near to these
    # that one more epoch for statistics of their own changed nothing (RESULTS.md).
    lookahead.finish()
    carso.eval()


def compute_losses(run: Run, carso: CARSO, network: nn.Module, batch: Batch, perturbed: torch.Tensor, beta: float):
    """`vae_loss` of this rank's part of a batch, perturbed (b, C, H, W). network: the purifier, wrapped by `Ranks`."""
    clean, _ = run.load_pictures(batch)
    # The second draw from the step's generator: `draw_noise` in `attack_batches` was the first.
    normal = run.draw(torch.randn, batch, carso.purifier.config["latent_dim"])
    with run.autocast():
        representation = record_piecewise(carso.classifier, carso.layers, perturbed, run.micro_batch)
        outputs = network(perturbed, representation, normal)
    reconstruction, mu, logvar = (output.float() for output in outputs)
    return vae_loss(reconstruction, clean, mu, logvar, beta)


def draw_reconstructions(run: Run, carso: CARSO, epoch: int) -> None:
    """reconstructions.png, every fifth epoch and the last: clean | attacked (PGD eps on the classifier) | six
    reconstructions, by Lookahead's fast weights; a row a test picture."""
    p, device = run.p, run.ranks.device
    if not run.ranks.is_first or (epoch % 5 != 4 and epoch != p.epochs - 1):
        return
    carso.eval()
    x, y = datasets.pixels(run.data.test_images[:8].to(device)), run.data.test_labels[:8].to(device)
    attacked = pgd(carso.classifier, x, y, p.eps, p.attack_steps, p.attack_step_size, noise=torch.zeros_like(x))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((len(x), 6, carso.purifier.config["latent_dim"]), generator=generator).to(device)
    with torch.no_grad():
        tiles = torch.cat([x[:, None], attacked[:, None], carso.purify(attacked, z)], dim=1)
    headings = ["clean", "attacked", *["reconstruction"] * 6]
    datasets.save_pictures(run.folder / "reconstructions.png", tiles, headings)
    carso.train()


def finish(run: Run, carso: CARSO, script: str = "evaluate.py", **state) -> None:
    """Keep the whole defence as carso.pt, with `state`, measure it, and remove what only resuming needed."""
    if not run.ranks.is_first:
        return
    path = run.folder / "carso.pt"
    state |= {"config": run.config, "classes": run.data.classes, "fingerprint": run.fingerprint}
    save_carso(path, carso, **state)
    for resumable in run.folder.glob("*.resume.pt"):
        resumable.unlink()

    images, labels = run.data.test_images[:500], run.data.test_labels[:500]
    clean = measure_accuracy(carso, images, labels, batch_size=10)  # each becomes S
    bare = measure_accuracy(carso.classifier, images, labels)
    run.say(f"CARSO: clean {clean:.1%}, its classifier alone {bare:.1%}, on {len(labels)} test pictures")
    reduced = [] if run.data.name in PRESETS else ["--budget", "reduced"]  # the paper's would take hours
    run.say(f"now: python {shlex.join([*script.split(), '--ckpt', str(path), *reduced])}")
    if clean < bare - 0.1:
        run.say("CARSO is far below its classifier on clean pictures: train longer (--epochs), under another --name")


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    path = os.path.expanduser  # the shell leaves ~ alone behind an equals sign
    add("--dataset", type=path, default="digits", help=f"{', '.join(datasets.NAMES)}, or a path, see data.py "
        "(default: digits)")  # fmt: skip
    add("--data-dir", type=path, default="data", help="where downloads and caches go (default: data)")
    add("--stage", choices=["all", "classifier"], default="all", help="classifier: end after stage one (default: all)")
    add("--preset", choices=PRESETS, help="default: the data set's own, cifar10's for a path")
    add("--name", type=path, help="folder under runs/ (default: the data set's name)")
    add("--classifier", type=path, help="'train'; 'published' (the paper's), or another's name in models.py: "
        "downloaded; or a file of weights (default: published where there is one, else train)")  # fmt: skip
    add("--tap", nargs="+", default=["*"], metavar="LAYER", help="layers of the classifier that the purifier sees: "
        "names, as init_conv, or patterns, as 'layer.2.*', the last group (default: the paper's, table 5)")  # fmt: skip
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--micro-batch", type=int, help="to save memory: attacks and representations so many pictures at a time, the "
        "purifier's activations computed twice; the same result (default: all at once)")  # fmt: skip
    group = parser.add_argument_group("preset", "every number can be overridden; in brackets the presets' own")
    for field in dataclasses.fields(Preset):
        number = parse_number if field.type is float else int
        kind = {"type": number, "metavar": field.type.__name__}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        option = "--" + field.name.replace("_", "-")
        defaults = ", ".join(f"{name} {getattr(preset, field.name):g}" for name, preset in PRESETS.items())
        group.add_argument(option, help=f"{field.metadata['meaning']} ({defaults})", **kind)
    args = parser.parse_args(argv)
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError(f"--micro-batch {args.micro_batch} is not 1 or more")
    if args.stage == "classifier" and args.classifier:
        raise ValueError("--stage classifier trains a classifier: leave out --classifier")
    return args


def name_folder(dataset: str, name: str | None, suffix: str = "") -> Path:
    """runs/NAME, or the data set's name and the suffix."""
    return Path("runs") / (name or Path(os.path.abspath(dataset)).stem + suffix)


def load_inputs(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Dataset, WideResNet | None]:
    """The data set, and the classifier that the options name; None where they ask to train one."""
    data = datasets.load(args.dataset, args.data_dir)
    name = args.classifier
    if name is None and args.stage == "all" and data.name in PUBLISHED:
        usual = PRESETS[args.preset or data.name]
        size = (args.depth or usual.depth, args.width or usual.width)
        name = "published" if size == (28, 10) else None
    if name is None or name == "train":
        return data, None
    if Path(name).is_file():
        return data, load_classifier(name, len(data.classes), data.mean, data.std).to(device)
    return data, fetch_classifier(data, name, args.data_dir, device)


def plan_training(args, data: datasets.Dataset, classifier: WideResNet | None, ranks: Ranks) -> Preset:
    """The preset with the command line's numbers, the given classifier's size, and batches that fit the data.
    Raises ValueError for numbers that make no sense."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Preset)}
    given = {name: number for name, number in given.items() if number is not None}
    if classifier is not None:
        for name in ("depth", "width"):
            size = classifier.config[name]
            if given.setdefault(name, size) != size:
                raise ValueError(f"--{name} {given[name]} is not that of --classifier, {size}: leave it out")

    is_known = data.name in PRESETS
    chosen = choose_preset(args.preset or (data.name if is_known else "cifar10"), given)
    p = fit_batches(chosen, len(data.train_labels), given, ranks.count)
    if ranks.is_first and not args.preset and not is_known:
        print("the preset is cifar10's: a network for a GPU; --preset digits has a small one")
    if ranks.is_first and p != chosen:
        fitted = [name for name in ("classifier_batch_size", "batch_size") if getattr(p, name) != getattr(chosen, name)]
        sizes = " and ".join(f"--{name.replace('_', '-')} {getattr(p, name)}" for name in fitted)
        print(f"{sizes}, for ten batches an epoch of {len(data.train_labels)} pictures; "
              "learning rates that were not given fall, too")  # fmt: skip
    return p


def find_layers(classifier: WideResNet, patterns: list[str]) -> list[str]:
    """Those of the paper's layers (table 5) that a pattern matches, and the layers that are named otherwise."""
    known = representation_layers(classifier.config["depth"])
    layers = [layer for pattern in patterns for layer in fnmatch.filter(known, pattern) or [pattern]]
    return list(dict.fromkeys(layers))  # each of them once


def main(argv=None, perturb=attack_batches, **settings) -> int:
    """The exit status. perturb: see `train_purifier`; settings: of it, for config.json."""
    args = parse_arguments(argv)
    ranks = start_ranks(start_device(args.device))
    data, given_classifier = ranks.take_turns(partial(load_inputs, args, ranks.device))
    p = plan_training(args, data, given_classifier, ranks)

    torch.manual_seed(args.seed)
    shape = tuple(data.train_images.shape[1:])
    classifier = given_classifier
    if given_classifier is None:
        classifier = WideResNet(len(data.classes), p.depth, p.width, shape[0], data.mean, data.std).to(ranks.device)
    carso = None
    if args.stage == "all":  # already now: a defence that cannot be built is refused before the training
        layers = find_layers(classifier, args.tap)
        torch.manual_seed(args.seed)  # again: the purifier is the same whether or not a classifier was drawn
        carso = build_carso(classifier, layers, shape, p.samples, p.condition_dim, p.latent_dim, p.decoder_width)

    folder = name_folder(args.dataset, args.name)
    ranks.check_alike({"stage": args.stage})  # not in config.json: stage two may follow in the same folder
    run = Run(folder, data, p, given_classifier, ranks, args.seed, args.micro_batch, tap=args.tap, **settings)
    if run.is_complete():
        return 0
    run.say(f"{data.name}: {len(data.train_labels)} training pictures {shape}, "
            f"{len(data.classes)} classes; {ranks.count} process(es) on {ranks.device.type}")  # fmt: skip
    for note in data.notes:
        run.say(note)

    if given_classifier is None:
        make_classifier(run, classifier)
    if args.stage == "classifier":
        path = str(folder / "classifier.pt")
        hint = ["evaluate.py", "--ckpt", path, "--dataset", args.dataset, "--eps", format_eps(p.eps)]
        run.say(f"now: python {shlex.join(hint)}")
        return 0
    train_purifier(run, carso.to(ranks.device), perturb)
    finish(run, carso, dataset=args.dataset, data_dir=args.data_dir)
    return 0


if __name__ == "__main__":
    run_script("train.py", main)
