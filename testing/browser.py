"""ComfyUI's front end in Chromium: one page with the canvas, and fixtures for the browser tests."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
# Messages that the front end logs without any extension: missing files of the user, no network, and errors of its own
# at start and in its search box.
HARMLESS = re.compile(
    r"404 \(Not Found\)|Content Security Policy|net::ERR_|Fetch API cannot load|reading 'id'\)\s+at onChange"
    r"|Error fetching file size|graph accessed before initialization|at Proxy\.onOptionSelect"
)
MODES = {"classic": False, "nodes2": True}

NEEDED = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; set CHROMIUM to its path"),
]


class Canvas:
    """One page with ComfyUI on it."""

    def __init__(self, page: Any, server: Any, mode: str) -> None:
        self.page, self.server, self.mode = page, server, mode
        self.errors: list[str] = []
        self.errors_at_start: list[str] = []
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
        """Put a node on the canvas and scroll it into view; return its id."""
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
        """Queue the workflow on the canvas as a user does; return its history entry when it has ended."""
        last = "/history?max_items=1"
        before = set(self.server.get(last))
        self.js("() => app.queuePrompt(0)")
        for _ in range(int(seconds * 10)):
            new = set(self.server.get(last)) - before
            if new:
                return self.server.wait(new.pop(), seconds)
            self.page.wait_for_timeout(100)
        raise AssertionError("nothing ran")


@pytest.fixture(scope="module")  # its event loop must not run in other modules' tests
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=MODES)
def canvas(request: Any, chromium: Any, server: Any) -> Iterator[Canvas]:
    for name, value in {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": MODES[request.param],
        "Comfy.Workflow.WarnBlueprintOverwrite": False,
        "Comfy.Validation.Workflows": False,
    }.items():
        server.post(f"/settings/{name}", value)
    page = chromium.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(60_000)
    yield Canvas(page, server, request.param).open()
    page.close()


@pytest.fixture
def fresh(canvas: Canvas) -> Iterator[None]:
    for _ in range(3):  # dialogs that a failed test left open
        canvas.page.keyboard.press("Escape")
    canvas.clear()
    canvas.errors_at_start += canvas.errors
    canvas.errors.clear()
    yield
    assert not canvas.errors, canvas.errors


def fill_in(canvas: Canvas, prompt: dict[str, Any]) -> None:
    """Set the widgets of the nodes on the canvas, inside subgraphs too, to the values of an API prompt."""
    values = {node_id: node["inputs"] for node_id, node in prompt.items()}
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


def train_briefly(canvas: Canvas, views: int = 4) -> None:
    """Connect settings of a short training, placed above the workflow, to every SLiMe Train."""
    canvas.js(
        """views => {
            const settings = LiteGraph.createNode("SLiMeInstantSettings");
            settings.pos = [0, -600];
            app.graph.add(settings);
            settings.widgets.find(widget => widget.name === "views").value = views;
            for (const train of app.graph.findNodesByType("SLiMeTrain")) settings.connect(0, train, "settings");
        }""",
        views,
    )


def settle(canvas: Canvas, least: int = 150) -> None:
    """Wait until neither the view nor the nodes on it move any more, ``least`` milliseconds after the call."""
    canvas.page.wait_for_timeout(least)
    canvas.js("() => { window.lastSeen = null; }")
    canvas.page.wait_for_function(
        """() => {
            const ds = app.canvas.ds, boxes = app.graph.nodes.map(node => [...node.pos, ...node.size]);
            const seen = JSON.stringify([ds.scale, [...ds.offset], boxes]), still = seen === window.lastSeen;
            window.lastSeen = seen;
            return still;
        }""",
        polling=100,
    )


def show_all(canvas: Canvas, name: str) -> None:
    canvas.js("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    settle(canvas)
    canvas.shot(name)


def lasting_overlaps(canvas: Canvas) -> list[tuple[str, str]]:
    """Return :func:`overlaps` that are there for five seconds: previews change sizes while they load."""
    for _ in range(20):
        found = overlaps(canvas)
        if not found:
            break
        canvas.page.wait_for_timeout(250)
    return found


def overlaps(canvas: Canvas) -> list[tuple[str, str]]:
    """Return the titles of nodes and notes that cover each other as drawn; an overlap of 2 pixels is tolerated."""
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
