"""The shape of the repository, and what the README says of it: imports, tables, links, the code that it prints."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import evaluate
import train
from attacks import format_eps

README = (ROOT / "README.md").read_text()
ROOT_FILES = {path.stem: path for path in ROOT.glob("*.py")}
CARD = {"models", "purifier", "attacks", "aggregate", "data", "train", "evaluate"}


def find_imports(path) -> set[str]:
    """The project's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module.partition(".")[0]}
    return found & (CARD | {"lab"})


def test_the_root_is_the_card_and_stands_alone():
    assert ROOT_FILES.keys() == CARD
    imports = {name: find_imports(path) for name, path in ROOT_FILES.items()}
    assert imports["models"] == imports["aggregate"] == imports["attacks"] == set()
    assert imports["data"] == {"models"}  # whose write_atomically it uses
    assert imports["purifier"] == {"models", "aggregate"}
    assert not any("lab" in found for found in imports.values())
    assert "evaluate" not in imports["train"] and "train" not in imports["evaluate"]


def test_sizes_and_links_are_true():
    sizes = {path: int(lines) for path, lines in re.findall(r"^\| \[(\w+\.py)\]\(.*?\) \| (\d+) \|", README, re.M)}
    ours = {path.name: len(path.read_text().splitlines()) for path in ROOT_FILES.values()}
    assert sizes == {name: round(lines, -1) for name, lines in ours.items()}
    for page in ("README.md", "RESULTS.md", "study.md"):
        for link in re.findall(r"\]\((?!http|#)(.*?)\)|src=\"(.*?)\"", (ROOT / page).read_text()):
            path = "".join(link).partition("#")[0]
            assert (ROOT / path).exists() or path.startswith("lab"), f"{page} links to {path}"
    for file, names in re.findall(r"\((\w+\.py), ((?:`[\w.]+`(?:, |\s+)?)+)\)", README):
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


def test_the_table_of_presets_is_true():
    rows = {
        "classifier": lambda p: f"WRN-{p.depth}-{p.width}",
        "D, Z, S": lambda p: f"{p.condition_dim}, {p.latent_dim}, {p.samples}",
        "epochs: all, warm-up, plateau": lambda p: f"{p.epochs}, {p.warmup}, {p.plateau}",
        "perturbed share": lambda p: f"{p.fraction:g}",
        "eps": lambda p: format_eps(p.eps),
    }
    for name, text in rows.items():
        line = "| " + " | ".join([name, *(text(p) for p in train.PRESETS.values())]) + " |"
        assert line in README, line


def find_options(parse, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


@pytest.mark.parametrize("page", ["README.md", "study.md"])
def test_every_option_of_a_printed_command_exists(page, capsys):
    """Also of the laboratory's, where it is there."""
    text = (ROOT / page).read_text()
    parsers = {"train.py": train.parse_arguments, "evaluate.py": evaluate.main}
    for module in ("evaluate", "end_to_end", "attack_once", "compare", "plot", "bench"):
        if (ROOT / "lab" / f"{module}.py").is_file():
            parsers[f"-m lab.{module}"] = importlib.import_module(f"lab.{module}").main
    for script, parse in parsers.items():
        commands = re.findall(rf"python {re.escape(script)}(.*?)(?:[#`&]|$)", text, re.M)
        commands += re.findall(rf"torchrun.*? {re.escape(script)}(.*?)(?:[#`&]|$)", text, re.M)
        named = {option for command in commands for option in re.findall(r"--[a-z0-9-]+", command)}
        known = find_options(parse, capsys) if named else set()
        if script == "-m lab.attack_once":
            known |= find_options(train.parse_arguments, capsys)  # it passes them on
        assert named <= known, (script, named - known)


def test_the_own_classifier_of_the_readme_is_trained_and_attacked(tmp_path):
    """The README's lines, as they stand there but for their length, pasted into Python's prompt."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "build_carso" in block)
    for long, short in (("epochs=8", "epochs=1"), ("[:100]", "[:5]"), ("steps=20", "steps=2")):
        assert long in code
        code = code.replace(long, short)
    for name in CARD:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    done = subprocess.run(
        [sys.executable, "-i", "-q"], input=code, cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Error" not in done.stderr, done.stderr
    for model in ("the classifier", "CARSO"):
        assert re.search(rf"^{model}: clean \d\.\d+, attacked \d\.\d+", done.stdout, re.M), done.stdout
    assert (tmp_path / "runs" / "own" / "log-purifier.tsv").is_file()
