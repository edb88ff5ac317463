"""Train CARSO: stage one, an adversarially-trained classifier (or a published one); stage two, the purifier.

    python train.py                                                    # digits, a laptop, minutes
    python train.py --objective end-to-end                             # then: the purifier against attacks on the whole
    python train.py --dataset mine.npz --preset cifar10 --epochs 50    # your own pictures; options override the preset
    torchrun --nproc_per_node=8 train.py --dataset cifar10             # the paper's scenario a on one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --dataset cifar10

Everything lands in runs/NAME: carso.pt (all that evaluate.py needs), log.tsv and log-STAGE.tsv (means over the epoch
and all ranks), reconstructions.png (clean | attacked | reconstructions), classifier.pt, config.json. The same command
goes on where it was stopped.

Shapes: B batch, C, H, W image in [0, 1], K classes, S members, Z latent, D condition.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data as datasets
from lab.checkpoints import fingerprint_of, load_checkpoint, load_start
from lab.perturb import perturbing, recorded
from lab.presets import PAPER, PRESETS, Preset, add_options, check_options, choose_preset, eps_text
from lab.published import CLASSIFIERS, names_of
from lab.ranks import keep_freed_memory, leave, start_ranks
from lab.robust_training import check_buildable, load_classifier, stage_one, train_end_to_end, untrained
from lab.run import DECIDED, Run, Stopped, drawing, finish, load_data, training_fingerprint
from lab.start import launched, out_of_memory, start_device, start_output
from purifier import CARSO, vae_loss

# ------------------------------------------------------------------------------------- schedules and the optimizer


def schedule_at(epoch: int, number: int, steps: int, p: Preset) -> float:
    """Where the schedules stand at step `number` of an epoch of `steps`, in epochs: as in the paper they move once an
    epoch. Where an epoch is short, or all the warm-up there is, they move at every step, but not in the first five:
    there RAdam follows the bare gradient of a summed loss, which is huge, and the rate stays at its start."""
    if steps > 5 and p.warmup > 1:
        return float(epoch)
    done = epoch * steps + number
    return done / steps if done >= 5 else 0.0


def learning_rate(epoch: float, p: Preset) -> float:
    """Linear warm-up, plateau, linear anneal (table 14)."""
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


def purifier_optimizer(purifier: nn.Module, p: Preset) -> Lookahead:
    """RAdam in Lookahead (section 5.1); over all tensors at once, on a CPU twice as fast as one after another."""
    settings = dict(lr=p.learning_rate_start, betas=(0.9, 0.999), eps=1e-8, foreach=True)
    return Lookahead(torch.optim.RAdam(purifier.parameters(), **settings), k=6, alpha=0.8)


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


# ------------------------------------------------------------------------------------------- stage two: the purifier


def train_purifier(run: Run, data: datasets.Dataset, carso: CARSO, p: Preset, micro_batch: int | None = None) -> None:
    """The paper's recipe (sections 4.4 and 5.1): adversarially-balanced batches, summed BCE and KL, RAdam in
    Lookahead."""
    ranks, device = run.ranks, run.ranks.device
    classifier, purifier = carso.classifier, carso.purifier
    network = ranks.wrap(purifier)
    purifier.recompute = micro_batch is not None
    lookahead = purifier_optimizer(purifier, p)
    count = len(data.train_labels)
    steps = len(datasets.batches(count, p.batch_size, 0, 0))
    perturb = perturbing(run, data, classifier, p, micro_batch)

    def forward(stage, epoch, number, indices, first):
        """This rank's part of a balanced batch through the purifier."""
        (clean, y), generator = run.pictures(data, indices), run.generator(stage, epoch, number)
        perturbed = perturb(clean, y, indices, epoch, first, generator)
        latent = torch.randn((len(indices), p.latent_dim), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=p.bf16):
            representation = recorded(classifier, carso.layers, perturbed, micro_batch)
            outputs = network(perturbed, representation, ranks.share(latent))
        return clean, *(output.float() for output in outputs)

    def step(epoch, number, indices, first):
        at = schedule_at(epoch, number, steps, p)
        lookahead.optimizer.param_groups[0]["lr"] = learning_rate(at, p) if at else p.learning_rate_start
        carso.train()
        clean, reconstruction, mu, logvar = forward("purifier", epoch, number, indices, first)
        loss, bce, kld = vae_loss(reconstruction, clean, mu, logvar, kl_weight(at, p))
        lookahead.optimizer.zero_grad()
        (loss * ranks.count).backward()  # DDP averages over ranks: this is the global batch's sum
        lookahead.step()
        return torch.stack([loss, bce, kld]).detach()

    parts = {"purifier": purifier, "lookahead": lookahead}
    with run.stopping_gently():
        run.train("purifier", p.epochs, count, p.batch_size, parts, ("loss", "bce", "kld"), step,
                  drawing(run, carso, data, p, p.epochs))  # fmt: skip
    lookahead.finish()

    def look(epoch, number, indices, first):
        clean, reconstruction, mu, logvar = forward("batchnorm", epoch, number, indices, first)
        return torch.stack(vae_loss(reconstruction, clean, mu, logvar, 1.0))

    def once_through_the_training_set():
        run.train("batchnorm", 1, count, p.batch_size, {"purifier": purifier}, ("loss", "bce", "kld"), look)

    with run.stopping_gently():
        refresh_batchnorm(purifier, once_through_the_training_set)
    carso.eval()


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(datasets.NAMES)}, or a path (see data.py)")
    add("--data-dir", default="data", help="where downloads and caches go (default: data)")
    add("--objective", choices=["paper", "end-to-end"], default="paper", help="the paper's, or adversarial training of "
        "the purifier inside the whole defence (default: paper)")  # fmt: skip
    add("--stage", choices=["all", "classifier"], default="all", help="classifier: end after stage one (default: all)")
    add("--from", dest="start", metavar="FILE", help="for end-to-end: a carso.pt, or 'scratch' for a fresh purifier "
        "(default: runs/DATASET/carso.pt, which --objective paper makes)")  # fmt: skip
    add("--preset", choices=PRESETS, help="default: the data set's own, cifar10's for a path")
    add("--name", help="folder under runs/ (default: the data set's name, and -end-to-end where that is the objective)")
    add("--classifier", help="'train'; 'published' (the paper's) or another's name in lab/published.py, downloaded; or "
        "a file of weights (default: published for cifar10, cifar100 and tinyimagenet, train elsewhere)")  # fmt: skip
    add("--final", metavar="FILE", help="weights of a second classifier, which labels the reconstructions, while the "
        "first one is looked into (default: one does both)")  # fmt: skip
    add("--train-on", metavar="FILE", help="stage one goes on from these weights, of the same depth and width")
    add("--tap", nargs="+", metavar="LAYER", help="layers of the classifier that a fresh purifier sees: names, as "
        "init_conv, or patterns, as 'layer.2.*', the last group (default: the paper's, table 5)")  # fmt: skip
    add("--trust-pickle", action="store_true", help="open a file of weights even if that runs code from it")
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--micro-batch", type=int, help="to save memory: attacks and representations so many pictures at a time, the "
        "purifier's activations computed twice; the same result")  # fmt: skip
    add("--save-every", type=float, default=10, help="minutes between checkpoints (default: 10)")
    add_options(parser, Preset)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Preset, str]:
    """The preset with what the command line overrides, and the run's name. ValueError for what makes no sense."""
    check_options(args)
    p = choose_preset(args.preset or (args.dataset if args.dataset in PRESETS else "cifar10"), args)
    fresh = args.objective == "paper" or args.start == "scratch"
    decided = ["--" + name.replace("_", "-") for name in DECIDED if getattr(args, name) is not None]
    stem = Path(os.path.abspath(args.dataset)).stem  # of a link its own name
    name = args.name or (f"{stem}-end-to-end" if args.objective == "end-to-end" else stem)
    for refused, sentence in (
        (Path(os.path.abspath("runs")) not in Path(os.path.abspath(f"runs/{name}")).parents,
         "--name is that of a folder under runs/"),
        (args.objective == "paper" and args.start, "--from goes with --objective end-to-end"),
        (not fresh and args.classifier, "--classifier goes with --from scratch; else the checkpoint's own is used"),
        (not fresh and decided, f"{' and '.join(decided)}: the checkpoint that --from names decides that"),
        (args.mirror and not p.augment, "--mirror true goes with --augment true: it is the crops that are mirrored"),
        (not fresh and args.tap, "--tap goes with --from scratch; otherwise the checkpoint's purifier has its layers"),
        (not fresh and args.stage == "classifier", "--stage classifier trains none when starting from a checkpoint"),
        (args.train_on and (args.classifier or "train") != "train",
         "--train-on and --classifier exclude each other: is the classifier to be trained or not?"),
        (args.stage == "classifier" and args.final, "--final goes with a purifier: --stage classifier trains none"),
        (args.stage == "classifier" and (args.classifier or "train") != "train",
         "--stage classifier and --classifier exclude each other: is the classifier to be trained or not?"),
        ("published" in (args.classifier, args.train_on, args.final) and not names_of(args.dataset),
         f"no classifier is published for {args.dataset}; known are {', '.join(CLASSIFIERS)}"),
    ):  # fmt: skip
        if refused:
            raise ValueError(sentence)
    if args.objective == "end-to-end":
        args.start = args.start or str(Path("runs") / stem / "carso.pt")
    if args.classifier is None:
        as_published = args.dataset in CLASSIFIERS and (p.depth, p.width) == (PAPER.depth, PAPER.width)
        trained = args.train_on or args.stage == "classifier"
        args.classifier = "published" if as_published and not trained else "train"
    return p, name


