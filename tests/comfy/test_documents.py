"""Schemas and help pages say the same."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from testing.code import sources
from tools.make_locales import FOLDER, LANGUAGES, TRANSLATIONS, english, help_page, read, texts, translated

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = Path(__file__).resolve().parents[1] / "interface.json"
BREAKS_TRANSLATION = re.compile(r"[@{}|%]")


@pytest.fixture(scope="module")
def schemas(extension):
    import slime_extension.nodes.extension as module
    from slime_extension.nodes.files import register_folder

    register_folder()
    return {node.define_schema().node_id: node.define_schema() for node in module.NODES}


def test_every_node_has_a_help_page_and_no_page_is_stale(schemas) -> None:
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == set(schemas)


def test_help_pages_have_their_sections_and_todays_tables(schemas) -> None:
    for name, node in english(schemas)["nodeDefs"].items():
        text = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {node['display_name']}\n"), name
        for section in ("## Overview", "## Inputs", "## Outputs", "## Troubleshooting"):
            assert section in text, (name, section)
        assert help_page(text, node) == text, f"{name}: run python dev.py locales"


def test_every_picture_of_a_document_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "web" / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link.strip("<>")).exists(), (page.name, link)


def test_quoted_errors_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("| no error, but")[0]
    literals = []
    for folder in ("slime", "nodes"):
        for _, tree in sources(folder):
            literals += [
                "".join(texts_of(node)) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)
            ]
    quoted = re.findall(r"\*([^*]+)\*", " ".join(re.findall(r"^\| (\*[^|]+) \|", page, re.MULTILINE)))
    for file in (ROOT / "web" / "docs").glob("*.md"):
        troubles = file.read_text(encoding="utf-8").partition("## Troubleshooting")[2]
        quoted += re.findall(r"^- \*([^*]+)\*", troubles, re.MULTILINE)
    assert len(quoted) > 40
    for error in quoted:
        pieces = [piece for piece in re.split(r"\.\.\.|\d+|\"[^\"]*\"|\bN\b", error) if piece.strip()]
        assert pieces and any(all(piece.strip() in literal for piece in pieces) for literal in literals), error


def texts_of(node: ast.AST) -> list[str]:
    return [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)]


def test_every_text_is_safe_for_the_translation_layer(schemas) -> None:
    for name, schema in schemas.items():
        texts = [schema.display_name, schema.description]
        for socket in (*schema.inputs, *schema.outputs):
            texts += [socket.display_name, socket.tooltip]
        for item in schema.inputs:
            assert item.tooltip and item.tooltip.strip(), (name, item.id, "no tooltip")
        for item in schema.outputs:
            assert item.tooltip and item.tooltip.strip(), (name, item.display_name, "no tooltip")
        for text in filter(None, texts):
            assert not BREAKS_TRANSLATION.search(text), (name, text)
            assert text.isascii(), (name, text)


def test_the_public_interface_is_as_recorded(schemas) -> None:
    """Node ids, inputs and outputs are in people's workflows. Changed on purpose: delete the file, run, commit it."""
    found = {
        name: {
            "inputs": [[item.id, item.io_type, bool(item.optional)] for item in schema.inputs],
            "outputs": [[item.display_name, item.io_type] for item in schema.outputs],
        }
        for name, schema in schemas.items()
    }
    if not INTERFACE.is_file():
        INTERFACE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(INTERFACE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_locales_are_what_schemas_and_translations_give(schemas, language) -> None:
    """Texts without a translation are shown in English; ``python dev.py locales`` lists them."""
    known = {} if language == "en" else read(TRANSLATIONS / f"{language}.json")
    for name, tree in english(schemas).items():
        found = read(FOLDER / language / f"{name}.json")
        assert found == translated(tree, known), "run python dev.py locales"
        for text in texts(found):
            assert text.strip() and not BREAKS_TRANSLATION.search(text), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(schemas, language) -> None:
    wanted = {text for tree in english(schemas).values() for text in texts(tree)}
    assert not sorted(wanted - read(TRANSLATIONS / f"{language}.json").keys())


def test_there_is_no_further_language() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"en", *LANGUAGES}


@pytest.mark.long
def test_the_script_of_the_readme_runs_as_it_stands(comfy_path, tmp_path, monkeypatch, capsys) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = script.replace('"tiny_wheel.safetensors"', f'"{(tmp_path / "wheel.safetensors").as_posix()}"')
    monkeypatch.chdir(ROOT)
    exec(script, {})  # noqa: S102  our own text
    assert capsys.readouterr().out.startswith("('wheel',) torch.Size([1, 512, 512])")
