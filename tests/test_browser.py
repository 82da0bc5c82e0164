"""The extension in a real browser: ComfyUI's own front end on the real server, classic canvas and Nodes 2.0.

Needs Chromium and Playwright's Python package. Screenshots go to test_output/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.run import put_image
from testing import scenes, splits
from testing.server import MODEL
from testing.workflows import load_workflow
from tools.make_workflows import BLUEPRINTS, WORKFLOWS
from tools.run_workflows import EMBEDDINGS, FIRST, learn_parts, prepare

playwright = pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "test_output" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What the front end says by itself, without any extension: files of the user that are not there, no network, slips of
# its own while it starts and in its search box.
HARMLESS = re.compile(
    r"404 \(Not Found\)|Content Security Policy|net::ERR_|Fetch API cannot load|reading 'id'\)\s+at onChange"
    r"|Error fetching file size|graph accessed before initialization|at Proxy\.onOptionSelect"
)
MODES = {"classic": False, "nodes2": True}

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; set CHROMIUM to its path"),
    pytest.mark.skipif(not MODEL.is_file(), reason="the tiny model is not there"),
]


class Canvas:
    """One page with ComfyUI on it."""

    def __init__(self, page: Any, server: Any, mode: str) -> None:
        self.page, self.server, self.mode = page, server, mode
        self.errors: list[str] = []
        page.on("console", lambda message: self._heard(message.type, message.text, message.location.get("url", "")))
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))

    def _heard(self, kind: str, text: str, url: str) -> None:
        if kind == "error" and not HARMLESS.search(text + url):
            self.errors.append(f"{text} ({url})")

    def open(self) -> Canvas:
        self.page.goto(self.server.address)
        # app.graph must not be touched before the front end has made it.
        self.page.wait_for_function(
            "window.app?.extensionManager?.spinner === false && app.extensions?.some(e => e.name === 'slime.painter')"
        )
        self.page.wait_for_function("app.canvas?.graph")
        self.clear()
        return self

    def clear(self) -> None:
        self.js("() => app.graph.clear()")

    def js(self, code: str, value: Any = None) -> Any:
        return self.page.evaluate(code, value)

    def load(self, workflow: dict[str, Any]) -> None:
        self.js("workflow => app.loadGraphData(workflow)", workflow)

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{self.mode}_{name}.png")

    def add(self, kind: str, x: int = 60, y: int = 120) -> int:
        """A node put on the canvas, scrolled into view; returns its id."""
        return self.js(
            """([kind, x, y]) => {
                const node = LiteGraph.createNode(kind);
                node.pos = [x, y];
                app.graph.add(node);
                app.canvas.ds.reset();
                app.canvas.setDirty(true, true);
                return node.id;
            }""",
            [kind, x, y],
        )

    def types(self) -> list[str]:
        return self.js("() => app.graph.nodes.map(node => node.type)")

    def run(self, seconds: float = 300) -> dict[str, Any]:
        """Queue what is on the canvas as the user does; history entry of its end."""
        before = set(self.server.get("/history"))
        self.js("() => app.queuePrompt(0)")
        deadline = seconds * 10
        for _ in range(int(deadline)):
            new = set(self.server.get("/history")) - before
            if new:
                return self.server.wait(new.pop(), seconds)
            self.page.wait_for_timeout(100)
        raise AssertionError("nothing ran")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=MODES)
def canvas(request, chromium, server) -> Iterator[Canvas]:
    for name, value in {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": MODES[request.param],
        "Comfy.Workflow.WarnBlueprintOverwrite": False,
        "Comfy.Validation.Workflows": False,
    }.items():
        server.post(f"/settings/{name}", value)
    page = chromium.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(30_000)
    yield Canvas(page, server, request.param).open()
    page.close()


@pytest.fixture(autouse=True)
def fresh(canvas) -> Iterator[None]:
    for _ in range(3):  # dialogs that a failed test left open
        canvas.page.keyboard.press("Escape")
    canvas.clear()
    canvas.errors.clear()
    yield
    assert not canvas.errors, canvas.errors


def test_the_pack_loads_without_an_error(canvas) -> None:
    canvas.page.reload()
    canvas.open()
    canvas.shot("loaded")
    names = canvas.js("() => app.extensions.map(e => e.name).filter(name => name.startsWith('slime'))")
    assert sorted(names) == [
        "slime.advanced",
        "slime.language",
        "slime.names",
        "slime.painter",
        "slime.text",
    ]  # each once
    assert not canvas.errors


def search_for(canvas: Canvas, name: str, patience: int) -> None:
    """Add the first node that ComfyUI's search box finds."""
    page = canvas.page
    canvas.js("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_timeout(500 * patience)
    page.keyboard.type(name)
    page.wait_for_timeout(700 * patience)
    listed = page.locator(".p-autocomplete-option").filter(has_text=name)
    if listed.count():
        listed.first.click()
    else:  # the newer search box takes the first of its list
        page.keyboard.press("Enter")
    page.wait_for_timeout(300 * patience)
    page.mouse.click(750, 600)  # newer versions hang the node on the pointer until it is put down
    page.wait_for_timeout(200)
    page.keyboard.press("Escape")


def test_every_node_is_found_by_search(canvas) -> None:
    info = {k: v for k, v in canvas.server.get("/object_info").items() if v["category"].split("/")[0] == "SLiMe"}
    assert len(info) >= 19
    for kind, spec in info.items():
        for patience in (1, 2, 4):  # the box slides in, takes the focus, and searches when typing pauses
            canvas.clear()
            search_for(canvas, spec["display_name"], patience)
            if canvas.types():
                break
        assert canvas.types() == [kind], f"searching {spec['display_name']} gave {canvas.types()}"
    canvas.shot("search")


def painter_on(canvas: Canvas) -> tuple[int, Any]:
    """A painter with a scene loaded; its node id and canvas element."""
    scene = scenes.render("car", splits.TEACH)
    put_image(canvas.server, "browser_scene.png", scene.image)
    node = canvas.add("SLiMePartPainter")
    element = canvas.page.locator(".slime-canvas:visible").first
    element.wait_for()
    canvas.page.locator(".slime-painter:visible input[type=file]").first.set_input_files(
        canvas.server.base / "input" / "browser_scene.png"
    )
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    canvas.page.wait_for_timeout(300)
    return node, element


PAINTER = "(id => app.graph.getNodeById(id).widgets.find(w => w.name === 'painting').painter)"


def painted(canvas: Canvas, node: int) -> dict[str, Any]:
    """What the node would save now."""
    return json.loads(canvas.js("id => app.graph.getNodeById(id).serialize().widgets_values[0]", node))


def stroke(canvas: Canvas, element: Any, *points: tuple[float, float]) -> None:
    """Draw with the mouse; points are shares of the canvas."""
    box = element.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    canvas.page.mouse.move(*places[0])
    canvas.page.mouse.down()
    for place in places[1:]:
        canvas.page.mouse.move(*place, steps=4)
    canvas.page.mouse.up()


def test_two_parts_are_painted_and_kept(canvas) -> None:
    """Two parts with the mouse; undo; save and load; copy; reload of the page; a subgraph; then they are learned."""
    node, element = painter_on(canvas)
    stroke(canvas, element, (0.40, 0.55), (0.45, 0.60))
    first = painted(canvas, node)
    canvas.page.locator(".slime-painter .slime-add").first.click()
    canvas.page.keyboard.type("window")
    canvas.page.keyboard.press("Enter")
    stroke(canvas, element, (0.55, 0.40), (0.60, 0.45))
    both = painted(canvas, node)
    assert [part["name"] for part in both["parts"]] == ["part", "window"] and both["runs"] != first["runs"]
    canvas.shot("painter")

    canvas.page.keyboard.press("Control+z")
    canvas.page.wait_for_timeout(300)
    assert painted(canvas, node)["runs"] == first["runs"]
    canvas.page.keyboard.press("Control+y")
    canvas.page.wait_for_timeout(300)
    assert painted(canvas, node) == both

    saved = canvas.js("() => app.graph.serialize()")
    canvas.clear()
    canvas.load(saved)
    assert painted(canvas, node) == both

    copies = canvas.js(
        """id => {
            app.canvas.selectItems([app.graph.getNodeById(id)]);
            app.canvas.copyToClipboard();
            app.canvas.pasteFromClipboard();
            return app.graph.nodes.map(node => node.id);
        }""",
        node,
    )
    (copy,) = set(copies) - {node}
    canvas.page.wait_for_timeout(300)
    assert painted(canvas, copy) == both
    canvas.js("id => app.graph.remove(app.graph.getNodeById(id))", copy)

    canvas.page.wait_for_timeout(1500)  # the front end saves a moment after a change
    canvas.page.reload()
    canvas.page.wait_for_function("() => window.app?.graph?.nodes?.some(node => node.type === 'SLiMePartPainter')")
    canvas.page.locator(".slime-canvas").first.wait_for()
    node = canvas.js("() => app.graph.nodes.find(node => node.type === 'SLiMePartPainter').id")
    assert painted(canvas, node) == both
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    canvas.shot("painter_after_reload")

    canvas.load(connected_to_training(both))
    entry = canvas.run()
    assert entry["status"]["status_str"] == "success", entry["status"]

    canvas.js(
        """() => {
            app.canvas.selectItems([app.graph.nodes.find(node => node.type === 'SLiMePartPainter')]);
            return app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph');
        }"""
    )
    canvas.page.wait_for_function("() => !app.graph.nodes.some(node => node.type === 'SLiMePartPainter')")
    inner = canvas.js(
        "() => app.graph.nodes.find(node => node.subgraph).subgraph.nodes[0].serialize().widgets_values[0]"
    )
    assert json.loads(inner) == both
    assert "painting" in json.dumps(canvas.js("async () => (await app.graphToPrompt()).output"))
    canvas.shot("painter_in_a_subgraph")


def test_outlines_snap_and_the_wheel_zooms_the_painting(canvas) -> None:
    node, element = painter_on(canvas)
    scale = f"id => {PAINTER}(id).view.scale"
    graph, painting = canvas.js("() => app.canvas.ds.scale"), canvas.js(scale, node)
    box = element.bounding_box()
    canvas.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert not any(painted_labels(canvas, node))  # a click takes the focus, no more
    canvas.page.mouse.wheel(0, -200)
    canvas.page.wait_for_timeout(300)
    assert canvas.js(scale, node) > 1.2 * painting and canvas.js("() => app.canvas.ds.scale") == graph
    canvas.page.keyboard.press("0")

    canvas.page.locator(".slime-lasso:visible").first.click()
    stroke(canvas, element, (0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6))
    outlined = painted_labels(canvas, node)
    assert sum(outlined) > 0.01 * len(outlined)
    canvas.page.keyboard.press("s")
    canvas.page.wait_for_function(
        f"([id, runs]) => JSON.parse({PAINTER}(id).value).runs !== runs", arg=[node, painted(canvas, node)["runs"]]
    )
    snapped = painted_labels(canvas, node)
    assert 0.3 * sum(outlined) < sum(snapped) < 3 * sum(outlined)
    canvas.page.locator(".slime-wand:visible").first.click()
    box = element.bounding_box()
    canvas.page.mouse.click(box["x"] + 0.15 * box["width"], box["y"] + 0.2 * box["height"])
    assert sum(painted_labels(canvas, node)) > sum(snapped)
    canvas.shot("painter_tools")


def test_the_painting_grows_with_its_node(canvas) -> None:
    node, element = painter_on(canvas)
    before = element.bounding_box()["height"]
    drawn = canvas.page.locator(f'[data-node-id="{node}"]')
    if canvas.mode == "classic":
        canvas.js("id => { const n = app.graph.getNodeById(id); n.setSize([n.size[0], n.size[1] + 150]); }", node)
        canvas.js("() => app.canvas.setDirty(true, true)")
    else:
        box = drawn.bounding_box()
        canvas.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
        canvas.page.mouse.down()
        canvas.page.mouse.move(box["x"] + box["width"], box["y"] + box["height"] + 150, steps=5)
        canvas.page.mouse.up()
    canvas.page.wait_for_timeout(500)
    canvas.shot("painter_grown")
    assert element.bounding_box()["height"] > before + 80


def painted_labels(canvas: Canvas, node: int) -> list[int]:
    return canvas.js(f"id => [...({PAINTER}(id).painting.map?.data ?? [])]", node)


def connected_to_training(painting: dict[str, Any]) -> dict[str, Any]:
    """The template with the painter, shortened to learning a little from this painting."""
    workflow = load_workflow(FIRST)
    for item in workflow["nodes"]:
        values = item.get("widgets_values", [])
        if item["type"] == "CheckpointLoaderSimple":
            values[0] = MODEL.name
        if item["type"] == "SLiMePartPainter":
            values[0] = json.dumps(painting)
        if item["type"] == "SLiMePartMask":
            values[0] = painting["parts"][0]["name"]
        if item["type"] == "SLiMeTrain":
            values[1], values[5] = 10, 4  # steps and views
    return workflow


def test_a_connected_image_is_shown_and_what_follows_waits(canvas) -> None:
    """An image that no Load Image node gives: the first run brings it, and says that nothing is painted."""
    canvas.js(
        """() => {
            const add = (kind, x) => {
                const node = LiteGraph.createNode(kind);
                node.pos = [x, 120];
                app.graph.add(node);
                return node;
            };
            const empty = add('EmptyImage', 20), painter = add('SLiMePartPainter', 340);
            const preview = add('PreviewImage', 900);
            empty.connect(0, painter, painter.inputs.findIndex(input => input.name === 'image'));
            painter.connect(2, preview, 0);
        }"""
    )
    canvas.js(
        """() => {
            window.refused = [];
            app.api.addEventListener('execution_error', event => refused.push(event.detail.exception_message));
        }"""
    )
    canvas.run()
    canvas.page.wait_for_function("() => refused.some(text => text.includes('nothing is painted yet'))")
    node = canvas.js("() => app.graph.nodes.find(node => node.type === 'SLiMePartPainter').id")
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    canvas.page.keyboard.press("Escape")
    canvas.shot("painter_connected")


def open_template(canvas: Canvas, name: str) -> None:
    """Choose a bundled workflow in ComfyUI's own browser of templates."""
    canvas.js("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    search = canvas.page.locator("input[placeholder^='Search']:visible").last
    search.wait_for()
    search.fill(name)
    card = canvas.page.get_by_test_id(f"template-workflow-{name}")
    card.first.wait_for()
    canvas.shot(f"template_{name}")
    card.first.click()
    canvas.page.wait_for_function("() => app.graph.nodes.some(node => node.type.startsWith('SLiMe'))")


def test_what_was_found_opens_the_second_painter(canvas) -> None:
    name = "4 Correct and teach again"
    canvas.load(load_workflow(name))
    fill_in(canvas, prepare(canvas.server, name), {"SLiMeTrain": {"views": 4, "steps": 10}})
    assert canvas.run()["status"]["status_str"] == "success"  # what follows the painter waits, without an error
    node = canvas.js("() => app.graph.nodes.filter(node => node.type === 'SLiMePartPainter')[1].id")
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    found = painted(canvas, node)
    assert [part["name"] for part in found["parts"]] == ["wheel", "window", "body"] and found["of"]
    outputs = canvas.run()["outputs"]
    again = canvas.js("() => String(app.graph.findNodesByType('SLiMeSegment')[1].id)")
    assert outputs[again]["images"]  # taught again, found again
    show_all(canvas, "corrected")


def test_names_are_chosen(canvas) -> None:
    canvas.load(load_workflow(FIRST))
    canvas.page.wait_for_timeout(1000)
    canvas.page.keyboard.press("Escape")  # versions differ in how they say that a checkpoint is missing
    canvas.page.wait_for_timeout(500)
    chips = canvas.page.locator(".slime-chip")
    assert chips.all_text_contents() == ["wheel", "window", "body", "background"]
    chips.filter(has_text="window").click()
    names = "() => app.graph.findNodesByType('SLiMePartMask')[0].widgets.find(w => w.name === 'names').value"
    assert canvas.js(names) == "wheel, window"
    chips.filter(has_text="wheel").click()
    assert canvas.js(names) == "window"
    sent = canvas.js("async () => (await app.graphToPrompt()).output")
    assert not any("known names" in node["inputs"] for node in sent.values())
    canvas.shot("names")
    shutil.copyfile(learned_file(canvas), canvas.server.base / "models" / "slime" / EMBEDDINGS)
    canvas.load(load_workflow("6 Repaint one part"))  # names from a file
    canvas.page.wait_for_timeout(1500)
    assert chips.all_text_contents() == ["wheel", "window", "body", "background"]
    canvas.page.keyboard.press("Escape")


def test_nodes_speak_the_language_that_was_chosen(canvas) -> None:
    words = json.loads((ROOT / "locales" / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))["SLiMeTrain"]
    canvas.server.post("/settings/Comfy.Locale", "ja")
    try:
        canvas.page.reload()
        canvas.open()
        node = canvas.add("SLiMeTrain", 300, 200)
        title, inputs = canvas.js(
            "id => { const n = app.graph.getNodeById(id); return [n.title, n.inputs.map(i => i.localized_name)]; }",
            node,
        )
        assert title == words["display_name"] and words["inputs"]["examples"]["name"] in inputs
        help_page = canvas.js("async () => await (await fetch('/extensions/slime/docs/SLiMeTrain/ja.md')).text()")
        assert words["display_name"] in help_page
        canvas.shot("japanese")
    finally:
        canvas.server.post("/settings/Comfy.Locale", "en")
        canvas.page.reload()
        canvas.open()
        canvas.page.wait_for_timeout(1000)  # the front end brings back what was open


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_template_opens_and_runs(canvas, name) -> None:
    shutil.copyfile(learned_file(canvas), canvas.server.base / "models" / "slime" / EMBEDDINGS)
    open_template(canvas, name)
    # Newer versions mark nodes whose checkpoint or picture is missing; a node of an unknown type is another thing.
    unknown = "() => app.graph.nodes.map(n => n.type).filter(type => !LiteGraph.registered_node_types[type])"
    assert canvas.js(unknown) == []
    show_all(canvas, f"{name}_before")
    assert overlaps(canvas) == []
    fill_in(canvas, prepare(canvas.server, name), {"SLiMeTrain": {"views": 4, "steps": 10}})
    entry = canvas.run(600)
    assert entry["status"]["status_str"] == "success", entry["status"]
    show_all(canvas, f"{name}_after")
    assert overlaps(canvas) == []


def fill_in(canvas: Canvas, prompt: dict[str, Any], changes: dict[str, dict[str, Any]]) -> None:
    """Set the widgets of what is on the canvas, inside subgraphs too, to the values of an API prompt."""
    values = {node_id: node["inputs"] | changes.get(node["class_type"], {}) for node_id, node in prompt.items()}
    canvas.js(
        """values => {
            const fill = (nodes, prefix) => {
                for (const node of nodes) {
                    if (node.subgraph) fill(node.subgraph.nodes, `${prefix}${node.id}:`);
                    for (const widget of node.widgets ?? []) {
                        const value = values[prefix + node.id]?.[widget.name];
                        if (value !== undefined && !Array.isArray(value)) widget.value = value;
                    }
                }
            };
            fill(app.graph.nodes, "");
        }""",
        values,
    )


def show_all(canvas: Canvas, name: str) -> None:
    canvas.js("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    canvas.page.wait_for_timeout(700)
    canvas.shot(name)


def overlaps(canvas: Canvas) -> list[tuple[str, str]]:
    """Titles of nodes and notes that cover each other, as they are drawn; a hand's breadth of pixels is forgiven."""
    boxes = canvas.js(
        """() => app.graph.nodes.map(node => {
            const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
            const scale = app.canvas.ds.scale, [x, y, width, height] = node.boundingRect;
            const box = drawn?.width ? [drawn.x, drawn.y, drawn.width, drawn.height]
                : [x * scale, y * scale, width * scale, height * scale];
            return [node.title, ...box];
        })"""
    )
    return [
        (one[0], other[0])
        for index, one in enumerate(boxes)
        for other in boxes[index + 1 :]
        if min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1]) > 2
        and min(one[2] + one[4], other[2] + other[4]) - max(one[2], other[2]) > 2
    ]


def learned_file(canvas: Canvas) -> Path:
    """A learned file for the workflows that load one."""
    path = canvas.server.base / "models" / "slime" / "browser_learned.safetensors"
    if not path.exists():
        shutil.copyfile(learn_parts(canvas.server, views=4, steps=10), path)
    return path


def test_live_previews_and_progress_arrive(canvas) -> None:
    canvas.load(load_workflow(FIRST))
    canvas.js(
        """() => {
            window.heard = {previews: 0, texts: []};
            for (const name of ['b_preview', 'b_preview_with_metadata']) {
                app.api.addEventListener(name, () => window.heard.previews++);
            }
            app.api.addEventListener('progress_text', event => window.heard.texts.push(event.detail.text));
        }"""
    )
    fill_in(canvas, prepare(canvas.server, FIRST), {"SLiMeTrain": {"views": 8, "seed": 5}})
    canvas.run(600)
    heard = canvas.js("() => window.heard")
    assert heard["previews"] >= 1
    assert any("loss" in text for text in heard["texts"]) and any("left" in text for text in heard["texts"])
    canvas.shot("after_training")


def test_the_help_panel_shows_our_page(canvas) -> None:
    node = canvas.add("SLiMeTrain", 300, 200)
    canvas.js("id => app.canvas.selectItems([app.graph.getNodeById(id)])", node)
    canvas.page.wait_for_timeout(500)
    canvas.page.get_by_test_id("info-button").first.click()
    canvas.page.get_by_text("Parameter notes").first.wait_for()
    canvas.shot("help")


def test_subgraph_blueprints_can_be_added(canvas) -> None:
    names = {entry["name"] for entry in canvas.server.get("/global_subgraphs").values()}
    assert set(BLUEPRINTS) <= names
    for name in BLUEPRINTS:
        canvas.load(json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8")))
        node = canvas.js(
            "() => { const node = app.graph.nodes[0]; return {inner: node.subgraph.nodes.length,"
            " widgets: node.widgets.map(w => w.name), inputs: node.inputs.length}; }"
        )
        described = BLUEPRINTS[name]()
        assert node["inner"] == len(described["prompt"]) and node["inputs"] >= len(described["inputs"])
        # Some versions write the inner node's number before a widget's name.
        assert [widget for _, widget in described["widgets"]] == [name.split(": ")[-1] for name in node["widgets"]]
        canvas.shot(name)


def test_expert_settings_are_tucked_away_and_still_sent(canvas) -> None:
    node = canvas.add("SLiMeTrain", 300, 120)
    canvas.page.wait_for_timeout(500)
    canvas.shot("train")
    height = "id => app.graph.getNodeById(id).size[1]"
    low = canvas.js(height, node)
    if canvas.mode == "classic":
        assert low < 200
        canvas.js("id => app.graph.getNodeById(id).toggleAdvanced()", node)
        assert canvas.js(height, node) > low + 200
    saved = canvas.js("() => app.graph.serialize()")
    assert len(saved["nodes"][0]["widgets_values"]) == 15
    sent = canvas.js("async () => (await app.graphToPrompt()).output")
    assert {"preset", "steps", "self_layers"} <= set(sent[str(node)]["inputs"])


def test_text_results_are_shown(canvas) -> None:
    shutil.copyfile(learned_file(canvas), canvas.server.base / "models" / "slime" / EMBEDDINGS)
    canvas.js("() => app.refreshComboInNodes()")
    loader = canvas.add("SLiMeLoadEmbeddings")
    kinds = ("SLiMeEmbeddingsInfo", "SLiMeEmbeddingsToText", "SLiMeSaveEmbeddings")
    others = [canvas.add(kind, 380, 120 + 260 * index) for index, kind in enumerate(kinds)]
    canvas.js(
        """([from, to, file]) => {
            const loader = app.graph.getNodeById(from);
            loader.widgets[0].value = file;
            to.forEach(id => loader.connect(0, app.graph.getNodeById(id), "embeddings"));
        }""",
        [loader, others, EMBEDDINGS],
    )
    entry = canvas.run(60)
    assert entry["status"]["status_str"] == "success"
    canvas.page.wait_for_timeout(500)
    shown = canvas.js(
        """() => app.graph.nodes.filter(node => node.widgets?.some(w => w.name === "result"))
            .map(node => node.widgets.find(w => w.name === "result").value)"""
    )
    canvas.shot("texts")
    assert len(shown) == 3 and all(shown) and any("my_parts" in text for text in shown)
    visible = canvas.js("() => [...document.querySelectorAll('textarea')].filter(e => e.offsetHeight > 30).length")
    assert visible >= 3
    assert not any("result" in node["inputs"] for node in entry["prompt"][2].values())
    locked = "() => [...document.querySelectorAll('textarea')].filter(e => e.offsetHeight > 30).every(e => e.readOnly)"
    assert canvas.js(locked)
