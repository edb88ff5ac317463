"""An evaluation as units of work: one attack on one chunk of pictures; its result is a file.

An evaluation can be killed anywhere and go on, with any number of processes on any number of machines that share the
folder: each claims a unit that nobody works on, until none is left. All random numbers follow from the attack and the
chunk, so the result is the same. In a cascade a picture that one attack has taken is not attacked by the next ones.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, K classes.
"""

import contextlib
import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data as datasets
from lab.files import claim, write_npz
from lab.presets import Budget
from lab.race import least, lost, race
from lab.start import out_of_memory
from lab.target import AGGREGATIONS, VIEWS, Target, climb, deterministic, full_precision, hits, reseed, seed_for

UNITS = 2  # the version of what a unit's file means; another one's are never mixed with these
CONTROLS = ("clean", "noise")  # they count in the headline, but are no attacks on this model


class Evaluation:
    """One model under one configuration, and the folder that holds its units of work.

    images (n, C, H, W) uint8 and labels (n,); config and budget as evaluate.py makes them; limit: so many pictures at a
    time, for memory; attacks: name -> Attack, in the order in which they run."""

    def __init__(
        self, model: nn.Module, images, labels, config: dict, budget: Budget, folder: Path, device, limit: int, attacks
    ):
        self.defence, self.images, self.labels, self.attacks = model, images, labels, attacks
        self.config, self.budget, self.folder, self.device, self.limit = config, budget, folder, device, limit
        self.eps, self.samples, self.view = config["eps"], max(1, config["samples"]), VIEWS[config["view"]]
        self.cascade = config.get("cascade", False)
        self.judge = None  # a second classifier, which looks at the reconstructions; see lab/report.py
        self.decide = AGGREGATIONS[config["aggregation"]][0]
        self.starts = range(0, len(labels), budget.chunk)
        self._deterministic: dict[bool, bool] = {}

    def changed(self, what: str, value, folder: Path) -> "Evaluation":
        """The same evaluation with one number of its configuration changed, in another folder."""
        other = copy.copy(self)
        if hasattr(self.budget, what):
            other.budget = dataclasses.replace(self.budget, **{what: value})
        other.config, other.folder = self.config | {what: value}, folder
        other.eps, other.samples = other.config["eps"], other.config["samples"]
        return other

    def pictures(self, start: int):
        """One chunk: x (B, C, H, W) in [0, 1], y (B,)."""
        rows = slice(start, start + self.budget.chunk)
        return datasets.pixels(self.images[rows].to(self.device)), self.labels[rows].to(self.device)

    def file(self, name: str, start: int) -> Path:
        return self.folder / "work" / f"{name}-{start:06d}.npz"

    def take_over(self, other: "Evaluation") -> None:
        """What another evaluation, which differs in its view of the defence alone, found of the bare classifier."""
        for unit in ((name, start) for name in other.finished() if self.bare(name) for start in self.starts):
            if not self.file(*unit).is_file():
                write_npz(self.file(*unit), **other.read(*unit))

    # ------------------------------------------------------------------------------------------ the model attacked

    def bare(self, name: str) -> bool:
        """Is this attack on the bare classifier, and is that not the whole model?"""
        return self.attacks[name].on == "classifier" and hasattr(self.defence, "purifier")

    def target(self, bare: bool, view) -> Target:
        return Target(self.defence.classifier if bare else self.defence, view, self.samples, self.limit)

    def is_deterministic(self, bare: bool = False) -> bool:
        """Then one draw says everything about it."""
        if bare not in self._deterministic:
            self._deterministic[bare] = deterministic(self.target(bare, self.decide), self.pictures(0)[0][:2])
        return self._deterministic[bare]

    def budget_for(self, name: str) -> Budget:
        once = dict(eot=1, select=1, draws=1) if self.is_deterministic(self.bare(name)) else {}
        return dataclasses.replace(self.budget, **once)

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
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.limit <= 16:
                    raise
            torch.cuda.empty_cache()
            self.limit //= 2
            print(f"out of memory: going on with {self.limit} pictures at a time", flush=True)

    def one_call(self, x, y, gradient: bool, classifier: bool, draws: int) -> torch.Tensor:
        """What an attack does again and again, a picture's draws together: the gradient, or logits (B, E, K)."""
        target = self.target(classifier, self.view).like_this(limit=max(self.limit, draws * self.samples))
        if gradient:
            with self.search_precision():
                return climb(target, y, "ce", draws)(x)[1]
        with torch.no_grad():
            return target.draws(x, draws, target.draw(x, draws))

    # -------------------------------------------------------------------------------------------------- the units

    def standing(self, name: str, start: int) -> torch.Tensor:
        """Which pictures no earlier attack of the cascade has taken, (B,)."""
        standing = torch.ones(min(self.budget.chunk, len(self.labels) - start), dtype=torch.bool, device=self.device)
        names = list(self.attacks)[: list(self.attacks).index(name)] if self.cascade and name not in CONTROLS else []
        for earlier in names:
            if self.bare(earlier) == self.bare(name) and self.file(earlier, start).is_file():
                standing &= torch.from_numpy(self.read(earlier, start)["select"] > 0).to(self.device)
        return standing

    def attack(self, name: str, start: int) -> None:
        """One unit: search for candidates, choose each picture's worst, score it on fresh draws."""
        (x, y), b, bare, began = self.pictures(start), self.budget_for(name), self.bare(name), time.monotonic()
        target, scorer = self.target(bare, self.view), self.target(bare, self.decide)
        reseed(seed_for("select", start, self.config["seed"]), self.defence)
        z = scorer.draw(x, b.select)  # the same noise for all candidates of a picture
        standing, during = self.standing(name, start), torch.ones(len(x), dtype=torch.bool, device=x.device)
        attacked, candidates, of = standing.clone(), [x[:0]], [y[:0]]
        runs = self.attacks[name].runs(b, self.config["classes"], target.has_members)
        for number, run in enumerate(runs):
            rows = standing.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            reseed(seed_for("attack", name, start, number, self.config["seed"]), self.defence)
            with self.search_precision():
                found, survived = run(target.like_this(rows=rows, whole=len(x)), x[rows], y[rows], self.eps, b)
            during[rows] &= survived
            pictures, found = rows.repeat(len(found)), found.flatten(0, 1)
            inside = (found - x[pictures]).abs().amax((1, 2, 3)) <= self.eps + 1e-5
            if not (inside.all() and found.min() >= 0 and found.max() <= 1):
                raise RuntimeError(f"attack {name} left the eps-ball or [0, 1]; this is a bug in the attack")
            moved = (found != x[pictures]).flatten(1).any(1) | (name == "clean")
            candidates, of = candidates + [found[moved]], of + [pictures[moved]]
            if self.cascade and number + 1 < len(runs):
                taken = lost(scorer, found[moved], pictures[moved], y, z, b.select)
                standing[pictures[moved][taken]] = False
        candidates, of = torch.cat(candidates), torch.cat(of)
        with full_precision():
            right, running = race(scorer, candidates, of, y, z, b.select)
            chosen = least(right, running, of, len(x))
            is_found = (chosen >= 0) & attacked
            worst = x.clone()
            worst[is_found] = candidates[chosen[is_found]]
            select = torch.ones(len(x), device=x.device)
            select[is_found] = right[chosen[is_found]] / b.select
            reseed(seed_for("score", name, start, self.config["seed"]), self.defence)
            z, score = scorer.draw(x, b.draws), torch.zeros(len(x), b.draws, dtype=torch.bool, device=x.device)
            noise = None if z is None else z[attacked]
            score[attacked] = hits(scorer, worst[attacked], y[attacked], b.draws, noise)
        arrays = dict(worst=worst, hits=score, select=select, found=is_found, attacked=attacked, during=during)
        arrays |= target.count | {"candidates": len(candidates) / max(int(attacked.sum()), 1)}
        self.write(name, start, began, arrays)

    def headline(self, name: str, names: list[str], start: int) -> None:
        """The last unit of a chunk: which attack is each picture's worst? The race goes on between the attacks' worst
        candidates; among equals a real attack counts, not the clean picture; a picture that was lost on every draw
        counts with the first attack that took it so."""
        (x, y), b, began = self.pictures(start), self.budget_for("clean"), time.monotonic()
        files = [self.read(n, start) for n in names]
        found = torch.from_numpy(np.stack([f["found"] for f in files])).to(self.device)  #    (attacks, B)
        select = torch.from_numpy(np.stack([f["select"] for f in files])).to(self.device)  #  (attacks, B)
        worst = torch.from_numpy(np.stack([f["worst"] for f in files])).to(self.device)  #    (attacks, B, C, H, W)
        taken = found & (select == 0)
        gone = taken.any(0)
        order = sorted(range(len(names)), key=lambda i: names[i] in CONTROLS)  # among equals the first one counts
        pairs = [(i, j) for i in order for j in range(len(x)) if found[i, j] and not gone[j]]
        i, j = torch.tensor(pairs, dtype=torch.long, device=self.device).reshape(-1, 2).T
        scorer, more = self.target(False, self.decide), 0 if self.is_deterministic() else 2 * b.select
        with full_precision():
            reseed(seed_for("headline", start, self.config["seed"]), self.defence)
            z, earlier = scorer.draw(x, max(more, 1)), (select[i, j] * b.select).round()
            best = torch.full((len(x),), torch.inf, device=self.device).scatter_reduce(0, j, earlier, "amin")
            close = earlier <= best[j] + b.select**0.5
            i, j, right, running = i[close], j[close], earlier[close], close[close]
            if more:
                right, running = race(scorer, worst[i, j], j, y, z, more, right, b.select)
            chosen = least(right, running, j, len(x))
            attack = torch.where(gone, taken.int().argmax(0), i[chosen] if len(i) else 0)
            bound = torch.where(gone, 0.0, right[chosen] / (b.select + more) if len(i) else 0.0)
            adversarial = worst[attack, torch.arange(len(x), device=self.device)]
            reseed(seed_for("final", start, self.config["seed"]), self.defence)
            score = hits(scorer, adversarial, y, b.draws, scorer.draw(x, b.draws))
        self.write(name, start, began, dict(attack=attack, hits=score, select=bound, worst=adversarial))

    def write(self, name: str, start: int, began: float, values: dict) -> None:
        arrays = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        write_npz(self.file(name, start), seconds=time.monotonic() - began, **arrays)

    def read(self, name: str, start: int) -> dict[str, np.ndarray]:
        """A finished unit. OSError if its file is damaged."""
        path = self.file(name, start)
        try:
            with np.load(path) as file:
                return {key: file[key] for key in ("hits", "select", "seconds", "worst")} | dict(file)
        except Exception as error:  # numpy and zipfile raise anything
            raise OSError(f"{path} is damaged ({error!r}): delete it, and it is made again") from None

    # --------------------------------------------------------------------------------------------- who does which

    def begun(self, name: str) -> bool:
        """Is there any unit of this attack in the folder?"""
        return any(self.file(name, start).is_file() for start in self.starts)

    def finished(self) -> list[str]:
        """The attacks whose every chunk is in the folder, whatever command put it there."""
        return [name for name in self.attacks if all(self.file(name, start).is_file() for start in self.starts)]

    def headline_of(self, names: list[str]) -> tuple[str, list[str]]:
        """The name of the units that make one headline of these attacks, and those of them that count in it: on the
        defence, or on a model that is just a classifier."""
        counted = [name for name in names if not self.bare(name)]
        return f"headline-{seed_for(*counted):08x}", counted

    def ready(self, name: str, names: list[str], start: int) -> bool:
        """In a cascade an attack waits for the earlier ones on the same pictures."""
        return not self.cascade or all(self.file(n, start).is_file() for n in names[: names.index(name)])

    def run(self, names: list[str], loud: bool = False, over: list[str] | None = None) -> None:
        """Every unit of these attacks that has no file yet, in turn with any other process, until none is left. With
        `over`, names are those of a headline over these attacks.

        A cascade also finishes what earlier commands began: a later attack leaves out the pictures that an earlier one
        took, and so the earlier one has to count.

        All chunks of one attack come before the next attack, so that no process waits for another until the end."""
        if self.cascade and over is None:
            names = [name for name in self.attacks if name in names or self.begun(name)]
        work = [(name, start) for name in names for start in self.starts]
        bar, mine, told = tqdm(total=len(work), desc="evaluating", disable=None if loud else True), 0, time.monotonic()
        seconds: dict[str, list[float]] = {}
        while work := [unit for unit in work if not self.file(*unit).is_file()]:
            bar.update(bar.total - len(work) - bar.n)
            for name, start in (unit for unit in work if self.ready(unit[0], names, unit[1])):
                with claim(self.file(name, start)) as claimed:
                    if not claimed or self.file(name, start).is_file():
                        continue
                    bar.set_postfix_str(f"{name}, pictures from {start}")
                    if over is None:
                        self.patiently(lambda name=name, start=start: self.attack(name, start))
                    else:
                        self.patiently(lambda name=name, start=start: self.headline(name, over, start))
                mine += 1
                if loud and over is None:
                    seconds.setdefault(name, []).append(self.told(name, start))
                    known = np.mean(np.concatenate(list(seconds.values())))
                    ahead = sum(np.mean(seconds.get(n, known)) for n, _ in work) - np.mean(seconds[name])
                    done = bar.total - len(work) + 1  # by all processes, of which this one did `mine`
                    tqdm.write(f"{'':>12}  about {ahead * mine / done:.0f} s left")
                break
            else:
                if loud and time.monotonic() - told > 10:
                    told = time.monotonic()
                    tqdm.write(f"waiting for {', '.join(f'{n} from {s} ({self.owner(n, s)})' for n, s in work[:3])}")
                time.sleep(0.2)
        bar.close()

    def accuracy(self, name: str) -> float:
        """Under one attack, over all chunks."""
        return float(np.concatenate([self.read(name, start)["hits"].mean(1) for start in self.starts]).mean())

    def told(self, name: str, start: int) -> float:
        """Says what a finished unit found; returns its seconds."""
        right, seconds = (self.read(name, start)[key] for key in ("hits", "seconds"))
        last = start + len(right) - 1
        tqdm.write(f"{name:>12}  pictures {start}-{last}  right {right.mean():6.1%}  in {seconds:.0f} s")
        return float(seconds)

    def owner(self, name: str, start: int) -> str:
        with contextlib.suppress(OSError):
            return self.file(name, start).with_suffix(".lock").read_text()
        return "nobody yet"
