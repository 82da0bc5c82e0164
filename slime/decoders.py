"""The decoders by kind: a new one is one file with these three methods, and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from .backbones.base import Backbone, ExtractionSpec
from .decode.linear import LinearDecoder
from .paper.decoder import PaperDecoder

if TYPE_CHECKING:
    from .embeddings import PartEmbeddings


class Decoder(Protocol):
    """How embeddings of one kind become part maps: what a pass extracts, and how maps are decoded from that.

    Attributes:
        kind: stored in embeddings files.
        temperature: calibrates the final probabilities, 1 for none.
    """

    kind: ClassVar[str]

    @property
    def temperature(self) -> float: ...

    def extract(
        self,
        backbone: Backbone,
        encoded: Tensor,
        spec: ExtractionSpec,
        noise: Tensor,
        embeddings: Sequence[PartEmbeddings] | None,
    ) -> Any:
        """Run one pass over encoded images, for these embeddings, or for any of the same spec where None."""
        ...

    def decode(self, extracted: Any, embeddings: PartEmbeddings, index: int) -> Tensor:
        """Return maps [B, K, h, w] for the embeddings, which are number ``index`` of those given to extract."""
        ...

    def weights(self, maps: Tensor) -> Tensor:
        """Return 1 where these maps count in the average over crops and noise samples, 0 where they do not."""
        ...


DECODERS: dict[str, type[LinearDecoder] | type[PaperDecoder]] = {
    decoder.kind: decoder for decoder in (LinearDecoder, PaperDecoder)
}
