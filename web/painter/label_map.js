// @ts-check
/** Which part every pixel belongs to: 0 is none, k is part k. No DOM in here. */

/** Pixels of the largest label map; a larger image is painted at this size, and the map is stretched to it. */
export const MOST_PIXELS = 4_000_000;

/** @typedef {{left: number, top: number, right: number, bottom: number}} Rect right and bottom are exclusive */

export class LabelMap {
  /**
   * @param {number} width
   * @param {number} height
   * @param {Uint8Array} [data] row by row
   */
  constructor(width, height, data = new Uint8Array(width * height)) {
    if (!(width > 0 && height > 0) || data.length !== width * height) {
      throw new RangeError(`a label map of ${width} x ${height} has ${width * height} pixels, got ${data.length}`);
    }
    this.width = width;
    this.height = height;
    this.data = data;
  }

  /**
   * An empty map for an image: of its size, or of its aspect where it has too many pixels.
   * @param {number} width
   * @param {number} height
   */
  static for(width, height) {
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
    return new LabelMap(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  }

  /**
   * Paint a round line, for example one move of the brush.
   * @param {number} x0 @param {number} y0 @param {number} x1 @param {number} y1 pixels
   * @param {number} radius pixels
   * @param {number} label
   * @returns {Rect} what may have changed; may be empty
   */
  line(x0, y0, x1, y1, radius, label) {
    const rect = {
      left: Math.max(0, Math.floor(Math.min(x0, x1) - radius)),
      top: Math.max(0, Math.floor(Math.min(y0, y1) - radius)),
      right: Math.min(this.width, Math.ceil(Math.max(x0, x1) + radius) + 1),
      bottom: Math.min(this.height, Math.ceil(Math.max(y0, y1) + radius) + 1),
    };
    const dx = x1 - x0;
    const dy = y1 - y0;
    const length = dx * dx + dy * dy;
    for (let y = rect.top; y < rect.bottom; y++) {
      for (let x = rect.left; x < rect.right; x++) {
        const px = x + 0.5 - x0;
        const py = y + 0.5 - y0;
        const along = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
        if ((px - along * dx) ** 2 + (py - along * dy) ** 2 <= radius * radius) {
          this.data[y * this.width + x] = label;
        }
      }
    }
    return rect;
  }

  /**
   * Paint what an outline encloses, by the even-odd rule.
   * @param {{x: number, y: number}[]} points the outline, closed by itself
   * @param {number} label
   */
  polygon(points, label) {
    for (let y = 0; y < this.height; y++) {
      const middle = y + 0.5;
      /** @type {number[]} */
      const crossings = [];
      points.forEach((one, index) => {
        const other = points[(index + 1) % points.length];
        if (one.y > middle !== other.y > middle) {
          crossings.push(one.x + ((middle - one.y) * (other.x - one.x)) / (other.y - one.y));
        }
      });
      crossings.sort((a, b) => a - b);
      for (let i = 0; i + 1 < crossings.length; i += 2) {
        const left = Math.max(0, Math.round(crossings[i]));
        const right = Math.min(this.width, Math.round(crossings[i + 1]));
        if (right > left) this.data.fill(label, y * this.width + left, y * this.width + right);
      }
    }
  }

  /**
   * Paint the connected region whose colours are like that under a pixel.
   * @param {Uint8ClampedArray} pixels RGBA of the image at the map's size
   * @param {number} x @param {number} y
   * @param {number} tolerance largest difference of a channel
   * @param {number} label
   */
  wand(pixels, x, y, tolerance, label) {
    const from = 4 * (Math.floor(y) * this.width + Math.floor(x));
    const [red, green, blue] = pixels.subarray(from, from + 3);
    const alike = new LabelMap(this.width, this.height);
    for (let i = 0, at = 0; i < alike.data.length; i++, at += 4) {
      const near =
        Math.abs(pixels[at] - red) <= tolerance &&
        Math.abs(pixels[at + 1] - green) <= tolerance &&
        Math.abs(pixels[at + 2] - blue) <= tolerance;
      if (near) alike.data[i] = 1;
    }
    if (!alike.fill(x, y, 2)) return;
    for (let i = 0; i < alike.data.length; i++) if (alike.data[i] === 2) this.data[i] = label;
  }

  /**
   * Give the connected region around a pixel another label.
   * @param {number} x @param {number} y @param {number} label
   * @returns {boolean} whether anything changed
   */
  fill(x, y, label) {
    x = Math.floor(x);
    y = Math.floor(y);
    if (x < 0 || y < 0 || x >= this.width || y >= this.height) return false;
    const from = this.data[y * this.width + x];
    if (from === label) return false;
    const stack = [y * this.width + x];
    while (stack.length) {
      const seed = /** @type {number} */ (stack.pop());
      if (this.data[seed] !== from) continue;
      const row = Math.floor(seed / this.width) * this.width;
      let first = seed;
      let last = seed;
      while (first > row && this.data[first - 1] === from) first--;
      while (last < row + this.width - 1 && this.data[last + 1] === from) last++;
      this.data.fill(label, first, last + 1);
      for (const next of [row - this.width, row + this.width]) {
        if (next < 0 || next >= this.data.length) continue;
        for (let column = first - row; column <= last - row; column++) {
          const here = next + column;
          if (this.data[here] === from && (column === first - row || this.data[here - 1] !== from)) stack.push(here);
        }
      }
    }
    return true;
  }

  /**
   * A part is gone: its pixels are free, and the parts behind it move up.
   * @param {number} label
   */
  remove(label) {
    for (let i = 0; i < this.data.length; i++) {
      const value = this.data[i];
      if (value === label) this.data[i] = 0;
      else if (value > label) this.data[i] = value - 1;
    }
  }

  /** @param {number} label */
  has(label) {
    return this.data.includes(label);
  }

  /**
   * The nearest pixels at another size.
   * @param {number} width @param {number} height
   */
  resized(width, height) {
    const result = new LabelMap(width, height);
    for (let y = 0; y < height; y++) {
      const row = Math.floor(((y + 0.5) * this.height) / height) * this.width;
      for (let x = 0; x < width; x++) {
        result.data[y * width + x] = this.data[row + Math.floor(((x + 0.5) * this.width) / width)];
      }
    }
    return result;
  }

  /**
   * Runs of equal labels as base64: label, then the run's length in groups of 7 bits, the lowest first.
   * @param {number} [most] characters @returns {string | null} null where the text would be longer
   */
  encode(most = Infinity) {
    const bytes = [];
    for (let start = 0; start < this.data.length; ) {
      if (bytes.length > 0.75 * most) return null;
      const label = this.data[start];
      let end = start + 1;
      while (end < this.data.length && this.data[end] === label) end++;
      bytes.push(label);
      let count = end - start;
      while (count > 127) {
        bytes.push((count & 127) | 128);
        count >>>= 7;
      }
      bytes.push(count);
      start = end;
    }
    let text = "";
    for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.slice(i, i + 4096));
    return btoa(text);
  }

  /**
   * @param {string} runs of {@link LabelMap.encode}
   * @param {number} width @param {number} height
   * @throws {RangeError} where the runs do not make up the size
   */
  static decode(runs, width, height) {
    const bytes = atob(runs);
    const data = new Uint8Array(width * height);
    let filled = 0;
    for (let i = 0; i < bytes.length; ) {
      const label = bytes.charCodeAt(i++);
      let count = 0;
      for (let shift = 0; ; shift += 7) {
        if (i >= bytes.length) throw new RangeError("the painting is cut short");
        const byte = bytes.charCodeAt(i++);
        count += (byte & 127) * 2 ** shift;
        if (byte < 128) break;
      }
      if (filled + count > data.length) throw new RangeError("the painting has too many pixels");
      data.fill(label, filled, (filled += count));
    }
    if (filled !== data.length) throw new RangeError("the painting has too few pixels");
    return new LabelMap(width, height, data);
  }
}
