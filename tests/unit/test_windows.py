"""What Windows does otherwise, without Windows: text in a code page, paths that are too long, names in any script."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slime import PartEmbeddings, SlimeError, load_embeddings, preset, save_embeddings, train
from testing.toy import ToyUNet, toy_example

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("slime", "nodes", "demo", "testing", "tools", "benchmarks")
SOURCES = [ROOT / "dev.py", ROOT / "__init__.py", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
IN_A_CODE_PAGE = """
import locale, sys
assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"), "this system has no other encoding"
from pathlib import Path
from slime import load_embeddings, save_embeddings, to_text
from tests.unit.test_windows import trained
path = save_embeddings(trained(), Path(sys.argv[1]) / "teile.safetensors")
assert load_embeddings(path).names == trained().names and to_text(trained())
"""


def trained() -> PartEmbeddings:
    """Parts with names in several scripts."""
    example = replace(toy_example(0), names=("\u8f66\u8f6e", "T\u00fcr \u2013 links"))
    return train(ToyUNet(), [example], preset("instant", views=2))


def test_every_text_file_is_opened_as_utf_8() -> None:
    """Windows' own default is a code page."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("read_text", "write_text"):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"
            if called == "open":
                method = isinstance(node.func, ast.Attribute)  # of a path, where its first argument is a mode
                modes = [a.value for a in node.args[not method :] if isinstance(a, ast.Constant)]
                of_module = ast.unparse(node.func) in ("av.open", "tarfile.open")
                if of_module or (method and not (modes and re.fullmatch(r"[rwax]b?\+?b?", str(modes[0])))):
                    continue
                binary = any("b" in str(mode) for mode in modes)
                assert binary or any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"


def test_what_the_commands_print_fits_a_console_of_windows() -> None:
    published = (ROOT / "slime", ROOT / "nodes")  # these print nothing
    for path in (path for path in SOURCES if not any(path.is_relative_to(folder) for folder in published)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value.encode("cp1252")


def test_help_is_printed_on_a_console_of_windows() -> None:
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252:strict"}
    done = subprocess.run(
        [sys.executable, "dev.py", "--help"], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert b"python dev.py demo" in done.stdout


@pytest.mark.long
def test_names_in_any_script_where_the_locale_has_none(tmp_path) -> None:
    """Files are UTF-8 whatever the system's encoding is: here plain ASCII, stricter than cp1252."""
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONIOENCODING": "cp1252:strict"}
    line = [sys.executable, "-c", IN_A_CODE_PAGE, str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_path_that_is_too_long_says_so(tmp_path, monkeypatch) -> None:
    def refused(*_args, **_kwargs):
        raise FileNotFoundError(2, "No such file or directory")  # what Windows says beyond 259 characters

    deep = tmp_path / ("d" * 120) / ("e" * 120)
    learned = trained()
    assert load_embeddings(save_embeddings(learned, deep / "a.safetensors")).names == learned.names
    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(SlimeError, match="could not be written.*259 characters"):
        save_embeddings(learned, deep / "b.safetensors")
