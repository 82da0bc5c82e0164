"""Write locales/ and the tables of web/docs from the node schemas, and list the texts that are not translated.

    python dev.py locales

ComfyUI reads locales/LANGUAGE/nodeDefs.json and main.json; outputs are keyed by their index. tools/translations holds
one file per language, from the English text to its translation. A text that has changed is shown in English until it is
translated again.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from testing.inprocess import NAME, ROOT, import_comfyui, load_extension

FOLDER, TRANSLATIONS, HELP = ROOT / "locales", ROOT / "tools" / "translations", ROOT / "web" / "docs"
LANGUAGES = ("zh", "ja", "ko")
MENU = {
    "nodeCategories": {name: name for name in ("SLiMe", "results", "files", "advanced", "sampling", "sam3", "mesh")},
    "dataTypes": {
        "SLIME_EXAMPLES": "SLiMe examples",
        "SLIME_EMBEDDINGS": "SLiMe embeddings",
        "SLIME_TRAIN_SETTINGS": "SLiMe settings",
        "SLIME_PARTS": "SLiMe parts",
        "SLIME_MESH_VIEWS": "SLiMe mesh views",
        "SLIME_PAINTING": "SLiMe painting",
        "SLIME_PART_PROMPTS": "SLiMe part prompts",
    },
}


def node_schemas() -> dict[str, Any]:
    """Return the schemas of all nodes by id."""
    import_comfyui()
    load_extension()
    importlib.import_module(f"{NAME}.nodes.files").register_folder()
    nodes = importlib.import_module(f"{NAME}.nodes.extension").NODES
    return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}


def english(schemas: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files of locales/en by name."""
    nodes = {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs},
            "outputs": {
                str(place): {"name": item.display_name, "tooltip": item.tooltip}
                for place, item in enumerate(schema.outputs)
            },
        }
        for name, schema in schemas.items()
    }
    return {"nodeDefs": nodes, "main": MENU}


def translated(tree: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Return the tree with translated texts; a text without a translation stays as it is."""
    return {
        key: known.get(value, value) if isinstance(value, str) else translated(value, known)
        for key, value in tree.items()
    }


def read(path: Any) -> dict[str, Any]:
    """Read a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write(path: Any, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def help_page(page: str, node: Mapping[str, Any]) -> str:
    """Return a help page with the tables of its sections Inputs and Outputs made from the node's texts."""
    for title, items in (("Inputs", node["inputs"]), ("Outputs", node["outputs"])):
        rows = [f"| {item['name']} | {item['tooltip']} |" for item in items.values()]
        table = "\n".join([f"| {title[:-1]} | Description |", "|---|---|", *rows])
        before, heading, rest = page.partition(f"\n## {title}\n\n")
        page = f"{before}{heading}{table}\n\n## {rest.partition('## ')[2]}"
    return page


def texts(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a tree."""
    for value in tree.values():
        yield from [value] if isinstance(value, str) else texts(value)


def main() -> None:
    files = english(node_schemas())
    wanted = {text for tree in files.values() for text in texts(tree)}
    for name, tree in files.items():
        write(FOLDER / "en" / f"{name}.json", tree)
    for name, node in files["nodeDefs"].items():
        path = HELP / f"{name}.md"
        path.write_text(help_page(path.read_text(encoding="utf-8"), node), encoding="utf-8")
    for language in LANGUAGES:
        path = TRANSLATIONS / f"{language}.json"
        known = {text: value for text, value in read(path).items() if text in wanted}
        write(path, dict(sorted(known.items())))
        for name, tree in files.items():
            write(FOLDER / language / f"{name}.json", translated(tree, known))
        for text in sorted(wanted - known.keys()):
            sys.stdout.write(f"{language}: not translated: {text}\n")


if __name__ == "__main__":
    main()
