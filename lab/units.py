"""An evaluation as units of work: attack a chunk, choose each picture's worst candidate, score it on fresh draws.

Each finished (attack, chunk) is a file, so that an evaluation can be killed anywhere and go on, with any number of
processes, and the result is the same: all random numbers follow from the attack and the chunk.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, K classes.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data as datasets
from lab.files import write_npz
from lab.presets import Budget
from lab.suite import AGGREGATIONS, VIEWS, Target, climb, hits, reseed, seed_for


class Evaluation:
    """One model under one configuration, and the folder that holds its units of work.

    images (n, C, H, W) uint8 and labels (n,); config and budget as evaluate.py makes them; limit: so many pictures at a
    time, for memory; attacks: name -> Attack."""

    def __init__(
        self, model: nn.Module, images, labels, config: dict, budget: Budget, folder: Path, device, limit: int, attacks
    ):
        self.defence, self.images, self.labels = model, images, labels
        self.config, self.budget, self.folder, self.device, self.limit = config, budget, folder, device, limit
        self.eps, self.samples, self.view = config["eps"], config["samples"], VIEWS[config["view"]]
        self.judge = None  # a second classifier, which looks at the reconstructions; see lab/report.py
        self.attacks, self.decide = attacks, AGGREGATIONS[config["aggregation"]][0]
        self.starts = range(0, len(labels), budget.chunk)

    def changed(self, what: str, value, folder: Path) -> "Evaluation":
        """The same evaluation with one number of its configuration changed, in another folder."""
        budget = dataclasses.replace(self.budget, **{what: value}) if hasattr(self.budget, what) else self.budget
        config = self.config | {what: value}
        same = self.device, self.limit, self.attacks
        return Evaluation(self.defence, self.images, self.labels, config, budget, folder, *same)

    def pictures(self, start: int):
        """One chunk: x (B, C, H, W) in [0, 1], y (B,)."""
        rows = slice(start, start + self.budget.chunk)
        return datasets.pixels(self.images[rows].to(self.device)), self.labels[rows].to(self.device)

    def file(self, kind: str, start: int) -> Path:
        return self.folder / "work" / f"{kind}-{start:06d}.npz"

    def target(self, name: str, view) -> Target:
        bare = self.attacks[name].on == "classifier"
        model = getattr(self.defence, "classifier", self.defence) if bare else self.defence
        return Target(model, view, self.samples, self.limit)

    def search_precision(self):
        """What attacks run in: bfloat16 inside the networks, float32 for logits and losses; scores are never in it."""
        reduced = self.config.get("search_precision") == "bf16"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=reduced)

    def patiently(self, work):
        """work(), again with half as many pictures at a time whenever the device's memory is full. The random numbers,
        and so the results, do not depend on it."""
        while True:
            try:
                return work()
            except torch.cuda.OutOfMemoryError:
                if self.limit <= 16:
                    print("evaluate.py: out of memory even so; choose a smaller --chunk", file=sys.stderr)
                    sys.exit(2)
            torch.cuda.empty_cache()
            self.limit //= 2
            print(f"out of memory: going on with {self.limit} pictures at a time", flush=True)

    def one_call(self, x, y, gradient: bool, classifier: bool, draws: int) -> torch.Tensor:
        """What an attack does again and again; for the plan. Returns the gradient, or the logits (B, E, K)."""
        model = self.defence.classifier if classifier else self.defence
        target = Target(model, self.view, self.samples, self.limit)
        if gradient:
            with self.search_precision():
                return climb(target, y, "ce", draws)(x)[1]
        with torch.no_grad():
            return target.draws(x, draws, target.draw(x, draws))

    def attack(self, name: str, start: int) -> None:
        """Search: adversarial candidates of one chunk by one attack."""
        x, y = self.pictures(start)
        reseed(seed_for("attack", name, start, self.config["seed"]), self.defence)
        target, began = self.target(name, self.view), time.monotonic()
        with self.search_precision():
            candidates, during = self.attacks[name].run(target, x, y, self.eps, self.budget)
        found = dict(candidates=candidates.cpu().numpy(), during=during.cpu().numpy())
        write_npz(self.file(name, start), seconds=time.monotonic() - began, **found, **target.count)

    def score(self, name: str, start: int) -> None:
        """Choose each picture's worst candidate on one set of draws, then score it on new ones."""
        x, y = self.pictures(start)
        with np.load(self.file(name, start)) as file:
            candidates = torch.from_numpy(file["candidates"]).to(self.device)
        inside = (candidates - x).abs().max() <= self.eps + 1e-5
        if not (inside and candidates.min() >= 0 and candidates.max() <= 1):
            raise RuntimeError(f"attack {name} left the eps-ball or [0, 1]; this is a bug in the attack")
        reseed(seed_for("score", name, start, self.config["seed"]), self.defence)
        target = self.target(name, self.decide)
        select = torch.stack([hits(target, c, y, self.budget.select).float().mean(1) for c in candidates])  # (N, B)
        chosen = select.argmin(0)
        worst = candidates[chosen, torch.arange(len(y), device=chosen.device)]
        write_npz(
            self.file(f"score-{name}", start),
            worst=worst.cpu().numpy(),
            hits=hits(target, worst, y, self.budget.draws).cpu().numpy(),
            select=select.min(0).values.cpu().numpy(),
        )

    def accuracy(self, name: str) -> float:
        """Under one attack, over the chunks that are scored."""
        files = [path for start in self.starts if (path := self.file(f"score-{name}", start)).is_file()]
        return float(np.concatenate([np.load(path)["hits"].mean(1) for path in files]).mean())

    def run(self, names: list[str], rank: int, ranks: int) -> None:
        """Every unit that has no file yet and is this process's turn."""
        units = [(start, name) for start in self.starts for name in names]
        mine = [u for i, u in enumerate(units) if i % ranks == rank and not self.file(f"score-{u[1]}", u[0]).is_file()]
        bar, began = tqdm(mine, "evaluating", disable=None if rank == 0 else True), time.monotonic()
        for done, (start, name) in enumerate(bar):
            bar.set_postfix_str(f"{name}, pictures from {start}")
            if not self.file(name, start).is_file():
                self.patiently(lambda name=name, start=start: self.attack(name, start))
            self.patiently(lambda name=name, start=start: self.score(name, start))
            if rank == 0:
                with np.load(self.file(f"score-{name}", start)) as file:
                    right, pictures = file["hits"].mean(), len(file["hits"])
                left = (time.monotonic() - began) / (done + 1) * (len(mine) - done - 1)
                tqdm.write(
                    f"{name:>12}  pictures {start}-{start + pictures - 1}  right {right:6.1%}  {left:6.0f} s left"
                )

    def wait(self, names: list[str]) -> None:
        """Until the other processes have finished their last chunks."""
        while not all(self.file(f"score-{name}", start).is_file() for name in names for start in self.starts):
            time.sleep(0.5)
