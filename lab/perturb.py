"""The perturbed part of a batch (paper, section 4.4): attacked anew for every batch, as in the paper, or drawn from
versions of the training set that were attacked once (ours: the classifier never changes, nor do the pictures).

`perturbing` returns a function perturb(clean, y, indices, epoch, first, generator), which gives this rank's pictures
of a global batch (b, C, H, W), in [0, 1], a part of them perturbed. indices: the whole batch's places in the training
set; first: its first picture's number since the start of training; generator: for the whole batch.
"""

from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import data as datasets
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, project
from lab.files import write_atomically
from lab.presets import Preset
from lab.run import Run, Stopped
from lab.tensors import read_tensors
from models import record

CHUNK = 256  # pictures that are attacked, and kept in a file, together, whatever the number of processes


def perturbing(run: Run, data: datasets.Dataset, classifier: nn.Module, p: Preset, limit: int | None):
    """What the preset asks for; limit: pictures at a time, for memory."""
    return once(run, data, classifier, p, limit) if p.attack_versions else anew(run, classifier, p, limit)


def anew(run: Run, classifier: nn.Module, p: Preset, limit: int | None):
    """The classifier is attacked for every batch."""

    def perturb(clean, y, indices, epoch, first, generator):
        first += int(run.ranks.share(torch.arange(len(indices)))[0])
        start = run.uniform(clean, indices, generator)
        whole = torch.empty_like(clean)
        for part in torch.arange(len(clean)).split(limit or len(clean)):
            whole[part] = attacked(classifier, clean[part], y[part], p, p.fraction, first + int(part[0]), start[part])
        return whole

    return perturb


def once(run: Run, data: datasets.Dataset, classifier: nn.Module, p: Preset, limit: int | None):
    """The same share of each batch is perturbed, by kinds in the same turns, but the pictures are those of
    `attack_training_set`. A picture takes the version that has the kind whose turn it is; with fewer than four versions
    there is none for every turn, and the even split over the kinds holds over time. Beyond four, epochs take turns."""
    differences = attack_training_set(run, data, classifier, p, limit)
    share, versions = run.ranks.share, p.attack_versions

    def perturb(clean, y, indices, epoch, first, generator):
        kinds = share(balanced_kinds(first, len(indices), p.fraction))
        rows = (kinds >= 0).nonzero().squeeze(1)
        pictures = share(indices)[rows]
        version = (kinds[rows] - pictures + len(KINDS) * epoch) % versions
        change = differences[version, pictures].to(clean.device).to(clean.dtype)
        radius = p.eps * torch.where((pictures + version) % 2 == 0, 0.5, 1.0).to(clean)[:, None, None, None]
        rows = rows.to(clean.device)
        return clean.index_copy(0, rows, project(clean[rows] + change, clean[rows], radius))

    return perturb


def attack_training_set(run: Run, data: datasets.Dataset, classifier, p: Preset, limit: int | None) -> torch.Tensor:
    """Attacked minus clean pictures, float16, (versions, N, C, H, W). Version v has picture i attacked by kind (i + v)
    mod 4, so that four versions are every kind once; PGD's random starts follow from seed, version and picture.

    Each process makes its share of the chunks, and all get all. A chunk is a file, so that a killed run goes on."""
    ranks, count, versions = run.ranks, len(data.train_labels), p.attack_versions
    shape = (versions, count, *data.train_images.shape[1:])
    differences = torch.zeros(shape, dtype=torch.float16, device=ranks.room(2 * torch.Size(shape).numel()))
    chunks = [(version, part) for version in range(versions) for part in torch.arange(count).split(CHUNK)]
    run.say(f"attack: {versions} version(s) of {count} pictures")
    with run.stopping_gently():
        for version, part in tqdm(chunks[ranks.rank :: ranks.count], "attack", leave=False, disable=not ranks.first):
            path = run.folder / "attacked" / f"{version}-{int(part[0]):07}.pt"
            if path.is_file():
                kept = read_tensors(path).get("differences")
                if getattr(kept, "shape", None) != differences[version, part].shape or not kept.isfinite().all():
                    raise ValueError(f"{path} is damaged; delete it, and it is made again")
                differences[version, part] = kept.to(differences)
                continue
            x, y = datasets.pixels(data.train_images[part].to(ranks.device)), data.train_labels[part].to(ranks.device)
            generator = run.generator("attack", version, int(part[0]))
            start = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
            first = int(part[0]) + version  # the number that decides the kind
            for rows in torch.arange(len(x)).split(limit or len(x)):
                after = attacked(classifier, x[rows], y[rows], p, 1.0, first + int(rows[0]), start[rows])
                differences[version, part[rows]] = (after - x[rows]).to(differences)
            content = {"differences": differences[version, part].cpu()}
            write_atomically(path, partial(torch.save, content))
            if run.stopping:
                raise Stopped(f"attack, version {version}, picture {int(part[-1])}")
    for whole in differences:  # the other processes' places hold zeros
        whole.copy_(ranks.sum(whole.to(ranks.device)))
    return differences


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
