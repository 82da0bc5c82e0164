// @ts-check
/** Names of parts as chips to click, wherever a node asks for names that were given elsewhere in the graph. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/**
 * Where the chips of a node write to, and what else can be chosen there.
 * @type {Record<string, {widget: string, more?: string[], line?: boolean, everywhere?: boolean}>}
 */
const NODES = {
  SLiMePartMask: { widget: "names", more: ["background"] },
  SLiMeEvaluate: { widget: "names" },
  SLiMeEmbeddingsMerge: { widget: "changes", line: true },
  SLiMeExample: { widget: "names", everywhere: true },
};
const MOST = 40; // chips; and nodes between a name and the node that asks for it are fewer than
const FAR = 200;

/** Names in saved files, by file. @type {Map<string, string[]>} */
const files = new Map();

api.addEventListener("execution_success", () => files.clear());

/** @param {string} file */
async function readFile(file) {
  files.set(file, []); // asked once until a run may have written another
  const answer = await api.fetchApi(`/slime/names?${new URLSearchParams({ filename: file })}`);
  if (answer.ok) files.set(file, (await answer.json()).names);
}

/** @param {string} text "wheel, window" */
function split(text) {
  return text.split(/[,;\n\u060c\u061b\u3001\uff0c\uff1b]/).map((name) => name.trim()).filter(Boolean);
}

/** @param {string} text of a painting @returns {string[]} none where it cannot be read; the painter says so */
function paintedNames(text) {
  try {
    return JSON.parse(text).parts.map((/** @type {{name: string}} */ part) => part.name);
  } catch {
    return [];
  }
}

/** Names that a node gives by itself. @param {any} node @returns {string[]} */
function given(node) {
  const value = (/** @type {string} */ name) => String(node.widgets?.find((/** @type {any} */ w) => w.name === name)?.value ?? "");
  switch (node.comfyClass) {
    case "SLiMeExample":
      return split(value("names"));
    case "SLiMeExampleFromLabelMap":
      return value("colors").split("\n").map((line) => line.split("=")[0].trim()).filter(Boolean);
    case "SLiMePartPainter":
      return paintedNames(value("painting"));
    case "SLiMeLoadEmbeddings": {
      const file = value("filename");
      if (file && !files.has(file)) readFile(file);
      return files.get(file) ?? [];
    }
    default:
      return [];
  }
}

/** Names given by the nodes that lead to this one, nearest first. @param {any} node @returns {string[]} */
function upstream(node) {
  const seen = new Set([node]);
  const names = new Set();
  const queue = [node];
  while (queue.length && seen.size < FAR) {
    const one = queue.shift();
    for (let slot = 0; slot < (one.inputs?.length ?? 0); slot++) {
      const source = one.getInputNode?.(slot);
      if (!source || seen.has(source)) continue;
      seen.add(source);
      queue.push(source);
      given(source).forEach((name) => names.add(name));
    }
  }
  return [...names];
}

/** @param {any} node */
function choices(node) {
  const { everywhere, more = [] } = NODES[node.comfyClass];
  const others = (node.graph?.nodes ?? []).filter((/** @type {any} */ other) => other !== node);
  const found = everywhere ? others.flatMap(given) : upstream(node);
  return found.length ? [...new Set([...found, ...more])].slice(0, MOST) : [];
}

/** @param {any} node @param {string} name */
function choose(node, name) {
  const { widget, line } = NODES[node.comfyClass];
  const field = node.widgets.find((/** @type {any} */ one) => one.name === widget);
  if (line) field.value = `${field.value}${field.value && !field.value.endsWith("\n") ? "\n" : ""}${name} = `;
  else {
    const chosen = split(field.value);
    field.value = (chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name]).join(", ");
  }
  field.callback?.(field.value);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** @param {any} node @param {HTMLElement} element */
function show(node, element) {
  const { widget, line } = NODES[node.comfyClass];
  const text = String(node.widgets.find((/** @type {any} */ one) => one.name === widget)?.value ?? "");
  const chosen = line ? text.split("\n").map((one) => one.split("=")[0].trim()) : split(text);
  const names = choices(node);
  const state = JSON.stringify([names, chosen]);
  if (element.dataset.state === state) return;
  element.dataset.state = state;
  element.replaceChildren(
    ...names.map((name) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "slime-chip";
      chip.textContent = name;
      chip.setAttribute("aria-pressed", String(chosen.includes(name)));
      chip.onpointerdown = (event) => event.stopPropagation(); // it would drag the node
      chip.onclick = () => {
        choose(node, name);
        show(node, element);
      };
      return chip;
    }),
  );
}

app.registerExtension({
  name: "slime.names",
  /** @param {any} node */
  nodeCreated(node) {
    if (!NODES[node.comfyClass]) return;
    const element = document.createElement("div");
    element.className = "slime-chips";
    const height = 30;
    const widget = node.addDOMWidget("known names", "SLIME_NAMES", element, {
      serialize: false,
      hideOnZoom: false,
      margin: 3,
      getMinHeight: () => height,
      getMaxHeight: () => height,
      getValue: () => "",
      setValue: () => {},
    });
    widget.serialize = false;
    const timer = setInterval(() => {
      if (node.graph?.getNodeById?.(node.id) === node) show(node, element);
    }, 500);
    const before = node.onRemoved;
    node.onRemoved = function (/** @type {any[]} */ ...args) {
      clearInterval(timer);
      return before?.apply(this, args);
    };
  },
});
