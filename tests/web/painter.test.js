import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";

import { History } from "../../web/painter/history.js";
import { LabelMap } from "../../web/painter/label_map.js";
import { LARGEST_RUNS, Painting } from "../../web/painter/painting.js";
import { STRINGS, translator } from "../../web/painter/strings.js";
import { View } from "../../web/painter/view.js";

const count = (map, label) => map.data.filter((value) => value === label).length;

describe("LabelMap", () => {
  it("has the image's own size up to 4 million pixels, and its aspect beyond", () => {
    expect(LabelMap.for(2400, 1600)).toMatchObject({ width: 2400, height: 1600 });
    expect(LabelMap.for(6000, 3000)).toMatchObject({ width: 2828, height: 1414 });
    expect(LabelMap.for(300, 200)).toMatchObject({ width: 300, height: 200 });
  });

  it("paints round lines of the right area, also over its borders", () => {
    const map = new LabelMap(100, 80);
    expect(map.line(50, 40, 50, 40, 10, 2)).toEqual({ left: 40, top: 30, right: 61, bottom: 51 });
    expect(count(map, 2)).toBeGreaterThan(Math.PI * 100 * 0.95);
    expect(count(map, 2)).toBeLessThan(Math.PI * 100 * 1.05);
    map.line(-20, 5, 120, 5, 3, 1);
    expect(count(map, 1)).toBe(600);
    map.line(300, 300, 400, 400, 5, 1);
    expect(count(map, 1)).toBe(600);
  });

  it("fills a region up to its outline", () => {
    const map = new LabelMap(20, 20);
    for (const [x0, y0, x1, y1] of [[5, 5, 15, 5], [15, 5, 15, 15], [15, 15, 5, 15], [5, 15, 5, 5]]) {
      map.line(x0, y0, x1, y1, 0.8, 1);
    }
    expect(map.fill(10, 10, 3)).toBe(true);
    const inside = count(map, 3);
    expect(inside).toBeGreaterThan(60);
    expect(map.data[0]).toBe(0);
    expect(map.fill(10, 10, 3)).toBe(false);
    expect(map.fill(0, 0, 2)).toBe(true);
    expect(count(map, 2) + count(map, 1) + inside).toBe(400);
    expect(map.fill(-1, 30, 2)).toBe(false);
  });

  it("fills like a plain flood fill on random maps", () => {
    let seed = 7;
    const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
    for (let round = 0; round < 20; round++) {
      const map = new LabelMap(13, 9);
      map.data.forEach((_, i) => (map.data[i] = random() < 0.4 ? 1 : 0));
      const wanted = map.data.slice();
      const queue = [[4, 4]];
      const from = wanted[4 * 13 + 4];
      while (queue.length) {
        const [x, y] = queue.pop();
        if (x < 0 || y < 0 || x > 12 || y > 8 || wanted[y * 13 + x] !== from) continue;
        wanted[y * 13 + x] = 5;
        queue.push([x + 1, y], [x - 1, y], [x, y + 1], [x, y - 1]);
      }
      map.fill(4, 4, 5);
      expect(map.data).toEqual(wanted);
    }
  });

  it("moves later parts up when one is removed", () => {
    const map = new LabelMap(4, 1, Uint8Array.from([0, 1, 2, 3]));
    map.remove(2);
    expect([...map.data]).toEqual([0, 1, 0, 2]);
    expect(map.has(3)).toBe(false);
  });

  it("survives encoding, and refuses what is damaged", () => {
    const map = new LabelMap(700, 600);
    map.line(100, 100, 600, 500, 40, 1);
    map.line(300, 50, 310, 300, 7, 2);
    const runs = map.encode();
    expect(runs.length).toBeLessThan(10_000);
    expect(LabelMap.decode(runs, 700, 600).data).toEqual(map.data);
    expect(() => LabelMap.decode(runs, 700, 599)).toThrow(RangeError);
    expect(() => LabelMap.decode(runs, 701, 600)).toThrow(RangeError);
    expect(() => LabelMap.decode(runs.slice(0, 40), 700, 600)).toThrow(RangeError);
  });
});

