"""Train CARSO: stage one, an adversarially-trained classifier (or a published one); stage two, the purifier.

    python train.py                                                    # digits, a laptop, minutes
    python train.py --objective end-to-end                             # then: the purifier against attacks on the whole
    python train.py --dataset mine.npz --preset cifar10 --epochs 50    # your own pictures; options override the preset
    torchrun --nproc_per_node=8 train.py --dataset cifar10             # the paper's scenario a on one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --dataset cifar10

Everything lands in runs/NAME: carso.pt (all that evaluate.py needs), log.tsv (means over the epoch and all ranks),
reconstructions.png (clean | attacked | reconstructions), classifier.pt, config.json. The same command goes on where it
was stopped.

Shapes: B batch, C, H, W image in [0, 1], K classes, S members, Z latent, D condition.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data as datasets
from aggregate import robust_logits
from attacks import adversarially_balanced_batch, parse_number, pgd
from models import WideResNet, keep_freed_memory, load_published_classifier, record, representation_layers
from purifier import (
    CARSO,
    Purifier,
    build_carso,
    check_config,
    load_checkpoint,
    save_checkpoint,
    vae_loss,
    write_atomically,
)
from report import save_grid
from run import Ranks, Run, Stopped, start_ranks

# --------------------------------------------------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """Every number of a training run. The defaults are the paper's scenario a (tables 12 to 14), but for what is marked
    "ours"."""

    # The classifier, and its own adversarial training (ours; the paper takes published weights)
    depth: int = 28  #                    WideResNet-depth-width
    width: int = 10
    classifier_epochs: int = 100
    classifier_batch_size: int = 512  #   pictures a step, over all ranks
    classifier_learning_rate: float = 0.2  # peak of a one-cycle schedule, SGD with Nesterov momentum 0.9
    classifier_weight_decay: float = 5e-4
    classifier_ramp: int = 5  #           epochs over which the attack's radius grows from 0 to eps
    classifier_attack_steps: int = 10  #  PGD, each step 2.5 eps / steps (Madry et al. 2018)
    classifier_bn_momentum: float = 0.01  # larger where there are few steps for the running statistics to settle
    augment: bool = True  #               random crop (a shift by up to 4 pixels), here and end to end
    mirror: bool = True  #                and half of the pictures mirrored
    classifier_bf16: bool = False  #      its training in mixed precision (for GPUs, and CPUs with bf16 instructions)

    # The purifier
    condition_dim: int = 512  #           D, table 13
    latent_dim: int = 128  #              Z, table 13
    decoder_width: int = 256  #           channels of the decoder's first map, tables 10 and 11
    samples: int = 8  #                   S, section 5.1

    # Stage two, table 14
    epochs: int = 200
    batch_size: int = 5120  #             pictures a step, over all ranks: 8 GPUs x 640
    learning_rate: float = 0.064  #       on the plateau; it does not depend on the number of ranks
    learning_rate_start: float = 5e-9
    learning_rate_end: float = 8e-6
    warmup: int = 25  #                   epochs
    plateau: int = 25  #                  epochs; the rest anneals
    kl_from: int = 25  #                  KL weight 0 until this epoch,
    kl_to: int = 34  #                    1 from this one

    # Adversarially-balanced batches, table 12
    eps: float = 8 / 255  #               largest radius, in pixels
    fraction: float = 0.5  #              perturbed share of each batch
    attack_steps: int = 40  #             PGD
    attack_step_size: float = 0.01  #     in pixels
    attack_bf16: bool = False  #          attacks in mixed precision (for GPUs, and CPUs with bf16 instructions)

    # Training end to end, --objective end-to-end (ours; what was tried stands in the README, "Does it work?")
    end_epochs: int = 20
    end_batch_size: int = 512  #          pictures a step, over all ranks
    end_learning_rate: float = 1e-3  #    Adam, falls linearly to 0
    end_attack_steps: int = 5  #          PGD on the whole defence, each step 2.5 eps / steps
    end_samples: int = 1  #               S in training
    end_reconstruction: float = 4.0  #    weight of the BCE, a mean over the picture's values
    end_bf16: bool = False  #             its update in mixed precision; attack_bf16 is for the attacks
    own_answer: float = 0.5  #            share of the classifier's answer to the picture itself in each member


PAPER = Preset()
PRESETS = {
    "digits": Preset(  # ours: minutes on two CPU cores
        depth=10, width=1, classifier_epochs=18, classifier_batch_size=64, classifier_learning_rate=0.1,
        classifier_ramp=6, classifier_attack_steps=5, classifier_bn_momentum=0.1,
        classifier_weight_decay=1e-4, augment=False, mirror=False,
        condition_dim=64, latent_dim=16, decoder_width=64,
        epochs=24, batch_size=64, learning_rate=4e-3, learning_rate_start=5e-9, learning_rate_end=4e-6,
        warmup=3, plateau=6, kl_from=3, kl_to=6, eps=0.2, attack_steps=10, attack_step_size=0.05,
        end_epochs=14, end_batch_size=64,
    ),
    "cifar10": PAPER,
    "cifar100": dataclasses.replace(PAPER, batch_size=2560, fraction=0.15),  # 4 GPUs x 640
    "tinyimagenet": dataclasses.replace(
        PAPER, condition_dim=768, latent_dim=192, epochs=250, batch_size=1024, fraction=0.01,  # 8 GPUs x 128
        learning_rate=0.0128, learning_rate_end=1.6e-6, warmup=31, plateau=31, kl_from=32, kl_to=43,
    ),
}  # fmt: skip


# What the CARSO authors' own copies of the published classifiers are, and their clean accuracy (paper, table 2).
BUCKET = "https://bucket.ballarin.cc/aimldl/carso2024cnn/"
PUBLISHED = {
    "cifar10": ("cifar_10_cuiwrn2810/models/cifar10_a3_b10_t4_20m_w.safetensors", 0.9216),
    "cifar100": ("cifar_100_cuiwrn2810/models/cifar100_a5_b12_t4_50m_w.safetensors", 0.7385),
    "tinyimagenet": ("tinyimagenet_wangwrn2810/models/tiny_linf_wrn28_10_w.safetensors", 0.6519),
}


def learning_rate(epoch: float, p: Preset) -> float:
    """Linear warm-up, plateau, linear anneal (table 14); stepped by epoch."""
    knots = [0, p.warmup, p.warmup + p.plateau, p.epochs]
    return float(
        np.interp(epoch, knots, [p.learning_rate_start, p.learning_rate, p.learning_rate, p.learning_rate_end])
    )


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
            for fast, slow in zip(self.fast, self.slow):
                slow.lerp_(fast, self.alpha)
                fast.copy_(slow)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the slow weights in the model."""
        for fast, slow in zip(self.fast, self.slow):
            fast.copy_(slow)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        for mine, saved in zip(self.slow, state["slow"], strict=True):
            mine.copy_(saved)


