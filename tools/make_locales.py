"""Write locales/en from the node schemas, and say what the other languages lack or hold in vain.

    python dev.py locales

ComfyUI reads locales/LANGUAGE/nodeDefs.json and main.json; an output is named by its place.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from testing.inprocess import NAME, ROOT, import_comfyui, load_extension

FOLDER = ROOT / "locales"
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "es", "ru", "ar")


def node_schemas() -> dict[str, Any]:
    """Schemas of all nodes by id."""
    import_comfyui()
    load_extension()
    importlib.import_module(f"{NAME}.nodes.files").register_folder()
    nodes = asyncio.run(importlib.import_module(f"{NAME}.nodes.extension").SlimeExtension().get_node_list())
    return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}


def english(schemas: dict[str, Any]) -> dict[str, Any]:
    """What stands in locales/en/nodeDefs.json."""
    return {
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


def read(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    path = FOLDER / language / f"{file}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(language: str, content: dict[str, Any], file: str = "nodeDefs") -> None:
    path = FOLDER / language / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the keys that lead to it."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def main() -> None:
    wanted = english(node_schemas())
    write("en", wanted)
    keys = {path for path, _ in leaves(wanted)}
    for language in LANGUAGES:
        found = {path for path, _ in leaves(read(language))}
        for path in sorted(keys - found):
            sys.stdout.write(f"{language}: missing {'.'.join(path)}\n")
        for path in sorted(found - keys):
            sys.stdout.write(f"{language}: stale {'.'.join(path)}\n")


if __name__ == "__main__":
    main()
