"""The wheel in an environment of its own, away from the checkout: what it holds, and that it trains."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "model.context=16", "trainer.accelerator=cpu"]
REHEARSAL = ["trainer.fast_dev_run=true", "logger=csv"]

USER_CONFIG = """
defaults:
  - train
  - _self_
hydra:
  searchpath:
    - pkg://lq_plugin.conf
name: mine
model:
  width: 24
"""

USER_SCRIPT = """
import hydra
from hydra.utils import instantiate

@hydra.main(version_base="1.3", config_path=".", config_name="mine")
def main(config):
    model = instantiate(config.model, optimizer=instantiate(config.optim))
    trainer = instantiate(config.trainer, plugins=[instantiate(config.quant)])
    trainer.fit(model, instantiate(config.data))
    print("trained", config.name, model.gpt.embedding.embedding_dim)

main()
"""


def run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(ROOT, sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel and this environment's other packages, none of them installed anew."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # Python does not read the .pth files of a folder that a .pth file names: an editable checkout stays out of sight.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    run(folder, sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    return folder / "bin"


def test_the_wheel_holds_two_packages_and_nothing_beside_them(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lq_plugin", "lq_kernels"}
    assert {"lq_plugin/conf/train.yaml", "lq_plugin/recipes/train.py", "lq_kernels/__init__.py"} <= set(names)
    tables = {f"lq_plugin/tables/{path.name}" for path in (ROOT / "lq_plugin" / "tables").iterdir()}
    assert "lq_plugin/tables/README.md" in tables
    assert tables <= set(names)
    assert len(names) == len(set(names))


def test_only_our_packages_can_be_imported(installed, tmp_path):
    absent = ("kernels", "conf", "recipes", "tests")
    present = ("lq_plugin", "lq_kernels", "lq_plugin.conf", "lq_plugin.recipes.train")
    code = (
        "from importlib.util import find_spec\n"
        f"print([name for name in {absent} if find_spec(name)], [find_spec(name).origin for name in {present}])"
    )
    printed = run(tmp_path, installed / "python", "-c", code)
    assert printed.startswith("[] ")
    assert str(ROOT) not in printed


def test_the_console_script_trains(installed, tmp_path):
    printed = run(tmp_path, installed / "lq-train", *SMALL, *REHEARSAL)
    assert printed.splitlines()[-1].startswith("fast_dev_run: one batch of training and of validation went through")


def test_a_users_own_configuration_builds_on_ours(installed, tmp_path):
    (tmp_path / "mine.yaml").write_text(USER_CONFIG)
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    printed = run(tmp_path, installed / "python", "script.py", "trainer.fast_dev_run=true", *SMALL[1:])
    assert printed.splitlines()[-1] == "trained mine 24"
    printed = run(
        tmp_path, installed / "lq-train", "--config-dir", ".", "--config-name", "mine", *SMALL[1:], *REHEARSAL
    )
    assert "fast_dev_run: one batch" in printed
