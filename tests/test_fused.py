"""BatchNorm and its activation as one kernel, compiled here for the CPU: the code that a GPU runs."""

import copy
import importlib.util
import re
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import TESTS
from torch.testing import assert_close

import models
from models import SILU, normalise_and_activate
from purifier import LEAKY_RELU, ConvBlock

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(models, "FUSED_ON", ("cpu",))
    assert models.has_compiler(torch.device("cpu")), "without a compiler nothing is tested"


def fill(batchnorm: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in (batchnorm.weight, batchnorm.bias, batchnorm.running_mean, batchnorm.running_var):
        tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return batchnorm.eval().requires_grad_(False)


def exact(batchnorm, x, activation=SILU) -> torch.Tensor:
    return activation.value(copy.deepcopy(batchnorm).double()(x.double()))


@pytest.mark.parametrize("activation", [SILU, LEAKY_RELU])
def test_the_slope_is_the_derivative_of_the_value(activation):
    x = torch.linspace(-5, 5, 40, dtype=torch.double, requires_grad=True)
    (derivative,) = torch.autograd.grad(activation.value(x).sum(), x)
    assert_close(activation.slope(x.detach()).double(), derivative, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("activation", [SILU, LEAKY_RELU])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_is_batchnorm_and_its_activation(dtype, tolerance, activation):
    batchnorm = fill(torch.nn.BatchNorm2d(24, eps=1e-3))
    kernels = []
    for size in (1, 5, 64, 33):
        x = torch.randn(size, 24, 6, 5).to(dtype).requires_grad_()
        y, want = normalise_and_activate(batchnorm, x, activation), exact(batchnorm, x, activation)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
        slope = torch.randn_like(want)
        (mine,) = torch.autograd.grad(y, x, slope.to(dtype))
        (theirs,) = torch.autograd.grad(want, x, slope)
        assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        kernels.append(models.compile_kernel.cache_info().misses)
    assert kernels[0] == kernels[-1], "no kernel of its own for another batch size"


def test_tensors_may_lie_in_memory_as_they_like():
    batchnorm = fill(torch.nn.BatchNorm2d(8))
    for x in (
        torch.randn(3, 16, 4, 4).to(memory_format=torch.channels_last)[:, ::2],
        torch.randn(4, 8, 5, 7)[1:].transpose(2, 3),
        torch.randn(8, 4, 4).expand(3, 8, 4, 4),
        torch.randn(1, 8, 1, 1),
        torch.randn(0, 8, 4, 4),
    ):
        x.requires_grad_()
        y = normalise_and_activate(batchnorm, x)
        assert_close(y.double(), exact(batchnorm, x), rtol=1e-5, atol=1e-5)
        (slope,) = torch.autograd.grad(y.sum(), x)  # the sum's own gradient is one number, expanded
        assert_close(slope, torch.autograd.grad(exact(batchnorm, x).sum(), x)[0], rtol=1e-5, atol=1e-5)


def test_weights_that_change_count_at_once():
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 3, 3, requires_grad=True)
    normalise_and_activate(batchnorm, x)
    batchnorm.weight.data.mul_(2)
    batchnorm.running_var = batchnorm.running_var.bfloat16()
    after, want = normalise_and_activate(batchnorm, x), exact(batchnorm, x)
    assert_close(after.double(), want, rtol=1e-5, atol=1e-5)
    mine, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (after, want))
    assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_change_between_forward_and_backward_is_refused():
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 3, 3, requires_grad=True)
    y = normalise_and_activate(batchnorm, x)
    batchnorm.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_and_not_zero():
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative: set models.FUSED_ON = ()"):
        torch.autograd.grad(normalise_and_activate(batchnorm, x).sum(), x, create_graph=True)