# ------------------------------------------------------------------------------------------ stage one: the classifier


def train_classifier(run: Run, data: datasets.Dataset, p: Preset, start: WideResNet | None = None) -> WideResNet:
    """PGD adversarial training (Madry et al. 2018) with an averaged copy of the weights as the result; from fresh
    weights, or on from those of `start`."""
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
        mine, generator = ranks.share(indices), run.generator("classifier", epoch, number)
        x, y = datasets.pixels(data.train_images[mine].to(device)), data.train_labels[mine].to(device)
        noise = 2 * torch.rand((len(indices), *x.shape[1:]), generator=generator, device=device) - 1
        if p.augment:
            draws = torch.rand((len(indices), 3), generator=generator, device=device)
            x = datasets.augment(x, ranks.share(draws), p.mirror)
        classifier.eval()
        step_size = 2.5 * eps / p.classifier_attack_steps  # the steps could cross the ball (Madry et al.)
        with torch.autocast(device.type, torch.bfloat16, enabled=p.classifier_bf16 or p.attack_bf16):
            x = pgd(classifier, x, y, eps, p.classifier_attack_steps, step_size, noise=ranks.share(noise))
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.classifier_bf16):
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


def averaged(module: nn.Module, steps_an_epoch: int) -> AveragedModel:
    """An exponential average of the weights and of BatchNorm's statistics that reaches back about an epoch."""
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps_an_epoch), use_buffers=True)


def unwrapped(trained: nn.Module, fresh: nn.Module) -> nn.Module:
    """The same weights in a module without traces of training on many ranks."""
    fresh.load_state_dict(trained.state_dict())
    return fresh


