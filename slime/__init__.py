"""SLiMe: learn a part segmenter from one example with a Stable Diffusion model's attention (arXiv 2309.03179).

Three calls: :func:`train`, :func:`segment`, and :class:`PartEmbeddings`' save and load. Nothing here knows ComfyUI.
"""

from .denoiser import Denoiser
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import Example, merge_examples
from .segment import PartMaps, segment
from .settings import SegmentSettings, TrainSettings, preset
from .train import StepReport, train

__all__ = [
    "Denoiser",
    "Example",
    "PartEmbeddings",
    "PartMaps",
    "SegmentSettings",
    "SlimeError",
    "StepReport",
    "TrainSettings",
    "merge_examples",
    "preset",
    "segment",
    "train",
]
