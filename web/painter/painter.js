// @ts-check
/** The painter's element: toolbar, list of parts, canvas. It knows nothing of ComfyUI. */

import { History } from "./history.js";
import { LabelMap } from "./label_map.js";
import { Painting } from "./painting.js";
import { translator } from "./strings.js";
import { View } from "./view.js";
import { element, icon, slider } from "./widgets.js";

/** @typedef {import("./painting.js").ImageFile} ImageFile */
/** @typedef {import("./painting.js").Found} Found */
/** @typedef {"brush" | "eraser" | "fill" | "lasso" | "rectangle" | "wand"} Tool */
/**
 * @typedef {object} Host what the painter asks of its surroundings
 * @property {(value: string) => void} changed the painting to be saved is another now
 * @property {(file: File) => Promise<ImageFile>} upload
 * @property {(image: ImageFile) => string} url where an uploaded image is served
 * @property {(painting: string, connected: string | null) => Promise<Found>} [snap] moves borders to the image's edges
 * @property {string} [language]
 */

const TOOLS = /** @type {const} */ (["brush", "eraser", "fill", "lasso", "rectangle", "wand"]);

export class Painter {
  /** @param {Host} host */
  constructor(host) {
    this.host = host;
    this.say = translator(host.language ?? "en");
    this.painting = new Painting();
    this.history = new History(this.painting.serialise());
    this.view = new View();
    /** @type {Tool} */
    this.tool = "brush";
    this.label = 1;
    /** Of the brush, in thousandths of the painting's longer side. */
    this.radius = 20;
    this.opacity = 0.55;
    this.tolerance = 24;
    /** @type {HTMLImageElement | null} */
    this.picture = null;
    /** An image that arrives by a socket hides the loaded one. @type {string | null} */
    this.connected = null;
    /** Digest of that image, known after a run. @type {string | null} */
    this.digest = null;
    /** What another node found in it. @type {Found | null} */
    this.found = null;
    /** The outline being drawn, painting positions. @type {{x: number, y: number}[] | null} */
    this.outline = null;
    /** The first press only takes the focus. */
    this.focusing = false;
    this.message = "";
    /** The saved text could not be read; it is kept until something is painted. */
    this.unreadable = false;
    /** @type {Map<number, {x: number, y: number}>} pointers that are down, canvas positions */
    this.pointers = new Map();
    /** @type {{x: number, y: number} | null} */
    this.cursor = null;
    this.painted = false;
    this.panning = false;
    /** @type {{x: number, y: number, label: number} | null} the line being painted, and where it has come to */
    this.stroke = null;
    /** @type {string | null} address of the picture that is shown or on its way */
    this.wanted = null;
    /** @type {string | null} address of the picture that is shown */
    this.shown = null;
    this.tint = document.createElement("canvas");
    this.element = element("div", "slime-painter widget-expands"); // Nodes 2.0 lets it grow with the node
    this.canvas = element("canvas", "slime-canvas");
    this.keys = element("textarea", "slime-keys"); // holds the focus: ComfyUI's shortcuts spare text fields
    this.list = element("div", "slime-parts");
    this.file = element("input");
    this.sizes = slider(this.say("size"), 1, 150, this.radius, (value) => (this.radius = value));
    this.tolerances = slider(this.say("tolerance"), 0, 128, this.tolerance, (value) => (this.tolerance = value));
    /** @type {Record<string, HTMLButtonElement>} */
    this.buttons = {};
    this.build();
    this.showParts();
  }

  // ------------------------------------------------------------------------------------------------------- saving

  get value() {
    return this.history.present;
  }

  /** @param {string} text */
  set value(text) {
    this.show(text, false);
  }

  /**
   * Show a saved painting.
   * @param {string} text @param {boolean} undoable whether undo returns to the painting before
   */
  show(text, undoable) {
    if (text === this.value) return;
    this.unreadable = false;
    this.message = "";
    try {
      this.painting = Painting.parse(text);
    } catch (error) {
      this.unreadable = true;
      this.painting = new Painting();
      this.message = `${this.say("unreadable")}: ${error instanceof Error ? error.message : error}`;
    }
    this.label = Math.min(this.label, this.painting.parts.length) || 1;
    const state = this.unreadable ? text : this.painting.serialise();
    if (undoable && !this.unreadable) this.history.push(state);
    else this.history.reset(state);
    this.showParts();
    this.loadPicture();
  }