@torch.no_grad()
def refresh_batchnorm(network: nn.Module, batches_through) -> None:
    """Recompute BatchNorm's running statistics as the plain mean over `batches_through()`: Lookahead's slow weights are
    the result, but the statistics collected on the way belong to the fast ones."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    network.train()
    batches_through()
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum


def accuracy(model: nn.Module, data: datasets.Dataset, count: int, attack=None) -> float:
    """On the first `count` test pictures, attacked by attack(model, x, y) if given."""
    device, correct = next(model.parameters()).device, 0
    count = min(count, len(data.test_labels))
    for indices in torch.arange(count).split(250):
        x, y = datasets.pixels(data.test_images[indices].to(device)), data.test_labels[indices].to(device)
        x = attack(model, x, y) if attack else x
        with torch.no_grad():
            correct += (model(x).argmax(1) == y).sum().item()
    return correct / count


# ------------------------------------------------------------------------------------------- stage two: the purifier


def train_purifier(run: Run, data: datasets.Dataset, carso: CARSO, p: Preset, micro_batch: int | None = None) -> None:
    """The paper's recipe (sections 4.4 and 5.1): adversarially-balanced batches, summed BCE and KL, RAdam in
    Lookahead."""
    ranks, device = run.ranks, run.ranks.device
    classifier, purifier = carso.classifier, carso.purifier
    network = ranks.wrap(purifier)
    purifier.recompute = micro_batch is not None
    optimizer = torch.optim.RAdam(purifier.parameters(), lr=p.learning_rate_start, betas=(0.9, 0.999), eps=1e-8)
    lookahead = Lookahead(optimizer, k=6, alpha=0.8)
    count = len(data.train_labels)

    def forward(stage, epoch, number, indices, first):
        """This rank's part of a balanced batch through the purifier."""
        rows, generator = ranks.share(torch.arange(len(indices))), run.generator(stage, epoch, number)
        mine = indices[rows]
        clean, y = datasets.pixels(data.train_images[mine].to(device)), data.train_labels[mine].to(device)
        start = 2 * torch.rand((len(indices), *clean.shape[1:]), generator=generator, device=device) - 1
        latent = torch.randn((len(indices), p.latent_dim), generator=generator, device=device)
        whole = None  # the perturbed pictures and their representation, micro_batch pictures at a time
        for part in torch.arange(len(mine)).split(micro_batch or len(mine)):
            with torch.autocast(device.type, torch.bfloat16, enabled=p.attack_bf16):
                perturbed = adversarially_balanced_batch(
                    classifier, clean[part], y[part], p.eps, p.fraction, p.attack_steps, p.attack_step_size,
                    first=first + int(rows[part[0]]), noise=ranks.share(start)[part],
                )  # fmt: skip
            with torch.no_grad():
                tensors = [perturbed, *record(classifier, carso.layers, perturbed)[1]]
            if len(part) == len(mine):
                whole = tensors
                break
            whole = whole or [tensor.new_empty((len(mine), *tensor.shape[1:])) for tensor in tensors]
            for full, tensor in zip(whole, tensors):
                full[part] = tensor
        perturbed, *representation = whole
        return clean, *network(perturbed, representation, ranks.share(latent))

    def step(epoch, number, indices, first):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, p)
        carso.train()
        clean, reconstruction, mu, logvar = forward("purifier", epoch, number, indices, first)
        loss, bce, kld = vae_loss(reconstruction, clean, mu, logvar, kl_weight(epoch, p))
        optimizer.zero_grad()
        (loss * ranks.count).backward()  # DDP averages over ranks: this is the global batch's sum
        lookahead.step()
        return torch.stack([loss, bce, kld]).detach()

    def picture(epoch):
        if ranks.first and (epoch % 5 == 4 or epoch == p.epochs - 1):
            draw_reconstructions(run.folder / "reconstructions.png", carso, data, p)

    parts = {"purifier": purifier, "lookahead": lookahead}
    with run.stopping_gently():
        run.train("purifier", p.epochs, count, p.batch_size, parts, ("loss", "bce", "kld"), step, picture)
    lookahead.finish()

    def once_through_the_training_set():
        first = 0
        for number, indices in enumerate(datasets.batches(count, p.batch_size, run.config["seed"], p.epochs)):
            with torch.enable_grad():
                forward("batchnorm", 0, number, indices, first)
            first += len(indices)

    refresh_batchnorm(purifier, once_through_the_training_set)
    carso.eval()


# ------------------------------------------------------------ end to end: the purifier against attacks on the whole


