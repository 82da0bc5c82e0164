"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .evaluate import SLiMeEvaluate
from .example import SLiMeExample, SLiMeExampleFromLabelMap
from .files import SLiMeLoadEmbeddings, SLiMeSaveEmbeddings
from .labels import SLiMeExportLabels, SLiMeLoadAnnotations
from .merge import SLiMeEmbeddingsMerge
from .mesh import SLiMeMeshViews, SLiMePartsToMesh, meshes_have_colors
from .overlay import SLiMeOverlay
from .painter import SLiMePartPainter
from .part_detailer import SLiMePartDetailer
from .part_mask import SLiMePartMask
from .part_outputs import SLiMePartBoxes, SLiMePartList, SLiMePartSegs
from .part_prompts import SLiMeGuiderMasks, SLiMePartGuider, SLiMePartPrompt
from .sam3_concept import SLiMeLearnSam3Concept, SLiMeSam3Prompt
from .sam3_refine import SLiMeSam3Refine
from .segment import SLiMeSegment
from .segment_video import SLiMeSegmentVideo, SLiMeVideoMasks
from .select_image import SLiMePickLeastSure
from .smooth_video import SLiMeSteadyParts
from .tracks import SLiMeTrackSeeds, SLiMeTracksToParts
from .train import SLiMeTrain
from .train_settings import SLiMeInstantSettings, SLiMePaperSettings

# A new node is one file, and its name here; CONTRIBUTING.md lists what else it needs.
NODES: list[type[io.ComfyNode]] = [
    SLiMeExample,
    SLiMeExampleFromLabelMap,
    SLiMePartPainter,
    SLiMeTrain,
    SLiMeInstantSettings,
    SLiMePaperSettings,
    SLiMeSegment,
    SLiMePickLeastSure,
    SLiMeSteadyParts,
    SLiMeSegmentVideo,
    SLiMeVideoMasks,
    SLiMePartMask,
    SLiMeOverlay,
    SLiMePartList,
    SLiMePartBoxes,
    SLiMePartSegs,
    SLiMePartPrompt,
    SLiMePartGuider,
    SLiMeGuiderMasks,
    SLiMePartDetailer,
    SLiMeEvaluate,
    SLiMeSaveEmbeddings,
    SLiMeLoadEmbeddings,
    SLiMeEmbeddingsMerge,
    SLiMeExportLabels,
    SLiMeLoadAnnotations,
    SLiMeLearnSam3Concept,
    SLiMeSam3Prompt,
    SLiMeSam3Refine,
    SLiMeTrackSeeds,
    SLiMeTracksToParts,
    SLiMeMeshViews,
    SLiMePartsToMesh,
]
FOR_MESHES = (SLiMeMeshViews, SLiMePartsToMesh)


class SlimeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for node in NODES if node not in FOR_MESHES or meshes_have_colors()]
