"""SLiMe Mesh Views and SLiMe Parts to Mesh: learn parts on one view of a 3D mesh, and colour the mesh by them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import Types, io
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.examples import BACKGROUND, IGNORE, Example
from ..slime.mesh.glb import read_glb
from ..slime.mesh.parts import VoteSettings, face_probabilities, label_texture
from ..slime.mesh.surface import Surface
from ..slime.mesh.views import Camera, MeshViews, cameras_around, render_views
from ..slime.parts.palette import Color
from .common import (
    MESH,
    ExamplesSocket,
    Parts,
    PartsSocket,
    advanced,
    named_errors,
    progress,
    schema,
    show_text,
    to_core,
)

MeshViewsSocket = io.Custom("SLIME_MESH_VIEWS")
FILE_TYPES = (io.Custom("FILE_3D_GLB"), io.Custom("FILE_3D"))  # of newer ComfyUI
GREY: Color = (150, 150, 150)  # of the faces that belong to no part
GAMMA = 2.2  # ComfyUI keeps vertex colours linear
TEXTURE_SIDE = 1024
SAME = 1.5 / 255  # largest difference of pixels that were saved as bytes in between


def meshes_have_colors() -> bool:
    """Return whether this ComfyUI's MESH holds vertex colours (0.33 does)."""
    return "vertex_colors" in inspect.signature(Types.MESH.__init__).parameters


class SLiMeMeshViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeMeshViews",
            category=MESH,
            display_name="SLiMe Mesh Views",
            description="Renders a mesh from cameras around it. Paint parts on the first view, segment all, and SLiMe "
            "Parts to Mesh brings the parts back to the mesh.",
            search_aliases="3d, multi view, render mesh, mesh segmentation, turntable",
            inputs=[
                io.MultiType.Input(
                    "mesh",
                    types=[io.Mesh, *FILE_TYPES],
                    tooltip="A mesh, with its texture or vertex colours if it has any: a MESH, or a GLB file from "
                    "Load 3D.",
                ),
                io.Int.Input("views", default=12, min=1, max=64, tooltip="Number of cameras around the mesh."),
                io.Int.Input("size", default=512, min=64, max=2048, step=8, tooltip="Side of the images in pixels."),
                io.Float.Input(
                    "azimuth",
                    default=30.0,
                    min=-360.0,
                    max=360.0,
                    step=5.0,
                    tooltip="Horizontal angle of the first camera in degrees. Choose a side that shows all parts.",
                ),
                io.Float.Input(
                    "elevation",
                    default=15.0,
                    min=-80.0,
                    max=80.0,
                    step=5.0,
                    tooltip="Degrees of the first camera above the horizon. Others look from above and below it.",
                ),
                advanced(
                    io.Int.Input(
                        "index", default=0, min=0, max=10_000, optional=True, tooltip="Which mesh of a batch, from 0."
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All views, for SLiMe Segment."),
                io.Image.Output(display_name="first_view", tooltip="The first view, for SLiMe Part Painter."),
                MeshViewsSocket.Output(display_name="mesh_views", tooltip="For SLiMe Parts to Mesh."),
            ],
        )

    @classmethod
    def execute(
        cls, mesh: Any, views: int, size: int, azimuth: float = 30.0, elevation: float = 15.0, index: int = 0
    ) -> io.NodeOutput:
        with named_errors("SLiMe Mesh Views"):
            surface = surface_of(mesh, index)
            device = comfy.model_management.get_torch_device()
            device = device if device.type == "cuda" else "cpu"  # others lack some of the operations
            rendered = render_views(
                surface, cameras_around(views, Camera(azimuth, elevation)), size, progress(views), device
            )
        images = to_core(rendered.images)
        return io.NodeOutput(images, images[:1], rendered)


class SLiMePartsToMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        usual = VoteSettings()
        return schema(
            node_id="SLiMePartsToMesh",
            category=MESH,
            display_name="SLiMe Parts to Mesh",
            description="Finds the parts of a mesh from its views: every pixel casts a vote for the part of the face "
            "it shows, and the votes are smoothed along the surface.",
            search_aliases="3d, mesh segmentation, color mesh, split mesh, parts to 3d",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, of all images of SLiMe Mesh Views."),
                MeshViewsSocket.Input("mesh_views", tooltip="From SLiMe Mesh Views."),
                ExamplesSocket.Input(
                    "examples",
                    optional=True,
                    tooltip="The example painted on one of the views: what it shows outweighs what was found.",
                ),
                io.Int.Input(
                    "smoothing",
                    default=usual.smoothing,
                    min=0,
                    max=100,
                    tooltip="Steps of averaging along the surface; more for finer meshes, 0 = off.",
                ),
                io.Float.Input(
                    "crease",
                    default=usual.crease,
                    min=1.0,
                    max=180.0,
                    step=1.0,
                    tooltip="Angle in degrees. Smoothing hardly crosses edges sharper than this.",
                ),
            ],
            outputs=[
                io.Mesh.Output(display_name="mesh", tooltip="The mesh, every part in its colour, for Save 3D Model."),
                io.Mesh.Output(
                    display_name="part_meshes",
                    is_output_list=True,
                    tooltip="One mesh per part in the order of the names; parts that were not found are left out.",
                ),
                io.Image.Output(
                    display_name="label_texture",
                    tooltip="The parts' colours in the mesh's UV layout; black where there is no part or no UVs.",
                ),
                io.String.Output(display_name="names", tooltip="Names of the part_meshes, separated by commas."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        parts: Parts,
        mesh_views: MeshViews,
        smoothing: int = 3,
        crease: float = 30.0,
        examples: Sequence[Example] = (),
    ) -> io.NodeOutput:
        with named_errors("SLiMe Parts to Mesh"):
            surface, maps = mesh_views.surface, parts.maps
            settings = VoteSettings(smoothing=smoothing, crease=crease)
            painted = painted_views(mesh_views, examples, maps.names)
            check_cancelled = comfy.model_management.throw_exception_if_processing_interrupted
            probabilities = face_probabilities(mesh_views, maps, settings, painted, check_cancelled)
            labels = probabilities.argmax(1)
            palette = torch.tensor([GREY, *maps.palette]).float() / 255
            if surface.uvs is not None:
                on_texture = label_texture(surface, labels, TEXTURE_SIDE)
                texture = torch.where(on_texture[..., None] > 0, palette[on_texture.long()], 0.0)
            else:
                texture = torch.zeros(64, 64, 3)
            found = [part for part in range(1, len(maps.names) + 1) if bool((labels == part).any())]
            if not found:
                raise SlimeError(
                    f"None of these parts is found on the mesh: {', '.join(maps.names)}. Look at the preview of "
                    "SLiMe Segment; connect the painter's examples, or paint a view that shows the parts larger."
                )
        areas = surface.areas / surface.areas.sum()
        share = {maps.names[part - 1]: float(areas[labels == part].sum()) for part in found}
        show_text(cls.hidden.unique_id, ", ".join(f"{name} {100 * area:.1f} %" for name, area in share.items()))
        whole = colored_mesh(surface, palette[labels])
        pieces = [colored_mesh(surface, palette[labels], labels == part) for part in found]
        return io.NodeOutput(whole, pieces, to_core(texture[None]), ", ".join(share))


def surface_of(mesh: Any, index: int) -> Surface:
    """Return one mesh of a MESH, or the mesh of a GLB file.

    Raises:
        SlimeError: an index that there is not, no mesh, or one that :func:`read_glb` or :meth:`Surface.of` refuses.
    """
    if mesh is None:
        raise SlimeError("There is no mesh. Choose a GLB file in Load 3D.")
    if hasattr(mesh, "get_bytes"):  # a FILE_3D
        if mesh.format != "glb":
            raise SlimeError(f"SLiMe reads meshes from GLB files, not {mesh.format or 'others'}. Convert it to GLB.")
        return read_glb(mesh.get_bytes())
    count = len(mesh.vertices)
    if not count:
        raise SlimeError("The MESH is empty. Look at the node that made it.")
    if not 0 <= index < count:
        raise SlimeError(f"index is {index}, but the MESH holds {count} meshes: 0 to {count - 1}. Lower index.")
    counts = getattr(mesh, "vertex_counts", None), getattr(mesh, "face_counts", None)
    vertex_count, face_count = (None if given is None else int(given[index]) for given in counts)
    vertices, faces = mesh.vertices[index][:vertex_count], mesh.faces[index][:face_count]

    def of_vertices(name: str) -> Tensor | None:
        values = getattr(mesh, name, None)
        return None if values is None else values[index][:vertex_count]

    colors, texture = of_vertices("vertex_colors"), getattr(mesh, "texture", None)
    if colors is not None and len(faces) and int(faces.max()) < len(colors):
        colors = colors[..., :3].clamp(0, 1)[faces.long()] ** (1 / GAMMA)
    else:
        colors = None
    texture = None if texture is None else texture[min(index, len(texture) - 1)]
    return Surface.of(vertices, faces, colors, of_vertices("uvs"), texture)


def painted_views(views: MeshViews, examples: Sequence[Example], names: Sequence[str]) -> dict[int, Tensor]:
    """Return the label maps of the views that are examples, by their number, with the labels of ``names``."""
    found = {}
    for example in examples:
        table = torch.full((IGNORE + 1,), IGNORE)
        for label, name in enumerate((BACKGROUND, *example.names)):
            table[label] = 0 if label == 0 else names.index(name) + 1 if name in names else IGNORE
        for number, image in enumerate(views.images):
            if example.image.shape == image.shape and bool((example.image - image).abs().max() < SAME):
                found[number] = table[example.with_ignored_pixels().labels.long()]
                break  # symmetric meshes look alike from several sides
    return found


def colored_mesh(surface: Surface, colors: Tensor, kept: Tensor | None = None) -> Any:
    """Return a MESH of all faces, or of those that are kept, in flat colours [M, 3]; no face shares a vertex."""
    faces = surface.faces if kept is None else surface.faces[kept]
    colors = colors if kept is None else colors[kept]
    corners = surface.vertices[faces.flatten()]
    linear = colors.repeat_interleave(3, 0) ** GAMMA
    uvs = None if surface.uvs is None else surface.uvs[faces.flatten()][None]
    indices = torch.arange(len(corners)).view(1, -1, 3)
    return Types.MESH(corners[None], indices, uvs=uvs, vertex_colors=linear[None])
