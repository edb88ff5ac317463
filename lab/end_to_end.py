"""Adversarial training of the purifier inside the whole defence (ours; the paper leaves it as future work).

    python -m lab.end_to_end --from runs/digits/carso.pt       # what train.py left; its classifier stays frozen

The pictures are attacked by PGD through classifier, purifier, classifier and aggregation, with fresh latent draws at
every step (EoT); BatchNorm uses its running statistics in the attack, the batch's in the update. The loss is the
cross-entropy of the aggregated answer, plus the reconstruction's binary cross-entropy towards the clean picture (a mean
over its values), so that the members stay pictures. An average of the weights is the result: runs/NAME/carso.pt.
"""

import argparse
import dataclasses
import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data as datasets
from aggregate import robust_logits
from attacks import parse_number, pgd
from models import record, run_script, start_device
from purifier import CARSO, load_carso
from train import (
    Preset,
    Run,
    Stage,
    draw_reconstructions,
    finish,
    fit_batches,
    name_folder,
    split_rows,
    start_ranks,
)


class EndToEndCARSO(CARSO):
    """CARSO with a share of its classifier's answer to the picture itself in each member.

    The recording gives this answer for free. own_answer: the share, in [0, 1); 0: the paper's CARSO."""

    own_answer = 0.0

    def answers(self, x: torch.Tensor, z: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As CARSO's; exp(logit) becomes the weighted mean of the two answers' exponentials, like the paper's sum."""
        z = self.draw(x, self.samples) if z is None else z
        own_logits, representation = record(self.classifier, self.layers, x)
        reconstructions = self.decode(z, self.purifier.condition(representation))
        logits = self.labeller(reconstructions.flatten(0, 1)).unflatten(0, z.shape[:2])  # (B, S, K)
        if self.own_answer > 0:
            own_logits = own_logits[:, None] + math.log(self.own_answer)
            logits = torch.logaddexp(logits + math.log(1 - self.own_answer), own_logits.expand_as(logits))
        return reconstructions, logits


def load_end_to_end(path, device="cpu") -> tuple[EndToEndCARSO, dict]:
    """The defence that this script wrote, or train.py, and its state. Raises ValueError as `load_carso` does."""
    carso, state = load_carso(path, device, EndToEndCARSO)
    carso.own_answer = state.get("own_answer", 0.0)
    return carso, state


class WholePass(nn.Module):
    """CARSO's training pass as one forward, which is what DistributedDataParallel wants to see."""

    def __init__(self, carso: EndToEndCARSO):
        super().__init__()
        self.carso = carso

    def forward(self, x: torch.Tensor, z: torch.Tensor):
        return self.carso.answers(x, z)


def train_end_to_end(run: Run, carso: EndToEndCARSO, attack_steps: int, samples: int, reconstruction: float) -> None:
    """Epochs, batch_size and learning_rate of the run's preset are this training's; eps, augment, mirror and bf16 the
    first one's. attack_steps, samples: see the options; reconstruction: the weight of the binary cross-entropy."""
    ranks, p, purifier = run.ranks, run.p, carso.purifier
    purifier.recompute = run.micro_batch is not None
    for encoder in (purifier.image_encoder, purifier.joint_head, purifier.to_mu, purifier.to_logvar):
        encoder.requires_grad_(False)  # z comes from the prior, as in use
    optimizer = torch.optim.Adam([w for w in purifier.parameters() if w.requires_grad], p.learning_rate)
    network = ranks.wrap(WholePass(carso))
    steps = run.count_steps(p.batch_size)
    average = AveragedModel(purifier, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps), use_buffers=True)

    parts = {"purifier": purifier, "average": average, "optimizer": optimizer}
    stage = Stage(run, "end-to-end", p.epochs, p.batch_size, parts, ("loss", "bce", "robust"))
    for epoch in stage.epochs():
        for batch in stage.batches(epoch):
            done = (epoch + batch.step / steps) / p.epochs
            optimizer.param_groups[0]["lr"] = p.learning_rate * (1 - done)
            clean, y = run.load_pictures(batch)
            noise = run.draw_noise(batch)
            clean = run.augment(clean, batch)
            shape = (attack_steps + 1, len(batch.indices), samples, purifier.config["latent_dim"])
            draws = torch.randn(shape, generator=batch.generator, device=ranks.device)
            *codes, last = (ranks.share(part) for part in draws)

            carso.eval()
            with run.autocast():
                x = attack_defence(carso, clean, y, p.eps, codes, noise, run.micro_batch)
            network.train()
            with run.autocast():
                reconstructions, members = network(x, last)
            logits = robust_logits(members)
            cross_entropy = F.cross_entropy(logits, y, reduction="sum")
            targets = clean[:, None].expand_as(reconstructions)
            pixels = F.binary_cross_entropy(reconstructions.nan_to_num(0.5), targets, reduction="none")
            bce = pixels.flatten(1).mean(1).sum()
            loss = cross_entropy + reconstruction * bce
            optimizer.zero_grad()
            (loss * ranks.count / len(batch.indices)).backward()  # DDP averages over ranks: the global batch's mean
            optimizer.step()
            average.update_parameters(purifier)
            stage.add(batch, torch.stack([cross_entropy.detach(), bce.detach(), (logits.argmax(1) == y).sum()]))
        draw_reconstructions(run, carso, epoch)
    purifier.load_state_dict(average.module.state_dict())
    carso.eval()


