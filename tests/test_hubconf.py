"""torch.hub's entry points, by torch.hub itself, called from among modules of the same names as ours."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fresh_carso

from lab.checkpoints import save_checkpoint

CALLER = """
import sys
import data, models  # the caller's own; train and purifier are imported only afterwards
import torch

repo, carso_file, weights = sys.argv[1:]
path = list(sys.path)
carso = torch.hub.load(repo, "carso", carso_file, source="local")
classifier = torch.hub.load(repo, "wide_resnet", weights, num_classes=10, source="local")
untrained = torch.hub.load(repo, "wide_resnet", num_classes=7, depth=16, width=2, source="local")
import purifier, train

assert [m.OWNER for m in (data, models, purifier, train)] == ["caller"] * 4
assert sys.modules["data"] is data and sys.modules["models"] is models and sys.path == path
assert not any(name.partition(".")[0] == "lab" for name in sys.modules)
x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
logits = carso(x)
logits.logsumexp(1).sum().backward()
assert x.grad.abs().sum() > 0 and not (carso.training or classifier.training)
colour = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
assert untrained(colour).shape == (2, 7) and untrained.config["depth"] == 16
torch.save({"carso": logits.detach(), "classifier": classifier(colour).detach()}, "answers.pt")
print("done")
"""


def test_torch_hub_among_modules_of_the_same_names(tmp_path, wrn_10_2):
    repo, caller = tmp_path / "repo", tmp_path / "caller"
    caller.mkdir()
    shutil.copytree(ROOT / "lab", repo / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, repo)
    for name in ("data", "models", "purifier", "train"):
        (caller / f"{name}.py").write_text("OWNER = 'caller'\n")
    (caller / "main.py").write_text(CALLER)
    carso = fresh_carso(5, samples=3, condition_dim=16, latent_dim=4, decoder_width=16)
    save_checkpoint(tmp_path / "carso.pt", carso)
    torch.save(wrn_10_2.state_dict(), tmp_path / "weights.pt")
    files = [repo, tmp_path / "carso.pt", tmp_path / "weights.pt"]
    done = subprocess.run([sys.executable, "main.py", *files], cwd=caller, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr

    answers = torch.load(caller / "answers.pt")
    grey, colour = (torch.rand(2, c, 32, 32, generator=torch.Generator().manual_seed(0)) for c in (1, 3))
    carso.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(answers["carso"], carso(grey))
        torch.testing.assert_close(answers["classifier"], wrn_10_2(colour))


def test_torch_hub_shows_two_entry_points_and_says_what_is_wrong(tmp_path):
    import hubconf

    public = {name for name in vars(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert public == {"carso", "wide_resnet"}
    with pytest.raises(ValueError, match="there is no file .*missing.pt"):
        torch.hub.load(str(ROOT), "carso", str(tmp_path / "missing.pt"), source="local")
    with pytest.raises(ValueError, match="leave out depth"):
        torch.hub.load(str(ROOT), "wide_resnet", str(tmp_path / "weights.pt"), depth=10, source="local")