describe("Painting", () => {
  it("starts with one part and saves itself", () => {
    const painting = new Painting();
    painting.fitTo(64, 48);
    expect(painting.addPart("wheel")).toBe(2);
    painting.map.line(10, 10, 20, 20, 4, 2);
    painting.keepMap();
    painting.image = { name: "car.png", subfolder: "slime", type: "input" };
    const again = Painting.parse(painting.serialise());
    expect(again).toEqual(painting);
    expect(Painting.parse("").parts).toHaveLength(1);
    expect(() => Painting.parse('{"version": 99}')).toThrow(/newer/);
  });

  it("keeps names apart and free of separators", () => {
    const painting = new Painting();
    painting.addPart("wheel");
    expect(painting.addPart("wheel")).toBe(3);
    expect(painting.parts[2].name).toBe("wheel 2");
    expect(painting.renamePart(1, " left, front; light ")).toBe("left front light");
    expect(painting.renamePart(1, "  ")).toBe("left front light");
    expect(painting.renamePart(2, "wheel")).toBe("wheel");
    expect(painting.renamePart(2, "wheel 2")).toBe("wheel 2 2");
  });

  it("gives every part another colour", () => {
    const painting = new Painting();
    while (painting.addPart());
    expect(painting.parts).toHaveLength(76);
    for (const { color } of painting.parts) expect(color).toMatch(/^#[0-9a-f]{6}$/);
    expect(new Set(painting.parts.map((part) => part.color)).size).toBeGreaterThan(70);
  });

  it("stays small in a workflow, however busy", () => {
    const painting = new Painting();
    painting.fitTo(1024, 1024);
    painting.map.data.forEach((_, i) => (painting.map.data[i] = (i * 2654435761) % 3));
    const text = painting.serialise();
    expect(text.length).toBeLessThan(LARGEST_RUNS + 1000);
    expect(Painting.parse(text).map.width).toBeLessThan(1024);
    expect(painting.map.width).toBe(1024);
  });

  it("is stretched to another image", () => {
    const painting = new Painting();
    painting.fitTo(100, 100);
    painting.map.line(50, 50, 50, 50, 20, 1);
    painting.keepMap();
    painting.fitTo(200, 200);
    expect(count(painting.map, 1)).toBeGreaterThan(3.9 * Math.PI * 400);
    painting.fitTo(200, 100);
    expect(painting.map).toMatchObject({ width: 200, height: 100 });
    expect(painting.map.has(1)).toBe(true);
    painting.fitTo(2, 2);
    painting.fitTo(100, 100);
    expect(count(painting.map, 1)).toBeGreaterThan(0.9 * Math.PI * 400); // small pictures in between cost nothing
  });
});

describe("History", () => {
  it("goes back and forth and forgets what was overwritten", () => {
    const history = new History("a", 3);
    expect(history.undo()).toBeUndefined();
    for (const state of ["b", "b", "c", "d"]) history.push(state);
    expect([history.undo(), history.undo(), history.undo()]).toEqual(["c", "b", undefined]);
    expect(history.redo()).toBe("c");
    history.push("e");
    expect(history.redo()).toBeUndefined();
    expect(history.present).toBe("e");
  });
});

describe("LabelMap tools", () => {
  it("selects the like colours around a pixel", () => {
    const map = new LabelMap(4, 1);
    const pixels = new Uint8ClampedArray([10, 10, 10, 255, 20, 10, 10, 255, 90, 10, 10, 255, 10, 10, 10, 255]);
    map.wand(pixels, 0.5, 0.5, 16, 3);
    expect([...map.data]).toEqual([3, 3, 0, 0]);
    map.wand(pixels, 9, 9, 16, 3);
    expect([...map.data]).toEqual([3, 3, 0, 0]);
  });
});

describe("View", () => {
  it("keeps what is under the pointer there while zooming", () => {
    const view = new View();
    view.fit(200, 100, 400, 400);
    expect(view.toPainting(200, 200)).toEqual({ x: 100, y: 50 });
    const before = view.toPainting(321, 123);
    view.zoom(321, 123, 1.7);
    const after = view.toPainting(321, 123);
    expect(after.x).toBeCloseTo(before.x);
    expect(after.y).toBeCloseTo(before.y);
    view.pan(10, 0);
    expect(view.toPainting(331, 123).x).toBeCloseTo(before.x);
    view.zoom(0, 0, 1e9);
    expect(view.scale).toBe(40);
  });
});

describe("strings", () => {
  it("fall back to English and name the same things in every language", () => {
    expect(translator("xx")("brush")).toBe(STRINGS.en.brush);
    expect(translator("en-US")("brush")).toBe(STRINGS.en.brush);
    for (const [language, words] of Object.entries(STRINGS)) {
      expect(Object.keys(words).sort(), language).toEqual(Object.keys(STRINGS.en).sort());
    }
  });
});

describe("Painter", () => {
  let Painter;
  beforeEach(async () => {
    const methods = {
      createImageData: (width, height) => ({ data: new Uint8ClampedArray(4 * width * height) }),
      measureText: (text) => ({ width: 7 * text.length }),
    };
    const drawing = new Proxy({}, { get: (_, name) => methods[name] ?? (() => {}), set: () => true });
    vi.stubGlobal("ResizeObserver", class { observe() {} });
    HTMLCanvasElement.prototype.getContext = () => drawing;
    ({ Painter } = await import("../../web/painter/painter.js"));
  });

  afterEach(() => vi.unstubAllGlobals());

  const make = () => {
    const host = { changed: vi.fn(), upload: vi.fn(), url: (image) => `/view/${image.name}` };
    const painter = new Painter(host);
    painter.painting.fitTo(100, 100);
    painter.picture = Object.assign(document.createElement("canvas"), { naturalWidth: 100, naturalHeight: 100 });
    painter.canvas.width = painter.canvas.height = 100;
    painter.canvas.getBoundingClientRect = () => ({ left: 0, top: 0, width: 50, height: 50 });
    painter.fit();
    painter.commit();
    document.body.replaceChildren(painter.element);
    painter.keys.focus();
    return { painter, host };
  };
  const pointer = (painter, type, clientX, clientY, more = {}) => {
    const event = new MouseEvent(type, { clientX, clientY, bubbles: true, ...more });
    const { pointerId = 1, pointerType = "mouse", pressure = 0.5 } = more;
    painter.canvas.dispatchEvent(Object.assign(event, { pointerId, pointerType, pressure }));
  };
  const press = (painter, key, more = {}) =>
    painter.keys.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));

  it("paints where the pointer is, whatever the graph's zoom, and undoes", () => {
    const { painter, host } = make();
    const empty = painter.value;
    pointer(painter, "pointerdown", 10, 10);
    pointer(painter, "pointermove", 30, 10);
    pointer(painter, "pointerup", 30, 10);
    expect(painter.painting.map.data[20 * 100 + 40]).toBe(1);
    expect(painter.painting.map.data[60 * 100 + 40]).toBe(0);
    expect(host.changed).toHaveBeenLastCalledWith(painter.value);
    const painted = painter.value;
    press(painter, "z", { ctrlKey: true });
    expect(painter.value).toBe(empty);
    press(painter, "y", { ctrlKey: true });
    expect(painter.value).toBe(painted);
    expect(painter.painting.map.has(1)).toBe(true);
  });

  it("can still be painted on after undoing to the start", () => {
    const { painter } = make();
    Object.defineProperties(painter.picture, { naturalWidth: { value: 100 }, naturalHeight: { value: 100 } });
    for (let i = 0; i < 3; i++) press(painter, "z", { ctrlKey: true });
    pointer(painter, "pointerdown", 10, 10);
    pointer(painter, "pointerup", 10, 10);
    expect(painter.painting.map.has(1)).toBe(true);
  });

  it("erases, fills and chooses by keys, and leaves other keys to ComfyUI", () => {
    const { painter } = make();
    const heard = vi.fn();
    document.body.addEventListener("keydown", heard);
    press(painter, "f");
    pointer(painter, "pointerdown", 10, 10);
    pointer(painter, "pointerup", 10, 10);
    expect(count(painter.painting.map, 1)).toBe(10_000);
    press(painter, "e");
    pointer(painter, "pointerdown", 25, 25);
    pointer(painter, "pointerup", 25, 25);
    expect(painter.painting.map.data[50 * 100 + 50]).toBe(0);
    expect(heard).not.toHaveBeenCalled();
    press(painter, "q");
    expect(heard).toHaveBeenCalledOnce();
  });

  it("takes the focus without a dot, but paints a line at once", () => {
    const { painter } = make();
    painter.keys.blur();
    pointer(painter, "pointerdown", 10, 10);
    pointer(painter, "pointerup", 10, 10);
    expect(painter.painting.map.has(1)).toBe(false);
    painter.keys.blur();
    pointer(painter, "pointerdown", 10, 10);
    pointer(painter, "pointermove", 20, 10);
    pointer(painter, "pointerup", 20, 10);
    expect(painter.painting.map.data[20 * 100 + 20]).toBe(1);
  });

  it("paints thinner with a light pen, and zooms with two fingers", () => {
    const { painter } = make();
    painter.radius = 100;
    const dab = (pressure) => {
      painter.painting.map.data.fill(0);
      pointer(painter, "pointerdown", 25, 25, { pointerType: "pen", pressure });
      pointer(painter, "pointerup", 25, 25, { pointerType: "pen", pressure: 0 });
      return count(painter.painting.map, 1);
    };
    expect(dab(0.5)).toBeLessThan(0.3 * dab(1));
    painter.painting.map.data.fill(0);
    const before = painter.view.scale;
    pointer(painter, "pointerdown", 20, 20, { pointerType: "touch", pointerId: 1 });
    pointer(painter, "pointerdown", 30, 30, { pointerType: "touch", pointerId: 2 });
    pointer(painter, "pointermove", 40, 40, { pointerType: "touch", pointerId: 2 });
    pointer(painter, "pointerup", 20, 20, { pointerType: "touch", pointerId: 1 });
    pointer(painter, "pointerup", 40, 40, { pointerType: "touch", pointerId: 2 });
    expect(painter.view.scale / before).toBeCloseTo(2);
  });

  it("paints a rectangle and what a lasso encloses", () => {
    const { painter } = make();
    press(painter, "r");
    pointer(painter, "pointerdown", 10, 10);
    pointer(painter, "pointermove", 20, 15);
    pointer(painter, "pointerup", 20, 15);
    expect(count(painter.painting.map, 1)).toBe(20 * 10);
    press(painter, "l");
    painter.painting.map.data.fill(0);
    pointer(painter, "pointerdown", 10, 10);
    for (const [x, y] of [[40, 10], [40, 40], [10, 40]]) pointer(painter, "pointermove", x, y);
    pointer(painter, "pointerup", 10, 40);
    expect(count(painter.painting.map, 1)).toBe(60 * 60);
  });

  it("opens with what was found, and knows which image it is of", () => {
    const { painter, host } = make();
    const found = new LabelMap(100, 100);
    found.data.fill(2, 0, 500);
    const parts = [{ name: "wheel", color: "#ff0000" }, { name: "window", color: "#00ff00" }];
    painter.connected = "/view/other.png";
    painter.propose("abc", { parts, width: 100, height: 100, runs: found.encode() });
    expect(painter.painting.parts.map((part) => part.name)).toEqual(["wheel", "window"]);
    expect(count(painter.painting.map, 2)).toBe(500);
    expect(JSON.parse(painter.value).of).toBe("abc");
    expect(host.changed).toHaveBeenLastCalledWith(painter.value);
    const corrected = painter.value;
    painter.propose("def", { parts, width: 100, height: 100, runs: new LabelMap(100, 100).encode() });
    expect(painter.value).toBe(corrected); // what was painted is not replaced unasked
    expect(painter.buttons.take.classList.contains("wanted")).toBe(true);
    painter.buttons.take.click();
    expect(JSON.parse(painter.value).of).toBe("def");
  });

  it("brings a coarser map and another picture to the picture's size, without a change to be saved", () => {
    const { painter, host } = make();
    const image = { name: "car.png", subfolder: "", type: "input" };
    const saved = new Painting();
    Object.assign(saved, { image, map: new LabelMap(50, 50) });
    saved.map.line(25, 25, 25, 25, 10, 1);
    const text = saved.serialise();
    /** @type {any[]} */
    const pictures = [];
    vi.stubGlobal("Image", class { constructor() { pictures.push(this); } });
    painter.value = text;
    const arrives = (width, height) => {
      Object.assign(pictures.at(-1), { naturalWidth: width, naturalHeight: height });
      pictures.at(-1).onload();
    };
    arrives(200, 200);
    expect(painter.painting.map).toMatchObject({ width: 200, height: 200 });
    expect(painter.value).toBe(text);
    painter.connect("/view/other.png");
    arrives(4, 4);
    expect(painter.painting.map).toMatchObject({ width: 4, height: 4 });
    painter.painting.renamePart(1, "wheel");
    painter.commit();
    painter.connect(null);
    arrives(200, 200);
    pointer(painter, "pointerdown", 1, 1);
    pointer(painter, "pointerup", 1, 1);
    const kept = Painting.parse(painter.value).map;
    expect(kept).toMatchObject({ width: 200, height: 200 });
    expect(count(kept, 1)).toBeGreaterThan(0.95 * 16 * count(saved.map, 1));
    expect(host.changed).toHaveBeenCalledTimes(3); // make(), the name, the stroke
  });

  it("takes what was found at the size of the picture that is on its way", () => {
    const { painter } = make();
    /** @type {any[]} */
    const pictures = [];
    vi.stubGlobal("Image", class { constructor() { pictures.push(this); } });
    painter.connect("/view/large.png");
    const found = new LabelMap(1000, 1000);
    found.line(500, 500, 500, 500, 3, 1);
    painter.propose("abc", { parts: [{ name: "bolt", color: "#ff0000" }], width: 1000, height: 1000, runs: found.encode() });
    Object.assign(pictures.at(-1), { naturalWidth: 1000, naturalHeight: 1000 });
    pictures.at(-1).onload();
    expect(JSON.parse(painter.value).runs).toBe(found.encode());
    expect(painter.painting.map.encode()).toBe(found.encode());
  });

  it("asks the server to snap, and keeps what was painted meanwhile", async () => {
    const { painter, host } = make();
    const answer = { parts: [], width: 100, height: 100, runs: new LabelMap(100, 100, new Uint8Array(10_000).fill(1)).encode() };
    host.snap = vi.fn(async () => answer);
    await painter.snap();
    expect(count(painter.painting.map, 1)).toBe(10_000);
    expect(host.snap).toHaveBeenCalledOnce();
    host.snap = vi.fn(async () => {
      painter.clear();
      return answer;
    });
    await painter.snap();
    expect(count(painter.painting.map, 1)).toBe(0);
    host.snap = vi.fn(() => Promise.reject(new Error("no image")));
    await painter.snap();
    expect(painter.message).toBe("no image");
  });

  it("adds, renames, recolours and deletes parts", () => {
    const { painter } = make();
    painter.element.querySelector(".slime-add").click();
    expect(painter.label).toBe(2);
    const name = painter.element.querySelectorAll(".slime-name")[1];
    name.value = "wheel";
    name.dispatchEvent(new Event("change"));
    expect(Painting.parse(painter.value).parts[1].name).toBe("wheel");
    pointer(painter, "pointerdown", 25, 25);
    pointer(painter, "pointerup", 25, 25);
    expect(painter.painting.map.has(2)).toBe(true);
    painter.element.querySelectorAll(".slime-remove")[0].click();
    expect(painter.painting.parts.map((part) => part.name)).toEqual(["wheel"]);
    expect(painter.painting.map.has(1)).toBe(true);
    expect(painter.element.querySelector(".slime-remove").disabled).toBe(true);
  });

  it("takes its state back, and says what it cannot read", () => {
    const first = make().painter;
    pointer(first, "pointerdown", 25, 25);
    pointer(first, "pointerup", 25, 25);
    const { painter, host } = make();
    host.changed.mockClear();
    painter.value = first.value;
    expect(painter.painting.map.data).toEqual(first.painting.map.data);
    expect(host.changed).not.toHaveBeenCalled();
    for (const broken of ["{broken", '{"version": 99}']) {
      painter.value = broken;
      expect(painter.message).toContain("cannot be read");
      expect(painter.value).toBe(broken); // saving the workflow again must not lose it
    }
  });

  it("uploads a dropped image", async () => {
    const { painter, host } = make();
    host.upload.mockResolvedValue({ name: "a.png", subfolder: "slime", type: "input" });
    await painter.load(new File(["x"], "a.png", { type: "image/png" }));
    expect(painter.painting.image.name).toBe("a.png");
    expect(painter.wanted).toBe("/view/a.png");
    host.upload.mockRejectedValue(new Error("413 too large"));
    await painter.load(new File(["x"], "b.png", { type: "image/png" }));
    expect(painter.message).toContain("413");
    await painter.load(new File(["x"], "b.txt", { type: "text/plain" }));
    expect(host.upload).toHaveBeenCalledTimes(2);
  });
});
