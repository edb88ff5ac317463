"""Adversarial training, ours: of the classifier alone, and of the purifier inside the whole defence (end to end).

Both are the same loop: attack the pictures against the network as it is, update it, and keep an average of its weights
as the result. The paper takes published classifiers, and leaves training end to end as future work.
"""

import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data as datasets
from aggregate import robust_logits
from attacks import pgd
from lab.checkpoints import load_published_classifier
from lab.files import write_atomically
from lab.foreign import check_answers
from lab.presets import Preset
from lab.published import check_reported, fetch_classifier, names_of
from lab.ranks import Ranks
from lab.run import Run, accuracy, drawing, unwrapped
from lab.tensors import load_state
from models import WideResNet, representation_layers
from purifier import CARSO, build_carso


def averaged(module: nn.Module, steps_an_epoch: int) -> AveragedModel:
    """An exponential average of the weights and of BatchNorm's statistics that reaches back about an epoch."""
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps_an_epoch), use_buffers=True)


def augmented(run: Run, x: torch.Tensor, indices, generator: torch.Generator, p: Preset) -> torch.Tensor:
    """This rank's pictures cropped and mirrored as the preset says, by numbers drawn for the global batch."""
    if not p.augment:
        return x
    draws = torch.rand((len(indices), 3), generator=generator, device=x.device)
    return datasets.augment(x, run.ranks.share(draws), p.mirror)


def piecewise(attack, x: torch.Tensor, limit: int | None) -> torch.Tensor:
    """attack(rows), a function of indices into x, at most `limit` pictures at a time."""
    return torch.cat([attack(rows) for rows in torch.arange(len(x), device=x.device).split(limit or len(x))])


# ---------------------------------------------------------------------------------------------------- the classifier


