"""What Inductor and Triton make of models.py's two kernels for an H100, without one: prints the PTX of one of them.

test_fused.py starts this in a process of its own, since it pretends that there is a GPU. The computation is traced on
the CPU; the graph is then lowered for tensors that have no memory, and Triton compiles the source."""

import importlib.util
import re
import sys
import tempfile
import types
from pathlib import Path

import torch

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, gcnArchName="",
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448, is_integrated=0,
)  # fmt: skip
PRETENCE = {
    "_lazy_init": None, "current_device": 0, "get_device_properties": PROPERTIES, "get_device_capability": (9, 0),
    "device_count": 1, "is_available": True, "is_initialized": True,
}  # fmt: skip
for name, value in PRETENCE.items():
    setattr(torch.cuda, name, lambda *args, value=value: value)

import torch._subclasses.fake_tensor  # noqa: E402
import torch.utils._triton  # noqa: E402

torch._subclasses.fake_tensor.init_gpu_context = lambda *_: None
torch.utils._triton.triton_hash_with_backend = lambda: "any"

import triton  # noqa: E402
from torch._dynamo.source import ConstantSource  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
import models  # noqa: E402

CHANNELS = 160
IMPORTS = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice
"""


def make_source(kernel: torch.nn.Module, inputs: list[torch.Tensor]) -> str:
    """Triton's source, as Inductor writes it for any number of rows in the inputs of two dimensions."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    stand_ins = []
    for number, tensor in enumerate(inputs):
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_the_card = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        sizes = [DimDynamic.DYNAMIC, DimDynamic.STATIC][-tensor.ndim :]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"argument{number}")
        stand_ins.append(mode.from_tensor(on_the_card, symbolic_context=context, source=source))
    graph = make_fx(kernel, decomposition_table=select_decomp_table())(*inputs)
    lowering = GraphLowering(graph, shape_env=environment, example_inputs=stand_ins, is_inference=True)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering.run(*stand_ins)
        code = lowering.codegen()[0]
    code = getattr(code, "value", code)
    return code[code.index("@triton.jit") : code.index("''', device_str")]


def compile_to_ptx(source: str, folder: Path) -> str:
    file = folder / "kernel.py"
    file.write_text(IMPORTS + source)
    spec = importlib.util.spec_from_file_location("kernel", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = next(value for value in vars(module).values() if isinstance(value, triton.JITFunction))
    by_element = re.search(r"(\w+) = xindex\n", source).group(1)  # the others are indices of channels
    types_of = {"xnumel": "i32", "XBLOCK": "constexpr"}
    for pointer, index in re.findall(r"tl\.(?:load|store)\((\w+) \+ \((\w+)\)", source):
        types_of[pointer] = "*bf16" if index == by_element else "*fp32"
    made = triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: types_of[name] for name in kernel.arg_names},
            constexprs={"XBLOCK": 1024},
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(kernel.arg_names) - 1)},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4},
    )
    return made.asm["ptx"]


if __name__ == "__main__":
    kinds = {"forward": (models.ForwardKernel, 1), "backward": (models.BackwardKernel, 2)}
    kind, rows = kinds[sys.argv[1]]
    inputs = [torch.ones(4096, CHANNELS, dtype=torch.bfloat16) for _ in range(rows)]
    inputs += [torch.ones(CHANNELS) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        print(compile_to_ptx(make_source(kind(models.SILU, 1e-5).eval(), inputs), Path(folder)))
