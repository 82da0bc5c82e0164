"""SLiMe Part Painter in a real browser, classic canvas and Nodes 2.0."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.run import put_image
from testing import scenes, splits
from testing.browser import NEEDED, Canvas, fill_in, lasting_overlaps, show_all, train_briefly
from testing.server import MODEL
from testing.workflows import load_workflow
from tools.run_workflows import CORRECTION, FIRST, prepare

pytestmark = NEEDED


def painter_on(canvas: Canvas, size: tuple[int, int] | None = None) -> tuple[int, Any]:
    """A painter with a scene loaded, resized to ``size`` (width, height); its node id and canvas element."""
    scene = Image.fromarray(scenes.render("car", splits.EXAMPLES).image)
    put_image(canvas.server, "browser_scene.png", np.asarray(scene.resize(size) if size else scene))
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
    """Two parts with the mouse; copy; reload of the page; a subgraph; then they are learned."""
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
    if canvas.mode == "classic":  # what is sent is the same
        train_briefly(canvas)
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


ON_THE_PAGE = """id => {
    const node = app.graph.getNodeById(id), widget = node.widgets.find(w => w.name === 'painting');
    const shown = [...document.querySelectorAll('.slime-painter')].filter(one => one.offsetParent);
    return [shown.length, shown[0] === widget.element, shown[0] === widget.painter.element];
}"""


def assert_seen_is_saved(canvas: Canvas, node: int) -> None:
    """The element on the page is the living node's, and its painting is what the workflow and the prompt hold."""
    canvas.page.wait_for_timeout(400)
    assert canvas.js(ON_THE_PAGE, node) == [1, True, True]
    seen = json.loads(canvas.js(f"id => {PAINTER}(id).painting.serialise()", node))
    assert painted(canvas, node) == seen
    prompt = canvas.js("async () => (await app.graphToPrompt()).output")
    assert json.loads(prompt[str(node)]["inputs"]["painting"]) == seen