def train_classifier(run: Run, data: datasets.Dataset, p: Preset, start=None, limit=None) -> WideResNet:
    """PGD adversarial training (Madry et al. 2018), or plain training where the attack has no steps, with an averaged
    copy of the weights as the result; from fresh weights, or on from those of the WideResNet `start`. limit: pictures
    attacked at a time."""
    ranks, device = run.ranks, run.ranks.device
    torch.manual_seed(run.config["seed"])
    classifier = WideResNet(len(data.classes), p.depth, p.width, data.train_images.shape[1], data.mean, data.std)
    if start is not None:
        classifier.load_state_dict(start.state_dict())
    for layer in classifier.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = p.classifier_bn_momentum
    classifier.to(device)
    optimizer = torch.optim.SGD(
        classifier.parameters(), momentum=0.9, nesterov=True, weight_decay=p.classifier_weight_decay
    )
    network = ranks.wrap(classifier)
    count, size = len(data.train_labels), p.classifier_batch_size
    steps_an_epoch = len(datasets.batches(count, size, 0, 0))
    average = averaged(classifier, steps_an_epoch)

    def step(epoch, number, indices, first):
        at = epoch + number / steps_an_epoch
        lr = (
            np.interp(at, [0, 0.3 * p.classifier_epochs, p.classifier_epochs], [0.1, 1, 0]) * p.classifier_learning_rate
        )
        eps = p.eps * min(1.0, (at + 0.5) / max(p.classifier_ramp, 1e-9))
        (x, y), generator = run.pictures(data, indices), run.generator("classifier", epoch, number)
        noise = run.uniform(x, indices, generator)
        x = augmented(run, x, indices, generator, p)
        classifier.eval()
        if steps := p.classifier_attack_steps:
            step_size = 2.5 * eps / steps  # the steps could cross the ball (Madry et al.)
            attack = lambda i: pgd(classifier, x[i], y[i], eps, steps, step_size, noise=noise[i])  # noqa: E731
            with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
                x = piecewise(attack, x, limit)
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            logits = network(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.zero_grad()
        (loss * ranks.count / len(indices)).backward()  # DDP averages over ranks: this is the global batch's mean
        optimizer.step()
        average.update_parameters(classifier)
        return torch.stack([loss.detach(), (logits.argmax(1) == y).sum()])

    parts = {"network": classifier, "average": average, "optimizer": optimizer}
    with run.stopping_gently():
        run.train("classifier", p.classifier_epochs, count, size, parts, ("loss", "robust"), step)
    return unwrapped(average.module, WideResNet(**classifier.config)).to(device).eval()


def load_classifier(weights: str, args, data: datasets.Dataset, p: Preset, ranks: Ranks) -> WideResNet:
    """A classifier from a file, or a published one by its name, downloaded; its clean accuracy is checked where it is
    known."""
    file, known = Path(weights), names_of(args.dataset)
    if weights in known:
        with ranks.one_by_one():
            file = fetch_classifier(args.dataset, weights, args.data_dir)
    elif not file.is_file():
        raise ValueError(f"there is no file {file}; published for {args.dataset}: {', '.join(known) or 'nothing'}")
    classifier = load_published_classifier(file, len(data.classes), data.mean, data.std, args.trust_pickle)
    classifier.to(ranks.device)
    check_answers(classifier, file, data.test_images, len(data.classes), ranks.device)
    clean = check_reported(classifier, file, data, weights)
    if ranks.first:
        print(f"classifier: {file}, clean accuracy {clean:.1%} on {min(1000, len(data.test_labels))} test pictures")
    size = classifier.config["depth"], classifier.config["width"]
    if weights == args.train_on and size != (p.depth, p.width):
        raise ValueError(f"{args.train_on} is a WRN-{size[0]}-{size[1]}: say so with --depth and --width")
    return classifier


def untrained(classifier: WideResNet, shape, p: Preset, tap: list[str] | None) -> CARSO:
    """A fresh purifier around the classifier, for pictures of this shape (C, H, W). ValueError if a layer that it is to
    see does not suit it. tap: names of layers, or patterns such as layer.2.*, which stand for those of the paper's that
    they match; None: all of the paper's."""
    sizes = dict(condition_dim=p.condition_dim, latent_dim=p.latent_dim, decoder_width=p.decoder_width)
    papers = representation_layers(classifier.config["depth"])
    layers = [layer for name in tap or ["*"] for layer in fnmatch.filter(papers, name) or [name]]
    return build_carso(classifier, list(dict.fromkeys(layers)), shape, p.samples, **sizes)


def check_buildable(classifier: WideResNet | None, shape, p: Preset, tap: list[str] | None) -> None:
    """Before hours of stage one: ValueError if `untrained` could not be built around its result, or around this
    classifier."""
    with torch.device("meta"):
        sizes = dict(num_classes=2, depth=p.depth, width=p.width, in_channels=shape[0])
        untrained(WideResNet(**(classifier.config if classifier else sizes)), shape, p, tap)


def stage_one(run: Run, data: datasets.Dataset, p: Preset, start=None, limit=None) -> WideResNet:
    """Train a classifier (see train_classifier), keep it as classifier.pt, measure it; or take the one that this run
    made before."""
    path = run.folder / "classifier.pt"
    if kept := run.ranks.load(path):
        weights = kept.get("state_dict")
        weights = dict(weights) if isinstance(weights, dict) else {}
        mean, std = (weights.pop(name, getattr(data, name)) for name in ("mean", "std"))
        classifier = WideResNet(len(data.classes), p.depth, p.width, len(data.mean), mean, std)
        load_state(classifier, weights, path)
        return classifier.to(run.ranks.device).eval()
    classifier = train_classifier(run, data, p, start, limit)
    weights = classifier.state_dict() | {"mean": classifier.mean.flatten(), "std": classifier.std.flatten()}
    if run.ranks.first:
        write_atomically(path, lambda temporary: torch.save({"state_dict": weights}, temporary))
    attack = partial(pgd, eps=p.eps, steps=20, step_size=p.eps / 4)
    torch.manual_seed(0)
    limit = min(250, limit or p.classifier_batch_size // run.ranks.count)  # what the training had room for
    clean, robust = accuracy(classifier, data, 500), accuracy(classifier, data, 500, attack, limit)
    run.say(f"classifier: clean {clean:.1%}, PGD-20 {robust:.1%} on {min(500, len(data.test_labels))} test pictures")
    return classifier


# ------------------------------------------------------------ end to end: the purifier against attacks on the whole


class WholePass(nn.Module):
    """CARSO's training pass as one forward, which is what DistributedDataParallel wants to see."""

    def __init__(self, carso: CARSO):
        super().__init__()
        self.carso = carso

    def forward(self, x: torch.Tensor, z: torch.Tensor):
        return self.carso.answers(x, z)


def train_end_to_end(run: Run, data: datasets.Dataset, carso: CARSO, p: Preset, limit: int | None = None) -> None:
    """Adversarial training of the purifier inside the whole defence (ours; the paper leaves it as future work). The
    classifier stays frozen.

    The pictures are attacked by PGD through classifier, purifier, classifier and aggregation, with fresh latent draws
    at every step (EoT); BatchNorm uses its running statistics in the attack, the batch's in the update. The loss is
    the cross-entropy of the aggregated answer, plus the reconstruction's BCE towards the clean picture (a mean over
    its values), so that the members stay pictures. An average of the weights is the result. limit: pictures attacked
    at a time, to save memory; the purifier's activations are computed twice then.
    """
    ranks, device, purifier = run.ranks, run.ranks.device, carso.purifier
    carso.own_answer, purifier.recompute = p.own_answer, limit is not None
    for encoder in (purifier.image_encoder, purifier.joint_head, purifier.to_mu, purifier.to_logvar):
        encoder.requires_grad_(False)  # z comes from the prior, as in use
    optimizer = torch.optim.Adam([q for q in purifier.parameters() if q.requires_grad], p.end_learning_rate)
    network = ranks.wrap(WholePass(carso), trained=purifier)
    count, size = len(data.train_labels), p.end_batch_size
    steps_an_epoch = len(datasets.batches(count, size, 0, 0))
    average = averaged(purifier, steps_an_epoch)

    def step(epoch, number, indices, first):
        done = (epoch + number / steps_an_epoch) / p.end_epochs
        optimizer.param_groups[0]["lr"] = p.end_learning_rate * (1 - done)
        (clean, y), generator = run.pictures(data, indices), run.generator("end-to-end", epoch, number)
        noise = run.uniform(clean, indices, generator)
        clean = augmented(run, clean, indices, generator, p)
        shape = (p.end_attack_steps + 1, len(indices), p.end_samples, purifier.config["latent_dim"])
        *draws, last = (ranks.share(part) for part in torch.randn(shape, generator=generator, device=device))

        def attack(rows):
            z = iter(draws)  # fresh ones at every step
            return pgd(
                lambda x: robust_logits(carso.member_logits(x, next(z)[rows])), clean[rows], y[rows], p.eps,
                p.end_attack_steps, 2.5 * p.eps / p.end_attack_steps, noise=noise[rows],
            )  # fmt: skip

        carso.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            x = piecewise(attack, clean, limit)
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            reconstructions, members = network(x, last)
        logits = robust_logits(members)
        cross_entropy = F.cross_entropy(logits, y, reduction="sum")
        reconstructions = reconstructions.nan_to_num(0.5)  # the cross-entropy is NaN then, and ends the run
        bce = F.binary_cross_entropy(reconstructions, clean[:, None].expand_as(reconstructions), reduction="none")
        bce = bce.flatten(1).mean(1).sum()
        loss = cross_entropy + p.end_reconstruction * bce
        optimizer.zero_grad()
        (loss * ranks.count / len(indices)).backward()  # DDP averages over ranks: this is the global batch's mean
        optimizer.step()
        average.update_parameters(purifier)
        return torch.stack([cross_entropy.detach(), bce.detach(), (logits.argmax(1) == y).sum()])

    parts = {"purifier": purifier, "average": average, "optimizer": optimizer}
    with run.stopping_gently():
        picture = drawing(run, carso, data, p, p.end_epochs)
        run.train("end-to-end", p.end_epochs, count, size, parts, ("loss", "bce", "robust"), step, picture)
    purifier.load_state_dict(average.module.state_dict())
    carso.eval()
