"""SLiMe Embeddings Merge: combine embeddings, and rename, drop or recolour parts."""

from __future__ import annotations

from comfy_api.latest import io

from ..slime.edit import change_parts, merge_embeddings
from ..slime.embeddings import PartEmbeddings
from .common import FILES, EmbeddingsSocket, named_errors, schema


class SLiMeEmbeddingsMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeEmbeddingsMerge",
            category=FILES,
            display_name="SLiMe Embeddings Merge",
            description="Combines the parts of two sets of embeddings of one model family; also renames, drops and "
            "recolours parts.",
            search_aliases="combine embeddings, rename part, drop part, part colour",
            inputs=[
                EmbeddingsSocket.Input("embeddings", tooltip="The first set, or the only one."),
                EmbeddingsSocket.Input(
                    "other",
                    optional=True,
                    tooltip="The second set, trained on the same model family with the same settings.",
                ),
                io.String.Input(
                    "changes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One change per line. wheel = tyre renames, wheel = drop removes, wheel = #ff8800 "
                    "recolours.",
                ),
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    display_name="embeddings", tooltip="For SLiMe Segment and Save SLiMe Embeddings."
                ),
                io.String.Output(display_name="names", tooltip="The part names, separated by commas."),
            ],
        )

    @classmethod
    def execute(
        cls, embeddings: PartEmbeddings, other: PartEmbeddings | None = None, changes: str = ""
    ) -> io.NodeOutput:
        with named_errors("SLiMe Embeddings Merge"):
            merged = embeddings if other is None else merge_embeddings(embeddings, other)
            merged = change_parts(merged, changes)
        return io.NodeOutput(merged, ", ".join(merged.names))
