"""Convert workflow files from ComfyUI's editor format to its API format, and the bundled ones back."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "example_workflows"
SUBGRAPHS = ROOT / "subgraphs"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3", "SLIME_PAINTING", "LOAD_3D"}
VIEW, MARGIN = (1130, 560), (90, 150)  # room that a window of 1280 x 720 leaves beside ComfyUI's own bars
READABLE = 0.65  # zoom; below 0.6 the classic canvas draws no text
NONE: Mapping[str, dict[str, Any]] = {}
INPUT_NODE, OUTPUT_NODE = -10, -20  # ids that ComfyUI gives to the ends of a subgraph
ONLY_IN_EDITOR = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}

Prompt = dict[str, dict[str, Any]]
Box = tuple[int, int, int, int]  # x, y, width, height


def load_workflow(name: str) -> dict[str, Any]:
    """Load a bundled workflow in the editor's format."""
    workflow: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


def _inputs(info: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, type and options of a node's inputs in the order of its widgets."""
    for group in ("required", "optional"):
        specs = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, specs):
            spec = specs[name]
            yield name, spec[0], spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def _extra_values(name: str, options: dict[str, Any]) -> list[Any]:
    """Return the values of widgets that the editor itself adds after an input."""
    if options.get("control_after_generate", name in ("seed", "noise_seed")):
        return ["fixed"]
    return ["image"] if options.get("image_upload") or options.get("video_upload") else []


