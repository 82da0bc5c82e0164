// @ts-check
/**
 * Our nodes in the user's language where the front end leaves them in English: versions as 1.32 load a language's own
 * words over those that packs brought along. Newer ones do it right, and nothing is done then.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** @typedef {{name?: string, tooltip?: string}} Words */
/** @type {Record<string, {display_name: string, description: string, inputs: Record<string, Words>, outputs: Record<string, Words>}>} */
let texts = {};
/** @type {Set<string>} nodes that the front end left in English */
const left = new Set();

app.registerExtension({
  name: "slime.language",
  /** @param {Record<string, any>} defs */
  async addCustomNodeDefs(defs) {
    const language = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
    if (language === "en") return;
    const all = await (await api.fetchApi("/i18n")).json();
    texts = all[language]?.nodeDefs ?? {};
    for (const [kind, def] of Object.entries(defs)) {
      const words = kind.startsWith("SLiMe") ? texts[kind] : undefined;
      if (!words || def.display_name !== all.en?.nodeDefs?.[kind]?.display_name) continue;
      left.add(kind);
      def.display_name = words.display_name;
      def.description = words.description;
      for (const group of Object.values(def.input)) {
        for (const [name, spec] of Object.entries(group)) {
          if (words.inputs[name]?.tooltip && spec[1]) spec[1].tooltip = words.inputs[name].tooltip;
        }
      }
    }
  },
  /** @param {any} node */
  nodeCreated(node) {
    if (!left.has(node.comfyClass)) return;
    const { inputs, outputs } = texts[node.comfyClass];
    for (const input of node.inputs ?? []) input.localized_name = inputs[input.name]?.name ?? input.localized_name;
    for (const widget of node.widgets ?? []) widget.label = inputs[widget.name]?.name ?? widget.label;
    (node.outputs ?? []).forEach((/** @type {any} */ output, /** @type {number} */ place) => {
      output.localized_name = outputs[String(place)]?.name ?? output.localized_name;
    });
  },
});
