"""The shape of the repository: what imports what, how long a file is, what the README says of them, and copying."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from lab import presets

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]
}
CARD = {"models", "purifier", "attacks", "aggregate", "data", "train", "evaluate"}
GROUND = {f"lab.{name}" for name in "files pictures tensors foreign presets ranks start run checkpoints".split()}


def imports(module: str) -> set[str]:
    """The project's own modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys()


def test_the_root_is_the_card():
    assert {name for name in FILES if "." not in name} == CARD | {"hubconf"}  # torch.hub looks nowhere else


def test_three_files_can_be_copied_alone():
    assert imports("models") == imports("aggregate") == imports("attacks") == set()
    assert imports("purifier") == {"models", "aggregate"}


def test_no_circle_and_scripts_are_leaves():
    done: set[str] = set()
    while len(done) < len(FILES):
        ready = {name for name in FILES if name not in done and imports(name) <= done}
        assert ready, f"a circle among {sorted(FILES.keys() - done)}"
        done |= ready
    for name in FILES.keys() - {"lab.bench"}:
        assert not imports(name) & {"train", "evaluate"}, name
    for leaf in ("hubconf", "lab.compare", "lab.plot", "lab.bench", "lab.torture"):
        assert not any(leaf in imports(name) for name in FILES), leaf


def test_the_ground_stands_on_the_ground():
    for name in GROUND:
        assert imports(name) <= GROUND | CARD - {"train", "evaluate"}, name
    for name in ("lab.suite", "lab.audit", "lab.report", "lab.units"):
        assert "argparse" not in FILES[name].read_text(), f"{name} knows of the command line"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_one_sitting(name):
    assert len(FILES[name].read_text().splitlines()) <= (300 if name.startswith("lab") else 320)


def test_the_readme_is_true():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    assert presets.table() in readme, "python -m lab.presets prints the table that belongs there"
    sizes = {path: int(lines) for path, lines in re.findall(r"^\| \[(.*?\.py)\]\(.*?\) \| (\d+) \|", readme, re.M)}
    ours = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    ours.pop("lab/__init__.py")
    assert sizes == {name: (lines + 5) // 10 * 10 for name, lines in ours.items()}
    for link in re.findall(r"\]\((?!http)(.*?)\)|src=\"(.*?)\"", readme):
        assert (ROOT / "".join(link)).exists(), link
    for file, names in re.findall(r"\((\w[\w/]*\.py), ((?:`[\w.]+`(?:, |\s+)?)+)\)", readme):
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


AROUND_A_RESNET = """
import torch
from torchvision.models import resnet18
from models import record
from purifier import build_carso, vae_loss

torch.manual_seed(0)
layers = ["conv1", "layer1.0.conv2", "layer2.1.conv1"]
sizes = dict(condition_dim=16, latent_dim=4, decoder_width=16)
try:
    build_carso(resnet18(num_classes=7), layers, (3, 64, 64), samples=3, **sizes)
except ValueError as error:
    assert "pass mean= and std=" in str(error)
try:
    build_carso(resnet18(num_classes=7), layers, (3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, **sizes)
except ValueError as error:
    assert "layer 2 of the representation is (128, 8, 8)" in str(error), error
try:
    build_carso(resnet18(num_classes=7), ["fc"], (3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, **sizes)
except ValueError as error:
    assert "layer 0 of the representation is (7,)" in str(error), error
carso = build_carso(resnet18(num_classes=7), layers[:2], (3, 64, 64), 3, (0.5,) * 3, (0.5,) * 3, **sizes)
x = torch.rand(4, 3, 64, 64, requires_grad=True)
carso.train()
reconstruction, mu, logvar = carso.purifier(x, record(carso.classifier, carso.layers, x)[1])
loss, _, _ = vae_loss(reconstruction, x.detach(), mu, logvar, beta=1.0)
loss.backward()
logits = carso.eval()(x)
assert logits.shape == (4, 7) and carso.purify(x).shape == (4, 3, 3, 64, 64)
assert torch.autograd.grad(logits.logsumexp(1).sum(), x)[0].abs().sum() > 0
print("done")
"""


def test_three_files_alone_defend_a_resnet(tmp_path):
    for name in ("models", "purifier", "aggregate"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "mine.py").write_text(AROUND_A_RESNET)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr
