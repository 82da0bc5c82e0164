// @ts-check
/** What the painter saves in the workflow: image, parts and label map. No DOM in here. */

import { LabelMap } from "./label_map.js";

/** @typedef {{name: string, subfolder: string, type: string}} ImageFile a file that ComfyUI serves at /view */
/** @typedef {{name: string, color: string}} Part color is "#rrggbb" */

/** @typedef {{parts: Part[], width: number, height: number, runs: string}} Found parts that another node found */

export const VERSION = 1;
export const MOST_PARTS = 76; // as many as one set of embeddings holds
/** Characters of the encoded label map; beyond, it is painted more coarsely so that workflows stay small. */
export const LARGEST_RUNS = 120_000;
/** The same as PALETTE in slime/embeddings.py. */
const COLORS = [
  "#e6194b", "#3cb44b", "#ffe119", "#0082c8", "#f58230", "#911eb4",
  "#46f0f0", "#f032e6", "#d2f53c", "#fabed4", "#008080", "#dcbeff",
];

export class Painting {
  constructor() {
    /** @type {ImageFile | null} */
    this.image = null;
    /** @type {Part[]} */
    this.parts = [{ name: "part", color: COLORS[0] }];
    /** The map that is shown and painted on, of the picture's size. @type {LabelMap | null} */
    this.map = null;
    /** The map as it was painted last, of that picture's size; null before. @type {LabelMap | null} */
    this.source = null;
    /** Digest of the connected image it was painted on. @type {string | null} */
    this.of = null;
  }

  /** @param {string} [name] @returns {number} label of the new part, 0 where there is no room for it */
  addPart(name) {
    if (this.parts.length >= MOST_PARTS) return 0;
    const used = new Set(this.parts.map((part) => part.color));
    const count = this.parts.length + 1;
    const color = COLORS.find((one) => !used.has(one)) ?? hue(count);
    this.parts.push({ name: this.freeName(name ?? `part ${count}`), color });
    return count;
  }

  /** @param {number} label */
  removePart(label) {
    this.parts.splice(label - 1, 1);
    for (const map of new Set([this.map, this.source])) map?.remove(label);
  }

  /** @param {LabelMap} map another map, at its own size */
  replaceMap(map) {
    this.map = this.source = map;
  }

  /** The map that is shown was painted on. */
  keepMap() {
    this.source = this.map;
  }

  /**
   * Commas separate names in ComfyUI's text fields, so they become blanks; a name that is taken gets a number.
   * @param {number} label @param {string} name @returns {string} the name it got
   */
  renamePart(label, name) {
    const clean = name.replace(/[\s,;\u060c\u061b\u3001\uff0c\uff1b]+/g, " ").trim();
    const part = this.parts[label - 1];
    if (clean && clean !== part.name) {
      part.name = "";
      part.name = this.freeName(clean);
    }
    return part.name;
  }

  /** @param {string} name */
  freeName(name) {
    const taken = new Set(this.parts.map((part) => part.name));
    let free = name;
    for (let number = 2; taken.has(free); number++) free = `${name} ${number}`;
    return free;
  }

  /**
   * Go on from parts that were found; names that were not found stay in the list.
   * @param {Found} found
   */
  take({ parts, width, height, runs }) {
    const found = new Set(parts.map((part) => part.name));
    const others = this.parts.filter(({ name }) => !found.has(name) && name !== "part");
    this.parts = [...parts, ...others].slice(0, MOST_PARTS).map((part) => ({ ...part }));
    this.replaceMap(LabelMap.decode(runs, width, height));
  }

  /**
   * Paint on an image of this size; what was painted last is stretched to it, however many images came between.
   * @param {number} width @param {number} height
   */
  fitTo(width, height) {
    const wanted = LabelMap.for(width, height);
    const map = this.source ?? this.map;
    const fits = map?.width === wanted.width && map.height === wanted.height;
    this.map = fits ? map : (map?.resized(wanted.width, wanted.height) ?? wanted);
  }

  get empty() {
    return !this.map?.data.some((label) => label > 0);
  }

  /** Text for the workflow; the map is made coarser until it is small enough. */
  serialise() {
    let map = this.source ?? this.map;
    let runs = map?.encode(LARGEST_RUNS) ?? null;
    while (map && runs === null) {
      map = map.resized(Math.max(1, map.width >> 1), Math.max(1, map.height >> 1));
      runs = map.encode(Math.max(map.width, map.height) > 64 ? LARGEST_RUNS : Infinity);
    }
    const { image, parts } = this;
    const saved = { version: VERSION, image, parts, width: map?.width ?? 0, height: map?.height ?? 0, runs: runs ?? "" };
    return JSON.stringify(this.of ? { ...saved, of: this.of } : saved);
  }

  /**
   * @param {unknown} text of {@link Painting.serialise}; nothing gives an empty painting
   * @throws {Error} for text that is something else, or of a newer version
   */
  static parse(text) {
    const painting = new Painting();
    if (!text) return painting;
    const saved = JSON.parse(String(text));
    if (!(saved.version <= VERSION)) throw new Error("this painting was saved by a newer version of SLiMe");
    painting.image = saved.image ?? null;
    painting.of = saved.of ?? null;
    painting.parts = saved.parts.map((/** @type {Part} */ part) => ({ name: String(part.name), color: part.color }));
    if (saved.runs) painting.replaceMap(LabelMap.decode(saved.runs, saved.width, saved.height));
    return painting;
  }
}

/** @param {number} index @returns {string} colours far apart, without end */
function hue(index) {
  const turn = (index * 0.381966) % 1;
  const channel = (/** @type {number} */ shift) => {
    const wave = Math.abs(((turn + shift) % 1) * 6 - 3) - 1;
    return Math.round(55 + 200 * Math.min(1, Math.max(0, wave)))
      .toString(16)
      .padStart(2, "0");
  };
  return `#${channel(0)}${channel(2 / 3)}${channel(1 / 3)}`;
}
