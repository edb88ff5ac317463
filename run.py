"""Running a training: many processes that act as one, and a loop that logs, saves, and goes on where it stopped.

Nothing here depends on the number of ranks, up to the order of summation: batches are cut from one global order, all
random numbers are drawn for the global batch by a generator that follows from (seed, stage, epoch, step), and each rank
takes its own rows. That is also why resuming needs no generator's state.
"""

import contextlib
import hashlib
import os
import signal
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as datasets
from purifier import write_atomically

# ------------------------------------------------------------------------------ many processes that act as one


@dataclass
class Ranks:
    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's rows of something that spans the global batch."""
        return batch.tensor_split(self.count)[self.rank]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def one_by_one(self):
        """One process of each node goes first (it downloads and caches), then the others."""
        if self.count > 1 and int(os.environ["LOCAL_RANK"]) > 0:
            dist.barrier()
        yield
        if self.count > 1 and int(os.environ["LOCAL_RANK"]) == 0:
            dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the ranks, and BatchNorm over the global batch."""
        if self.count == 1:
            return module
        if self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            return DistributedDataParallel(module, device_ids=[self.device.index], broadcast_buffers=False)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.forward = partial(global_batch_norm, layer)  # SyncBatchNorm is for GPUs only
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in older versions
            return DistributedDataParallel(module, broadcast_buffers=False)


def global_batch_norm(layer: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """What SyncBatchNorm does, in plain collectives that also run on CPUs: statistics over the pictures of all
    ranks."""
    if not layer.training:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast x is bfloat16
    local_count = x.new_full((1,), x.numel() / x.shape[1])
    sums = AllSum.apply(torch.cat([x.sum(dims), local_count]))
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


def start_ranks(device: str | None) -> Ranks:
    """Read torchrun's environment; a plain `python train.py` is the only rank."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A restart by torchrun (--max-restarts) must not read the addresses that the dead processes left in the store.
    e = os.environ
    agent = e.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        e["MASTER_ADDR"], int(e["MASTER_PORT"]), int(e["WORLD_SIZE"]), is_master=not agent and e["RANK"] == "0"
    )
    store = dist.PrefixStore(f"attempt {e.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=int(e["RANK"]), world_size=int(e["WORLD_SIZE"]))
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), own)


# ------------------------------------------------------------------------------------- the loop both stages share


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; the step was finished and saved."""


class Run:
    """One folder, one configuration, one set of ranks: stepping, saving, resuming, logging."""

    def __init__(self, folder: Path, config: dict, ranks: Ranks, save_every: float):
        self.folder, self.config, self.ranks, self.save_every = folder, config, ranks, save_every
        self.last_save, self.stopping = time.monotonic(), False

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

    def say(self, text: str) -> None:
        if self.ranks.first:
            tqdm.write(text)

    def generator(self, stage: str, epoch: int, step: int) -> torch.Generator:
        """The random numbers of one step, the same on every rank, for whole global batches."""
        key = f"{self.config['seed']} {stage} {epoch} {step}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little")
        return torch.Generator(self.ranks.device).manual_seed(seed)

    def train(self, stage: str, epochs: int, count: int, batch_size: int, parts: dict, columns, step, after_epoch=None):
        """Call step(epoch, number, indices, first) for every batch of every epoch, from where a saved run stopped.

        parts: name -> anything with a state_dict; saved and restored together.
        step: trains on the global batch `indices` (of which it takes its rank's rows), whose first picture is number
            `first` since the start, and returns the sums over its rows of what `columns` names.
        Every epoch's means over all pictures become a row of log.tsv.
        """
        path = self.folder / f"{stage}.resume.pt"
        epoch_now, step_now, rows, sums = 0, 0, [], torch.zeros(len(columns), dtype=torch.float64)
        if path.is_file():
            saved = torch.load(path, map_location=self.ranks.device, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            epoch_now, step_now, rows, sums = saved["epoch"], saved["step"], saved["rows"], saved["sums"].cpu()
            self.say(f"{stage}: going on at epoch {epoch_now}, step {step_now}")

        def save(epoch, step):
            self.last_save = time.monotonic()
            if self.ranks.first:
                state = {name: part.state_dict() for name, part in parts.items()}
                content = {"parts": state, "epoch": epoch, "step": step, "rows": rows, "sums": sums}
                write_atomically(path, lambda temporary: torch.save(content, temporary))

        if epoch_now == 0 and step_now == 0:
            self.say(f"{stage}: {epochs} epochs of {count} pictures in batches of {batch_size}")
        header = ["epoch", *columns, "pictures/s", "left"]
        self.say("  ".join(f"{name:>10}" for name in header))
        started, steps_done = time.monotonic(), 0
        for epoch in range(epoch_now, epochs):
            order = datasets.batches(count, batch_size, self.config["seed"], epoch)
            quiet = None if self.ranks.first else True
            bar = tqdm(range(step_now, len(order)), f"{stage} {epoch}", leave=False, disable=quiet)
            epoch_started, pictures = time.monotonic(), 0
            for number in bar:
                first = epoch * count + sum(len(indices) for indices in order[:number])
                values = step(epoch, number, order[number], first)
                values = torch.cat([values.double(), values.new_tensor([float(self.stopping)]).double()])
                values = self.ranks.sum(values).cpu()
                sums += values[:-1]
                pictures, steps_done = pictures + len(order[number]), steps_done + 1
                if values[-1] > 0:
                    save(epoch, number + 1)
                    raise Stopped(f"{stage} epoch {epoch}, step {number + 1}")
                if time.monotonic() - self.last_save > self.save_every:
                    save(epoch, number + 1)
            left = (time.monotonic() - started) / max(steps_done, 1) * len(order) * (epochs - 1 - epoch)
            speed = pictures / max(time.monotonic() - epoch_started, 1e-9)
            rows.append([epoch, *(sums / count).tolist()])
            shown = [f"{epoch}", *(f"{value:.5g}" for value in rows[-1][1:]), f"{speed:.0f}", clock(left)]
            self.say("  ".join(f"{text:>10}" for text in shown))
            sums, step_now = torch.zeros_like(sums), 0
            self._log(stage, columns, rows)
            if after_epoch:
                after_epoch(epoch)
        save(epochs, 0)

    def _log(self, stage: str, columns, rows) -> None:
        """Rewritten whole from the rows so far, so that a resumed run never repeats or loses one."""
        if self.ranks.first:
            lines = ["\t".join(["epoch", *columns])]
            lines += ["\t".join(f"{value:.8g}" for value in row) for row in rows]
            name = "log.tsv" if stage == "purifier" else f"log-{stage}.tsv"
            write_atomically(self.folder / name, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
