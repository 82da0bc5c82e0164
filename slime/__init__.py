"""SLiMe: learn a part segmenter from one example with the features of a frozen model (arXiv 2309.03179).

Independent of ComfyUI. Data flows one way: images and masks make an :class:`Example`, :func:`train` learns
:class:`PartEmbeddings` from it (a file), :func:`segment` finds :class:`PartMaps` in other images, and ``slime.parts``
makes masks of them. The model is a backbone, see ``slime.backbones``.
"""

from .embedding_files import from_text, load_embeddings, save_embeddings, to_text
from .embeddings import PartEmbeddings
from .errors import SlimeError
from .examples import Example, merge_examples
from .parts.maps import PartMaps
from .segment import Segmenter, decode, extract, segment
from .settings import InstantSettings, PaperSettings, SegmentSettings
from .train import StepReport, preset, train

__all__ = [
    "Example",
    "InstantSettings",
    "PaperSettings",
    "PartEmbeddings",
    "PartMaps",
    "SegmentSettings",
    "Segmenter",
    "SlimeError",
    "StepReport",
    "decode",
    "extract",
    "from_text",
    "load_embeddings",
    "merge_examples",
    "preset",
    "save_embeddings",
    "segment",
    "to_text",
    "train",
]