  /** Something was changed by hand. */
  commit() {
    const state = this.painting.serialise();
    if (state === this.value) return;
    if (this.unreadable) this.history.reset(state);
    else this.history.push(state);
    this.unreadable = false;
    this.host.changed(state);
  }

  /** @param {string | undefined} state of the history */
  restore(state) {
    if (state === undefined) return;
    const before = JSON.stringify(this.painting.image);
    this.painting = Painting.parse(state);
    this.label = Math.min(this.label, this.painting.parts.length) || 1;
    this.showParts();
    if (JSON.stringify(this.painting.image) !== before) this.loadPicture();
    else {
      this.fitMap(); // the step before the image came had nothing to paint on
      this.retint();
    }
    this.host.changed(state);
  }

  // ------------------------------------------------------------------------------------------------------- images

  /** @param {string | null} url of the image at the socket, null where there is none any more */
  connect(url) {
    if (url === this.connected) return;
    this.connected = url;
    this.digest = null; // until a run tells it
    this.loadPicture();
  }

  /**
   * What a run sent: the connected image's digest, and what was found in it. An empty painting starts from that.
   * @param {string | null} digest @param {Found | null} found
   */
  propose(digest, found) {
    this.digest = digest;
    this.found = found;
    this.buttons.take.hidden = !found;
    const another = Boolean(digest && this.painting.of && this.painting.of !== digest);
    this.buttons.take.classList.toggle("wanted", another);
    if (found && this.painting.empty) this.take();
  }

  /** Paint what was found. */
  take() {
    if (!this.found) return;
    this.painting.take(this.found);
    this.painting.of = this.digest;
    this.replaced();
  }

  /** Say something over the picture until it is painted on. @param {string} text */
  tell(text) {
    this.message = text;
    this.draw();
  }

  /** Let the borders follow the edges of the image. */
  async snap() {
    if (!this.host.snap || !this.painting.map || !this.picture) return;
    const before = this.value;
    this.buttons.snap.disabled = true;
    try {
      const { runs, width, height } = await this.host.snap(before, this.connected);
      if (this.value !== before) return; // painted on meanwhile
      this.painting.replaceMap(LabelMap.decode(runs, width, height));
      this.replaced();
    } catch (error) {
      this.message = error instanceof Error ? error.message : String(error);
    } finally {
      this.buttons.snap.disabled = false;
      this.draw();
    }
  }

  /** The whole painting is another one. */
  replaced() {
    this.label = Math.min(this.label, this.painting.parts.length) || 1;
    this.fitMap();
    this.buttons.take.classList.remove("wanted");
    this.showParts();
    this.retint();
    this.commit();
  }

  /** Bring the map to the size of the picture, unless another one is on its way. */
  fitMap() {
    if (!this.picture || this.shown !== this.wanted) return;
    this.painting.fitTo(this.picture.naturalWidth, this.picture.naturalHeight);
  }

  loadPicture() {
    const { image } = this.painting;
    const url = this.connected ?? (image && this.host.url(image));
    this.wanted = url;
    if (!url) {
      this.picture = null;
      this.retint();
      return;
    }
    const picture = new Image();
    picture.onload = () => {
      if (this.wanted !== url) return;
      this.picture = picture;
      this.shown = url;
      this.fitMap();
      this.fit();
      // Only another image is worth saving: a map that was saved at another size is merely shown at this one.
      if (!this.unreadable && JSON.stringify(image) !== JSON.stringify(JSON.parse(this.value).image)) {
        this.painting.keepMap();
        this.commit();
      }
      this.retint();
    };
    picture.onerror = () => {
      if (this.wanted !== url) return;
      this.picture = null;
      this.message = this.say("upload_failed");
      this.retint();
    };
    picture.src = url;
  }

  /** @param {File | undefined} file */
  async load(file) {
    if (!file || !file.type.startsWith("image/")) return;
    try {
      this.painting.image = await this.host.upload(file);
      this.message = this.painting.empty ? "" : this.say("other_picture");
      this.loadPicture();
    } catch (error) {
      this.message = `${this.say("upload_failed")}: ${error instanceof Error ? error.message : error}`;
      this.draw();
    }
  }

  // ------------------------------------------------------------------------------------------------------- element

  build() {
    const bar = element("div", "slime-bar");
    const actions = {
      load: () => this.file.click(),
      brush: () => this.choose("brush"),
      eraser: () => this.choose("eraser"),
      fill: () => this.choose("fill"),
      lasso: () => this.choose("lasso"),
      rectangle: () => this.choose("rectangle"),
      wand: () => this.choose("wand"),
      snap: () => this.snap(),
      take: () => this.take(),
      undo: () => this.restore(this.history.undo()),
      redo: () => this.restore(this.history.redo()),
      fit: () => (this.fit(), this.draw()),
      full: () => this.fullScreen(),
      clear: () => this.clear(),
    };
    for (const [name, action] of Object.entries(actions)) {
      const button = element("button", `slime-${name}`);
      button.type = "button";
      button.title = this.say(name);
      button.setAttribute("aria-label", button.title);
      button.append(icon(/** @type {keyof typeof import("./widgets.js").ICONS} */ (name)));
      button.onclick = action;
      this.buttons[name] = button;
      bar.append(button);
    }
    this.buttons.take.hidden = true;
    this.buttons.snap.hidden = !this.host.snap;
    const opacity = slider(this.say("opacity"), 0, 100, 100 * this.opacity, (value) => {
      this.opacity = value / 100;
      this.draw();
    });
    const sliders = element("div", "slime-bar");
    sliders.append(this.sizes.element, this.tolerances.element, opacity.element);
    this.file.type = "file";
    this.file.accept = "image/*";
    this.file.hidden = true;
    this.file.onchange = () => {
      this.load(this.file.files?.[0]);
      this.file.value = "";
    };
    this.element.dataset.captureWheel = "true"; // Nodes 2.0 would zoom the graph
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", this.say("canvas"));
    this.keys.readOnly = true;
    this.keys.inputMode = "none"; // no keyboard on a touch screen
    this.keys.setAttribute("aria-label", this.say("canvas"));
    this.element.append(bar, sliders, this.list, this.keys, this.canvas, this.file);
    this.listen();
    this.choose("brush");
    new ResizeObserver(() => this.resize()).observe(this.canvas);
  }

  showParts() {
    const rows = this.painting.parts.map((part, index) => {
      const label = index + 1;
      const row = element("div", "slime-part");
      row.classList.toggle("active", label === this.label);
      const color = element("input");
      color.type = "color";
      color.value = part.color;
      color.title = this.say("recolor");
      color.oninput = () => {
        part.color = color.value;
        this.retint();
      };
      color.onchange = () => this.commit();
      const name = element("input", "slime-name");
      name.value = part.name;
      name.title = this.say("rename");
      name.spellcheck = false;
      name.onfocus = () => this.select(label);
      name.onchange = () => {
        name.value = this.painting.renamePart(label, name.value);
        this.commit();
      };
      const remove = element("button", "slime-remove");
      remove.type = "button";
      remove.textContent = "\u00d7";
      remove.title = this.say("remove");
      remove.disabled = this.painting.parts.length === 1;
      remove.onclick = () => {
        this.painting.removePart(label);
        this.label = Math.min(this.label, this.painting.parts.length);
        this.showParts();
        this.retint();
        this.commit();
      };
      row.onclick = () => this.select(label);
      row.append(color, name, remove);
      return row;
    });
    const add = element("button", "slime-add");
    add.type = "button";
    add.textContent = "+";
    add.title = this.say("add");
    add.onclick = () => {
      this.label = this.painting.addPart() || this.label;
      this.showParts();
      this.commit();
      const names = this.list.querySelectorAll("input.slime-name");
      /** @type {HTMLInputElement} */ (names[this.label - 1]).select();
    };
    this.list.replaceChildren(...rows, add);
  }

  /** @param {number} label */
  select(label) {
    if (label < 1 || label > this.painting.parts.length) return;
    this.label = label;
    [...this.list.children].forEach((row, index) => row.classList.toggle("active", index === label - 1));
  }

  /** @param {Tool} tool */
  choose(tool) {
    this.tool = tool;
    this.focus();
    for (const name of TOOLS) this.buttons[name].classList.toggle("active", name === tool);
    this.sizes.element.hidden = tool !== "brush" && tool !== "eraser";
    this.tolerances.element.hidden = tool !== "wand";
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.element.requestFullscreen?.();
  }

