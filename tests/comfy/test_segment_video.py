"""Videos of any length: real files through PyAV, label frames, cancel and going on."""

from __future__ import annotations

import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from slime import SlimeError, preset, train
from slime.parts.maps import DenseMaps, HardMaps, PartMaps
from slime.parts.palette import default_palette
from slime.parts.video_stream import LabelFrames, segment_stream
from testing.toy import ToyUNet, toy_example

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

    return lambda path: VideoReader(InputImpl.VideoFromFile(str(path)))


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
    video.write_overlay(tmp_path / "overlay.mp4", labelled(video, tmp_path / "labels"), quiet)
    written = reader(tmp_path / "overlay.mp4")
    assert sum(1 for _ in written.frames()) == COUNT


def labelled(video: Any, folder: Path) -> LabelFrames:
    """Label frames of the bright square."""
    labels = LabelFrames.create(folder, ["square"], default_palette(1))
    for number, (image, _) in enumerate(video.frames()):
        labels.write(number, (image[..., 0] > 150).astype(np.uint8))
    return labels


def quiet(done: int) -> None:
    """Hear of a finished frame."""


def times_of(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [float(frame.pts * stream.time_base) for frame in container.decode(stream)]


def test_times_of_a_variable_rate_are_kept(reader, tmp_path) -> None:
    times = [0, 40, 80, 500, 540, 1000, 1040, 1080, 2000]
    video = reader(write(tmp_path / "x.mkv", times=times))
    video.write_overlay(tmp_path / "overlay.mp4", labelled(video, tmp_path / "labels"), quiet)
    assert np.allclose(times_of(tmp_path / "overlay.mp4"), np.array(times) / 1000, atol=0.002)


def test_the_overlay_of_a_trimmed_video_begins_at_zero(reader, tmp_path) -> None:
    """As a VIDEO of newer ComfyUI says that it is trimmed."""
    from slime_extension.nodes.segment_video import VideoReader

    path = str(write(tmp_path / "x.mp4"))
    video = VideoReader(SimpleNamespace(get_stream_source=lambda: path, get_active_trim_window=lambda: (0.3, 0.4)))
    assert [round(bright(image)) for image, _ in video.frames()] == [round(9.5 + 5 * n) for n in range(3, 7)]
    video.write_overlay(tmp_path / "overlay.mp4", labelled(video, tmp_path / "labels"), quiet)
    assert np.allclose(times_of(tmp_path / "overlay.mp4"), [0, 0.1, 0.2, 0.3], atol=0.002)


def test_frames_without_times_have_those_of_the_rate(reader, tmp_path) -> None:
    """A raw stream has no times; two streams one after the other jump back."""
    from slime_extension.nodes.segment_video import VideoReader

    write(tmp_path / "x.h264")
    stream = reader(tmp_path / "x.h264")
    steps = np.diff([float(time * stream._time_base) for _, time in stream.frames()])
    assert np.allclose(steps, 1 / float(stream.rate), rtol=0.05)
    path, window = str(tmp_path / "x.h264"), (4 / float(stream.rate), 0.0)
    trimmed = VideoReader(SimpleNamespace(get_stream_source=lambda: path, get_active_trim_window=lambda: window))
    assert sum(1 for _ in trimmed.frames()) == COUNT - 4
    one = write(tmp_path / "a.ts").read_bytes()
    (tmp_path / "two.ts").write_bytes(one + one)
    joined = reader(tmp_path / "two.ts")
    times = [float(time * joined._time_base) for _, time in joined.frames()]
    assert len(times) == 2 * COUNT and min(np.diff(times)) > 0.05


def test_pixels_that_are_not_square_stay_so(reader, tmp_path) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_of(0), format="rgb24")))
        container.mux(stream.encode())
    video = reader(tmp_path / "x.mp4")
    video.write_overlay(tmp_path / "overlay.mp4", labelled(video, tmp_path / "labels"), quiet)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


QUARTER = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]  # a display matrix: turned by 90 degrees