@pytest.mark.parametrize("learning", ["weight", "bias"])
def test_weights_that_want_gradients_get_them(learning):
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 3, 3)
    parameter = getattr(batchnorm, learning).requires_grad_()
    (mine,) = torch.autograd.grad(normalise_and_activate(batchnorm, x).square().sum(), parameter)
    (theirs,) = torch.autograd.grad(F.silu(batchnorm(x)).square().sum(), parameter)
    assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_the_first_call_decides_nothing(first, capsys):
    """Neither whether there is a kernel for the rest of the process, nor which."""
    models.has_compiler.cache_clear(), models.compile_kernel.cache_clear()
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 3, 3)
    with first:
        normalise_and_activate(batchnorm, x)
    lead = x.clone().requires_grad_()
    y = normalise_and_activate(batchnorm, lead)
    assert models.is_fused(batchnorm, lead) and "NormaliseAndActivate" in type(y.grad_fn).__name__
    assert_close(y.double(), exact(batchnorm, x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert capsys.readouterr().err == ""


def test_the_backward_pass_may_be_compiled_in_a_thread():
    """A GPU's backward pass runs in a thread of autograd's."""
    models.compile_kernel.cache_clear()
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 3, 3, requires_grad=True)
    y = normalise_and_activate(batchnorm, x)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert_close(x.grad, torch.autograd.grad(F.silu(batchnorm(x)).sum(), x)[0], rtol=1e-5, atol=1e-5)


def test_a_network_that_is_compiled_whole_breaks_nowhere(tiny_carso):
    classifier, x = tiny_carso.classifier, torch.rand(2, 1, 32, 32)
    whole = torch.compile(classifier, fullgraph=True, backend="eager")
    assert_close(whole(x), classifier(x), rtol=1e-3, atol=1e-3)


def test_networks_answer_alike_fused_and_not(tiny_carso, monkeypatch):
    x, z = torch.rand(3, 1, 32, 32, requires_grad=True), torch.randn(3, 2, 4)
    tiny_carso.requires_grad_(False)
    found = []
    for fused_on in (("cpu",), ()):
        monkeypatch.setattr(models, "FUSED_ON", fused_on)
        logits = tiny_carso(x, z)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
        representation = models.record(tiny_carso.classifier, tiny_carso.layers, x)[1]
        found.append((gradient, [logits, *representation]))
    (fused_gradient, fused), (plain_gradient, plain) = found
    assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert (fused_gradient - plain_gradient).norm() < 1e-3 * plain_gradient.norm()


def test_only_x_is_kept_for_the_backward_pass():
    batchnorm = fill(torch.nn.BatchNorm2d(8))
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *batchnorm.state_dict().values())}
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        normalise_and_activate(batchnorm, x)
    assert x.untyped_storage().data_ptr() in kept <= known


def test_without_a_compiler_there_is_one_line_and_the_plain_network(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(torch._inductor, "standalone_compile", refuse)
    models.has_compiler.cache_clear(), models.compile_kernel.cache_clear()
    batchnorm, x = fill(torch.nn.BatchNorm2d(8)), torch.randn(2, 8, 4, 4)
    for _ in range(2):
        assert_close(normalise_and_activate(batchnorm, x), F.silu(batchnorm(x)), rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().err == "BatchNorm is not fused with its activation: no C compiler found\n"
    models.has_compiler.cache_clear()


def test_a_block_that_trains_is_pytorchs_own():
    block = ConvBlock(torch.nn.Conv2d(3, 8, 3, bias=False)).train()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(block(x), F.leaky_relu(F.batch_norm(block[0](x), None, None, training=True), 0.2))


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="a build of PyTorch without Triton")
@pytest.mark.parametrize("kernel, loads", [("forward", 1), ("backward", 2)])
def test_an_h100_divides_nowhere_and_moves_sixteen_bytes_at_a_time(kernel, loads):
    command = [sys.executable, TESTS / "ptx_for_h100.py", kernel]
    program = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert program.returncode == 0, program.stderr[-2000:]
    accesses = re.findall(r"\b((?:ld|st)\.global\S*)", program.stdout)
    assert len(accesses) == 8 + loads + 1 and all(access.endswith(".v4.b32") for access in accesses)
    assert not re.findall(r"\brem\.|\bdiv\.[su]", program.stdout)
