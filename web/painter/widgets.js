// @ts-check
/** Small pieces of the painter's toolbar. */

export const ICONS = {
  load: "M4 16v3h16v-3M12 4v11M8 8l4-4 4 4",
  brush: "M4 20c3 0 5-1 5-4l-2-2c-3 0-3 3-3 6M8 13L18 3l3 3-10 10",
  eraser: "M8 20h12M4 15L14 5l6 6-9 9H8z",
  fill: "M5 12l7-7 7 7-7 7zM12 5L9 2M20 15c2 3 2 5 0 5s-2-2 0-5",
  lasso: "M4 10c0-4 4-6 8-6s8 2 8 6-4 6-8 6c-2 0-4 0-5-1M7 15c-2 1-2 4 0 4s2 2 1 3",
  rectangle: "M4 6h16v12H4z",
  wand: "M4 20L14 10M15 3v4M13 5h4M20 9v4M18 11h4M8 3v2M7 4h2",
  snap: "M5 4v7a7 7 0 0 0 14 0V4h-4v7a3 3 0 0 1-6 0V4zM5 8h4M15 8h4",
  take: "M12 3v11M8 10l4 4 4-4M4 17v4h16v-4",
  full: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5M9 9h6v6H9z",
  undo: "M9 14L4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
  redo: "M15 14l5-5-5-5M20 9H10a6 6 0 0 0 0 12h3",
  fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
  clear: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
};

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag @param {string} [name] @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, name = "") {
  const made = document.createElement(tag);
  made.className = name;
  return made;
}

/** @param {keyof typeof ICONS} name */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", ICONS[name]);
  svg.append(line);
  return svg;
}

/**
 * A slider with its name and value.
 * @param {string} title @param {number} low @param {number} high @param {number} value @param {(value: number) => void} set
 */
export function slider(title, low, high, value, set) {
  const made = element("label", "slime-slider");
  const name = element("span");
  const range = element("input");
  made.title = title;
  Object.assign(range, { type: "range", min: String(low), max: String(high) });
  range.setAttribute("aria-label", title);
  const word = title.replace(/[(（].*/, "").trim();
  const show = (/** @type {number} */ now) => {
    range.value = String(now);
    name.textContent = `${word} ${Math.round(now)}`;
  };
  range.oninput = () => {
    set(Number(range.value));
    show(Number(range.value));
  };
  show(value);
  made.append(name, range);
  return { element: made, show };
}