@pytest.mark.parametrize("turn", [0, 1])
def test_turned_videos_are_upright(reader, tmp_path, turn) -> None:
    """By the display matrix in the track header of an MP4 file, as phones write it."""
    data = write(tmp_path / "x.mp4").read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(plain, data.index(b"tkhd"))
    matrix = struct.pack(">9i", *QUARTER) if turn else plain
    (tmp_path / "y.mp4").write_bytes(data[:place] + matrix + data[place + len(plain) :])
    images = [image for image, _ in reader(tmp_path / "y.mp4").frames()]
    as_stored = [image for image, _ in reader(tmp_path / "x.mp4").frames()]
    assert len(images) == COUNT
    assert all(np.array_equal(one, np.rot90(other, -turn)) for one, other in zip(images, as_stored, strict=True))


def test_files_that_are_no_whole_videos(reader, tmp_path) -> None:
    whole = write(tmp_path / "x.mkv", "ffv1", "bgr0").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    cut = reader(tmp_path / "cut.mkv")
    assert 0 < sum(1 for _ in cut.frames()) < COUNT
    (tmp_path / "cut.mp4").write_bytes(write(tmp_path / "y.mp4").read_bytes()[:700])
    for name in ("cut.mp4", "missing.mp4"):
        with pytest.raises(SlimeError, match="cannot be opened"):
            reader(tmp_path / name)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(SlimeError, match="no video stream"):
        reader(tmp_path / "sound.wav")


def test_one_damaged_frame_costs_no_others(reader, tmp_path) -> None:
    path = write(tmp_path / "x.avi", "mjpeg", "yuvj420p")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    start, size = packets[4]
    data[start + 8 : start + 8 + size] = bytes(size)
    path.write_bytes(bytes(data))
    video = reader(path)
    assert sum(1 for _ in video.frames()) == COUNT - 1
    assert video.remark == "1 damaged frames were left out."
    path.write_bytes(bytes(data[: packets[-1][0]]))  # cut off as well
    cut = reader(path)
    assert sum(1 for _ in cut.frames()) < COUNT - 1 and cut.remark.startswith("1 damaged frames were left out.")


def test_frames_in_memory_that_cannot_be_read_say_what_to_do(reader) -> None:
    from slime_extension.nodes.segment_video import VideoReader

    class InMemory:
        def get_stream_source(self) -> Any:
            raise ValueError("Could not determine output format")

    with pytest.raises(SlimeError, match="Save it with Save Video"):
        VideoReader(InMemory())


def found_in(frames: torch.Tensor) -> PartMaps:
    inside = frames[..., 0] > 0.6
    maps = torch.stack([~inside, inside], 1).float() * 0.8 + 0.1
    return PartMaps(DenseMaps(maps), ("square",), tuple(default_palette(1)), torch.ones(len(frames), 1))


