"""Embeddings as text inside a workflow, what is inside them, and how to combine and change them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..slime.edit import change_parts, describe, merge_embeddings
from ..slime.embedding_files import from_text, to_text
from ..slime.embeddings import PartEmbeddings
from .common import FILES, Embeddings, named_errors, schema


class SLiMeEmbeddingsToText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeEmbeddingsToText",
            category=FILES,
            display_name="SLiMe Embeddings to Text",
            description="Packs embeddings into a text that travels inside a workflow and needs no further file.",
            search_aliases=["inline embeddings", "share segmenter", "export embeddings"],
            inputs=[Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings.")],
            outputs=[io.String.Output(display_name="text", tooltip="Copy it into SLiMe Embeddings from Text.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings: PartEmbeddings) -> io.NodeOutput:
        with named_errors("SLiMe Embeddings to Text"):
            text = to_text(embeddings)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class SLiMeEmbeddingsFromText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeEmbeddingsFromText",
            category=FILES,
            display_name="SLiMe Embeddings from Text",
            description="Embeddings from a text made by SLiMe Embeddings to Text.",
            search_aliases=["inline embeddings", "paste embeddings", "import embeddings"],
            inputs=[
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="The whole text, which begins with slime1: and holds at most 400000 characters.",
                )
            ],
            outputs=[
                Embeddings.Output(
                    display_name="embeddings", tooltip="For SLiMe Segment; connect its clip, which this form needs."
                ),
                io.String.Output(display_name="names", tooltip="The parts, separated by commas."),
            ],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        with named_errors("SLiMe Embeddings from Text"):
            embeddings = from_text(text)
        return io.NodeOutput(embeddings, ", ".join(embeddings.names))


class SLiMeEmbeddingsInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeEmbeddingsInfo",
            category=FILES,
            display_name="SLiMe Embeddings Info",
            description="What is inside embeddings: parts, model family, settings, loss.",
            search_aliases=["inspect embeddings", "show embeddings"],
            inputs=[Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load Learned Embeddings.")],
            outputs=[
                io.String.Output(display_name="info", tooltip="Readable text."),
                io.String.Output(display_name="names", tooltip="The parts, separated by commas."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings: PartEmbeddings) -> io.NodeOutput:
        text = describe(embeddings)
        return io.NodeOutput(text, ", ".join(embeddings.names), ui=ui.PreviewText(text))


class SLiMeEmbeddingsMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeEmbeddingsMerge",
            category=FILES,
            display_name="SLiMe Embeddings Merge",
            description="Parts of two embeddings of one kind together; also renames, drops and recolours parts.",
            search_aliases=["combine embeddings", "rename part", "drop part", "part colour"],
            inputs=[
                Embeddings.Input("embeddings", tooltip="The first, or the only one."),
                Embeddings.Input("other", optional=True, tooltip="Learned on the same family with the same settings."),
                io.String.Input(
                    "changes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One change a line. wheel = tyre renames, wheel = drop removes, wheel = #ff8800 recolours.",
                ),
            ],
            outputs=[
                Embeddings.Output(display_name="embeddings", tooltip="For SLiMe Segment and Save Learned Embeddings."),
                io.String.Output(display_name="names", tooltip="The parts, separated by commas."),
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
