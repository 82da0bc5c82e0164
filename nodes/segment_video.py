"""SLiMe Segment Video and SLiMe Video Masks: parts of videos of any length, in constant memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
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

from ..slime.embeddings import PartEmbeddings
from ..slime.errors import SlimeError
from ..slime.files import replacing
from ..slime.parts.draw import overlay
from ..slime.parts.maps import PartMaps
from ..slime.parts.video_stream import AGAIN, LabelFrames, check_model, segment_stream
from ..slime.segment import segment
from ..slime.settings import SegmentSettings
from .backbones import build_backbone, clip_vision_input, model_inputs
from .common import (
    ADVANCED,
    EmbeddingsSocket,
    clip_input,
    confidence_input,
    named_errors,
    parts_outputs,
    parts_result,
    refine_input,
    schema,
    seed_input,
    show_text,
    smoothing_input,
    to_core,
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
            description="Finds the trained parts in a video of any length: frames are read, segmented and written one "
            "after the other. After a cancel it goes on where it stopped.",
            search_aliases="long video, video segmentation, video mask, segment video",
            inputs=[
                *model_inputs("The model the parts were trained with, or one of the same family."),
                EmbeddingsSocket.Input("embeddings", tooltip="From SLiMe Train or Load SLiMe Embeddings."),
                io.Video.Input("video", tooltip="From Load Video."),
                io.String.Input(
                    "name",
                    default="video",
                    tooltip="Name of the results in output/slime_video. After a change of the model or a LoRA choose "
                    "another name; otherwise the run stops with an error.",
                ),
                smoothing_input("smoothing"),
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
            is_output_node=True,
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
        with named_errors("SLiMe Segment Video"):
            settings = SegmentSettings(**more)
            backbone = build_backbone(model, vae, clip, clip_vision)
            embeddings.check_model(backbone)
            embeddings = embeddings.completed(backbone)
            reader = VideoReader(video)
            folder = _folder(name, reader, embeddings, f"{sorted(asdict(settings).items())}/{smoothing}")
            target = LabelFrames.create(folder, embeddings.names, embeddings.palette, reader.digest())
            steps = 2 * max(reader.expected, 1)  # every frame is segmented and drawn
            bar = comfy.utils.ProgressBar(steps)

            def on_frame(done: int, doing: str = "segmented", before: int = 0) -> None:
                bar.update_absolute(min(before + done, steps), steps)
                if done % 10 == 0:
                    show_text(cls.hidden.unique_id, f"Frame {done} of about {reader.expected} {doing}")
                comfy.model_management.throw_exception_if_processing_interrupted()

            def tensors(start: int) -> Iterator[Tensor]:
                for image, _ in reader.frames(start):
                    yield torch.from_numpy(image).float() / 255

            def on_batch(done: int, total: int) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()

            def find(frames: Tensor) -> PartMaps:
                return segment(backbone, frames, embeddings, settings, on_batch=on_batch)[0]

            device = comfy.model_management.get_torch_device()
            smoothing_device = device if device.type == "cuda" else "cpu"  # others lack some of the operations
            path = folder / "overlay.mp4"
            there = target.complete and path.is_file() and path.stat().st_size > 0
            if there:
                check_model(tensors, find, target)
            else:
                count = segment_stream(tensors, find, target, smoothing, on_frame, smoothing_device)
                if not count:
                    raise SlimeError(
                        f"No frame of the video can be decoded. {reader.remark} Convert it to MP4 (H.264)."
                    )
                reader.write_overlay(path, target, lambda done: on_frame(done, "drawn", steps // 2))
                target = replace(target, finished=count, remark=reader.remark)
                target.save()
        said = f"{target.finished} frames in {folder}{', from an earlier run' if there else ''}. {target.remark}"
        show_text(cls.hidden.unique_id, said)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), str(folder), target.finished)


class SLiMeVideoMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeVideoMasks",
            category=ADVANCED,
            is_output_node=True,
            display_name="SLiMe Video Masks",
            description="Loads the parts of some frames that SLiMe Segment Video has written.",
            search_aliases="video mask, load label frames, frame range",
            inputs=[
                io.String.Input("folder", force_input=True, tooltip="From SLiMe Segment Video."),
                io.Video.Input("video", tooltip="The video that SLiMe Segment Video was given."),
                io.Int.Input("start", default=0, min=0, max=10_000_000, tooltip="First frame, from 0."),
                io.Int.Input("count", default=16, min=1, max=4096, tooltip="Number of frames."),
            ],
            outputs=[*parts_outputs(), io.Image.Output(display_name="images", tooltip="The frames.")],
        )

    @classmethod
    def execute(cls, folder: str, video: Any, start: int = 0, count: int = 16) -> io.NodeOutput:
        with named_errors("SLiMe Video Masks"):
            frames, reader = LabelFrames.open(_within_output(folder)), VideoReader(video)
            there = frames.count()
            if start >= there:
                raise SlimeError(
                    f"start is {start}, but there are {there} segmented frames, from 0. Lower start, or run SLiMe "
                    "Segment Video to its end."
                )
            if frames.video != reader.digest():
                raise SlimeError(
                    f"The label frames in {folder} belong to another video, or its file was moved or changed. Connect "
                    "the same video to both nodes, and run SLiMe Segment Video again."
                )
            numbers = range(start, min(start + count, there))
            labels = [torch.from_numpy(frames.read(number)) for number in numbers]
            images = [torch.from_numpy(image).float() / 255 for image, _ in islice(reader.frames(start), len(numbers))]
            if len({tuple(item.shape[:2]) for item in (*labels, *images)}) > 1:
                raise SlimeError(
                    f"Frames {start} to {numbers[-1]} have several sizes. Choose frames of one size by start and count."
                )
        maps = PartMaps.of_labels(torch.stack(labels), frames.names, frames.palette)
        batch = torch.stack(images)
        shown = parts_result(cls, maps, batch)
        return io.NodeOutput(*shown.args, to_core(batch), ui=shown.ui)


class VideoReader:
    """Frames of a VIDEO, decoded one at a time, upright and trimmed as ComfyUI does.

    Attributes:
        expected: number of frames, as far as the file tells.
        remark: what the user should know, after the frames were read.
    """

    def __init__(self, video: Any) -> None:
        self.remark = ""
        try:
            self._source = video.get_stream_source()
        except (ValueError, OSError, av.error.FFmpegError) as error:  # frames in memory that cannot be encoded
            raise SlimeError(
                f"The video cannot be read: {error}. Save it with Save Video, and load it with Load Video."
            ) from error
        start, duration = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
        self._start, self._end = float(start), float(start) + float(duration) if duration else float("inf")
        with closing(self._open()) as container:
            stream = self._stream(container)
            self._time_base, self._aspect = stream.time_base, stream.sample_aspect_ratio
            self.rate = stream.average_rate or stream.guessed_rate or 24
            length = float(stream.duration * stream.time_base) if stream.duration else 0.0
            length = length or float((container.duration or 0) / av.time_base)
            whole = stream.frames or round(length * float(self.rate))
            window = min(self._end, length) - self._start if length else 0.0
            self.expected = min(whole, round(window * float(self.rate))) if window > 0 else whole

    def _open(self) -> Any:
        if hasattr(self._source, "seek"):
            self._source.seek(0)
        try:
            return av.open(self._source, mode="r")
        except (OSError, av.error.FFmpegError) as error:
            raise SlimeError(f"The video cannot be opened: {error}. Check that the file is there and plays.") from error

    @staticmethod
    def _stream(container: Any) -> Any:
        if not container.streams.video:
            container.close()
            raise SlimeError("The file has no video stream: it may contain only audio. Load a video.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return stream

    def digest(self) -> str:
        """Return a text that changes with the video."""
        if isinstance(self._source, str):
            about = Path(self._source).stat()
            of = f"{self._source}/{about.st_mtime_ns}/{about.st_size}".encode()
        else:
            of = self._source.getvalue()
        return hashlib.sha256(of + f"/{self._start}/{self._end}".encode()).hexdigest()

    def frames(self, first: int = 0) -> Iterator[Frame]:
        """Yield the frames from number ``first`` on; what cannot be decoded is left out, and said in ``remark``."""
        step = max(1, round(1 / (self.rate * self._time_base)))  # of a frame, in units of the stream
        number, last = 0, None
        with closing(self._open()) as container:
            for index, frame in enumerate(self._decoded(container)):
                time = frame.pts if frame.pts is not None else index * step
                seconds = float(time * self._time_base)
                if seconds >= self._end - 1e-6:
                    return
                if seconds < self._start - 1e-6:
                    continue
                time = time if last is None or time > last else last + step
                last = time
                if number >= first:
                    turns = round(frame.rotation / 90) if frame.rotation else 0
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)), time
                number += 1

    def _decoded(self, container: Any) -> Iterator[Any]:
        stream, bad, end = self._stream(container), 0, ""
        try:
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    bad += 1
        except av.error.FFmpegError as error:
            end = f"The file ends early ({error})."
        finally:  # also where a trim ends the reading
            remarks = [f"{bad} damaged frames were left out."] if bad else []
            if remarks := [*remarks, end] if end else remarks:
                self.remark = " ".join(remarks)
                logger.warning("SLiMe: %s", self.remark)

    def write_overlay(self, path: Path, labels: LabelFrames, on_frame: Callable[[int], None]) -> None:
        """Write the video with the parts drawn over it, frame by frame, at the times of the video from 0.

        Args:
            path: of the MP4 file.
            labels: of the frames; the overlay ends with them.
            on_frame: called with the number of finished frames; an exception from it ends the work.

        Raises:
            SlimeError: label frames that are missing or of another size.
        """
        with replacing(path) as partial, av.open(str(partial), mode="w", format="mp4") as container:
            stream, start = None, 0
            for number, (image, time) in enumerate(islice(self.frames(), labels.count())):
                if stream is None:
                    stream, start = self._overlay_stream(container, image), time
                drawn = overlay(image, _fitting(labels, number, image), labels.palette, opacity=OPACITY)
                drawn = np.ascontiguousarray(drawn[: stream.height, : stream.width])
                frame = av.VideoFrame.from_ndarray(drawn, format="rgb24")
                if (frame.height, frame.width) != (stream.height, stream.width):  # the size changes on the way
                    frame = frame.reformat(stream.width, stream.height)
                frame.pts, frame.time_base = time - start, self._time_base
                container.mux(stream.encode(frame))
                on_frame(number + 1)
            if stream is not None:
                container.mux(stream.encode())

    def _overlay_stream(self, container: Any, image: np.ndarray) -> Any:
        stream = container.add_stream("libx264", rate=self.rate)
        stream.height, stream.width = (side - side % 2 for side in image.shape[:2])  # the codec needs even sides
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = self._time_base
        if self._aspect:
            stream.codec_context.sample_aspect_ratio = self._aspect
        return stream


def _fitting(labels: LabelFrames, number: int, image: np.ndarray) -> np.ndarray:
    """Return the label map uint8 [H, W] of an image."""
    found = labels.read(number)
    if found.shape != image.shape[:2]:
        raise SlimeError(f"{labels.path(number)} has another size than the video. {AGAIN}")
    return found


def _folder(name: str, reader: VideoReader, embeddings: PartEmbeddings, settings: str) -> Path:
    """Return the folder of the results: the same for the same video, embeddings and settings."""
    read = embeddings.names, embeddings.palette, embeddings.decoder, embeddings.example_confidence
    digest = hashlib.sha256(f"{reader.digest()}/{read}/{embeddings.extraction_key()}/{settings}".encode())
    for group, vectors in sorted(embeddings.vectors.items()):
        digest.update(group.encode() + vectors.numpy().tobytes())
    stem = save_path(name, overwrite=True).stem
    return Path(folder_paths.get_output_directory()) / FOLDER / f"{stem}_{digest.hexdigest()[:8]}"


def _within_output(folder: str) -> Path:
    """Return a folder of label frames; nothing outside of ComfyUI's output folder is read.

    Raises:
        SlimeError: a folder elsewhere.
    """
    root = Path(folder_paths.get_output_directory()).resolve()
    path = Path(folder.replace("\0", "")).resolve()
    if not path.is_relative_to(root):
        raise SlimeError(f"{folder} is not in ComfyUI's output folder. Connect the folder of SLiMe Segment Video.")
    return path
