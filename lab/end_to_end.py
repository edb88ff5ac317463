"""Adversarial training of the purifier inside the whole defence (ours; the paper leaves it as future work).

    python -m lab.end_to_end --from runs/digits/carso.pt       # what train.py left; its classifier stays frozen

The pictures are attacked by PGD through classifier, purifier, classifier and aggregation, with fresh latent draws at
every step (EoT); BatchNorm uses its running statistics in the attack, the batch's in the update. The loss is the
cross-entropy of the aggregated answer, plus the reconstruction's binary cross-entropy towards the clean picture (a mean
over its values), so that the members stay pictures. An average of the weights is the result: runs/NAME/carso.pt.
"""

import argparse
import dataclasses
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data as datasets
from aggregate import robust_logits
from attacks import parse_eps, pgd
from models import hash_weights, run_script, start_device
from purifier import CARSO, load_carso
from train import Preset, Run, attack_piecewise, draw_reconstructions, finish, load_data, start_ranks


class WholePass(nn.Module):
    """CARSO's training pass as one forward, which is what DistributedDataParallel wants to see."""

    def __init__(self, carso: CARSO):
        super().__init__()
        self.carso = carso

    def forward(self, x: torch.Tensor, z: torch.Tensor):
        return self.carso.answers(x, z)


