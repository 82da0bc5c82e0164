// @ts-check
/**
 * Expert settings are tucked away on every canvas: "Show advanced" in the node's menu brings them back. Inputs that only
 * older workflows use are shown where they hold something.
 */

import { app } from "../../scripts/app.js";

const { LiteGraph } = /** @type {any} */ (globalThis);

app.registerExtension({
  name: "slime.advanced",
  /** @param {any} node */
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("SLiMe")) return;
    const native = () => LiteGraph.vueNodesMode && node.hasAdvancedWidgets; // newer Nodes 2.0 hides them by itself
    const tuck = (/** @type {any} */ widget, /** @type {() => boolean} */ tucked) => {
      for (const place of [widget, widget.options]) {
        Object.defineProperty(place, "hidden", { get: tucked, set: () => {}, enumerable: true, configurable: true });
      }
    };
    let any = false;
    for (const widget of node.widgets ?? []) {
      const { advanced, hidden: bygone } = widget.options ?? {};
      if (!advanced && !bygone) continue;
      any = true;
      const usual = widget.value;
      const shown = bygone ? () => widget.value !== usual : () => node.showAdvanced;
      if (advanced) widget.advanced = true;
      // Advanced alone is not drawn, but keeps its place; older versions keep that of hidden ones too.
      tuck(widget, () => !(advanced && native()) && !shown());
      widget.computeSize = (/** @type {number} */ width) => (shown() ? [width, LiteGraph.NODE_WIDGET_HEIGHT] : [0, -4]);
    }
    if (!any) return;
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
