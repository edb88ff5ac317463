"""The loop of every training: it logs, saves, and goes on where it stopped.

All random numbers are drawn for the global batch by a generator that follows from (seed, stage, epoch, step), and each
process takes its own rows: so the result does not depend on their number, and resuming needs no generator's state.
"""

import contextlib
import dataclasses
import hashlib
import signal
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data as datasets
from attacks import pgd
from lab.checkpoints import save_checkpoint
from lab.files import check_config, read_json, save_grid, write_atomically, write_text
from lab.presets import Preset, fit_batches
from lab.ranks import Ranks
from models import WideResNet
from purifier import CARSO, Purifier


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; the step was finished and saved."""


class Diverged(ValueError):
    """A sum or a weight is not finite; nothing of it was kept."""


def finite(state) -> bool:
    """Is every number in nested dicts and lists of tensors finite?"""
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all())
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return all(map(finite, inner))


IDENTITY = ("format", "data", "weights")  # what a run stands on and no option tells
DECIDED = ("depth", "width", "condition_dim", "latent_dim", "decoder_width", "samples")  # by a checkpoint to go on from


class Run:
    """One folder, one configuration, one set of ranks: stepping, saving, resuming, logging."""

    def __init__(self, folder: Path, config: dict, ranks: Ranks, save_every: float):
        self.folder, self.config, self.ranks, self.save_every = folder, config, ranks, save_every
        self.last_save, self.stopping = time.monotonic(), False
        self.window = 1 if ranks.device.type == "cpu" else 10  # steps between two looks at sums: a GPU is waited for

    def settle(self, complete: bool = False, write: bool = False, **identity) -> None:
        """Compare the folder's configuration with ours, `identity` included from now on; write it where there is none.
        What we do not know (yet), and what a complete run of an earlier version did not write down, is not compared.
        ValueError where something differs."""
        path, self.config = self.folder / "config.json", self.config | identity
        old = read_json(path) if path.is_file() else {}
        unknown = [k for k in IDENTITY + DECIDED if k not in self.config or (complete and k not in old)]
        check_config(path, self.config | {k: old.get(k) for k in unknown}, "--name", write)

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

    def pictures(self, data: datasets.Dataset, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of a global batch: x (b, C, H, W) in [0, 1], y (b,)."""
        mine = self.ranks.share(indices)
        images, labels = (part[mine.to(part.device)] for part in (data.train_images, data.train_labels))
        return datasets.pixels(images.to(self.ranks.device)), labels.to(self.ranks.device)

    def uniform(self, x: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """PGD's random start for this rank's pictures, in [-1, 1], of x's shape; drawn for the global batch."""
        noise = 2 * torch.rand((len(indices), *x.shape[1:]), generator=generator, device=x.device) - 1
        return self.ranks.share(noise)

    def train(self, stage: str, epochs: int, count: int, batch_size: int, parts: dict, columns, step, after_epoch=None):
        """Call step(epoch, number, indices, first) for every batch of every epoch, from where a saved run stopped.

        parts: name -> anything with a state_dict; saved and restored together.
        step: trains on the global batch `indices` (of which it takes its rank's rows), whose first picture is number
            `first` since the start, and returns the sums over its rows of what `columns` names.
        Every epoch's means over all pictures become a row of log-STAGE.tsv (the purifier's: log.tsv).
        """
        path, device = self.folder / f"{stage}.resume.pt", self.ranks.device
        epoch_now, step_now, rows, sums = 0, 0, [], torch.zeros(len(columns), dtype=torch.float64)
        if saved := self.ranks.load(path):  # on the CPU: on a GPU each of RAdam's counters would have to be waited for
            try:
                for name, part in parts.items():
                    part.load_state_dict(saved["parts"].pop(name))
                epoch_now, step_now, rows, sums = saved["epoch"], saved["step"], saved["rows"], saved["sums"]
            except Exception as error:  # whatever a network or an optimizer says to what is not its state
                text = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"{path} is no state of this run ({text}): delete it, and {stage} begins anew"
                ) from None
            self.say(f"{stage}: going on at epoch {epoch_now}, step {step_now}")

        def diverged(what, epoch, step) -> Diverged:
            if self.ranks.first:
                path.unlink(missing_ok=True)  # what was saved leads here again
            return Diverged(f"{stage}: {what} is not finite at epoch {epoch}, step {step}, and nothing of it is kept: "
                            "choose a lower learning rate, and another --name")  # fmt: skip

        def save(epoch, step):
            self.last_save = time.monotonic()
            state = {name: part.state_dict() for name, part in parts.items()}
            if not finite(state):
                raise diverged("a weight", epoch, step)
            if self.ranks.first:
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
            gathered = torch.zeros(len(columns), dtype=torch.float64, device=device)  # over this rank's last steps
            for number in bar:
                first = epoch * count + sum(len(indices) for indices in order[:number])
                values = step(epoch, number, order[number], first)
                gathered, steps_done = gathered + values.double(), steps_done + 1
                pictures += len(order[number])
                if (number + 1) % self.window and number + 1 < len(order):
                    continue
                values = torch.cat([gathered, gathered.new_tensor([float(self.stopping)])])
                values, gathered = self.ranks.sum(values).cpu(), torch.zeros_like(gathered)
                sums += values[:-1]
                if not finite(sums):
                    raise diverged("the loss", epoch, number)
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
            write_text(self.folder / name, "\n".join(lines) + "\n")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def accuracy(model: nn.Module, data: datasets.Dataset, count: int, attack=None, limit: int = 250) -> float:
    """On the first `count` test pictures, attacked by attack(model, x, y) if given, at most `limit` at a time."""
    device, correct = next(model.parameters()).device, 0
    count = min(count, len(data.test_labels))
    for indices in torch.arange(count).split(max(1, limit)):
        x, y = datasets.pixels(data.test_images[indices].to(device)), data.test_labels[indices].to(device)
        x = attack(model, x, y) if attack else x
        with torch.no_grad():
            correct += (model(x).argmax(1) == y).sum().item()
    return correct / count