class WholePass(nn.Module):
    """CARSO's training pass as one forward, which is what DistributedDataParallel wants to see."""

    def __init__(self, carso: CARSO):
        super().__init__()
        self.carso = carso

    def forward(self, x: torch.Tensor, z: torch.Tensor):
        return self.carso.answers(x, z)


def train_end_to_end(run: Run, data: datasets.Dataset, carso: CARSO, p: Preset) -> None:
    """Adversarial training of the purifier inside the whole defence (ours; the paper leaves it as future work). The
    classifier stays frozen.

    The pictures are attacked by PGD through classifier, purifier, classifier and aggregation, with fresh latent draws
    at every step (EoT); BatchNorm uses its running statistics in the attack, the batch's in the update. The loss is
    the cross-entropy of the aggregated answer, plus the reconstruction's BCE towards the clean picture (a mean over
    its values), so that the members stay pictures. An average of the weights is the result.
    """
    ranks, device, purifier = run.ranks, run.ranks.device, carso.purifier
    carso.own_answer = p.own_answer
    for encoder in (purifier.image_encoder, purifier.joint_head, purifier.to_mu, purifier.to_logvar):
        encoder.requires_grad_(False)  # z comes from the prior, as in use
    optimizer = torch.optim.Adam([q for q in purifier.parameters() if q.requires_grad], p.end_learning_rate)
    network = ranks.wrap(WholePass(carso))
    count, size = len(data.train_labels), p.end_batch_size
    steps_an_epoch = len(datasets.batches(count, size, 0, 0))
    average = averaged(purifier, steps_an_epoch)

    def step(epoch, number, indices, first):
        done = (epoch + number / steps_an_epoch) / p.end_epochs
        optimizer.param_groups[0]["lr"] = p.end_learning_rate * (1 - done)
        mine, generator = ranks.share(indices), run.generator("end-to-end", epoch, number)
        clean, y = datasets.pixels(data.train_images[mine].to(device)), data.train_labels[mine].to(device)
        shape = (p.end_attack_steps + 1, len(indices), p.end_samples, purifier.config["latent_dim"])
        noise = 2 * torch.rand((len(indices), *clean.shape[1:]), generator=generator, device=device) - 1
        if p.augment:
            draws = torch.rand((len(indices), 3), generator=generator, device=device)
            clean = datasets.augment(clean, ranks.share(draws), p.mirror)
        z = iter([ranks.share(part) for part in torch.randn(shape, generator=generator, device=device)])

        carso.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.attack_bf16):
            x = pgd(
                lambda x: robust_logits(carso.member_logits(x, next(z))), clean, y, p.eps, p.end_attack_steps,
                2.5 * p.eps / p.end_attack_steps, noise=ranks.share(noise),
            )  # fmt: skip
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.end_bf16):
            reconstructions, members = network(x, next(z))
        logits = robust_logits(members)
        cross_entropy = F.cross_entropy(logits, y, reduction="sum")
        bce = F.binary_cross_entropy(reconstructions, clean[:, None].expand_as(reconstructions), reduction="none")
        bce = bce.flatten(1).mean(1).sum()
        loss = cross_entropy + p.end_reconstruction * bce
        optimizer.zero_grad()
        (loss * ranks.count / len(indices)).backward()  # DDP averages over ranks: this is the global batch's mean
        optimizer.step()
        average.update_parameters(purifier)
        return torch.stack([cross_entropy.detach(), bce.detach(), (logits.argmax(1) == y).sum()])

    def picture(epoch):
        if ranks.first and (epoch % 5 == 4 or epoch == p.end_epochs - 1):
            draw_reconstructions(run.folder / "reconstructions.png", carso, data, p)

    parts = {"purifier": purifier, "average": average, "optimizer": optimizer}
    with run.stopping_gently():
        run.train("end-to-end", p.end_epochs, count, size, parts, ("loss", "bce", "robust"), step, picture)
    purifier.load_state_dict(average.module.state_dict())
    carso.eval()


