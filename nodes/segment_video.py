"""SLiMe Segment Video and SLiMe Video Masks: parts of videos of any length, in constant memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import InputImpl, io
from torch import Tensor

from ..slime.data.video_stream import LabelFrames, segment_stream
from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.parts.draw import overlay
from ..slime.parts.maps import PartMaps
from ..slime.segment import segment
from ..slime.settings import SegmentSettings
from .backbones import build_backbone, clip_vision_input, model_inputs
from .common import (
    ADVANCED,
    Embeddings,
    clip_input,
    confidence_input,
    named_errors,
    parts_outputs,
    parts_result,
    refine_input,
    schema,
    seed_input,
    show_text,
)
from .files import save_path

logger = logging.getLogger(__name__)

FOLDER = "slime_video"  # in ComfyUI's output folder
OPACITY = 0.55
Frame = tuple[np.ndarray, int]  # RGB uint8 [H, W, 3], and its time in units of the stream


class SLiMeSegmentVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeSegmentVideo",
            category=ADVANCED,
            display_name="SLiMe Segment Video",
            description="Finds the learned parts in a video of any length: frames are read, segmented and written one "
            "after the other. After a cancel it goes on where it stopped.",
            search_aliases=["long video", "video segmentation", "video mask", "segment video"],
            inputs=[
                *model_inputs("The model the parts were trained with, or one of the same family."),
                Embeddings.Input("embeddings", tooltip="From SLiMe Train or Load SLiMe Embeddings."),
                io.Video.Input("video", tooltip="From Load Video."),
                io.String.Input(
                    "name", default="video", tooltip="Name of the results in the folder output/slime_video."
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.7,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="Weight of the frame before where nothing moves; 0 = off.",
                ),
                refine_input(),
                seed_input(),
                clip_input(),
                confidence_input(),
                clip_vision_input(),
            ],
            outputs=[
                io.Video.Output(display_name="overlay", tooltip="The video with the parts drawn over it."),
                io.String.Output(display_name="folder", tooltip="Folder of the label frames, for SLiMe Video Masks."),
                io.Int.Output(display_name="frames", tooltip="Number of frames."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        embeddings: PartEmbeddings,
        video: Any,
        name: str,
        smoothing: float = 0.7,
        model: Any = None,
        vae: Any = None,
        clip: Any = None,
        clip_vision: Any = None,
        **more: Any,
    ) -> io.NodeOutput:
        settings = SegmentSettings(**more)
        with named_errors("SLiMe Segment Video"):
            backbone = build_backbone(model, vae, clip, clip_vision)
            embeddings.check_model(backbone)
            embeddings = embeddings.completed(backbone)
            reader = VideoReader(video)
            folder = _folder(name, reader, embeddings, f"{settings}/{smoothing}")
            target = LabelFrames.create(folder, embeddings.names, embeddings.palette)
            total = reader.expected
            bar = comfy.utils.ProgressBar(max(total, 1))

            def on_frame(done: int) -> None:
                bar.update_absolute(min(done, total), max(total, 1))
                if done % 10 == 0:
                    show_text(cls.hidden.unique_id, f"Frame {done} of about {total}")
                comfy.model_management.throw_exception_if_processing_interrupted()

            def tensors(start: int) -> Iterator[Tensor]:
                for image, _ in reader.frames(start):
                    yield torch.from_numpy(image).float() / 255

            def find(frames: Tensor) -> PartMaps:
                return segment(backbone, frames, embeddings, settings)[0]

            path = folder / "overlay.mp4"
            if not path.exists():  # it is written last: the video is done
                if not segment_stream(tensors, find, target, smoothing, on_frame):
                    raise SlimeError("The video has no frame that can be decoded. Is the file complete?")
                reader.write_overlay(path, target)
        count = target.count()
        said = f"{count} frames in {folder}" + (f". {reader.remark}" if reader.remark else "")
        show_text(cls.hidden.unique_id, said)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), str(folder), count)


class SLiMeVideoMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeVideoMasks",
            category=ADVANCED,
            is_output_node=True,
            display_name="SLiMe Video Masks",
            description="Loads the parts of some frames that SLiMe Segment Video has written.",
            search_aliases=["video mask", "load label frames", "frame range"],
            inputs=[
                io.String.Input("folder", force_input=True, tooltip="From SLiMe Segment Video."),
                io.Image.Input("images", tooltip="The same frames of the video, for nodes that draw or edit."),
                io.Int.Input("start", default=0, min=0, max=10_000_000, tooltip="First frame, from 0."),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(cls, folder: str, images: Tensor, start: int = 0) -> io.NodeOutput:
        with named_errors("SLiMe Video Masks"):
            frames = LabelFrames.open(_within_output(folder))
            there = frames.count()
            if start + len(images) > there:
                raise SlimeError(
                    f"Frames {start} to {start + len(images) - 1} are wanted, but there are 0 to {there - 1}. Connect "
                    "fewer images, or lower start."
                )
            labels = torch.stack([torch.from_numpy(frames.read(start + index)) for index in range(len(images))])
            if labels.shape[1:] != images.shape[1:3]:
                raise SlimeError(
                    f"The frames are {labels.shape[2]}x{labels.shape[1]}, the images "
                    f"{images.shape[2]}x{images.shape[1]}. Connect the frames of the same video."
                )
        maps = PartMaps.of_labels(labels, frames.names, frames.palette)
        return parts_result(cls, maps, images[..., :3].cpu().float())


class VideoReader:
    """Frames of a VIDEO, decoded one at a time, upright and trimmed as ComfyUI does.

    Attributes:
        expected: number of frames, as far as the file tells.
        remark: what the user should know, after the frames were read.
    """

    def __init__(self, video: Any) -> None:
        self._video = video
        self.remark = ""
        start, duration = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
        self._start, self._end = float(start), float(start) + float(duration) if duration else float("inf")
        with closing(self._open()) as container:
            stream = self._stream(container)
            self._time_base = stream.time_base
            self.rate = stream.average_rate or stream.guessed_rate or 24
            length = float(stream.duration * stream.time_base) if stream.duration else 0.0
            length = length or float((container.duration or 0) / av.time_base)
            whole = stream.frames or round(length * float(self.rate))
            window = min(self._end, length) - self._start if length else 0.0
            self.expected = min(whole, round(window * float(self.rate))) if window > 0 else whole

    def _open(self) -> Any:
        source = self._video.get_stream_source()
        if hasattr(source, "seek"):
            source.seek(0)
        try:
            return av.open(source, mode="r")
        except (OSError, av.error.FFmpegError) as error:
            raise SlimeError(f"The video cannot be opened: {error}. Is the file complete?") from error

    @staticmethod
    def _stream(container: Any) -> Any:
        if not container.streams.video:
            container.close()
            raise SlimeError("The file has no video stream. Is it audio alone?")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return stream

    def stamp(self) -> str:
        """Return a text that changes with the video."""
        source = self._video.get_stream_source()
        if isinstance(source, str):
            about = Path(source).stat()
            return f"{source}/{about.st_mtime_ns}/{about.st_size}/{self._start}/{self._end}"
        return f"{hashlib.sha256(source.getvalue()).hexdigest()}/{self._start}/{self._end}"

    def frames(self, first: int = 0) -> Iterator[Frame]:
        """Yield the frames from number ``first`` on; a file that is cut off ends with its last good frame."""
        with closing(self._open()) as container:
            stream = self._stream(container)
            number = 0
            try:
                for frame in container.decode(stream):
                    time = float(frame.pts * stream.time_base) if frame.pts is not None else number / float(self.rate)
                    if time >= self._end - 1e-6:
                        return
                    if time < self._start - 1e-6:
                        continue
                    if number >= first:
                        turns = round(frame.rotation / 90) if frame.rotation else 0
                        image = np.rot90(frame.to_ndarray(format="rgb24"), turns)
                        yield np.ascontiguousarray(image), frame.pts if frame.pts is not None else number
                    number += 1
            except av.error.FFmpegError as error:
                self.remark = f"The file is damaged after frame {number - 1} ({error})."
                logger.warning("SLiMe: %s", self.remark)

    def write_overlay(self, path: Path, labels: LabelFrames) -> None:
        """Write the video with the parts drawn over it, frame by frame, at the times of the video."""
        scratch = path.with_name(f"partial_{path.name}")
        with av.open(str(scratch), mode="w") as container:
            stream, last = None, -1
            for number, (image, time) in enumerate(self.frames()):
                height, width = (side - side % 2 for side in image.shape[:2])  # the codec needs even sides
                if stream is None:
                    stream = container.add_stream("libx264", rate=self.rate)
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                    stream.codec_context.time_base = self._time_base
                drawn = overlay(image, labels.read(number), labels.palette, opacity=OPACITY)[:height, :width]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format="rgb24")
                last = frame.pts = max(int(time), last + 1)
                frame.time_base = self._time_base
                container.mux(stream.encode(frame))
            if stream is not None:
                container.mux(stream.encode())
        scratch.replace(path)


def _folder(name: str, reader: VideoReader, embeddings: PartEmbeddings, settings: str) -> Path:
    """Return the folder of the results: the same for the same video, embeddings and settings."""
    digest = hashlib.sha256(f"{reader.stamp()}/{embeddings.names}/{embeddings.extraction_key()}/{settings}".encode())
    for group, vectors in sorted(embeddings.vectors.items()):
        digest.update(group.encode() + vectors.numpy().tobytes())
    stem = save_path(name, overwrite=True).stem
    return Path(folder_paths.get_output_directory()) / FOLDER / f"{stem}_{digest.hexdigest()[:8]}"


def _within_output(folder: str) -> Path:
    """Return a folder of label frames; nothing outside of ComfyUI's output folder is read.

    Raises:
        SlimeError: a folder elsewhere.
    """
    root, path = Path(folder_paths.get_output_directory()).resolve(), Path(folder).resolve()
    if not path.is_relative_to(root):
        raise SlimeError(f"{folder} is not in ComfyUI's output folder. Connect the folder of SLiMe Segment Video.")
    return path
