"""The perturbed part of a batch (paper, section 4.4): attacked anew for every batch, as in the paper.

`anew` returns a function perturb(clean, y, indices, epoch, first, generator), which gives this rank's pictures of a
global batch (b, C, H, W), in [0, 1], a part of them perturbed. indices: the whole batch's places in the training set;
first: its first picture's number since the start of training; generator: for the whole batch.
"""

import torch
from torch import nn

from attacks import adversarially_balanced_batch
from lab.presets import Preset
from lab.run import Run
from models import record


def anew(run: Run, classifier: nn.Module, p: Preset, limit: int | None):
    """The classifier is attacked for every batch, at most `limit` pictures at a time."""

    def perturb(clean, y, indices, epoch, first, generator):
        first += int(run.ranks.share(torch.arange(len(indices)))[0])
        start = run.uniform(clean, indices, generator)
        whole = torch.empty_like(clean)
        for part in torch.arange(len(clean)).split(limit or len(clean)):
            whole[part] = attacked(classifier, clean[part], y[part], p, p.fraction, first + int(part[0]), start[part])
        return whole

    return perturb


def attacked(classifier, x, y, p: Preset, fraction: float, first: int, start: torch.Tensor) -> torch.Tensor:
    """`adversarially_balanced_batch` with the preset's attack; start: PGD's, uniform in [-1, 1]."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=p.bf16):
        return adversarially_balanced_batch(
            classifier, x, y, p.eps, fraction, p.attack_steps, p.attack_step_size, first=first, noise=start
        )


@torch.no_grad()
def recorded(classifier: nn.Module, layers: list[str], x: torch.Tensor, limit: int | None) -> list[torch.Tensor]:
    """The representation of x, at most `limit` pictures at a time: the classifier's other tensors need less memory."""
    if limit is None or limit >= len(x):
        return record(classifier, layers, x)[1]
    whole = None
    for part in torch.arange(len(x)).split(limit):
        representation = record(classifier, layers, x[part])[1]
        whole = whole or [layer.new_empty((len(x), *layer.shape[1:])) for layer in representation]
        for full, layer in zip(whole, representation):
            full[part] = layer
    return whole