def draw_reconstructions(path: Path, carso: CARSO, data: datasets.Dataset, p: Preset, rows: int = 8) -> None:
    """One row a test picture: clean | attacked (PGD eps on the classifier) | six reconstructions."""
    was_training, device = carso.purifier.training, next(carso.purifier.parameters()).device
    carso.eval()
    x, y = datasets.pixels(data.test_images[:rows].to(device)), data.test_labels[:rows].to(device)
    noise = torch.zeros_like(x)
    attacked = pgd(carso.classifier, x, y, p.eps, p.attack_steps, p.attack_step_size, noise=noise)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((len(x), 6, carso.purifier.config["latent_dim"]), generator=generator).to(device)
    with torch.no_grad():
        tiles = torch.cat([x[:, None], attacked[:, None], carso.purify(attacked, z)], dim=1)
    save_grid(path, tiles)
    carso.train(was_training)


# ------------------------------------------------------------------------------------------------------ command line


def switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help=f"{', '.join(datasets.NAMES)}, or a path (see data.py)")
    parser.add_argument("--data-dir", default="data", help="where downloads and caches go (default: data)")
    parser.add_argument("--objective", choices=["paper", "end-to-end"], default="paper", help="the paper's, or "
                        "adversarial training of the purifier inside the whole defence (default: paper)")  # fmt: skip
    parser.add_argument("--from", dest="start", metavar="FILE", help="for end-to-end: a carso.pt, or 'scratch' for a "
                        "fresh purifier (default: runs/DATASET/carso.pt, which --objective paper makes)")  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, help="default: the data set's own, cifar10's for a path")
    parser.add_argument("--name", help="folder under runs/ (default: the data set's name, and "
                        "-end-to-end where that is the objective)")  # fmt: skip
    parser.add_argument("--classifier", help="'train', 'published' (the paper's, downloaded), or a file of weights "
                        "(default: published for cifar10, cifar100 and tinyimagenet, train elsewhere)")  # fmt: skip
    parser.add_argument("--train-on", metavar="FILE", help="stage one goes on from these weights of a classifier, of "
                        "the same depth and width")  # fmt: skip
    parser.add_argument("--tap", nargs="+", metavar="LAYER", help="layers of the classifier that a fresh purifier "
                        "sees, such as init_conv (default: the paper's, table 5)")  # fmt: skip
    parser.add_argument("--trust-pickle", action="store_true", help="open such a file even if it runs code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    micro = (
        "the classifier's work so many pictures at a time, the purifier's activations computed twice; the same result"
    )
    parser.add_argument("--micro-batch", type=int, help=f"to save memory: {micro}")
    parser.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints (default: 10)")
    group = parser.add_argument_group("preset", "every number of the preset can be overridden")
    kinds = {float: parse_number, int: int, bool: switch}
    for field in dataclasses.fields(Preset):
        group.add_argument("--" + field.name.replace("_", "-"), type=kinds[field.type], metavar=field.type.__name__)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Preset, str]:
    """The preset with what the command line overrides, and the run's name. ValueError for what makes no sense."""
    name = args.preset or (args.dataset if args.dataset in PRESETS else "cifar10")
    overrides = {f.name: getattr(args, f.name) for f in dataclasses.fields(Preset)}
    p = dataclasses.replace(PRESETS[name], **{k: v for k, v in overrides.items() if v is not None})
    if not 0 < p.eps <= 1:
        raise ValueError(f"--eps {p.eps:g} is not a distance between pixels in [0, 1]; write 8/255, say")
    if not 0 <= p.fraction <= 1:
        raise ValueError(f"--fraction {p.fraction:g} is not a share between 0 and 1")
    with torch.device("meta"):
        names = dict(WideResNet(2, p.depth, p.width).named_modules())  # says what is wrong with a depth
    if unknown := set(args.tap or ()) - names.keys():
        raise ValueError(f"--tap: a WRN-{p.depth}-{p.width} has no layer {', '.join(sorted(unknown))}")
    if not 0 <= p.own_answer < 1:
        raise ValueError(f"--own-answer {p.own_answer:g} is not a share of at least 0 and less than 1")
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError("--micro-batch must be 1 or more")
    counts = p.epochs, p.batch_size, p.classifier_epochs, p.classifier_batch_size, p.samples, p.width
    if min(*counts, p.end_epochs, p.end_batch_size, p.end_attack_steps, p.end_samples) < 1:
        raise ValueError("epochs, batch sizes, attack steps, samples and width must be 1 or more")
    if p.epochs != PRESETS[name].epochs:  # a shorter or longer run keeps the schedule's proportions
        # (but one epoch of warm-up: RAdam's first five steps follow the bare gradient of a summed loss, which is huge)
        scale = p.epochs / PRESETS[name].epochs
        names = [k for k in ("warmup", "plateau", "kl_from", "kl_to") if overrides[k] is None]
        p = dataclasses.replace(p, **{k: max(1, int(getattr(PRESETS[name], k) * scale)) for k in names})
    stem = Path(args.dataset).stem
    if args.objective == "end-to-end":
        if args.start != "scratch" and args.classifier is not None:
            raise ValueError("--classifier goes with --from scratch; otherwise the classifier is the checkpoint's own")
        if args.start != "scratch" and args.tap is not None:
            raise ValueError("--tap goes with --from scratch; otherwise the checkpoint's purifier has its layers")
        args.start = args.start or str(Path("runs") / stem / "carso.pt")
    elif args.start is not None:
        raise ValueError("--from goes with --objective end-to-end")
    if args.train_on and (args.classifier or "train") != "train":
        raise ValueError("--train-on and --classifier exclude each other: is the classifier to be trained or not?")
    if args.classifier is None:
        as_published = args.dataset in PUBLISHED and (p.depth, p.width) == (PAPER.depth, PAPER.width)
        as_published = as_published and not args.train_on
        args.classifier = "published" if as_published else "train"
    if args.classifier == "published" and args.dataset not in PUBLISHED:
        raise ValueError(f"no classifier is published for {args.dataset}; known are {', '.join(PUBLISHED)}")
    return p, args.name or (f"{stem}-end-to-end" if args.objective == "end-to-end" else stem)


