"""Many processes that act as one. Nothing depends on their number, up to the order of summation."""

import contextlib
import ctypes
import io
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lab.tensors import check_whole


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

    def agree(self, flag: bool) -> bool:
        """What the first process says."""
        return bool(self.sum(torch.tensor(float(flag and self.first), device=self.device)) > 0)

    def load(self, path: Path) -> dict | None:
        """A file of tensors as the first process finds it, on the CPU, or None where it finds none: so all stand at the
        same step, also where processes do not share a folder. ValueError if it is not whole."""
        content = path.read_bytes() if self.first and path.is_file() else b""
        if self.count > 1:
            size = self.sum(torch.tensor(len(content), device=self.device)).item()
            whole = torch.zeros(size, dtype=torch.uint8, device=self.device)
            if content:
                whole.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            dist.broadcast(whole, 0)
            content = whole.cpu().numpy().tobytes()
        if not content:
            return None
        try:
            check_whole(io.BytesIO(content))
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # torch raises anything on a file that it does not know
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged; delete it, and what it holds is made again")
        return found

    def room(self, size: int) -> torch.device:
        """This rank's device, if `size` bytes take less than a quarter of what is free there; else the CPU."""
        fits = self.device.type != "cuda" or 4 * size < torch.cuda.mem_get_info(self.device)[0]
        return self.device if fits else torch.device("cpu")

    @contextlib.contextmanager
    def one_by_one(self):
        """One process of each node goes first (it downloads and caches), then the others."""
        if self.count > 1 and int(os.environ["LOCAL_RANK"]) > 0:
            dist.barrier()
        try:
            yield
        except (ValueError, OSError):  # which the others will see for themselves
            self._let_go()
            raise
        self._let_go()

    def _let_go(self) -> None:
        if self.count > 1 and int(os.environ["LOCAL_RANK"]) == 0:
            dist.barrier()

    def wrap(self, module: nn.Module, trained: nn.Module | None = None) -> nn.Module:
        """The module with gradients averaged over the ranks, and BatchNorm over the global batch in the part of it that
        is trained (default: all)."""
        if self.count == 1:
            return module
        trained = module if trained is None else trained
        own = [self.device.index] if self.device.type == "cuda" else None
        if own:
            nn.SyncBatchNorm.convert_sync_batchnorm(trained)  # in place, but for a module that is itself a BatchNorm
        else:
            for layer in trained.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.forward = partial(global_batch_norm, layer)  # SyncBatchNorm is for GPUs only
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in older versions
            return DistributedDataParallel(
                module, device_ids=own, broadcast_buffers=False, gradient_as_bucket_view=True
            )


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
    if not os.environ.get("RANK"):  # as `launched` sees it
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
    own = torch.device(device, int(e["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    ranks = dict(rank=int(e["RANK"]), world_size=int(e["WORLD_SIZE"]))
    dist.init_process_group(backend, store=store, device_id=own if device == "cuda" else None, **ranks)
    return Ranks(dist.get_rank(), dist.get_world_size(), own)


def leave(status: int) -> NoReturn:
    """End the process with this status. One of several ends at once, without the interpreter's own clearing up:
    DistributedDataParallel never frees its process group, and a thread of it that is late by a moment aborted a
    process whose training was complete (exit status -6, seen once)."""
    if not dist.is_initialized():
        sys.exit(status)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the kernel after every layer: 1.4 times as fast on
    a CPU (measured; see RESULTS.md). Call it once at the start of a script; does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
