// @ts-check
/** Advanced inputs are hidden on every canvas until "Show advanced" in the node's menu brings them back. */

import { app } from "../../scripts/app.js";

const { LiteGraph } = /** @type {any} */ (globalThis);

app.registerExtension({
  name: "slime.advanced",
  /** @param {any} node */
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("SLiMe")) return;
    const native = () => LiteGraph.vueNodesMode && node.hasAdvancedWidgets; // newer Nodes 2.0 hides them by itself
    const hidden = () => !native() && !node.showAdvanced;
    const advanced = (node.widgets ?? []).filter((/** @type {any} */ widget) => widget.options?.advanced);
    for (const widget of advanced) {
      widget.advanced = true;
      // Advanced alone is not drawn, but keeps its place; older versions keep that of hidden ones too. Newer ones, whose
      // widgets have a visibility, take hidden for good.
      for (const place of widget.visibility ? [] : [widget, widget.options]) {
        Object.defineProperty(place, "hidden", { get: hidden, set: () => {}, enumerable: true, configurable: true });
      }
      widget.computeSize = (/** @type {number} */ width) => (node.showAdvanced ? [width, LiteGraph.NODE_WIDGET_HEIGHT] : [0, -4]);
    }
    if (!advanced.length) return;
    let restored = false; // a saved node keeps its size
    const before = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...given) {
      restored = true;
      return before?.apply(this, given);
    };
    setTimeout(() => {
      if (restored) return;
      node.setSize(node.computeSize());
      node.setDirtyCanvas(true, true);
    });
  },
});
