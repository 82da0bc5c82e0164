"""Measure the parts of 3D meshes from one painted view, on meshes built by code (testing/meshes.py).

    python dev.py benchmark mesh [--meshes 10] [--views 1 4 12 24] [--json FILE] [--picture FILE]
    python dev.py benchmark mesh --speed 100000

The true parts of one view are the example; the test bed's model is trained on it as SLiMe Train does by default, and
segments all views: (a) of the same mesh, (b) of another mesh of the domain. Against that, on (a) alone: the painted
view's own labels on the faces that it shows, the others without a part; the same, spread over the surface; and for
every face the label of the face in the painted view whose colour is nearest, which (b) has as well. "unweighted" votes
count all alike. Accuracy and mIoU are by the area of the faces; the background of a view is a wrong answer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slime import Example, segment, train
from slime.mesh.parts import VoteSettings, face_probabilities
from slime.mesh.surface import Surface
from slime.mesh.views import Camera, MeshViews, cameras_around, render_views
from slime.parts.draw import color_labels
from slime.parts.maps import HardMaps, PartMaps
from slime.parts.palette import default_palette
from testing import meshes
from testing.inprocess import load_backbone
from testing.tiny.weights import TESTBED

from .rows import Row, read_rows, say_row, say_table, write_rows

SIDE = 256
PAINTED = Camera(30.0, 15.0)
SEED = 900_000  # of the meshes that figures are reported on
PLAIN = VoteSettings(weighted=False, smoothing=0)


def true_labels(views: MeshViews, labels: Tensor) -> Tensor:
    """Return the label maps uint8 [V, S, S] of views."""
    return torch.where(views.faces >= 0, labels[views.faces.long().clamp(min=0)], 0).byte()


def scores(surface: Surface, found: Tensor, truth: Tensor) -> dict[str, float]:
    """Return accuracy, and mIoU over the parts that there are, by area."""
    areas, ratios = surface.areas, []
    for part in truth.unique().tolist():
        both = float(areas[(found == part) & (truth == part)].sum())
        either = float(areas[(found == part) | (truth == part)].sum())
        ratios.append(both / either)
    return {"accuracy": float(areas[found == truth].sum() / areas.sum()), "miou": float(np.mean(ratios))}


def projected(views: MeshViews, maps: PartMaps, spread: bool) -> Tensor:
    """Return the labels of faces by one painted view alone; faces that it does not show have none unless spread."""
    labels = face_probabilities(views, maps, PLAIN).argmax(1)
    if not spread:
        shown = torch.zeros(len(views.surface), dtype=torch.bool)
        shown[views.faces[views.faces >= 0].long()] = True
        labels = torch.where(shown, labels, 0)
    return labels


def by_color(painted: MeshViews, truth: Tensor, surface: Surface) -> Tensor:
    """Return for every face the label of the nearest colour in the painted view."""
    shown = painted.faces[painted.faces >= 0].long().unique()
    distance = torch.cdist(surface.colors[:, 0], painted.surface.colors[shown, 0])
    return truth[shown[distance.argmin(1)]]


def measure(backbone: object, domain: str, number: int, counts: list[int]) -> list[Row]:
    surface, truth = meshes.build(domain, SEED + number)
    names = meshes.PARTS[domain]
    painted = render_views(surface, [PAINTED], SIDE)
    labels = true_labels(painted, truth)
    example = Example.from_label_map(painted.images[0], labels[0].long(), names)
    embeddings = train(backbone, [example])  # type: ignore[arg-type]
    palette = tuple(default_palette(len(names)))
    certain = PartMaps(HardMaps(labels, len(names) + 1), names, palette, torch.ones(1, len(names)))
    other, other_truth = meshes.build(domain, SEED + 1000 + number)
    rows: list[Row] = []

    def add(target: str, method: str, count: int, where: Surface, found: Tensor, right: Tensor) -> None:
        about = {"domain": domain, "mesh": number, "target": target, "method": method, "views": count}
        rows.append(about | scores(where, found, right))
        say_row(rows[-1])

    add("same", "painted view, projected", 1, surface, projected(painted, certain, False), truth)
    add("same", "painted view, spread", 1, surface, projected(painted, certain, True), truth)
    add("same", "colour neighbours", 1, surface, by_color(painted, truth, surface), truth)
    add("other", "colour neighbours", 1, other, by_color(painted, truth, other), other_truth)
    for target, where, right in (("same", surface, truth), ("other", other, other_truth)):
        for count in counts:
            views = render_views(where, cameras_around(count, PAINTED), SIDE)
            maps = segment(backbone, views.images, embeddings)[0]  # type: ignore[arg-type]
            ways: dict[str, tuple[VoteSettings, dict[int, Tensor] | None]]
            ways = {"SLiMe": (VoteSettings(), None), "SLiMe, unweighted": (PLAIN, None)}
            if target == "same":
                ways["SLiMe, and the painted view"] = (VoteSettings(), {0: labels[0]})
            for method, (settings, known) in ways.items():
                add(target, method, count, where, face_probabilities(views, maps, settings, known).argmax(1), right)
    return rows


def summarise(rows: list[Row]) -> None:
    for target, title in (("same", "the mesh that was painted"), ("other", "another mesh of the domain")):
        chosen = [row for row in rows if row["target"] == target]
        lines = []
        for method, count in dict.fromkeys((row["method"], row["views"]) for row in chosen):
            cells = [method, str(count)]
            for domain in meshes.DOMAINS:
                own = [row for row in chosen if (row["method"], row["views"], row["domain"]) == (method, count, domain)]
                cells += [f"{np.mean([row[key] for row in own]):.3f}" for key in ("accuracy", "miou")]
            lines.append(cells)
        head = [f"{domain}, {key}" for domain in meshes.DOMAINS for key in ("accuracy", "mIoU")]
        say_table(["method", "views", *head], lines, title)


def draw(backbone: object, path: Path) -> None:
    """Write a picture: for a mesh of each domain the painted view, and the coloured mesh from four sides."""
    rows = []
    for domain in meshes.DOMAINS:
        surface, truth = meshes.build(domain, SEED)
        palette = default_palette(len(meshes.PARTS[domain]))
        painted = render_views(surface, [PAINTED], SIDE)
        labels = true_labels(painted, truth)
        example = Example.from_label_map(painted.images[0], labels[0].long(), meshes.PARTS[domain])
        embeddings = train(backbone, [example])  # type: ignore[arg-type]
        views = render_views(surface, cameras_around(12, PAINTED), SIDE)
        maps = segment(backbone, views.images, embeddings)[0]  # type: ignore[arg-type]
        found = face_probabilities(views, maps, VoteSettings()).argmax(1)
        colors = torch.tensor([(150, 150, 150), *palette]).float()[found] / 255
        colored = Surface.of(surface.vertices, surface.faces, colors[:, None].expand(-1, 3, -1))
        shown = render_views(colored, [Camera(30.0 + 90 * k, 20.0) for k in range(4)], SIDE).images
        left = [(painted.images[0] * 255).byte().numpy(), color_labels(labels[0].numpy(), palette)]
        rows.append(np.hstack([*left, *((image * 255).byte().numpy() for image in shown)]))
    Image.fromarray(np.vstack(rows)).save(path, quality=88)


def measure_speed(backbone: object, count: int) -> None:
    """Print how long each step takes for a ball of about ``count`` faces and 24 views of 512 pixels."""
    steps = round((count / 4) ** 0.5)
    v, u = torch.meshgrid(torch.linspace(0.01, 3.13, steps + 1), torch.linspace(0, 6.28, 2 * steps + 1), indexing="ij")
    builder = meshes.Builder(np.random.default_rng(0))
    ball = torch.stack([v.sin() * u.cos(), v.cos(), v.sin() * u.sin()], -1)
    builder.grid(ball * (1 + 0.1 * (5 * u).sin())[..., None], 1, builder.main)
    surface, _ = builder.surface()
    cameras, names = cameras_around(24, PAINTED), meshes.PARTS["horse"]
    start = time.monotonic()
    views = render_views(surface, cameras, 512)
    times = {"render": time.monotonic() - start}
    labels = (views.faces[0] >= 0).long()
    embeddings = train(backbone, [Example.from_label_map(views.images[0], labels, names[:1])])  # type: ignore[arg-type]
    start = time.monotonic()
    maps = segment(backbone, views.images, embeddings)[0]  # type: ignore[arg-type]
    maps.label_map  # noqa: B018  computed when it is asked for
    times["segment"] = time.monotonic() - start
    start = time.monotonic()
    face_probabilities(views, maps, VoteSettings())
    times["votes and smoothing"] = time.monotonic() - start
    rows = [[name, f"{seconds:.1f}", f"{seconds / times['segment']:.2f}"] for name, seconds in times.items()]
    say_table(["step", "seconds", "of the time of segmenting"], rows, f"{len(surface)} faces, 24 views of 512 pixels")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", type=int, default=10, help="meshes of a domain")
    parser.add_argument("--views", nargs="+", type=int, default=[1, 4, 12, 24])
    parser.add_argument("--json", type=Path, help="write rows here after every mesh, and go on from them")
    parser.add_argument("--picture", type=Path, help="write pictures of coloured meshes, and measure nothing")
    parser.add_argument("--speed", type=int, default=0, help="faces of a mesh whose steps are timed; no accuracy")
    options = parser.parse_args()
    backbone = load_backbone(TESTBED)
    if options.speed:
        measure_speed(backbone, options.speed)
        return
    if options.picture:
        draw(backbone, options.picture)
        return
    rows = read_rows(options.json)
    for number in range(options.meshes):
        for domain in meshes.DOMAINS:
            if not any((row["domain"], row["mesh"]) == (domain, number) for row in rows):
                rows += measure(backbone, domain, number, options.views)
                write_rows(options.json, rows)
    summarise(rows)


if __name__ == "__main__":
    main()