def main() -> int:
    args = parse_arguments()
    start_output()
    keep_freed_memory()
    try:
        launched()
        start_device(args.device)
        ranks = start_ranks(args.device)
        p, name = prepare(args)
        folder = Path("runs") / name
        data, p = load_data(args, p, ranks)
        asked = ("dataset", "classifier", "seed", "start", "train_on", "tap", "final")
        config = {field: getattr(args, field) for field in asked} | dataclasses.asdict(p)
        config["objective"] = args.objective if args.start else None
        if args.start not in (None, "scratch"):
            config = {k: v for k, v in config.items() if k not in DECIDED}
        run, done = Run(folder, config, ranks, 60 * args.save_every), ranks.agree((folder / "carso.pt").is_file())
        run.settle(done, format=2, data=training_fingerprint(data))
        if done:
            if ranks.first:
                load_checkpoint(folder / "carso.pt")
            run.say(f"{folder / 'carso.pt'} is complete: attack it with evaluate.py --ckpt, or choose another --name")
            return 0
        start = classifier = None
        if args.start not in (None, "scratch"):
            start = load_start(args.start, data, ranks.device)
        elif args.train_on or args.classifier != "train":
            classifier = load_classifier(args.train_on or args.classifier, args, data, p, ranks)
        final = load_classifier(args.final, args, data, p, ranks) if args.final else None
        shape, device = tuple(data.train_images.shape[1:]), ranks.device.type
        if not start:
            check_buildable(classifier, shape, p, args.tap)
        given = "".join(fingerprint_of(network) for network in (start or classifier, final) if network)
        run.settle(write=ranks.first, weights=given or None)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the training began", file=sys.stderr)
        return 130
    try:
        run.say(f"{data.name}: {len(data.train_labels)} training pictures {shape}, {len(data.classes)} classes; "
                f"{ranks.count} process(es) on {device}{'; ' + data.note if data.note else ''}")  # fmt: skip
        if start is None and (classifier is None or args.train_on):
            classifier = stage_one(run, data, p, classifier, args.micro_batch)
        if args.stage == "classifier":
            weights = folder / "classifier.pt"
            run.say(f"now: python evaluate.py --ckpt {weights} --dataset {args.dataset} --eps {eps_text(p.eps)}")
            return 0
        if start is None:  # an untrained purifier around the classifier
            torch.manual_seed(args.seed)
            start = untrained(classifier, shape, p, args.tap).to(ranks.device)
        start.final = start.final if final is None else final.requires_grad_(False)
        if args.objective == "end-to-end":
            train_end_to_end(run, data, start, p, args.micro_batch)
        else:
            train_purifier(run, data, start, p, args.micro_batch)
        finish(run, args, data, start, p)
    except Stopped as stop:
        run.say(f"stopped at {stop} and saved; the same command goes on from there")
        return 130
    except KeyboardInterrupt:
        run.say("stopped; the same command goes on from the last checkpoint")
        return 130
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("train.py: the memory is not enough: add --micro-batch 64, say, and the command goes on from "
              "the last checkpoint; or choose smaller batches, and another --name", file=sys.stderr)  # fmt: skip
        return 2
    except OSError as error:
        print(f"train.py: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