def train_end_to_end(run: Run, data: datasets.Dataset, carso: CARSO, p: Preset, args: argparse.Namespace) -> None:
    """p: epochs, batch_size and learning_rate are this training's; eps, augment, mirror and bf16 the first one's."""
    ranks, device, purifier = run.ranks, run.ranks.device, carso.purifier
    carso.own_answer, purifier.recompute = args.own_answer, args.micro_batch is not None
    for encoder in (purifier.image_encoder, purifier.joint_head, purifier.to_mu, purifier.to_logvar):
        encoder.requires_grad_(False)  # z comes from the prior, as in use
    optimizer = torch.optim.Adam([q for q in purifier.parameters() if q.requires_grad], p.learning_rate)
    network = ranks.wrap(WholePass(carso), trained=purifier)
    count = len(data.train_labels)
    steps_an_epoch = len(datasets.batches(count, p.batch_size, 0, 0))
    average = AveragedModel(purifier, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps_an_epoch), use_buffers=True)

    def step(epoch, number, indices, first):
        done = (epoch + number / steps_an_epoch) / p.epochs
        optimizer.param_groups[0]["lr"] = p.learning_rate * (1 - done)
        (clean, y), generator = run.pictures(data, indices), run.generator("end-to-end", epoch, number)
        noise = run.uniform(clean, indices, generator)
        if p.augment:
            draws = torch.rand((len(indices), 3), generator=generator, device=device)
            clean = datasets.augment(clean, ranks.share(draws), p.mirror)
        shape = (args.attack_steps + 1, len(indices), args.samples, purifier.config["latent_dim"])
        *codes, last = (ranks.share(part) for part in torch.randn(shape, generator=generator, device=device))

        def attack(rows):
            z = iter(codes)  # fresh ones at every step
            return pgd(
                lambda x: robust_logits(carso.member_logits(x, next(z)[rows])), clean[rows], y[rows], p.eps,
                args.attack_steps, 2.5 * p.eps / args.attack_steps, noise=noise[rows],
            )  # fmt: skip

        carso.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            x = attack_piecewise(attack, clean, args.micro_batch)
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            reconstructions, members = network(x, last)
        logits = robust_logits(members)
        cross_entropy = F.cross_entropy(logits, y, reduction="sum")
        targets = clean[:, None].expand_as(reconstructions)
        bce = (
            F.binary_cross_entropy(reconstructions.nan_to_num(0.5), targets, reduction="none").flatten(1).mean(1).sum()
        )
        loss = cross_entropy + args.reconstruction * bce
        optimizer.zero_grad()
        (loss * ranks.count / len(indices)).backward()  # DDP averages over ranks: this is the global batch's mean
        optimizer.step()
        average.update_parameters(purifier)
        return torch.stack([cross_entropy.detach(), bce.detach(), (logits.argmax(1) == y).sum()])

    parts = {"purifier": purifier, "average": average, "optimizer": optimizer}
    draw = partial(draw_reconstructions, run, carso, data, p, p.epochs)
    run.train("end-to-end", p.epochs, count, p.batch_size, parts, ("loss", "bce", "robust"), step, draw)
    purifier.load_state_dict(average.module.state_dict())
    carso.eval()


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("end_to_end", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--from", dest="start", default="runs/digits/carso.pt", metavar="FILE", help="a carso.pt of train.py's")
    add("--name", help="folder under runs/ (default: the data set's name, and -end-to-end)")
    add("--dataset", help="default: the one it was trained on")
    add("--data-dir", help="default: as in its training")
    add("--epochs", type=int, help="default: 20; digits: 14")
    add("--batch-size", type=int, help="pictures a step, over all processes (default: 512; digits: 64)")
    add("--learning-rate", type=float, help="of Adam, falls linearly to 0 (default: 1e-3)")
    add("--eps", type=parse_eps, help="radius in pixels (default: its training's)")
    add("--attack-steps", type=int, default=5, help="PGD on the whole defence, each 2.5 eps / steps (default: 5)")
    add("--samples", type=int, default=1, help="S in training (default: 1)")
    add("--reconstruction", type=float, default=4.0, help="weight of the binary cross-entropy (default: 4)")
    add("--own-answer", type=float, default=0.5, help="share of the classifier's answer to the picture itself in each "
        "member (default: 0.5)")  # fmt: skip
    add("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision (default: as in its training)")
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--micro-batch", type=int, help="to save memory: pictures attacked at a time")
    add("--save-every", type=float, default=10, help="minutes between checkpoints (default: 10)")
    args = parser.parse_args(argv)
    for name in ("attack_steps", "samples", "micro_batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not 1 or more")
    if not 0 <= args.own_answer < 1:
        raise ValueError(f"--own-answer {args.own_answer:g} is not a share of at least 0 and less than 1")
    return args


def main(argv=None) -> int:
    args = parse_arguments(argv)
    ranks = start_ranks(start_device(args.device))
    carso, state = load_carso(args.start, ranks.device)
    if "config" not in state:
        raise ValueError(f"--from {args.start} was not left by train.py: it says nothing of its training")
    args.dataset, args.data_dir = args.dataset or state["dataset"], args.data_dir or state["data_dir"]
    usual = {"epochs": 14, "batch_size": 64} if args.dataset == "digits" else {"epochs": 20, "batch_size": 512}
    given = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "eps", "bf16")}
    earlier = {field.name: state["config"][field.name] for field in dataclasses.fields(Preset)}
    p = Preset(**earlier | usual | {"learning_rate": 1e-3} | {k: v for k, v in given.items() if v is not None})
    # The classifier is not trained: its batches are nobody's concern.
    args.classifier_batch_size, args.classifier_learning_rate = p.classifier_batch_size, 0.0
    data, p = load_data(args, ranks, p)
    datasets.check_fit(data, carso.purifier.config["image_shape"], state["classes"], args.start)
    folder = Path("runs") / (args.name or f"{Path(os.path.abspath(args.dataset)).stem}-end-to-end")
    own = ("start", "attack_steps", "samples", "reconstruction", "own_answer")
    config = dataclasses.asdict(p) | {"dataset": args.dataset, "seed": args.seed, "weights": hash_weights(carso)}
    config["end_to_end"] = {name: getattr(args, name) for name in own}
    config["data"] = datasets.fingerprint(data.train_images, data.train_labels, data.classes)
    if ranks.first:
        datasets.check_config(folder / "config.json", config, "--name")
    run = Run(folder, config, ranks, 60 * args.save_every)
    if run.is_complete():
        return 0
    train_end_to_end(run, data, carso, p, args)
    finish(run, data, args.data_dir, carso)
    return 0


if __name__ == "__main__":
    run_script("end_to_end", main)
