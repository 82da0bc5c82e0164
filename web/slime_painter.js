// @ts-check
/** Registers the painter as the widget of inputs of type SLIME_PAINTING. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Painter } from "./painter/painter.js";

/** @typedef {import("./painter/painting.js").ImageFile} ImageFile */

const SMALLEST = [380, 560];

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./painter/painter.css", import.meta.url).href;
document.head.append(style);

/** @param {ImageFile} image */
function viewUrl(image) {
  return api.apiURL(`/view?${new URLSearchParams({ filename: image.name, subfolder: image.subfolder, type: image.type })}`);
}

/** @param {File} file @returns {Promise<ImageFile>} */
async function upload(file) {
  const body = new FormData();
  body.append("image", file);
  body.append("subfolder", "slime");
  const response = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  const { name, subfolder, type } = await response.json();
  return { name, subfolder, type };
}

/**
 * @param {string} painting @param {string | null} connected address of the connected image
 * @returns {Promise<import("./painter/painting.js").Found>}
 */
async function snap(painting, connected) {
  const asked = connected && new URL(connected, location.href).searchParams;
  const image = asked && `${asked.get("subfolder") ?? ""}/${asked.get("filename")} [${asked.get("type")}]`.replace(/^\//, "");
  const response = await api.fetchApi("/slime/snap", { method: "POST", body: JSON.stringify({ painting, image }) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/** The picture that a Load Image node at the socket shows. @param {any} node */
function upstreamUrl(node) {
  const slot = node.inputs?.findIndex((/** @type {any} */ input) => input.name === "image") ?? -1;
  if (slot < 0 || !node.isInputConnected(slot)) return null;
  const source = node.getInputNode?.(slot);
  const file = source?.widgets?.find((/** @type {any} */ widget) => widget.name === "image")?.value;
  if (typeof file !== "string" || !source.comfyClass?.startsWith("LoadImage")) return null;
  const [, path, type = "input"] = /** @type {string[]} */ (file.match(/^(.*?)(?: \[(\w+)\])?$/));
  const cut = path.lastIndexOf("/");
  return viewUrl({ name: path.slice(cut + 1), subfolder: path.slice(0, Math.max(cut, 0)), type });
}

/**
 * The last painter of every node id, with the node it belonged to then. The graph makes new nodes when it is loaded
 * again (undo, redo, another tab), while Nodes 2.0 may keep the element of the node before on the page.
 * @type {Map<string, any>}
 */
const last = new Map();

/** Whether a node is part of the graph that is open. @param {any} node */
function living(node) {
  const root = app.rootGraph ?? app.graph;
  const reachable = node.graph === root || root.subgraphs?.get(node.graph?.id) === node.graph;
  return reachable && node.graph.getNodeById(node.id) === node;
}

/**
 * Let the painter that a node's predecessor left on the page go on in that node, with its history, zoom and focus.
 * @param {any} widget @param {any} before widget, node and id of the graph of the predecessor @param {any} graph
 */
function inherit(widget, before, graph) {
  const { painter } = before.widget;
  painter.show(widget.painter.value, before.graph === graph);
  painter.host = widget.painter.host;
  widget.painter = painter;
  widget.element = painter.element;
}

app.registerExtension({
  name: "slime.painter",
  getCustomWidgets() {
    return {
      /** @param {any} node @param {string} name */
      SLIME_PAINTING(node, name) {
        const painter = new Painter({
          language: app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en",
          upload,
          url: viewUrl,
          snap,
          changed: () => node.graph?.setDirtyCanvas?.(true, true),
        });
        const widget = node.addDOMWidget(name, "SLIME_PAINTING", painter.element, {
          hideOnZoom: false,
          hideInPanel: true, // the element can be in one place only
          getMinHeight: () => 400,
          getValue: () => widget.painter.value,
          setValue: (/** @type {string} */ value) => {
            widget.painter.value = value;
          },
        });
        // The properties panel would leave its own width here, and the painter would keep it.
        Object.defineProperty(widget, "width", { get: () => undefined, set: () => {} });
        widget.painter = painter;
        // A subgraph that takes the painting on its face shows nothing there, and hides the painter in here.
        const before = node.onConnectInput;
        node.onConnectInput = function (/** @type {any[]} */ ...given) {
          const [slot, , input, end, output] = given;
          if (node.inputs[slot]?.name !== name || output !== -1) return before?.apply(this, given); // -1: of a subgraph
          queueMicrotask(() => {
            if (end?.subgraph?.inputs.includes(input) && !input.linkIds.length) end.subgraph.removeInput(input);
          });
          app.extensionManager?.toast?.add({ severity: "info", summary: node.title, detail: painter.say("inside"), life: 8000 });
          return false;
        };
        const refresh = () => widget.painter.connect(upstreamUrl(node) ?? (connected(node) ? sent : null));
        /** Address of the image that the last run sent, for sources other than Load Image. @type {string | null} */
        let sent = null;
        chain(node, "onExecuted", (/** @type {any} */ output) => {
          const image = output?.slime_image?.[0];
          if (image) sent = `${viewUrl({ name: image.filename, subfolder: image.subfolder, type: image.type })}&run=${Date.now()}`;
          refresh();
          if (output) widget.painter.propose(output.slime_digest?.[0] ?? null, output.slime_initial_masks?.[0] ?? null);
          widget.painter.tell(output?.slime_message?.[0] ?? "");
        });
        chain(node, "onConnectionsChange", () => queueMicrotask(refresh));
        /** @type {any} */
        let predecessor;
        chain(node, "onAdded", () => {
          predecessor = last.get(String(node.id));
          last.set(String(node.id), { node, widget, graph: node.graph?.id });
        });
        chain(node, "onConfigure", () => {
          if (predecessor && predecessor.node !== node && !living(predecessor.node)) inherit(widget, predecessor, node.graph?.id);
          predecessor = undefined;
          setTimeout(refresh);
        });
        return { widget, minWidth: SMALLEST[0], minHeight: SMALLEST[1] };
      },
    };
  },
  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== "SLiMePartPainter") return;
    node.setSize([Math.max(node.size[0], SMALLEST[0]), Math.max(node.size[1], SMALLEST[1])]);
  },
});

/** @param {any} node */
function connected(node) {
  const wanted = (/** @type {any} */ input, /** @type {number} */ slot) =>
    ["image", "initial_masks"].includes(input.name) && node.isInputConnected(slot);
  return node.inputs?.some(wanted) ?? false;
}

/** Call something after a node's own handler. @param {any} node @param {string} name @param {(...given: any[]) => void} then */
function chain(node, name, then) {
  const before = node[name];
  node[name] = function (/** @type {any[]} */ ...given) {
    const result = before?.apply(this, given);
    then(...given);
    return result;
  };
}
