// @ts-check
/** The painter's words by language; English where a language has none. */

/** @type {Record<string, Record<string, string>>} */
export const STRINGS = {
  en: {
    load: "Load an image",
    brush: "Brush (B)",
    eraser: "Eraser (E)",
    fill: "Fill a region (F)",
    size: "Brush size ([ and ])",
    opacity: "Opacity of the parts",
    undo: "Undo (Ctrl+Z)",
    redo: "Redo (Ctrl+Y)",
    fit: "Show everything (0); wheel zooms, middle button or Space pans",
    clear: "Erase everything",
    add: "Add a part",
    remove: "Delete this part",
    rename: "Name of the part",
    recolor: "Colour of the part",
    canvas: "Painting",
    empty: "Load or drop an image here, or connect one and queue once",
    unreadable: "The painting saved here cannot be read",
    upload_failed: "The image could not be loaded",
  },
};

/** @param {string} language such as "en" or "zh-TW" @returns {(key: string) => string} */
export function translator(language) {
  const words = STRINGS[language] ?? STRINGS[language.split("-")[0]] ?? {};
  return (key) => words[key] ?? STRINGS.en[key] ?? key;
}