def test_nothing_painted_is_lost_by_any_undo(canvas) -> None:
    """Strokes, undo in the painter, by the graph, redo, loading anew, another tab: what is seen is what is saved."""
    node, element = painter_on(canvas)
    steps = iter(range(20))

    def two_strokes() -> None:
        """Two more strokes; each must arrive in what is saved."""
        for _ in range(2):
            y = 0.15 + 0.035 * next(steps)
            before = painted_sum(canvas, node)
            stroke(canvas, element, (0.3, y), (0.4, y), (0.7, y))
            assert painted_sum(canvas, node) > before
        assert_seen_is_saved(canvas, node)

    two_strokes()
    both = painted(canvas, node)
    canvas.js(f"id => {PAINTER}(id).view.zoom(50, 50, 1.1)", node)
    zoom = canvas.js(f"id => {PAINTER}(id).view.scale", node)
    canvas.page.keyboard.press("Control+z")
    assert_seen_is_saved(canvas, node)
    assert painted(canvas, node) != both and painted_sum(canvas, node)
    assert canvas.js(f"id => {PAINTER}(id).view.scale", node) == zoom  # the graph did not load anew
    canvas.page.keyboard.press("Control+y")
    assert_seen_is_saved(canvas, node)
    assert painted(canvas, node) == both
    canvas.page.locator(".slime-undo:visible").first.click()
    canvas.page.keyboard.press("Control+Shift+Z")
    assert_seen_is_saved(canvas, node)
    assert painted(canvas, node) == both
    two_strokes()

    undo, redo = ("app.extensionManager.workflow.activeWorkflow.changeTracker." + name for name in ("undo()", "redo()"))
    canvas.js(f"() => {undo}")
    assert_seen_is_saved(canvas, node)
    two_strokes()
    canvas.js(f"() => {undo}")
    canvas.js(f"() => {redo}")
    assert_seen_is_saved(canvas, node)
    two_strokes()

    kept = painted(canvas, node)
    saved = canvas.js("() => app.graph.serialize()")
    canvas.load(saved)
    assert_seen_is_saved(canvas, node)
    assert painted(canvas, node) == kept
    two_strokes()
    kept = painted(canvas, node)

    canvas.js("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    canvas.page.wait_for_function("() => !app.graph.nodes.some(node => node.type === 'SLiMePartPainter')")
    other = json.loads(json.dumps(saved))  # the same node in another workflow, with a painting of its own
    other["id"] = "0b3d0a5c-30f4-4d60-8a3b-0f2f4a8f1d11"
    canvas.load(other)
    assert_seen_is_saved(canvas, node)
    assert painted(canvas, node)["runs"] == json.loads(painting_of(other, node))["runs"]
    two_strokes()
    for _ in range(2):  # past the blank one
        canvas.js("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
        canvas.page.wait_for_timeout(500)
    canvas.page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'SLiMePartPainter')")
    assert painted(canvas, node) == kept
    assert_seen_is_saved(canvas, node)
    two_strokes()


def painting_of(workflow: dict[str, Any], node: int) -> str:
    return next(item["widgets_values"][0] for item in workflow["nodes"] if str(item["id"]) == str(node))


def test_outlines_snap_and_the_wheel_zooms_the_painting(canvas) -> None:
    node, element = painter_on(canvas)
    scale = f"id => {PAINTER}(id).view.scale"
    graph, painting = canvas.js("() => app.canvas.ds.scale"), canvas.js(scale, node)
    box = element.bounding_box()
    canvas.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert not painted_sum(canvas, node)  # a click takes the focus, no more
    canvas.page.mouse.wheel(0, -200)
    canvas.page.wait_for_timeout(300)
    assert canvas.js(scale, node) > 1.2 * painting and canvas.js("() => app.canvas.ds.scale") == graph
    canvas.page.keyboard.press("0")

    canvas.page.locator(".slime-lasso:visible").first.click()
    stroke(canvas, element, (0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6))
    outlined = painted_labels(canvas, node)
    assert sum(outlined) > 0.01 * len(outlined)
    runs = painted(canvas, node)["runs"]  # read before the key: snapping may be done by the next call
    canvas.page.keyboard.press("s")
    canvas.page.wait_for_function(f"([id, runs]) => JSON.parse({PAINTER}(id).value).runs !== runs", arg=[node, runs])
    snapped = painted_labels(canvas, node)
    assert 0.3 * sum(outlined) < sum(snapped) < 3 * sum(outlined)
    canvas.page.locator(".slime-wand:visible").first.click()
    box = element.bounding_box()
    canvas.page.mouse.click(box["x"] + 0.15 * box["width"], box["y"] + 0.2 * box["height"])
    assert painted_sum(canvas, node) > sum(snapped)
    canvas.shot("painter_tools")


def test_each_picture_is_painted_at_its_own_size_up_to_four_megapixels(canvas) -> None:
    node, element = painter_on(canvas, (3840, 2160))
    stroke(canvas, element, (0.4, 0.4), (0.6, 0.5))
    large = painted(canvas, node)
    assert 3_990_000 < large["width"] * large["height"] < 4_010_000 and len(large["runs"]) < 10_000
    small = Image.new("RGB", (64, 64), "gray")
    put_image(canvas.server, "small.png", np.asarray(small))
    canvas.page.locator(".slime-painter:visible input[type=file]").first.set_input_files(
        canvas.server.base / "input" / "small.png"
    )
    canvas.page.wait_for_function(f"id => JSON.parse({PAINTER}(id).value).width === 64", arg=node)
    assert painted_sum(canvas, node) and painted(canvas, node)["height"] == 64
    canvas.page.keyboard.press("Control+z")
    canvas.page.wait_for_function(f"id => {PAINTER}(id).painting.map.data.length > 3e6", arg=node)
    assert painted(canvas, node) == large


def test_the_properties_panel_leaves_the_painter_as_it_is(canvas) -> None:
    toggle = canvas.page.locator('button[aria-label="Toggle properties panel"]:visible')
    if not toggle.count():
        pytest.skip("this front end has no properties panel")
    toggle.first.click()
    node, element = painter_on(canvas)
    width = element.bounding_box()["width"]
    canvas.js("id => app.canvas.selectItems([app.graph.getNodeById(id)])", node)
    panel = canvas.page.get_by_role("tab", name="Parameters").first
    panel.wait_for()
    canvas.page.get_by_text("SLiMe Part Painter").last.wait_for()  # the panel is about this node
    canvas.page.wait_for_timeout(1000)
    canvas.shot("painter_with_panel")
    assert element.bounding_box()["width"] == width and not canvas.page.get_by_text("painting", exact=True).count()
    toggle.first.click()
    panel.wait_for(state="hidden")
    assert element.bounding_box()["width"] == width


def test_the_painting_cannot_be_an_input_of_a_subgraph(canvas) -> None:
    """There the front end would show nothing, and inside nothing either."""
    node, element = painter_on(canvas)
    stroke(canvas, element, (0.4, 0.4), (0.6, 0.5))
    before = painted(canvas, node)
    canvas.js("id => app.canvas.selectItems([app.graph.getNodeById(id)])", node)
    canvas.js("() => app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph')")
    canvas.page.wait_for_function("() => app.graph.nodes[0]?.subgraph")
    linked = canvas.js(
        """() => {
            const { subgraph } = app.graph.nodes[0];
            const [node] = subgraph.nodes;
            const slot = node.inputs.find(input => input.name === "painting");
            subgraph.inputNode.emptySlot.connect(slot, node);
            return slot.link != null;
        }"""
    )
    assert not linked
    canvas.page.get_by_text("Open the subgraph to paint").first.wait_for()
    assert canvas.js("() => app.graph.nodes[0].subgraph.inputs.length") == 0
    sent = canvas.js("async () => Object.values((await app.graphToPrompt()).output)[0].inputs.painting")
    assert json.loads(sent) == before


def test_painting_in_app_mode(canvas) -> None:
    if not canvas.page.locator('button[aria-label="Enter app mode"]').count():
        pytest.skip("this front end has no app mode")
    node, element = painter_on(canvas)
    stroke(canvas, element, (0.4, 0.4), (0.6, 0.5))
    before = painted(canvas, node)
    graph = canvas.js("() => app.graph.serialize()")
    linear = {"linearMode": True, "linearData": {"inputs": [[node, "painting"]], "outputs": [node]}}
    canvas.load(graph | {"extra": graph.get("extra", {}) | linear})
    canvas.page.get_by_text("App Mode", exact=True).first.wait_for()
    canvas.page.keyboard.press("Escape")  # the front end's welcome
    element = canvas.page.locator(".slime-canvas:visible").first
    element.wait_for()
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    box: dict[str, float] = {}
    while element.bounding_box() != box:  # the column slides in
        box = element.bounding_box()
        canvas.page.wait_for_timeout(300)
    assert min(element.bounding_box()[side] for side in ("width", "height")) > 250
    stroke(canvas, element, (0.2, 0.7), (0.6, 0.8))
    canvas.shot("painter_in_app_mode")
    after = json.loads(canvas.js("async () => Object.values((await app.graphToPrompt()).output)[0].inputs.painting"))
    assert after["runs"] != before["runs"] and after["parts"] == before["parts"]
    canvas.load(graph)
    canvas.page.get_by_text("App Mode", exact=True).first.wait_for(state="hidden")


def test_painting_in_full_screen(canvas) -> None:
    node, element = painter_on(canvas)
    before = element.bounding_box()["height"]
    canvas.page.locator(".slime-full:visible").first.click()
    canvas.page.wait_for_function("() => document.fullscreenElement?.classList.contains('slime-painter')")
    canvas.page.wait_for_timeout(500)
    assert element.bounding_box()["height"] > max(1.2 * before, 0.7 * canvas.page.viewport_size["height"])
    canvas.page.locator(".slime-brush:visible").first.click()
    stroke(canvas, element, (0.4, 0.4), (0.6, 0.6))
    assert painted_sum(canvas, node)
    canvas.shot("painter_full_screen")
    canvas.page.locator(".slime-full:visible").first.click()
    canvas.page.wait_for_function("() => !document.fullscreenElement")
    canvas.page.wait_for_timeout(500)
    assert abs(element.bounding_box()["height"] - before) < 20


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


def painted_sum(canvas: Canvas, node: int) -> int:
    """Sum of the labels of all pixels."""
    return canvas.js(f"id => ({PAINTER}(id).painting.map?.data ?? []).reduce((sum, label) => sum + label, 0)", node)


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
    canvas.page.wait_for_function("() => refused.some(text => text.includes('nothing is painted'))")
    node = canvas.js("() => app.graph.nodes.find(node => node.type === 'SLiMePartPainter').id")
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    canvas.page.keyboard.press("Escape")
    canvas.shot("painter_connected")


def test_what_was_found_opens_the_second_painter(canvas) -> None:
    if canvas.mode == "nodes2":
        pytest.skip("the mask comes from the server, whatever draws it")
    canvas.load(load_workflow(CORRECTION))
    fill_in(canvas, prepare(canvas.server, CORRECTION))
    train_briefly(canvas)
    assert canvas.run()["status"]["status_str"] == "success"  # what follows the painter waits, without an error
    node = canvas.js("() => app.graph.findNodesByType('SLiMePartPainter')[0].id")
    canvas.page.wait_for_function(f"() => {PAINTER}({node}).picture")
    found = painted(canvas, node)
    assert [part["name"] for part in found["parts"]] == ["wheel"] and found["of"]
    outputs = canvas.run()["outputs"]
    again = canvas.js("() => String(app.graph.findNodesByType('SLiMeSegment')[1].id)")
    assert outputs[again]["images"]  # trained again, segmented again
    show_all(canvas, f"{CORRECTION}_after")
    assert lasting_overlaps(canvas) == []