class _Scope:
    """Nodes and links of a workflow, or of a subgraph at the place where it is used."""

    def __init__(
        self, content: dict[str, Any], used: dict[str, Any], place: tuple[_Scope, dict[str, Any]] | None
    ) -> None:
        self.nodes = {node["id"]: node for node in content["nodes"]}
        self.subgraphs, self.content, self.place = used, content, place
        self.prefix: str = f"{place[0].prefix}{place[1]['id']}:" if place else ""
        self.links = {}
        for link in content["links"]:
            number, node, slot = (
                (link["id"], link["origin_id"], link["origin_slot"]) if isinstance(link, dict) else link[:3]
            )
            self.links[number] = (node, slot)

    def inner(self, node: dict[str, Any]) -> _Scope | None:
        """Return the subgraph that a node stands for."""
        content = self.subgraphs.get(node["type"])
        return None if content is None else _Scope(content, self.subgraphs, (self, node))

    def source(self, link: int | None) -> list[Any] | None:
        """Return the node and output that a link comes from, through the ends of subgraphs."""
        if link is None:
            return None
        node, slot = self.links[link]
        if node == INPUT_NODE and self.place is not None:
            outer, user = self.place
            return outer.source(user["inputs"][slot]["link"])
        inner = self.inner(self.nodes[node])
        if inner is not None:
            return inner.source(inner.content["outputs"][slot]["linkIds"][0])
        return [f"{self.prefix}{node}", slot]

    def prompt(self, object_info: dict[str, Any]) -> Prompt:
        found: Prompt = {}
        for node in self.nodes.values():
            if node["type"] in ONLY_IN_EDITOR or node.get("mode", 0) in (2, 4):
                continue
            inner = self.inner(node)
            if inner is not None:
                found |= inner.prompt(object_info)
                continue
            linked = {slot["name"]: slot.get("link") for slot in node.get("inputs", [])}
            values = list(node.get("widgets_values", []))
            inputs: dict[str, Any] = {}
            for name, kind, options in _inputs(object_info[node["type"]]):
                if _is_widget(kind, options):
                    if values:
                        inputs[name] = values.pop(0)
                    for _ in _extra_values(name, options):
                        if values:
                            values.pop(0)
                source = self.source(linked.get(name))
                if source is not None:
                    inputs[name] = source
            found[f"{self.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
        return found


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """Return what the editor would send to /prompt for this workflow; notes are left out, subgraphs are unpacked."""
    subgraphs = {content["id"]: content for content in workflow.get("definitions", {}).get("subgraphs", [])}
    return _Scope(workflow, subgraphs, None).prompt(object_info)


def to_editor(
    prompt: Prompt,
    layout: dict[str, Box],
    object_info: dict[str, Any],
    notes: list[tuple[str, Box]],
    titles: dict[str, str],
    groups: Sequence[tuple[str, Box]] = (),
    subgraphs: Mapping[str, dict[str, Any]] = NONE,
) -> dict[str, Any]:
    """Return an API prompt in the editor's format.

    Args:
        prompt: nodes by id; ids are numbers as text.
        layout: x, y, width, height of every node.
        object_info: from the server.
        notes: Markdown texts with their boxes.
        titles: display titles that differ from the node's own.
        groups: titles with their boxes.
        subgraphs: results of :func:`definition`, by the class under which the prompt uses them.
    """
    object_info = object_info | {kind: _as_info(made) for kind, made in subgraphs.items()}
    nodes: list[dict[str, Any]] = []
    links: list[list[Any]] = []
    outgoing: dict[tuple[str, int], list[int]] = {}
    for node_id, node in prompt.items():
        for name, _, _ in _inputs(object_info[node["class_type"]]):
            value = node["inputs"].get(name)
            if isinstance(value, list):
                source, output = value
                number = len(links) + 1
                kinds = object_info[prompt[source]["class_type"]]["output"]
                links.append([number, int(source), output, int(node_id), None, kinds[output], name])
                outgoing.setdefault((source, output), []).append(number)
    for order, (node_id, node) in enumerate(prompt.items()):
        info = object_info[node["class_type"]]
        x, y, width, height = layout[node_id]
        inputs: list[dict[str, Any]] = []
        values: list[Any] = []
        for name, kind, options in _inputs(info):
            link = next((item for item in links if item[3] == int(node_id) and item[6] == name), None)
            widget = _is_widget(kind, options)
            if link is not None or not widget:
                if link is not None:
                    link[4] = len(inputs)
                slot: dict[str, Any] = {"name": name, "type": kind, "link": link[0] if link else None}
                slot |= {"widget": {"name": name}} if widget else {}
                inputs.append(slot | ({"shape": 7} if name in info["input"].get("optional", {}) else {}))
            if widget:
                choices = kind if isinstance(kind, list) else options.get("options")
                fallback = options.get("default", choices[0] if choices else None)
                given = fallback if link is not None else node["inputs"].get(name, fallback)
                values += [given, *_extra_values(name, options)]
        outputs = [
            {"name": label, "type": kind, "links": outgoing.get((node_id, slot), [])}
            for slot, (label, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
        ]
        entry = {
            "id": int(node_id),
            "type": node["class_type"],
            "pos": [x, y],
            "size": [width, height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": node["class_type"]},
            "widgets_values": values,
        }
        made = subgraphs.get(node["class_type"])
        if made is not None:
            entry |= {"type": made["id"], "title": made["name"], "properties": {"proxyWidgets": made["proxies"]}}
        nodes.append(entry | ({"title": titles[node_id]} if node_id in titles else {}))
    last = max(int(node_id) for node_id in prompt)
    for index, (text, (x, y, width, height)) in enumerate(notes, start=1):
        nodes.append(
            {
                "id": last + index,
                "type": "MarkdownNote",
                "pos": [x, y],
                "size": [width, height],
                "flags": {},
                "order": len(nodes),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [text],
                "color": "#432",
                "bgcolor": "#653",
            }
        )
    return {
        "last_node_id": last + len(notes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": [link[:6] for link in links],
        "groups": [
            {"id": index, "title": title, "bounding": list(box), "color": "#3f789e", "font_size": 24, "flags": {}}
            for index, (title, box) in enumerate(groups, start=1)
        ],
        "config": {},
        "extra": {"ds": _opening_view(nodes)},
        "version": 0.4,
        **({"definitions": {"subgraphs": [_saved(made) for made in subgraphs.values()]}} if subgraphs else {}),
    }


def _opening_view(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the zoom and offset at which a small window shows all nodes, or where they would be too small to read,
    the first of them.

    Nodes 2.0 misplaces the nodes of a file without them.
    """
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes)
    scale = min(1.0, max(READABLE, min(VIEW[0] / right, VIEW[1] / bottom)))
    return {"scale": round(scale, 3), "offset": [round(MARGIN[0] / scale), round(MARGIN[1] / scale)]}


def _as_info(made: dict[str, Any]) -> dict[str, Any]:
    """Return a subgraph as if the server had listed it among its nodes."""
    return {
        "input": {"required": {item["name"]: [item["type"]] for item in made["inputs"]}},
        "output": [item["type"] for item in made["outputs"]],
        "output_name": [item["name"] for item in made["outputs"]],
    }


def _saved(made: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in made.items() if key != "proxies"}


Ends = dict[str, list[tuple[str, str]]]


def definition(
    name: str,
    prompt: Prompt,
    layout: dict[str, Box],
    inputs: Ends,
    outputs: dict[str, tuple[str, int]],
    widgets: list[tuple[str, str]],
    object_info: dict[str, Any],
    key: str = "",
) -> dict[str, Any]:
    """Return a subgraph as ComfyUI saves it, with the widgets that are shown outside under "proxies".

    Args:
        name: of the subgraph.
        prompt, layout: the nodes inside, as for :func:`to_editor`.
        inputs: for every socket of the subgraph, the nodes and inputs that it feeds.
        outputs: for every output of the subgraph, the node and slot that it comes from.
        widgets: nodes and widgets that are shown outside.
        object_info: from the server.
        key: distinguishes subgraphs of one name.
    """

    def identity(what: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"slime/{name}{key}/{what}"))

    inside = to_editor(prompt, layout, object_info, [], {})
    nodes = {str(node["id"]): node for node in inside["nodes"]}
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(names, link, strict=True)) for link in inside["links"]]
    made_inputs, made_outputs = [], []
    for slot, (label, targets) in enumerate(inputs.items()):
        first = len(links) + 1
        for node_id, socket in targets:
            place = next(i for i, item in enumerate(nodes[node_id]["inputs"]) if item["name"] == socket)
            found = nodes[node_id]["inputs"][place]
            found["link"] = len(links) + 1
            ends = (len(links) + 1, INPUT_NODE, slot, int(node_id), place, found["type"])
            links.append(dict(zip(names, ends, strict=True)))
        numbers = list(range(first, len(links) + 1))
        made_inputs.append(_end(identity(f"input/{label}"), label, found["type"], numbers))
    for slot, (label, (node_id, place)) in enumerate(outputs.items()):
        found = nodes[node_id]["outputs"][place]
        number = len(links) + 1
        found["links"] = [*found["links"], number]
        ends = (number, int(node_id), place, OUTPUT_NODE, slot, found["type"])
        links.append(dict(zip(names, ends, strict=True)))
        made_outputs.append(_end(identity(f"output/{label}"), label, found["type"], [number]))
    right = max(x + width for x, _, width, _ in layout.values())
    return {
        "id": identity("subgraph"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name.replace("_", " "),
        "inputNode": {"id": INPUT_NODE, "bounding": [-200, 0, 120, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 80, 0, 120, 40 + 20 * len(outputs)]},
        "inputs": made_inputs,
        "outputs": made_outputs,
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": [],
        "links": links,
        "extra": {},
        "proxies": [list(widget) for widget in widgets],
    }


def blueprint(name: str, description: str, **described: Any) -> dict[str, Any]:
    """Return a subgraph for ComfyUI's node library, with one node that uses it; see :func:`definition`."""
    made = definition(name, **described)
    count = len(made["nodes"])
    rows = max(len(made["inputs"]), len(made["outputs"])) + len(made["proxies"])
    outside = {
        "id": count + 1,
        "type": made["id"],
        "pos": [0, 0],
        "size": [300, 60 + 26 * rows],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": item["name"], "type": item["type"], "link": None} for item in made["inputs"]],
        "outputs": [{"name": item["name"], "type": item["type"], "links": []} for item in made["outputs"]],
        "properties": {"proxyWidgets": made["proxies"]},
        "widgets_values": [],
        "title": made["name"],
    }
    about = {"category": "SLiMe", "description": description}
    return {
        "revision": 0,
        "last_node_id": count + 1,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [_saved(made) | about]},
        "extra": {"BlueprintDescription": description},
    }


def _end(identity: str, name: str, kind: str, links: list[int]) -> dict[str, Any]:
    """Return an input or output of a subgraph."""
    return {"id": identity, "name": name, "type": kind, "linkIds": links, "pos": [0, 0]}


def find(prompt: Prompt, class_type: str) -> str:
    """Return the id of the first node of a class."""
    return next(node_id for node_id, node in prompt.items() if node["class_type"] == class_type)


class PromptBuilder:
    """Builder that adds nodes to a copy of a prompt."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = copy.deepcopy(prompt)
        self._next = 1 + max((int(node_id.split(":")[0]) for node_id in prompt), default=0)

    def add(self, class_type: str, **inputs: Any) -> str:
        node_id = str(self._next)
        self._next += 1
        self.prompt[node_id] = {"class_type": class_type, "inputs": inputs}
        return node_id

    @classmethod
    def of_checkpoint(cls, name: str) -> PromptBuilder:
        """Return a builder whose node 1 loads a checkpoint."""
        return cls({"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}})

    def add_sampling(self, positive: str, negative: str, latent: str, seed: int, steps: int, model: Any = None) -> str:
        """Add a KSampler for texts and the node of a latent; its model is node 1's by default."""
        texts = [[self.add("CLIPTextEncode", clip=["1", 1], text=text), 0] for text in (positive, negative)]
        links = {"model": model or ["1", 0], "positive": texts[0], "negative": texts[1], "latent_image": [latent, 0]}
        values = {"cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        return self.add("KSampler", **links, seed=seed, steps=steps, **values)

    def add_examples(self, image: str, masks: Mapping[str, str], previous: Any = None) -> Any:
        """Add one SLiMe Example for every mask file of an image; return the output of the last."""
        loaded = self.add("LoadImage", image=image)
        for part, file in masks.items():
            mask = self.add("LoadImageMask", image=file, channel="red")
            chain = {"previous": previous} if previous else {}
            previous = [self.add("SLiMeExample", image=[loaded, 0], mask=[mask, 0], names=part, **chain), 0]
        return previous

    def set_training(self, train: str, preset: str, **values: Any) -> None:
        """Set the preset of a SLiMe Train node, and connect a settings node with these values."""
        self.prompt[train]["inputs"]["preset"] = preset
        if values:
            settings = self.add(f"SLiMe{preset.capitalize()}Settings", **values)
            self.prompt[train]["inputs"]["settings"] = [settings, 0]