def load_data(args, p: Preset, ranks: Ranks) -> datasets.Dataset:
    """One process of each node downloads and caches, the others then read; checks that batches suit data and ranks."""
    with ranks.one_by_one():
        data = datasets.load(args.dataset, args.data_dir)
    for name, size in (("--batch-size", p.batch_size), ("--classifier-batch-size", p.classifier_batch_size)):
        smallest = min(len(b) for b in datasets.batches(len(data.train_labels), size, 0, 0))
        if smallest < max(2, ranks.count):
            raise ValueError(
                f"{name} {size} leaves a batch of {smallest} for {ranks.count} process(es); make it larger"
            )
        if size % ranks.count and ranks.first:
            print(f"{name} {size} over {ranks.count} processes: their shares differ by one picture")
    return data


def load_classifier(weights: str, args, data: datasets.Dataset, ranks: Ranks) -> WideResNet:
    """Stage one from a file, downloaded if it is the published one; its clean accuracy is checked where we know it."""
    file, expected = Path(weights), None
    if weights == "published":
        name, expected = PUBLISHED[args.dataset]
        file = Path(args.data_dir) / Path(name).name
        with ranks.one_by_one():
            datasets.download(BUCKET + name, file)
    mean_std = (data.mean, data.std) if args.dataset not in PUBLISHED else (None, None)
    classifier = load_published_classifier(file, len(data.classes), *mean_std, args.trust_pickle).to(ranks.device)
    clean = accuracy(classifier, data, 1000)
    if ranks.first:
        print(f"classifier: {file}, clean accuracy {clean:.1%} on {min(1000, len(data.test_labels))} test pictures")
    if expected is not None and clean < expected - 0.03:
        raise ValueError(
            f"{file} should classify {expected:.1%} of clean pictures; this is another file, or other data"
        )
    return classifier


def stage_one(run: Run, data: datasets.Dataset, p: Preset, start: WideResNet | None = None) -> WideResNet:
    """Train a classifier, measure it, keep it as classifier.pt; or take the one that this run made before."""
    path = run.folder / "classifier.pt"
    if path.is_file():
        return load_published_classifier(path, len(data.classes)).to(run.ranks.device)
    classifier = train_classifier(run, data, p, start)
    attack = partial(pgd, eps=p.eps, steps=20, step_size=p.eps / 4)
    torch.manual_seed(0)
    clean, robust = accuracy(classifier, data, 500), accuracy(classifier, data, 500, attack)
    run.say(f"classifier: clean {clean:.1%}, PGD-20 {robust:.1%} on {min(500, len(data.test_labels))} test pictures")
    weights = classifier.state_dict() | {"mean": classifier.mean.flatten(), "std": classifier.std.flatten()}
    if run.ranks.first:
        write_atomically(path, lambda temporary: torch.save({"state_dict": weights}, temporary))
    return classifier