def draw_reconstructions(path: Path, carso, data: datasets.Dataset, p: Preset, rows: int = 8) -> None:
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


def drawing(run: Run, carso, data: datasets.Dataset, p: Preset, epochs: int):
    """What the loop calls after an epoch: reconstructions.png, every fifth time and the last."""

    def after_epoch(epoch):
        if run.ranks.first and (epoch % 5 == 4 or epoch == epochs - 1):
            draw_reconstructions(run.folder / "reconstructions.png", carso, data, p)

    return after_epoch


def unwrapped(trained: nn.Module, fresh: nn.Module) -> nn.Module:
    """The same weights in a module without traces of training on many ranks."""
    fresh.load_state_dict(trained.state_dict())
    return fresh


def finish(run: Run, args, data: datasets.Dataset, carso: CARSO, p: Preset) -> None:
    """Keep the whole defence as carso.pt, without traces of training on many processes."""
    if not run.ranks.first:
        return
    if not finite(carso.state_dict()):
        raise Diverged("a weight of the result is not finite, and nothing of it is kept: choose a lower learning rate")
    draw_reconstructions(run.folder / "reconstructions.png", carso, data, p)
    classifier = unwrapped(carso.classifier, WideResNet(**carso.classifier.config))
    purifier = unwrapped(carso.purifier, Purifier(**carso.purifier.config))
    rest = dict(own_answer=carso.own_answer, final=carso.final)
    carso = CARSO(classifier, purifier, carso.layers, carso.samples, **rest).to(run.ranks.device)
    state = {"dataset": args.dataset, "data_dir": args.data_dir, "config": run.config, "classes": data.classes}
    save_checkpoint(run.folder / "carso.pt", carso, **state)
    for path in [*run.folder.glob("*.resume.pt"), *run.folder.glob("attacked/*-*.pt")]:
        path.unlink()
    with contextlib.suppress(OSError):  # nothing of ours is in it, or it never was
        (run.folder / "attacked").rmdir()
    clean = accuracy(carso, data, 500, limit=250 // max(1, carso.samples))
    run.say(f"CARSO: clean {clean:.1%} on {min(500, len(data.test_labels))} test pictures")
    run.say(f"now: python evaluate.py --ckpt {run.folder / 'carso.pt'}")


def load_data(args, p: Preset, ranks: Ranks) -> tuple[datasets.Dataset, Preset]:
    """The data set, which one process of each node downloads and caches before the others read it, and the preset with
    batches that fit it. ValueError where they do not suit BatchNorm or the processes."""
    with ranks.one_by_one():
        data = datasets.load(args.dataset, args.data_dir)
    asked, p = p, fit_batches(p, len(data.train_labels), args)
    for name in ("batch_size", "classifier_batch_size", "end_batch_size"):
        option, size, usual = "--" + name.replace("_", "-"), getattr(p, name), getattr(asked, name)
        smallest = min(len(b) for b in datasets.batches(len(data.train_labels), size, 0, 0))
        if smallest < max(2, ranks.count):
            raise ValueError(
                f"{option} {size} leaves a batch of {smallest} for {ranks.count} process(es); make it larger"
            )
        if size != usual and ranks.first:
            print(f"{option} {size} instead of {usual}, for ten batches an epoch; its learning rate falls with it")
        if size % ranks.count and ranks.first:
            print(f"{option} {size} over {ranks.count} processes: their shares differ by one picture")
    if ranks.device.type == "cuda" and ranks.room(data.train_images.nbytes) == ranks.device:
        parts = dict(train_images=data.train_images.to(ranks.device), train_labels=data.train_labels.to(ranks.device))
        data = dataclasses.replace(data, **parts)
    return data, p


def training_fingerprint(data: datasets.Dataset) -> str:
    """Of its training pictures and labels, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (data.train_images, data.train_labels):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
