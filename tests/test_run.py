"""Many processes as one: BatchNorm over the pictures of all ranks, random numbers that follow from the step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from lab.ranks import Ranks, global_batch_norm
from lab.run import Run


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


def test_random_numbers_follow_from_seed_stage_epoch_and_step():
    def draw(seed, *where):
        return torch.rand(
            4, generator=Run(None, {"seed": seed}, Ranks(0, 1, torch.device("cpu")), 60).generator(*where)
        )

    one = draw(0, "purifier", 1, 2)
    assert torch.equal(one, draw(0, "purifier", 1, 2))
    for other in ((1, "purifier", 1, 2), (0, "classifier", 1, 2), (0, "purifier", 2, 2), (0, "purifier", 1, 1)):
        assert not torch.equal(one, draw(*other)), other