def fresh_carso(args, data: datasets.Dataset, classifier: WideResNet, p: Preset) -> CARSO:
    """An untrained purifier around a trained classifier."""
    torch.manual_seed(args.seed)
    sizes = dict(condition_dim=p.condition_dim, latent_dim=p.latent_dim, decoder_width=p.decoder_width)
    layers = args.tap or representation_layers(classifier.config["depth"])
    return build_carso(classifier, layers, data.train_images.shape[1:], p.samples, **sizes)


def finish(run: Run, args, data: datasets.Dataset, carso: CARSO, p: Preset) -> None:
    """Keep the whole defence as carso.pt."""
    if not run.ranks.first:
        return
    draw_reconstructions(run.folder / "reconstructions.png", carso, data, p)
    classifier = unwrapped(carso.classifier, WideResNet(**carso.classifier.config))
    purifier = unwrapped(carso.purifier, Purifier(**carso.purifier.config))
    carso = CARSO(classifier, purifier, carso.layers, carso.samples, own_answer=carso.own_answer).to(run.ranks.device)
    state = {"dataset": args.dataset, "data_dir": args.data_dir, "config": run.config, "classes": data.classes}
    save_checkpoint(run.folder / "carso.pt", carso, **state)
    for path in run.folder.glob("*.resume.pt"):
        path.unlink()
    run.say(f"CARSO: clean {accuracy(carso, data, 500):.1%} on {min(500, len(data.test_labels))} test pictures")
    run.say(f"now: python evaluate.py --ckpt {run.folder / 'carso.pt'}")


def load_start(path, data: datasets.Dataset, device) -> CARSO:
    """A trained CARSO to go on from. ValueError if there is none, or it is of other data."""
    if not Path(path).is_file():
        raise ValueError(f"there is no {path} to start from: train with --objective paper first, or say --from scratch")
    carso, _ = load_checkpoint(path, device)
    carso.check_fits(path, data.name, data.train_images.shape[1:], len(data.classes))
    return carso


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    try:
        ranks = start_ranks(args.device)
        p, name = prepare(args)
        folder = Path("runs") / name
        data = load_data(args, p, ranks)
        config = {"dataset": args.dataset, "classifier": args.classifier, "seed": args.seed, **dataclasses.asdict(p)}
        if args.objective == "end-to-end":
            config |= {"objective": args.objective, "start": args.start}
        if args.train_on:
            config |= {"train_on": args.train_on}
        if args.tap:
            config |= {"tap": args.tap}
        run = Run(folder, config, ranks, 60 * args.save_every)
        if (folder / "config.json").is_file():
            check_config(folder / "config.json", config, "--name")
        if (folder / "carso.pt").is_file():
            load_checkpoint(folder / "carso.pt")
            run.say(f"{folder / 'carso.pt'} is complete: attack it with evaluate.py --ckpt, or choose another --name")
            return 0
        start, classifier, weights = None, None, args.train_on or args.classifier
        if args.objective == "end-to-end" and args.start != "scratch":
            start = load_start(args.start, data, ranks.device)
        elif weights != "train":
            classifier = load_classifier(weights, args, data, ranks)
            size = classifier.config["depth"], classifier.config["width"]
            if args.train_on and size != (p.depth, p.width):
                raise ValueError(f"{args.train_on} is a WRN-{size[0]}-{size[1]}: say so with --depth and --width")
        if ranks.first:
            check_config(folder / "config.json", config, "--name")
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    shape, device = tuple(data.train_images.shape[1:]), ranks.device.type
    run.say(f"{data.name}: {len(data.train_labels)} training pictures {shape}, {len(data.classes)} classes; "
            f"{ranks.count} process(es) on {device}{'; ' + data.note if data.note else ''}")  # fmt: skip
    try:
        if start is None and (classifier is None or args.train_on):
            classifier = stage_one(run, data, p, classifier)
        carso = start or fresh_carso(args, data, classifier, p).to(ranks.device)
        if args.objective == "end-to-end":
            train_end_to_end(run, data, carso, p)
        else:
            train_purifier(run, data, carso, p, args.micro_batch)
        finish(run, args, data, carso, p)
    except Stopped as stop:
        run.say(f"stopped at {stop} and saved; the same command goes on from there")
        return 130
    except KeyboardInterrupt:
        run.say("stopped; the same command goes on from the last checkpoint")
        return 130
    except OSError as error:
        print(f"train.py: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
