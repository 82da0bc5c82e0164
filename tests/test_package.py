"""What goes to the registry."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1_000_000
ONLY_FOR_DEVELOPERS = {"benchmarks", "demo", "tests", "docs", "assets", ".ci", ".github", "node_modules"}

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None


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


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_dependencies_are_the_same_in_both_lists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split("#")[0].strip() for line in lines]
    assert sorted(project["dependencies"]) == sorted(filter(None, listed))
    assert "comfyui" not in project["name"].lower()
