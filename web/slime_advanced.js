// @ts-check
/** Expert settings are tucked away on the classic canvas too: "Show advanced" in the node's menu brings them back. */

import { app } from "../../scripts/app.js";

const { LiteGraph } = /** @type {any} */ (globalThis);

app.registerExtension({
  name: "slime.advanced",
  /** @param {any} node */
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("SLiMe")) return;
    const widgets = (node.widgets ?? []).filter((/** @type {any} */ widget) => widget.options?.advanced);
    const tucked = () => !LiteGraph.vueNodesMode && !node.showAdvanced; // Nodes 2.0 has a way of its own
    for (const widget of widgets) {
      widget.advanced = true;
      // Advanced alone is not drawn, but keeps its place; older versions keep that of hidden ones too.
      Object.defineProperty(widget, "hidden", { get: tucked, set: () => {}, configurable: true });
      widget.computeSize = (/** @type {number} */ width) => (tucked() ? [0, -4] : [width, LiteGraph.NODE_WIDGET_HEIGHT]);
    }
    if (!widgets.length || LiteGraph.vueNodesMode) return;
    let restored = false; // a saved node keeps its size
    const before = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...given) {
      restored = true;
      return before?.apply(this, given);
    };
    queueMicrotask(() => restored || node.setSize(node.computeSize()));
  },
});
