"""Many processes as one: BatchNorm over the pictures of all ranks, random numbers that follow from the step."""

import runpy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch.testing import assert_close

from lab.ranks import Ranks, global_batch_norm
from lab.robust_training import WholePass
from lab.run import Diverged, Run, Stopped


@pytest.fixture
def one_rank():
    """A process group of one, inside this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_global_batch_norm_is_batch_norm(one_rank, shape, dtype):
    """Output, gradients and running statistics; under autocast the layer stays float32 while x is bfloat16."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    ours, theirs = ((nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4) for _ in range(2))
    if dtype == torch.float64:
        ours, theirs = ours.double(), theirs.double()
    ways = []
    for layer, forward in ((ours, lambda x: global_batch_norm(ours, x)), (theirs, theirs)):
        nn.init.uniform_(layer.weight, generator=torch.Generator().manual_seed(1))
        lead = x.clone().requires_grad_()
        out = forward(lead)
        out.square().sum().backward()
        layer.eval()
        numbers = (out, lead.grad, layer.weight.grad, layer.running_mean, layer.running_var, forward(x))
        ways.append([n.detach() for n in numbers])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert ways[0][0].dtype == dtype
    for mine, other in zip(*ways, strict=True):
        assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_only_what_is_trained_is_synchronised(one_rank, tiny_carso):
    Ranks(0, 2, torch.device("cpu")).wrap(WholePass(tiny_carso), tiny_carso.purifier)
    for part, replaced in ((tiny_carso.classifier, False), (tiny_carso.purifier, True)):
        for layer in part.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                assert ("forward" in vars(layer)) == replaced


@pytest.mark.parametrize("several, said", [(True, "trained"), (False, "trained cleared up")])
def test_one_of_several_processes_ends_at_once(several, said):
    """With its status and all that it said, but without what the interpreter does at its end, where a thread that
    DistributedDataParallel left behind would abort it."""
    program = f"""
import atexit, torch.distributed as dist
from lab.ranks import leave
atexit.register(print, "cleared up")
if {several}:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("trained")
leave(130)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, " ".join(done.stdout.split())) == (130, said), done.stderr


def test_that_is_how_training_ends(monkeypatch):
    left = []
    monkeypatch.setattr("lab.ranks.leave", left.append)
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "0"])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert left == [2]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_sums_are_complete_however_seldom_they_are_looked_at(tmp_path, window):
    """Also when the run is stopped in between and goes on: steps are saved with all their sums."""

    def ready():
        run = Run(tmp_path, {"seed": 0}, Ranks(0, 1, torch.device("cpu")), 60)
        run.window = window
        return run

    def step(epoch, number, indices, first):
        run.stopping |= (epoch, number) == stop_at
        return indices.sum()[None]

    run, stop_at = ready(), (1, 1)
    with pytest.raises(Stopped, match=f"epoch 1, step { {1: 2, 3: 3, 100: 8}[window] }"):
        run.train("stage", 2, 72, 9, {}, ["sum"], step)
    run, stop_at = ready(), None
    run.train("stage", 2, 72, 9, {}, ["sum"], step)
    assert (tmp_path / "log-stage.tsv").read_text().splitlines()[1:] == ["0\t35.5", "1\t35.5"]


def test_a_number_that_is_not_finite_stops_at_the_next_look(tmp_path):
    run = Run(tmp_path, {"seed": 0}, Ranks(0, 1, torch.device("cpu")), 0)
    run.window, sums = 2, [torch.tensor([float(n) if n != 4 else torch.nan]) for n in range(8)]
    with pytest.raises(Diverged, match="stage: the loss is not finite at epoch 0, step 5"):
        run.train("stage", 1, 72, 9, {}, ["sum"], lambda epoch, number, *_: sums[number])
    assert not list(tmp_path.iterdir())


def test_random_numbers_follow_from_seed_stage_epoch_and_step():
    def draw(seed, *where):
        return torch.rand(
            4, generator=Run(None, {"seed": seed}, Ranks(0, 1, torch.device("cpu")), 60).generator(*where)
        )

    one = draw(0, "purifier", 1, 2)
    assert torch.equal(one, draw(0, "purifier", 1, 2))
    for other in ((1, "purifier", 1, 2), (0, "classifier", 1, 2), (0, "purifier", 2, 2), (0, "purifier", 1, 1)):
        assert not torch.equal(one, draw(*other)), other
