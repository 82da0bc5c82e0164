// @ts-check
/** Nodes whose result is a text show it, read-only; ComfyUI's own front end draws nothing for it. */

import { app } from "../../scripts/app.js";

const SMALLEST = [340, 220];
const NODES = new Set(["SLiMeSaveEmbeddings", "SLiMeLoadEmbeddings", "SLiMeExportLabels"]);

app.registerExtension({
  name: "slime.text",
  /** @param {any} node */
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return;
    const { widget } = app.widgets.STRING(node, "result", ["STRING", { multiline: true }], app);
    widget.serialize = false; // in the workflow
    widget.options.serialize = false; // in the prompt
    widget.options.read_only = true; // on the Nodes 2.0 canvas
    if (widget.element) widget.element.readOnly = true;
    node.setSize([Math.max(node.size[0], SMALLEST[0]), Math.max(node.size[1], SMALLEST[1])]);
    const before = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      before?.call(this, output);
      if (output?.text) widget.value = [output.text].flat().join("\n");
    };
  },
});
