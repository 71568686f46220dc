"""The wheel: installed elsewhere it carries its options and sweeps, and composes them."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty environment with the wheel; its dependencies are lent by this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, "wheel", *options], check=True)
    (wheel,) = folder.glob("lorasweep-*.whl")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # a path file is not read recursively, so the editable install of this environment stays out
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    target = ["--target", str(packages), "--no-deps", str(wheel)]
    subprocess.run([*pip, "install", *target], check=True)
    return folder / "venv" / "bin" / "python"


def run(python, *arguments, cwd):
    return subprocess.run([python, "-m", "lorasweep", *arguments], capture_output=True, text=True,
                          cwd=cwd)  # fmt: skip


def test_it_is_the_installed_package_that_runs(installed, tmp_path):
    script = "import lorasweep; print(lorasweep.__file__)"
    found = subprocess.run([installed, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.startswith(str(installed.parents[1]))


def test_it_composes_its_options_and_sweeps(installed, tmp_path):
    result = run(installed, "train", "--cfg", "job", "experiment=demo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "_target_: LoRA" in result.stdout
    result = run(installed, "train", "--cfg", "job", "+sweeps=demo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "name: demo" in result.stdout


def test_it_carries_the_embedded_model_and_images(installed, tmp_path):
    result = run(installed, "caption", "experiment=demo", "output_root=out",
                 f"cache_dir={tmp_path}", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    package = Path(next(installed.parents[1].glob("lib/python*/site-packages/lorasweep")))
    assert (package / "embedded/base_model/unet/diffusion_pytorch_model.safetensors").exists()


def test_a_users_own_options_are_found(installed, tmp_path):
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    option = "defaults: [lora]\nrank: 3\n"
    (tmp_path / "mine" / "adapter" / "tiny.yaml").write_text(option)
    arguments = ("train", "--config-dir", "mine", "--cfg", "job", "adapter=tiny")
    result = run(installed, *arguments, "dataset.image_dir=x", cwd=tmp_path)
    assert "rank: 3" in result.stdout, result.stderr
