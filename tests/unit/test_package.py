"""What goes to the registry, and what ``pip install`` brings."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2_500_000  # bytes; pictures and help pages in four languages are most of it
ONLY_FOR_DEVELOPERS = {
    *("benchmarks", "demo", "testing", "tests", "tools", "docs", "assets"),
    *(".ci", ".github", ".pre-commit-config.yaml", "dev.py", "requirements-dev.txt", "node_modules"),
}


@pytest.fixture(scope="module")
def packed() -> list[str]:
    """Files that are tracked and that .comfyignore, which has git's syntax, lets through."""

    def listed(*options: str) -> set[str]:
        command = ["git", "-c", "core.quotepath=off", "ls-files", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            pytest.skip("not a git checkout")
        return set(done.stdout.splitlines())

    return sorted(listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_the_package_is_small_and_holds_no_developer_files(packed) -> None:
    assert sum((ROOT / name).stat().st_size for name in packed) < LIMIT
    assert not ONLY_FOR_DEVELOPERS & {name.split("/")[0] for name in packed}
    for name in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        assert name in packed
    for name in ("web/docs/SLiMeTrain.md", "web/slime_painter.js", "locales/ja/nodeDefs.json"):
        assert name in packed
    for folder in ("example_workflows", "subgraphs", "nodes", "slime"):
        assert any(name.startswith(f"{folder}/") for name in packed), folder


def test_the_installation_of_the_readme_is_small_and_whole(packed, tmp_path) -> None:
    """Its two commands, with a copy of this repository as the address, bring all that the registry's package has."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (git (?:clone|-C SLiMe) .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    bare = tmp_path / "bare.git"
    for command in (
        ["git", "clone", "--quiet", "--bare", str(ROOT), str(bare)],
        ["git", "-C", str(bare), "config", "uploadpack.allowFilter", "true"],
        *(shlex.split(command.replace("REPOSITORY_URL", bare.as_uri())) for command in commands),
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    files = [path for path in (tmp_path / "SLiMe").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3 * LIMIT
    brought = {path.relative_to(tmp_path / "SLiMe").as_posix() for path in files}
    assert set(packed) <= brought and not ONLY_FOR_DEVELOPERS & {name.split("/")[0] for name in packed}


def project_file() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


def test_dependencies_are_the_same_in_both_lists() -> None:
    project = project_file()["project"]
    # ComfyUI brings torch, in the build for the user's card; a node pack that names it may replace that build.
    assert sorted(project["dependencies"]) == sorted([*requirements("requirements.txt"), "torch", "torchvision"])
    assert "comfyui" not in project["name"].lower()


def test_developer_tools_are_pinned_in_one_place() -> None:
    pinned = {line.split("==")[0] for line in requirements("requirements-dev.txt")}
    assert set(project_file()["dependency-groups"]["dev"]) <= pinned


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but the wheel's content, as ``pip install`` lays it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    if importlib.util.find_spec("hatchling"):
        build.append("--no-build-isolation")
    done = subprocess.run(build, capture_output=True, text=True)
    offline = "No matching distribution found for hatchling" in done.stderr
    if offline and not os.environ.get("CI"):
        pytest.skip("hatchling is neither installed nor to be had")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_holds_the_library_alone(installed) -> None:
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"slime"}
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    assert "slime = slime.__main__:main" in entries.read_text(encoding="utf-8")
    assert (installed / "slime" / "py.typed").is_file()
    there, here = (
        {path.relative_to(root).as_posix() for path in (root / "slime").rglob("*.py")} for root in (installed, ROOT)
    )
    assert there == here


@pytest.mark.long
def test_the_installed_library_needs_nothing_of_the_repository(installed) -> None:
    """Every module imports with only the installed copy in reach: -I leaves out PYTHONPATH and the current folder."""
    program = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import slime
for module in pkgutil.walk_packages(slime.__path__, "slime."):
    importlib.import_module(module.name)
sys.stdout.write(slime.__file__)
"""
    command = [sys.executable, "-I", "-c", program, str(installed)]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout).is_relative_to(installed)
