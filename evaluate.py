"""Attack a trained CARSO end to end, score every adversarial picture on fresh draws, and report the worst.

    python evaluate.py --ckpt runs/digits/carso.pt                              # AutoAttack, as in the paper
    python evaluate.py --ckpt runs/digits/carso.pt --attack all                 # everything we know
    python evaluate.py --ckpt runs/digits/carso.pt --view naive-odds            # the reference's output: audit fails
    python evaluate.py --ckpt runs/digits/carso.pt --attack rand --eps 0.95     # the paper's sanity check, table 3
    python evaluate.py --ckpt runs/digits/carso.pt --sweep eps                  # also steps, eot, samples
    python evaluate.py --published cifar10                                      # the authors' released defence, fetched
    python evaluate.py --model mine.py:build --dataset cifar10 --attack all     # any function that returns an nn.Module
    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/cifar10/carso.pt --attack all

First the audit: do gradients exist, and are they the derivative? If not, the exit status is 3 and the report says why.
Work is cut into chunks of pictures; each finished (attack, chunk) is a file. Kill it anywhere and run the same command
again, with any number of processes: it goes on, and the result is the same, since all random numbers follow from the
attack and the chunk. Processes share a folder and never talk to each other.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, S members, K classes.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import sys
from pathlib import Path

import torch
from torch import nn

import data as datasets
from attacks import ascend, project
from lab import audit, plan, published, report
from lab.checkpoints import check_fits, fingerprint_of, is_checkpoint, load_checkpoint, load_published
from lab.checkpoints import load_published_classifier as load_classifier
from lab.files import check_config, write_text
from lab.foreign import check_answers, load_function
from lab.presets import BUDGETS, Budget, add_options, check_options, eps_text, overridden, parse_number
from lab.ranks import keep_freed_memory
from lab.start import last_words, launched, start_device, start_output
from lab.suite import CONTROL_ATTACKS, CONTROLS, OUR_ATTACKS, Attack, alone, found, remember_best
from lab.target import AGGREGATIONS, VIEWS, Target, climb, differentiable
from lab.units import UNITS, Evaluation
from models import WideResNet

# ------------------------------------------------------------------------------------ the paper's attacks, section 5.1


def autoattack(version: str):
    """AutoAttack (Croce and Hein 2020), `standard` or `rand`, with this budget's steps, draws, queries and targets.

    Where nothing was flipped it returns the clean picture; of rand, which stops at one lucky draw, the points of the
    largest loss are candidates too."""

    def run(target: Target, x, y, eps: float, b: Budget):
        from pyautoattack import AutoAttack
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        with torch.no_grad():
            classes = target(x[:1]).shape[1]
        settings = dict(eps=eps, norm="Linf", seed=torch.initial_seed() % 2**31, device=x.device)
        suite = AutoAttack(target, version=version, **settings)
        draws, targets = b.eot if version == "rand" else 1, min(b.targets, classes - 1)
        # Built anew: changing n_iter afterwards would leave their schedules at 100 steps.
        settings |= dict(n_restarts=1, n_iter=b.steps, verbose=False)
        pgd = settings | dict(rho=0.75, logger=suite.logger)
        suite.apgd = APGDAttack(target, eot_iter=draws, **pgd)
        suite.apgd_targeted = APGDAttack_targeted(target, n_target_classes=targets, eot_iter=1, **pgd)
        suite.fab = FABAttack_PT(target, n_target_classes=targets, **settings)
        suite.square.n_queries = b.queries
        suite.square.perturb = torch.no_grad()(suite.square.perturb)  # it would keep the graph of every query
        if classes <= 3:  # APGD-T, FAB-T and DLR need more classes than that
            suite.attacks_to_run = ["apgd-ce"] if version == "rand" else ["apgd-ce", "fab", "square"]
            suite.fab.n_target_classes = classes - 1
        points = remember_best(suite.apgd, x) if version == "rand" else []
        adversarial, answer = suite.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
        return project(torch.stack([adversarial.detach(), *points]), x, eps), answer == y

    return run


def pgd_eot(target: Target, x, y, eps: float, b: Budget):
    """PGD with EoT (paper, table 12), from a random start."""
    objective = climb(target, y, "ce", b.eot)
    return found(target, y, ascend(objective, x, target.random_point(x, eps), eps, b.pgd_steps, b.pgd_step_size))


PAPER_ATTACKS = {
    "pgd-eot": Attack(alone(pgd_eot)),
    "rand": Attack(alone(autoattack("rand"))),
    "standard": Attack(alone(autoattack("standard")), on="classifier", eot=False),
}
SQUARE = {"square": OUR_ATTACKS["square"]}
# In the order in which they run: in a cascade the cheap and strong ones first.
ATTACKS = CONTROL_ATTACKS | {k: a for k, a in OUR_ATTACKS.items() if k != "square"} | PAPER_ATTACKS | SQUARE
GROUPS = {"paper": list(PAPER_ATTACKS), "all": [name for name in PAPER_ATTACKS | OUR_ATTACKS if name != "apgd-ce"]}


# ------------------------------------------------------------------------------------------------------ command line


def load_model(args) -> tuple[nn.Module, dict, datasets.Dataset, Path]:
    """The model to attack, what its checkpoint says of its training, the data, and the file it came from."""
    state, source = {}, Path(args.ckpt or args.published or args.model.rpartition(":")[0])
    whole = args.ckpt and (args.dataset is None or args.control or is_checkpoint(args.ckpt))
    if whole:
        model, state = load_checkpoint(args.ckpt)
    elif args.model:
        model = load_function(args.model)
    elif args.published in published.FOLDERS:
        if args.dataset not in (None, args.published):
            raise ValueError(f"--published {args.published} is for its own pictures, not for --dataset {args.dataset}")
        args.dataset, source = args.published, published.fetch_defence(args.published, args.data_dir or "data")
    if args.dataset is None and "dataset" not in state:
        raise ValueError(f"{source} does not say which data it is for: add --dataset")
    data = datasets.load(args.dataset or state["dataset"], args.data_dir or state.get("data_dir", "data"))
    shape, classes = tuple(data.test_images.shape[1:]), len(data.classes)
    if args.published:
        model, source = load_published(source, classes, shape), next(source.glob("*decoder.safetensors"))
        if args.published in published.FOLDERS:
            published.check_reported(model.classifier.to(args.device), source.parent, data)
    elif args.ckpt and not whole:
        model = load_classifier(source, classes, data.mean, data.std)
    if (args.published or whole) and hasattr(model, "purifier"):
        check_fits(model, source, data.name, shape, classes, state.get("classes"), data.classes)
    model = CONTROLS[args.control](model) if args.control else model
    model = model.requires_grad_(False).to(args.device)
    check_answers(model, args.model or source, data.test_images, classes, args.device)
    if not hasattr(model, "purifier"):
        model = differentiable(model, datasets.pixels(data.test_images[:1].to(args.device)))
    return model, state, data, source


def prepare(args) -> tuple[Evaluation, list[str], list[str]]:
    """Everything that can be refused is refused here, with ValueError or OSError."""
    check_options(args)
    start_device(args.device)
    if args.control and not args.ckpt:
        raise ValueError("--control needs --ckpt")
    model, state, data, source = load_model(args)
    others = {}
    for option, file in (("final", args.final), ("judge", args.judge)):
        if file:
            if not hasattr(model, "purifier"):
                raise ValueError(f"--{option} looks at reconstructions, and this model makes none")
            if file in published.names_of(data.name):
                file = published.fetch_classifier(data.name, file, args.data_dir or "data")
            others[option] = load_classifier(file, len(data.classes), data.mean, data.std).to(args.device)
            check_answers(others[option], file, data.test_images, len(data.classes), args.device)
    if args.final:
        model.final = others["final"].requires_grad_(False)
    budget = overridden(BUDGETS[args.budget or ("reduced" if data.name == "digits" else "paper")], args)
    budget = dataclasses.replace(budget, n=min(budget.n, len(data.test_labels)))
    eps = args.eps if args.eps is not None else (state.get("config") or {}).get("eps", 8 / 255)
    samples = getattr(model, "samples", 1) if args.samples is None else args.samples
    if samples == 0 and (args.control == "fixed-z" or args.sweep == "samples" or not hasattr(model, "purifier")):
        raise ValueError("--samples 0 is a CARSO's single reconstruction of z = 0, which allows no other z")
    if hasattr(model, "purifier"):
        model.samples = samples
    if not isinstance(eps, (int, float)) or not 0 <= eps <= 1:
        raise ValueError(f"--eps {eps} is not a distance between pixels in [0, 1]; write 8/255, say")
    if args.own_answer is not None:
        if not hasattr(model, "own_answer") or not 0 <= args.own_answer < 1:
            raise ValueError("--own-answer is for a CARSO, a share of at least 0 and less than 1")
        model.own_answer = args.own_answer
    asked = [n for a in args.attack for n in GROUPS.get(a, [a])]
    names = [n for n in ATTACKS if n in ("clean", "noise", *asked)]
    skipped = [n for n in names if ATTACKS[n].needs and not hasattr(model, "purifier")]
    images, labels = data.test_images[: budget.n], data.test_labels[: budget.n]
    config = {
        "checkpoint": str(args.ckpt or args.published or args.model),
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "weights": fingerprint_of(model),
        # Of a bare classifier, which the data may give where the weights' file does not.
        "normalisation": [list(model.config[k]) for k in ("mean", "std")] if isinstance(model, WideResNet) else None,
        "pictures": datasets.fingerprint(images, labels, data.classes),
        "units": UNITS,
        "dataset": data.name,
        "eps": eps,
        "samples": samples,
        "aggregation": args.aggregation,
        "view": args.view or AGGREGATIONS[args.aggregation][1],
        "control": args.control,
        "codes": "one a member" if args.control == "fixed-z" else None,  # which earlier versions drew otherwise
        "final": args.final,
        "own_answer": getattr(model, "own_answer", None),
        "judge": args.judge,
        "seed": args.seed,
        "search_precision": args.search_precision,
        "cascade": "all" in args.attack if args.cascade is None else args.cascade,
        "classes": len(data.classes),
        **dataclasses.asdict(budget),
    }
    settings = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=3).hexdigest()
    settings = f"S{samples}-n{budget.n}-steps{budget.steps}-eot{budget.eot}-{settings}"
    folder = Path(args.out or source.parent / f"eval-eps{eps_text(eps).replace('/', '_')}-{settings}")
    check_config(folder / "config.json", config, "--out", write=not args.plan)
    e = Evaluation(model, images, labels, config, budget, folder, args.device, args.limit, ATTACKS)
    e.judge, e.note = others.get("judge"), data.note
    return e, [n for n in names if n not in skipped], [f"{n} (the model has no {ATTACKS[n].needs})" for n in skipped]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    add = parser.add_argument
    what.add_argument("--ckpt", help="a carso.pt; or, with --dataset, a file of a classifier's weights")
    what.add_argument("--published", metavar="NAME", help="the CARSO authors' released defence: cifar10, cifar100 or "
        "tinyimagenet (fetched; the paper's attacks, through two views), or a folder with its four files")  # fmt: skip
    what.add_argument("--model", metavar="FILE.py:FUNCTION", help="a function that returns an nn.Module")
    names = f"any of {', '.join(ATTACKS)}; paper: its whole protocol; all: the union (default: standard rand; with "
    add("--attack", nargs="+", choices=[*ATTACKS, *GROUPS], metavar="NAME", help=names + "--published NAME: paper)")
    add("--cascade", action=argparse.BooleanOptionalAction, help="a picture that an attack takes on every draw is not "
        "attacked again (default: for --attack all)")  # fmt: skip
    add("--eps", type=parse_number, help="radius in pixels, such as 8/255 (default: the training's)")
    add("--samples", type=int, help="S, reconstructions a picture; 0: one, of z = 0 (default: the checkpoint's)")
    add("--own-answer", type=parse_number, metavar="SHARE", help="of the classifier's answer to the picture in a "
        "member (default: the checkpoint's; 0: only reconstructions)")  # fmt: skip
    add("--control", choices=CONTROLS, help="with --ckpt: a part of the defence, or one with a part cut")
    add("--final", metavar="FILE", help="weights of a second classifier, to label the reconstructions (default: the "
        "checkpoint's, which may be the one that is looked into)")  # fmt: skip
    add("--judge", metavar="FILE", help="a second classifier's weights: does it recognise the members?")
    add("--aggregation", choices=AGGREGATIONS, default="robust", help="the decision (default: robust)")
    add("--view", choices=VIEWS, help="what attacks see (default: the decision's own)")
    add("--search-precision", choices=["fp32", "bf16"], default="fp32", help="of attacks; audit and scores are float32")
    add("--plan", action="store_true", help="only print passes, FLOP, hours and memory of the chosen attacks")
    add("--sweep", choices=audit.SWEEPS, help="repeat one attack over a range of this, with a plot")
    add("--budget", choices=BUDGETS, help="default: reduced for digits, paper for the rest")
    add("--dataset", help="default: the one it was trained on")
    add("--data-dir", help="default: as in training")
    add("--out", help="folder (default: beside the checkpoint, named after the settings)")
    add("--seed", type=int, default=0)
    add("--limit", type=int, default=1024, help="pictures at a time, for memory (default: 1024)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_options(parser, Budget)
    return parser.parse_args(argv)


def run(e: Evaluation, args, names: list[str], skipped: list[str], rank: int) -> dict | None:
    """The audit, the attacks, the report, of which the first process returns what report.json holds."""
    audited = e.patiently(lambda: audit.audit(e)) if rank == 0 else None
    for message in audited["messages"] if audited else ():
        print(f"audit: {message}", file=sys.stderr, flush=True)
    if args.sweep:
        audit.sweep(e, args.sweep, loud=rank == 0)
        return {"audit": audited}
    e.run(names, loud=rank == 0)
    names = e.finished()  # also those of earlier commands: the worst counts over all
    headline, counted = e.headline_of(names)
    e.run([headline], loud=rank == 0, over=counted)
    if rank > 0:
        return None
    result = report.write(e, names, headline, audited, skipped)
    print((e.folder / "report.md").read_text(encoding="utf-8"))
    print(report.in_words(result))
    print(f"written to {e.folder}")
    return result


def evaluate(args: argparse.Namespace) -> int:
    """The exit status: 0, 2 for what is refused, 3 if the audit failed (through the last view, where there are two)."""
    released, out = args.published in published.FOLDERS, args.out
    args.attack = args.attack or (["paper"] if released else ["standard", "rand"])
    both = released and args.aggregation == "robust" and not (args.view or args.sweep or args.plan)
    results, earlier = {}, None
    for view in ("naive-odds", "logsumexp") if both else (args.view,):
        try:
            rank, _ = launched()
            if args.device == "cuda" and os.environ.get("LOCAL_RANK"):
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            args.out = str(Path(out) / view) if both and out else out
            e, names, skipped = prepare(argparse.Namespace(**vars(args) | {"view": view}))
        except (ValueError, OSError) as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            return 2
        if e.note and rank == 0:
            print(e.note, flush=True)
        if args.plan or (both and rank == 0 and not earlier):
            print(plan.text(e.patiently(lambda e=e, names=names: plan.plan(e, names, e.one_call)), e), flush=True)
            print("All this for each of two views.\n" if both else "", end="")
        if args.plan:
            return 0
        if earlier:
            e.take_over(earlier)
        results[view], earlier = run(e, args, names, skipped, rank), e
    if both and rank == 0:
        text = published.side_by_side(results, e.budget)
        write_text(e.folder.with_name(f"{e.folder.name}-beside-naive-odds.md"), text)
        print(text)
    return 3 if rank == 0 and not results[view]["audit"]["passed"] else 0


def main() -> int:
    args = parse_arguments()
    start_output()
    keep_freed_memory()
    try:
        return evaluate(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last finished chunk", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = last_words(error, args.model)
        if sentence is None:
            raise
        print(f"evaluate.py: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
