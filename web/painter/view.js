// @ts-check
/** Where the image lies on the canvas: zoom and pan. No DOM in here. */

const SMALLEST = 0.05;
const LARGEST = 40;

export class View {
  constructor() {
    /** canvas pixels a painting pixel */
    this.scale = 1;
    /** canvas position of the painting's corner */
    this.x = 0;
    this.y = 0;
  }

  /**
   * Show everything, centred.
   * @param {number} width @param {number} height of the painting
   * @param {number} canvasWidth @param {number} canvasHeight
   */
  fit(width, height, canvasWidth, canvasHeight) {
    this.scale = Math.min(canvasWidth / width, canvasHeight / height) || 1;
    this.x = (canvasWidth - width * this.scale) / 2;
    this.y = (canvasHeight - height * this.scale) / 2;
  }

  /** Zoom about a canvas position. @param {number} x @param {number} y @param {number} factor */
  zoom(x, y, factor) {
    const scale = Math.min(LARGEST, Math.max(SMALLEST, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
  }

  /** @param {number} dx @param {number} dy canvas pixels */
  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
  }

  /** Painting position under a canvas position. @param {number} x @param {number} y */
  toPainting(x, y) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }
}
