"""SLiMe: learn a part segmenter from one example with the features of a frozen model (arXiv 2309.03179).

Independent of ComfyUI. Data flows one way: images and masks make an :class:`Example`, :func:`train` learns
:class:`PartEmbeddings` from it (a file), :func:`segment` finds :class:`PartMaps` in other images, and ``slime.parts``
makes masks of them. The model is a backbone, see ``slime.backbones``.

Words used throughout:

* *encoded image*: what a backbone makes of an image, [B, C, h, w]; latents where it has a VAE. ``cell`` is the side of
  one of its pixels in image pixels, ``side`` the side of the square whose area a backbone works on.
* *feature group*: the mean of the features of several layers, usually of one resolution; a part has a vector for each.
* *view*: an augmented copy of an example, one pass of training.
* *part maps*: probabilities of background and parts; *peaks*: their highest values.

Letters in shapes: B images of a batch, V views, H W image pixels, h w pixels of a smaller grid, C channels, D width of
a feature, P parts, K = P + 1 classes with the background first, T text tokens, N tokens of an image, L layers.
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
