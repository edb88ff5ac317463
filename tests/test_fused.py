"""BatchNorm and its activation as one kernel, compiled here for the CPU: the code that a GPU runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import models
from models import normalise_and_activate
from purifier import ConvBlock, leaky_relu

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(models, "FUSED_ON", ("cpu",))
    monkeypatch.setattr("purifier.FUSED_ON", ("cpu",))


def fill(batchnorm: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in (batchnorm.weight, batchnorm.bias, batchnorm.running_mean, batchnorm.running_var):
        tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return batchnorm.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_batchnorm_and_its_activation(dtype):
    batchnorm, compiled = fill(torch.nn.BatchNorm2d(24)), models.fuse(models.scale_and_activate, "cpu")
    assert compiled is not models.scale_and_activate  # else there was no compiler, and nothing is tested
    graphs = {}
    for size in (2, 5, 64, 33):
        for activate in (F.silu, leaky_relu):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(size, 24, 6, 6).to(dtype).to(memory_format=layout).requires_grad_()
                y = normalise_and_activate(batchnorm, x, activate)
                exact = x.detach().double().requires_grad_()
                want = activate(copy.deepcopy(batchnorm).double()(exact))
                tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
                assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
                assert_close(y.double(), want, **tolerance)
                slope = torch.randn_like(want)
                (mine,) = torch.autograd.grad(y, x, slope.to(dtype))
                (theirs,) = torch.autograd.grad(want, exact, slope)
                assert_close(mine.double(), theirs, **tolerance)
        graphs[size] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs[2] == graphs[33], "no graph of its own for another batch size"


def test_networks_answer_alike_fused_and_not(tiny_carso, monkeypatch):
    x = torch.rand(3, 1, 32, 32)
    z = torch.randn(3, 2, 4)
    found = []
    for fused_on in (("cpu",), ()):
        monkeypatch.setattr(models, "FUSED_ON", fused_on)
        monkeypatch.setattr("purifier.FUSED_ON", fused_on)
        tiny_carso.requires_grad_(False)
        lead = x.clone().requires_grad_()
        logits = tiny_carso(lead, z)
        found.append((logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), lead)[0]))
    assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert (found[0][1] - found[1][1]).norm() < 1e-3 * found[1][1].norm()


def test_the_first_call_may_want_no_gradient(tiny_carso):
    models.fuse.cache_clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tiny_carso.requires_grad_(False)(torch.rand(2, 1, 32, 32))
    assert models.fuse(models.scale_and_activate, "cpu") is not models.scale_and_activate


def test_hooks_see_the_same_tensors(tiny_carso, monkeypatch):
    x = torch.rand(2, 1, 32, 32)
    fused = models.record(tiny_carso.classifier, tiny_carso.layers, x)[1]
    monkeypatch.setattr(models, "FUSED_ON", ())
    for mine, theirs in zip(fused, models.record(tiny_carso.classifier, tiny_carso.layers, x)[1]):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_there_is_a_line_and_the_plain_function(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: refuse)
    models.fuse.cache_clear()
    assert models.fuse(models.scale_and_activate, "cpu") is models.scale_and_activate
    assert capsys.readouterr().err == "BatchNorm is not fused with its activation: no C compiler found\n"
    x = torch.randn(2, 8, 4, 4)
    batchnorm = fill(torch.nn.BatchNorm2d(8))
    assert_close(normalise_and_activate(batchnorm, x), F.silu(batchnorm(x)), rtol=1e-5, atol=1e-5)
    models.fuse.cache_clear()


def test_a_block_that_trains_is_pytorchs_own():
    block = ConvBlock(torch.nn.Conv2d(3, 8, 3, bias=False)).train()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(block(x), F.leaky_relu(F.batch_norm(block[0](x), None, None, training=True), 0.2))