  clear() {
    this.painting.map?.data.fill(0);
    this.painting.keepMap();
    this.painting.of = null;
    this.retint();
    this.commit();
  }

  // ------------------------------------------------------------------------------------------------------- pointers

  listen() {
    const { canvas, element: root } = this;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of /** @type {const} */ (["pointerup", "pointercancel"])) {
      canvas.addEventListener(name, (event) => this.up(event));
    }
    canvas.addEventListener("pointerleave", () => {
      this.cursor = null;
      this.draw();
    });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    this.keys.addEventListener("keydown", (event) => this.key(event));
    this.keys.addEventListener("keyup", (event) => {
      if (event.code === "Space") this.panning = false;
    });
    canvas.addEventListener(
      "wheel",
      (event) => {
        // The wheel belongs to the graph until the painter has been clicked.
        if (document.activeElement !== this.keys) return;
        event.preventDefault();
        event.stopPropagation();
        const { x, y } = this.position(event);
        this.view.zoom(x, y, Math.exp(-event.deltaY / 400));
        this.draw();
      },
      { passive: false },
    );
    root.addEventListener("pointerdown", (event) => event.stopPropagation()); // it would drag the node
    root.addEventListener("mousedown", (event) => {
      // A button, or the canvas, would take the focus from the keys.
      if (!(event.target instanceof HTMLInputElement)) event.preventDefault();
    });
    root.addEventListener("click", () => {
      if (!(document.activeElement instanceof HTMLInputElement && root.contains(document.activeElement))) this.focus();
    });
    root.addEventListener("dragover", (event) => event.preventDefault());
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      this.load(event.dataTransfer?.files[0]);
    });
  }

  focus() {
    this.keys.focus({ preventScroll: true });
  }

  /** Canvas position of an event, whatever the graph's zoom. @param {MouseEvent} event */
  position(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * this.canvas.width) / (box.width || 1),
      y: ((event.clientY - box.top) * this.canvas.height) / (box.height || 1),
    };
  }

  /** @param {PointerEvent} event */
  down(event) {
    const focused = this.element.contains(document.activeElement);
    this.focus();
    this.canvas.setPointerCapture?.(event.pointerId);
    const at = this.position(event);
    this.pointers.set(event.pointerId, at);
    this.cursor = at;
    const { map } = this.painting;
    if (this.pointers.size > 1 || event.button === 1 || this.panning || !map || !this.picture) {
      this.stroke = this.outline = null; // a second finger ends the line
      return;
    }
    const where = this.view.toPainting(at.x, at.y);
    const label = this.tool === "eraser" || event.button === 2 ? 0 : this.label;
    this.stroke = { label, ...where };
    this.focusing = !focused;
    if (this.focusing) return; // a press that only takes the focus paints nothing; one that moves on does
    this.begin(where, event);
  }

  /** @param {{x: number, y: number}} where painting position @param {PointerEvent} event */
  begin(where, event) {
    this.focusing = false;
    this.message = "";
    const { map } = this.painting;
    if (!this.stroke || !map) return;
    if (this.tool === "lasso" || this.tool === "rectangle") this.outline = [where];
    else if (this.tool === "fill") {
      if (map.fill(where.x, where.y, this.stroke.label)) this.painted = true;
      this.retint();
    } else if (this.tool === "wand") {
      map.wand(this.pixels(), where.x, where.y, this.tolerance, this.stroke.label);
      this.painted = true;
      this.retint();
    } else this.retint(this.paint(where, event));
  }

  /** The picture's RGBA at the size of the label map. */
  pixels() {
    const { width, height } = /** @type {LabelMap} */ (this.painting.map);
    const canvas = element("canvas");
    Object.assign(canvas, { width, height });
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
    context.drawImage(/** @type {HTMLImageElement} */ (this.picture), 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  }

  /** @param {PointerEvent} event */
  move(event) {
    const at = this.position(event);
    const before = this.pointers.get(event.pointerId);
    this.cursor = at;
    if (before) {
      const others = [...this.pointers].filter(([id]) => id !== event.pointerId);
      this.pointers.set(event.pointerId, at);
      if (this.stroke) {
        if (this.focusing && distance(before, at) > 0) this.begin(this.view.toPainting(before.x, before.y), event);
        const events = event.getCoalescedEvents?.() ?? [];
        /** @type {import("./label_map.js").Rect | undefined} */
        let changed;
        for (const one of events.length ? events : [event]) {
          const { x, y } = this.position(one);
          changed = united(changed, this.follow(this.view.toPainting(x, y), one));
        }
        if (changed) this.retint(changed);
      } else if (others.length) {
        const other = others[0][1];
        const grown = distance(at, other) / (distance(before, other) || 1);
        this.view.zoom((at.x + other.x) / 2, (at.y + other.y) / 2, grown);
        this.view.pan((at.x - before.x) / 2, (at.y - before.y) / 2);
      } else if (!this.painted) {
        this.view.pan(at.x - before.x, at.y - before.y);
      }
    }
    this.draw();
  }

  /** @param {{x: number, y: number}} to painting position @param {PointerEvent} event @returns what was painted on */
  follow(to, event) {
    if (this.outline) this.outline = this.tool === "lasso" ? [...this.outline, to] : rectangle(this.outline[0], to);
    else if (this.tool === "brush" || this.tool === "eraser") return this.paint(to, event);
    return undefined;
  }

  /** @param {PointerEvent} event */
  up(event) {
    this.pointers.delete(event.pointerId);
    if (this.stroke && this.outline && this.outline.length > 2) {
      this.painting.map?.polygon(this.outline, this.stroke.label);
      this.painted = true;
      this.retint();
    }
    this.stroke = this.outline = null;
    this.focusing = false;
    if (this.painted) {
      this.painting.keepMap();
      this.painting.of = this.connected && this.digest;
      this.commit();
    }
    this.painted = false;
  }

  /** A pen's pressure makes the line thinner. @param {{x: number, y: number}} to painting position @param {PointerEvent} event */
  paint(to, event) {
    if (!this.stroke || !this.painting.map) return undefined;
    const { x, y, label } = this.stroke;
    const radius = this.brush * (event.pointerType === "pen" && event.pressure > 0 ? event.pressure : 1);
    const rect = this.painting.map.line(x, y, to.x, to.y, Math.max(0.5, radius), label);
    this.stroke = { label, ...to };
    this.painted = true;
    return rect;
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const control = event.ctrlKey || event.metaKey;
    /** @type {Record<string, () => void>} */
    const keys = control
      ? {
          z: () => this.restore(event.shiftKey ? this.history.redo() : this.history.undo()),
          y: () => this.restore(this.history.redo()),
        }
      : {
          b: () => this.choose("brush"),
          e: () => this.choose("eraser"),
          f: () => this.choose("fill"),
          l: () => this.choose("lasso"),
          r: () => this.choose("rectangle"),
          w: () => this.choose("wand"),
          s: () => this.snap(),
          0: () => this.fit(),
          "[": () => this.resizeBrush(1 / 1.2),
          "]": () => this.resizeBrush(1.2),
          " ": () => (this.panning = true),
        };
    const number = control ? 0 : Number(event.key);
    const action = number > 0 ? () => this.select(number) : keys[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
    this.draw();
  }

  /** Radius of the brush in pixels of the painting. */
  get brush() {
    const { map } = this.painting;
    return map ? (this.radius * Math.max(map.width, map.height)) / 1000 : this.radius;
  }

  /** @param {number} factor */
  resizeBrush(factor) {
    this.radius = Math.min(150, Math.max(1, this.radius * factor));
    this.sizes.show(this.radius);
  }

  // ------------------------------------------------------------------------------------------------------- drawing

  fit() {
    const { map } = this.painting;
    if (map) this.view.fit(map.width, map.height, this.canvas.width, this.canvas.height);
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio);
    const height = Math.round(this.canvas.clientHeight * ratio);
    if (!width || !height || (width === this.canvas.width && height === this.canvas.height)) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.fit();
    this.draw();
  }

  /** Colour the label map anew, or a stretch of it. @param {import("./label_map.js").Rect} [rect] */
  retint(rect) {
    const { map, parts } = this.painting;
    const context = this.tint.getContext("2d");
    if (!map || !context) return this.draw();
    if (this.tint.width !== map.width || this.tint.height !== map.height) {
      this.tint.width = map.width;
      this.tint.height = map.height;
      rect = undefined;
    }
    const { left, top, right, bottom } = rect ?? { left: 0, top: 0, right: map.width, bottom: map.height };
    if (right <= left || bottom <= top) return this.draw();
    const colors = new Uint32Array(256);
    const channels = new Uint8Array(colors.buffer);
    parts.forEach((part, index) => channels.set([...rgb(part.color), 255], 4 * (index + 1)));
    const pixels = context.createImageData(right - left, bottom - top);
    const tinted = new Uint32Array(pixels.data.buffer);
    for (let y = top, i = 0; y < bottom; y++) {
      for (let x = left; x < right; x++) tinted[i++] = colors[map.data[y * map.width + x]];
    }
    context.putImageData(pixels, left, top);
    this.draw();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    if (!context) return;
    const { width, height } = this.canvas;
    const { map } = this.painting;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!this.picture || !map) {
      context.fillStyle = "#999";
      context.font = `${14 * (window.devicePixelRatio || 1)}px sans-serif`;
      context.textAlign = "center";
      context.fillText(this.message || this.say("empty"), width / 2, height / 2, width - 20);
      return;
    }
    context.setTransform(this.view.scale, 0, 0, this.view.scale, this.view.x, this.view.y);
    context.drawImage(this.picture, 0, 0, map.width, map.height);
    context.imageSmoothingEnabled = false;
    context.globalAlpha = this.opacity;
    context.drawImage(this.tint, 0, 0);
    context.globalAlpha = 1;
    if (this.outline) {
      context.lineWidth = 2 / this.view.scale;
      for (const [style, dash] of /** @type {const} */ ([["#000", []], ["#fff", [6 / this.view.scale]]])) {
        context.strokeStyle = style;
        context.setLineDash([...dash]);
        context.beginPath();
        for (const { x, y } of this.outline) context.lineTo(x, y);
        if (this.tool === "rectangle") context.closePath();
        context.stroke();
      }
      context.setLineDash([]);
    }
    if (this.cursor && (this.tool === "brush" || this.tool === "eraser")) {
      const { x, y } = this.view.toPainting(this.cursor.x, this.cursor.y);
      context.lineWidth = 1.5 / this.view.scale;
      for (const [style, radius] of /** @type {const} */ ([["#000", this.brush], ["#fff", this.brush * 0.96]])) {
        context.strokeStyle = style;
        context.beginPath();
        context.arc(x, y, radius, 0, 2 * Math.PI);
        context.stroke();
      }
    }
    if (this.message) this.drawMessage(context);
  }

  /** Draw the message in lines at the foot of the canvas. @param {CanvasRenderingContext2D} context */
  drawMessage(context) {
    const { width, height } = this.canvas;
    const size = 13 * (window.devicePixelRatio || 1);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.font = `${size}px sans-serif`;
    context.textAlign = "left";
    const lines = [""];
    for (const word of this.message.split(" ")) {
      const longer = `${lines[lines.length - 1]} ${word}`.trim();
      if (context.measureText(longer).width > width - 2 * size) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    const top = height - (lines.length + 0.6) * size * 1.3;
    context.fillStyle = "rgba(120, 20, 20, 0.9)";
    context.fillRect(0, top, width, height - top);
    context.fillStyle = "#fff";
    lines.forEach((line, index) => context.fillText(line, size, top + (index + 1.1) * size * 1.3));
  }
}

/**
 * The smallest rectangle that holds both.
 * @param {import("./label_map.js").Rect | undefined} a @param {import("./label_map.js").Rect | undefined} b
 */
function united(a, b) {
  if (!a || !b) return a ?? b;
  return {
    left: Math.min(a.left, b.left),
    top: Math.min(a.top, b.top),
    right: Math.max(a.right, b.right),
    bottom: Math.max(a.bottom, b.bottom),
  };
}

/** The corners of a rectangle. @param {{x: number, y: number}} a @param {{x: number, y: number}} b */
function rectangle(a, b) {
  return [a, { x: b.x, y: a.y }, b, { x: a.x, y: b.y }];
}

/** @param {string} color "#rrggbb" */
function rgb(color) {
  return [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
}

/** @param {{x: number, y: number}} a @param {{x: number, y: number}} b */
function distance(a, b) {
  return Math.hypot(a.x - b.x, a.y - b.y);
}