def attack_defence(carso: CARSO, x, y, eps: float, codes: list, noise: torch.Tensor, micro_batch: int | None):
    """PGD through the whole, from clean x (b, C, H, W); codes: for each step the latent draws (b, S, Z)."""
    attacked = []
    for rows in split_rows(len(x), micro_batch):
        fresh = iter(codes)
        answer = lambda pictures: robust_logits(carso.member_logits(pictures, next(fresh)[rows]))  # noqa: B023, E731
        step_size = 2.5 * eps / len(codes)
        attacked.append(pgd(answer, x[rows], y[rows], eps, len(codes), step_size, noise=noise[rows]))
    return torch.cat(attacked)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("end_to_end", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add, path = parser.add_argument, os.path.expanduser
    add("--from", dest="start", type=path, default="runs/digits/carso.pt", metavar="FILE",
        help="a carso.pt of train.py's (default: runs/digits/carso.pt)")  # fmt: skip
    add("--name", type=path, help="folder under runs/ (default: the data set's name, and -end-to-end)")
    add("--dataset", type=path, help="default: the one it was trained on")
    add("--data-dir", type=path, help="default: as in its training")
    add("--epochs", type=int, help="default: 20; digits: 14")
    add("--batch-size", type=int, help="pictures a step, over all processes (default: 512; digits: 64)")
    add("--learning-rate", type=float, help="of Adam, falls linearly to 0 (default: 1e-3)")
    add("--eps", type=parse_number, help="radius in pixels (default: its training's)")
    add("--attack-steps", type=int, default=5, help="PGD on the whole defence, each 2.5 eps / steps (default: 5)")
    add("--samples", type=int, default=1, help="S in training (default: 1)")
    add("--reconstruction", type=float, default=4.0, help="weight of the binary cross-entropy (default: 4)")
    add("--own-answer", type=float, default=0.5, help="share of the classifier's answer to the picture itself in each "
        "member (default: 0.5)")  # fmt: skip
    add("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision (default: as in its training)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--micro-batch", type=int, help="to save memory: pictures attacked at a time (default: all)")
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
    carso, state = load_end_to_end(args.start, ranks.device)
    if "config" not in state:
        raise ValueError(f"--from {args.start} was not left by train.py: it says nothing of its training")
    carso.own_answer = args.own_answer
    dataset, data_dir = args.dataset or state["dataset"], args.data_dir or state["data_dir"]
    data = ranks.take_turns(partial(datasets.load, dataset, data_dir))
    datasets.check_fit(data, carso.purifier.config["image_shape"], state["classes"], args.start)

    earlier = {field.name: state["config"][field.name] for field in dataclasses.fields(Preset)}
    usual = {"epochs": 14, "batch_size": 64} if dataset == "digits" else {"epochs": 20, "batch_size": 512}
    numbers = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "eps", "bf16")}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    p = Preset(**earlier | usual | {"learning_rate": 1e-3} | numbers)
    p = fit_batches(p, len(data.train_labels), numbers, ranks.count)

    folder = name_folder(dataset, args.name, "-end-to-end")
    training = {name: getattr(args, name) for name in ("attack_steps", "samples", "reconstruction")}
    settings = {"end_to_end": training | {"own_answer": args.own_answer}}
    run = Run(folder, data, p, carso, ranks, args.seed, args.micro_batch, **settings)
    if run.is_complete():
        return 0
    train_end_to_end(run, carso, **training)
    finish(run, carso, "-m lab.evaluate", dataset=dataset, data_dir=data_dir, own_answer=args.own_answer)
    return 0


if __name__ == "__main__":
    run_script("end_to_end", main)