def flickering(frames: torch.Tensor) -> PartMaps:
    """The square, less sure in frames that are brighter by 1/255 than others."""
    inside = frames[..., 0] > 0.6
    weak = (frames[:, -1, -1, 0] > 60.5 / 255)[:, None, None]
    found = torch.where(inside, torch.where(weak, 0.42, 0.95), 0.02)
    return PartMaps(DenseMaps(torch.stack([1 - found, found], 1)), ("square",), tuple(default_palette(1)), found)


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_a_cancelled_stream_goes_on_as_if_nothing_had_been(tmp_path, strength, monkeypatch) -> None:
    monkeypatch.setattr("slime.parts.video_stream.CHUNK_VALUES", 4 * 48 * 64 * 3)
    frames = [torch.from_numpy(frame_of(number // 4)).float() / 255 for number in range(24)]
    frames = [frame + (number % 3 > 0) / 255 for number, frame in enumerate(frames)]
    whole, part = (LabelFrames.create(tmp_path / name, ["square"], default_palette(1)) for name in ("a", "b"))
    batches: list[int] = []

    def segment(batch: torch.Tensor) -> PartMaps:
        batches.append(len(batch))
        return flickering(batch)

    assert segment_stream(lambda start: frames[start:], segment, whole, strength) == 24
    assert max(batches) == 4

    def cancel(done: int) -> None:
        if done == 15:
            raise Cancelled

    with pytest.raises(Cancelled):
        segment_stream(lambda start: frames[start:], segment, part, strength, cancel)
    assert part.count() == 15
    kept = part.path(2).stat().st_mtime_ns
    part.path(14).write_bytes(part.path(14).read_bytes()[:30])  # half written
    part.path(9).unlink()
    assert segment_stream(lambda start: frames[start:], segment, part, strength) == 24
    assert part.path(2).stat().st_mtime_ns == kept and not list(part.folder.glob(".*"))
    assert all(np.array_equal(whole.read(number), part.read(number)) for number in range(24))


def test_label_frames_know_their_parts_their_video_and_their_end(tmp_path) -> None:
    frames = LabelFrames.create(tmp_path / "x", ["a"], default_palette(1), "one")
    frames.write(0, np.ones((4, 4), np.uint8))
    assert not frames.complete
    replace(frames, finished=1, remark="odd").save()
    again = LabelFrames.create(tmp_path / "x", ["a"], default_palette(1), "one")
    assert again.complete and again.remark == "odd" and again.read(0).dtype == np.uint8
    assert not LabelFrames.create(tmp_path / "x", ["a"], default_palette(1), "two").complete
    with pytest.raises(SlimeError, match="missing or damaged.*Unload Models"):
        frames.read(1)
    Image.new("RGB", (4, 4)).save(frames.path(0))
    with pytest.raises(SlimeError, match="is not a label map of these 1 parts"):
        frames.read(0)
    for damage in (
        '{"frames": 1}',
        '{"names": ["a"], "palette": [["x", 0, 0]], "video": "", "frames": 1, "remark": ""}',
        '{"names": ["a"], "palette": [[1, 0, 0]], "video": "", "frames": Infinity, "remark": ""}',
    ):
        (tmp_path / "parts.json").write_text(damage)
        with pytest.raises(SlimeError, match="no label frames"):
            LabelFrames.open(tmp_path)


def test_frames_of_another_model_are_not_mixed(tmp_path) -> None:
    frames = [torch.from_numpy(frame_of(number)).float() / 255 for number in range(3)]
    target = LabelFrames.create(tmp_path, ["square"], default_palette(1))
    assert segment_stream(lambda start: frames[start:], found_in, target, 0.7) == 3
    target.path(2).unlink()
    with pytest.raises(SlimeError, match="Frame 0 now comes out differently.*Choose another name"):
        segment_stream(lambda start: frames[start:], lambda batch: found_in(1 - batch), target, 0.7)
    assert segment_stream(lambda start: frames[start:], found_in, target, 0.7) == 3


@pytest.mark.long
def test_one_frame_that_is_missing_costs_few_passes_and_nothing_of_the_user(tmp_path, monkeypatch) -> None:
    """A gap near the start of a finished video; and a label frame that a paint program saved in colours."""
    frames = [torch.from_numpy(frame_of(number % COUNT)).float() / 255 for number in range(200)]
    target, passes = LabelFrames.create(tmp_path, ["square"], default_palette(1)), []

    def segment(batch: torch.Tensor) -> PartMaps:
        passes.append(len(batch))
        return found_in(batch)

    assert segment_stream(lambda start: frames[start:], segment, target, 0.7) == sum(passes) == 200
    before = target.read(30)
    target.path(30).unlink()
    passes.clear()
    assert segment_stream(lambda start: frames[start:], segment, target, 0.7) == 200
    assert sum(passes) < 80 and np.array_equal(target.read(30), before)
    Image.new("RGB", (64, 48)).save(target.path(199))
    with pytest.raises(SlimeError, match="000199.png is not a label map"):
        segment_stream(lambda start: frames[start:], segment, target, 0.7)
    assert target.path(199).is_file()


def test_the_size_may_change_on_the_way(reader, tmp_path) -> None:
    frames = [torch.rand(size, size, 3) for size in (8, 8, 12, 12, 8)]
    target = LabelFrames.create(tmp_path, ["square"], default_palette(1))
    assert segment_stream(lambda start: frames[start:], found_in, target, 0.7) == 5
    assert [target.read(number).shape[0] for number in range(5)] == [8, 8, 12, 12, 8]


def test_masks_of_some_frames(reader, tmp_path, monkeypatch) -> None:
    import folder_paths
    from comfy_api.latest import InputImpl, io
    from slime_extension.nodes import segment_video

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(segment_video, "parts_result", lambda cls, maps, images: io.NodeOutput(maps, None))
    path, load = write(tmp_path / "x.mp4"), segment_video.SLiMeVideoMasks.execute
    video, other = InputImpl.VideoFromFile(str(path)), InputImpl.VideoFromFile(str(write(tmp_path / "y.mp4")))
    labels = LabelFrames.create(tmp_path / "slime_video" / "x", ["a", "b"], default_palette(2), reader(path).digest())
    for number in range(COUNT):
        labels.write(number, np.full((48, 64), number % 3, np.uint8))
    maps, _, images = load(str(labels.folder), video, 1, 2).args
    assert isinstance(maps.source, HardMaps) and maps.label_map[:, 0, 0].tolist() == [1, 2]
    assert maps.names == ("a", "b") and maps.peaks.tolist() == [[1, 0], [0, 1]]
    assert [round(bright(image.numpy() * 255)) for image in images] == [14, 20]
    assert len(load(str(labels.folder), video, COUNT - 2, 16).args[2]) == 2  # the video ends
    with pytest.raises(SlimeError, match=f"start is {COUNT}, but there are {COUNT} segmented frames"):
        load(str(labels.folder), video, COUNT)
    with pytest.raises(SlimeError, match="belong to another video"):
        load(str(labels.folder), other)
    with pytest.raises(SlimeError, match="not in ComfyUI"):
        load("/etc", video)
    with pytest.raises(SlimeError, match="not in ComfyUI"):
        load("/etc\0", video)


def test_a_video_through_the_node(extension, tmp_path, monkeypatch, in_inference_mode) -> None:
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

    def counted(backbone: Any, frames: torch.Tensor, *rest: Any, **more: Any) -> Any:
        calls.append(len(frames))
        return real(backbone, frames, *rest, **more)

    monkeypatch.setattr(segment_video, "segment", counted)
    monkeypatch.setattr(segment_video, "build_backbone", lambda *_: ToyUNet())
    embeddings = train(ToyUNet(), [toy_example(0)], preset("instant", views=2))
    video = InputImpl.VideoFromFile(str(write(tmp_path / "x.mp4", size=(128, 192))))
    inputs = {"refine": "fast", "seed": 0}
    overlay, folder, count = node.execute(embeddings, video, "clip", **inputs).args
    assert count == COUNT == sum(calls) and Path(folder).parent == tmp_path / "slime_video"
    assert overlay.get_dimensions() == (192, 128)
    node.execute(embeddings, video, "clip", **inputs)
    assert sum(calls) == COUNT + 1  # of a finished video only the first frame is segmented, to see if it is the same
    (Path(folder) / "000003.png").unlink()
    (Path(folder) / "overlay.mp4").write_bytes(b"")
    node.execute(embeddings, video, "clip", **inputs)
    assert (Path(folder) / "000003.png").is_file() and (Path(folder) / "overlay.mp4").stat().st_size > 1000

    def interrupted(*_: Any) -> None:
        raise Cancelled

    (Path(folder) / "overlay.mp4").unlink()
    monkeypatch.setattr(segment_video.VideoReader, "_overlay_stream", interrupted)
    with pytest.raises(Cancelled):
        node.execute(embeddings, video, "clip", **inputs)
    assert not (Path(folder) / "overlay.mp4").exists() and not list(Path(folder).glob(".*"))
