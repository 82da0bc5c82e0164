"""A node that stands in for Load Checkpoint with SAM3 when the templates are tried."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


class LoadTinySam3(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadTinySam3",
            category="demo",
            inputs=[io.Boolean.Input("tracker", tooltip="A random SAM3.1 that can track, else the trained detector.")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, tracker: bool) -> io.NodeOutput:
        from testing.tiny import sam3

        model: Any = sam3.build_tracker() if tracker else sam3.load()[0]
        return io.NodeOutput(sam3.as_model(model))
