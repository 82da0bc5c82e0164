"""Videos of any length: real files through PyAV, label frames, cancel and going on."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from slime import SlimeError
from slime.data.video_stream import LabelFrames, StreamSmoother, segment_stream
from slime.parts.maps import CertainMaps, DenseMaps, PartMaps
from slime.parts.palette import default_palette

COUNT = 9


def frame_of(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A grey image with a bright square that moves to the right."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[16:32, 4 + 5 * number : 16 + 5 * number] = 230
    return image


def write(
    path: Path, codec: str = "libx264", pixels: str = "yuv420p", times: Any = None, size: tuple[int, int] = (48, 64)
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(frame_of(number, *size), format="rgb24")
            frame.pts = times[number] if times else 100 * number
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def reader(extension) -> Any:
    from comfy_api.latest import InputImpl
    from slime_extension.nodes.segment_video import VideoReader

    return lambda path, **trim: VideoReader(InputImpl.VideoFromFile(str(path), **trim))


def bright(image: np.ndarray) -> float:
    """The middle of the bright square, in pixels from the left."""
    return float(np.nonzero(image[..., 0] > 150)[1].mean())


def test_frames_come_in_order_from_any_number(reader, tmp_path) -> None:
    video = reader(write(tmp_path / "x.mp4"))
    assert video.expected == COUNT
    positions = [bright(image) for image, _ in video.frames()]
    assert len(positions) == COUNT and np.allclose(np.diff(positions), 5, atol=0.5)
    assert [bright(image) for image, _ in video.frames(6)] == positions[6:]


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels", "size"),
    [
        ("mkv", "ffv1", "bgr0", (33, 47)),
        ("mov", "qtrle", "argb", (48, 64)),
        ("webm", "libvpx-vp9", "yuva420p", (48, 64)),
    ],
    ids=["odd sizes", "alpha", "alpha in webm"],
)
def test_odd_sizes_and_alpha(reader, tmp_path, suffix, codec, pixels, size) -> None:
    video = reader(write(tmp_path / f"x.{suffix}", codec, pixels, size=size))
    images = [image for image, _ in video.frames()]
    assert len(images) == COUNT and images[0].shape == (*size, 3)
    labels = LabelFrames.create(tmp_path / "labels", ["square"], default_palette(1))
    for number, image in enumerate(images):
        labels.write(number, (image[..., 0] > 150).astype(np.uint8))
    video.write_overlay(tmp_path / "overlay.mp4", labels)
    written = reader(tmp_path / "overlay.mp4")
    assert sum(1 for _ in written.frames()) == COUNT


def test_times_of_a_variable_rate_are_kept(reader, tmp_path) -> None:
    times = [0, 40, 80, 500, 540, 1000, 1040, 1080, 2000]
    video = reader(write(tmp_path / "x.mkv", times=times))
    labels = LabelFrames.create(tmp_path / "labels", ["square"], default_palette(1))
    for number, (image, _) in enumerate(video.frames()):
        labels.write(number, (image[..., 0] > 150).astype(np.uint8))
    video.write_overlay(tmp_path / "overlay.mp4", labels)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        found = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    assert np.allclose(np.array(found) - found[0], np.array(times) / 1000, atol=0.002)


def test_turned_frames_are_upright(reader, tmp_path, monkeypatch) -> None:
    video = reader(write(tmp_path / "x.mp4"))
    turned = SimpleNamespace(pts=0, rotation=-90, to_ndarray=lambda format: frame_of(0))
    monkeypatch.setattr(video, "_stream", lambda container: SimpleNamespace(time_base=Fraction(1, 10)))
    monkeypatch.setattr(video, "_open", lambda: SimpleNamespace(decode=lambda stream: [turned], close=lambda: None))
    ((image, _),) = video.frames()
    assert np.array_equal(image, np.rot90(frame_of(0), -1)) and image.shape == (64, 48, 3)


def test_files_that_are_no_whole_videos(reader, tmp_path) -> None:
    whole = write(tmp_path / "x.mkv", "ffv1", "bgr0").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    cut = reader(tmp_path / "cut.mkv")
    assert 0 < sum(1 for _ in cut.frames()) < COUNT
    (tmp_path / "cut.mp4").write_bytes(write(tmp_path / "y.mp4").read_bytes()[:700])
    with pytest.raises(SlimeError, match="cannot be opened"):
        reader(tmp_path / "cut.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(SlimeError, match="no video stream"):
        reader(tmp_path / "sound.wav")


def found_in(frames: torch.Tensor) -> PartMaps:
    inside = frames[..., 0] > 0.6
    maps = torch.stack([~inside, inside], 1).float() * 0.8 + 0.1
    return PartMaps(DenseMaps(maps), ("square",), tuple(default_palette(1)), torch.ones(len(frames), 1))


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_a_cancelled_stream_goes_on(tmp_path, strength, monkeypatch) -> None:
    monkeypatch.setattr("slime.data.video_stream.CHUNK_VALUES", 4 * 48 * 64 * 3)
    frames = [torch.from_numpy(frame_of(number)).float() / 255 for number in range(COUNT)]
    whole, part = (LabelFrames.create(tmp_path / name, ["square"], default_palette(1)) for name in ("a", "b"))
    batches: list[int] = []

    def segment(batch: torch.Tensor) -> PartMaps:
        batches.append(len(batch))
        return found_in(batch)

    assert segment_stream(lambda start: frames[start:], segment, whole, strength) == COUNT
    assert max(batches) == 4

    class Cancelled(BaseException):
        pass

    def cancel(done: int) -> None:
        if done == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        segment_stream(lambda start: frames[start:], segment, part, strength, cancel)
    assert part.count() == 5
    kept = part.path(2).stat().st_mtime_ns
    assert segment_stream(lambda start: frames[start:], segment, part, strength) == COUNT
    assert part.path(2).stat().st_mtime_ns == kept and not list(part.folder.glob(".*"))
    for number in range(COUNT):
        same = whole.read(number) == part.read(number)
        assert same.mean() > 0.99 and (strength or same.all())
    again = LabelFrames.open(part.folder)
    assert again == part and again.read(0).dtype == np.uint8
    with pytest.raises(SlimeError, match="missing or damaged"):
        part.read(COUNT)
    with pytest.raises(SlimeError, match="no label frames"):
        LabelFrames.open(tmp_path)


def test_smoothing_holds_what_flickers_and_lets_go_of_what_moves() -> None:
    still = torch.full((32, 32, 3), 0.5)
    smoother, sure, unsure = StreamSmoother(0.7), torch.full((2, 32, 32), 0.9), torch.full((2, 32, 32), 0.4)
    assert torch.equal(smoother(sure, still), sure)
    assert torch.allclose(smoother(unsure, still), torch.tensor(0.3 * 0.4 + 0.7 * 0.9))
    moved = still + 0.4
    assert torch.allclose(smoother(unsure, moved), unsure, atol=1e-3)


def test_masks_of_some_frames(extension, tmp_path, monkeypatch) -> None:
    import folder_paths
    from slime_extension.nodes import segment_video

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(segment_video, "parts_result", lambda cls, maps, images: maps)
    frames = LabelFrames.create(tmp_path / "slime_video" / "x", ["a", "b"], default_palette(2))
    for number in range(4):
        frames.write(number, np.full((8, 12), number % 3, np.uint8))
    load = segment_video.SLiMeVideoMasks.execute
    maps = load(str(frames.folder), torch.rand(2, 8, 12, 3), 1)
    assert isinstance(maps.full_size, CertainMaps) and maps.label_map[:, 0, 0].tolist() == [1, 2]
    assert maps.names == ("a", "b") and maps.peaks.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(SlimeError, match="there are 0 to 3"):
        load(str(frames.folder), torch.rand(3, 8, 12, 3), 2)
    with pytest.raises(SlimeError, match="frames are 12x8"):
        load(str(frames.folder), torch.rand(2, 8, 8, 3), 1)
    with pytest.raises(SlimeError, match="not in ComfyUI"):
        load("/etc", torch.rand(2, 8, 12, 3))


def test_a_video_through_the_node(tiny, tmp_path, monkeypatch, in_inference_mode) -> None:
    import folder_paths
    from comfy_api.latest import InputImpl
    from slime_extension.nodes import segment_video
    from slime_extension.nodes.files import register_folder

    register_folder()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    node = segment_video.SLiMeSegmentVideo
    monkeypatch.setattr(node, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    calls: list[int] = []
    real = segment_video.segment  # type: ignore[attr-defined]

    def counted(backbone: Any, frames: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(frames))
        return real(backbone, frames, *rest)

    monkeypatch.setattr(segment_video, "segment", counted)
    video = InputImpl.VideoFromFile(str(write(tmp_path / "x.mp4", size=(128, 192))))
    own = tiny.backbone
    inputs = {"model": own.model, "vae": own.vae, "refine": "fast", "seed": 0}
    overlay, folder, count = node.execute(tiny.embeddings, video, "clip", **inputs).args
    assert count == COUNT == sum(calls) and Path(folder).parent == tmp_path / "slime_video"
    assert overlay.get_dimensions() == (192, 128)
    node.execute(tiny.embeddings, video, "clip", **inputs)
    assert sum(calls) == COUNT  # a finished video is neither segmented nor drawn again
