"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .embedding_tools import (
    SLiMeEmbeddingsFromText,
    SLiMeEmbeddingsInfo,
    SLiMeEmbeddingsMerge,
    SLiMeEmbeddingsToText,
)
from .evaluate import SLiMeEvaluate
from .example import SLiMeExample, SLiMeExampleFromLabelMap
from .files import SLiMeLoadEmbeddings, SLiMeSaveEmbeddings
from .labels import SLiMeExportLabels, SLiMeLoadAnnotations
from .look import SLiMeLook, SLiMeReadParts
from .overlay import SLiMeOverlay
from .painter import SLiMePartPainter
from .part_detailer import SLiMePartDetailer
from .part_latent_mask import SLiMePartLatentMask
from .part_mask import SLiMePartMask
from .part_outputs import SLiMePartBoxes, SLiMePartList, SLiMePartSegs
from .part_prompts import SLiMeGuiderMasks, SLiMePartGuider, SLiMePartPrompt
from .pick import SLiMePickLeastSure
from .segment import SLiMeSegment
from .steady import SLiMeSteadyParts
from .train import SLiMeTrain
from .train_settings import SLiMeInstantSettings, SLiMePaperSettings


class SlimeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SLiMeExample,
            SLiMeExampleFromLabelMap,
            SLiMePartPainter,
            SLiMeTrain,
            SLiMeInstantSettings,
            SLiMePaperSettings,
            SLiMeSegment,
            SLiMeLook,
            SLiMeReadParts,
            SLiMePickLeastSure,
            SLiMeSteadyParts,
            SLiMePartMask,
            SLiMeOverlay,
            SLiMePartList,
            SLiMePartBoxes,
            SLiMePartSegs,
            SLiMePartPrompt,
            SLiMePartGuider,
            SLiMeGuiderMasks,
            SLiMePartLatentMask,
            SLiMePartDetailer,
            SLiMeEvaluate,
            SLiMeSaveEmbeddings,
            SLiMeLoadEmbeddings,
            SLiMeEmbeddingsInfo,
            SLiMeEmbeddingsMerge,
            SLiMeEmbeddingsToText,
            SLiMeEmbeddingsFromText,
            SLiMeExportLabels,
            SLiMeLoadAnnotations,
        ]
