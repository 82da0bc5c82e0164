"""The command line: train parts, segment large sets, evaluate, and describe embeddings files.

    slime train    --model M --examples SOURCE --output wheel.safetensors
    slime segment  --model M --embeddings wheel.safetensors INPUT --output OUT --format coco
    slime evaluate --model M --embeddings wheel.safetensors TRUTH
    slime info     wheel.safetensors

M is a diffusers folder, a vision encoder's folder, or a checkpoint file (with --comfyui FOLDER through ComfyUI).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import PartEmbeddings, Segmenter, SegmentSettings, load_embeddings, preset, save_embeddings, train
from ..backbones.load import fingerprint, load_model
from ..edit import describe
from ..errors import SlimeError
from ..files import write_whole
from ..parts.metrics import EvaluationCounts, boundary_f, mean_known
from ..settings import REFINEMENTS
from ..train import TRAINERS
from .annotations import read_annotations, read_examples
from .file_names import FileNames, changed_names, read_table, safe_path, write_table
from .formats import FORMATS, AnnotatedSet
from .formats.base import said_of
from .pixels import decode
from .review import least_confident, review_page
from .run import Engine, segment_images
from .run_log import RunLog
from .sources import STREAMED, SourceImage, source_images, source_names

ANNOTATIONS = "COCO or Label Studio .json, YOLO data.yaml, or the folder of a data set"


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (SlimeError, OSError) as error:
        sys.stderr.write(f"slime: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("slime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work, add_arguments, about in (
        ("train", _train, _add_train, "Train parts on labelled images."),
        ("segment", _segment, _add_segment, "Segment trained parts in many images."),
        ("evaluate", _evaluate, _add_evaluate, "Compare with labelled images."),
        ("info", _info, _add_info, "Describe an embeddings file."),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=work)
        add_arguments(command)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--examples", required=True, help=ANNOTATIONS)
    parser.add_argument("--parts", nargs="+", default=(), help="part names, in order; default: all in the examples")
    parser.add_argument("--shots", type=_count, default=0, help="number of images to train on; 0 for all")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--strict", action="store_true", help="an annotation that cannot be used is an error")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--preset", choices=("instant", "paper"), default="instant")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the preset")


def _add_segment(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _segmenting(parser)
    parser.add_argument("input", help="folder, 'pattern', .txt list, COCO .json, .tar or .parquet")
    parser.add_argument("--output", required=True, help="folder; a stopped run is resumed")
    parser.add_argument(
        "--format", choices=(*FORMATS, "jsonl"), nargs="+", default=["label-map"], help="with --ray: parquet or jsonl"
    )
    parser.add_argument("--limit", type=_count, default=0, help="largest number of images; 0 for all")
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="the I-th of N equal shares, from 0"
    )
    parser.add_argument(
        "--workers", type=_positive, default=max(1, (os.cpu_count() or 2) // 2), help="threads to load, and to write"
    )
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="on a Ray cluster, or one on this machine"
    )
    parser.add_argument("--actors", type=_positive, default=1, help="with --ray: number of models")
    parser.add_argument("--gpus", type=float, default=0, help="with --ray: GPUs per model")
    parser.add_argument("--order", choices=("uncertain",), help="write order.txt: the lowest confidence first")
    parser.add_argument(
        "--review",
        type=_count,
        default=0,
        metavar="N",
        help="write review.html with the N images of the lowest confidence",
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _model(parser, required=False)
    _segmenting(parser, required=False)
    parser.add_argument("ground_truth", help=ANNOTATIONS)
    parser.add_argument("--labels", help="labels to evaluate, in any of these forms, instead of a model and embeddings")
    parser.add_argument("--strict", action="store_true", help="an annotation that cannot be used is an error")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("embeddings", type=Path)


def _model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", required=required, help="checkpoint file, diffusers folder, or an encoder's folder")
    parser.add_argument("--comfyui", default="", metavar="FOLDER", help="load the checkpoint with this ComfyUI")
    parser.add_argument(
        "--device", default="", help="cuda, mps or cpu; default: the best available (ComfyUI chooses by itself)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="precision")


def _segmenting(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--embeddings", type=Path, required=required, help="the .safetensors file")
    parser.add_argument("--batch", type=_count, default=0, help="images per pass; 0 = automatic")
    parser.add_argument(
        "--refine", choices=REFINEMENTS, default="fast", help="how mask borders are aligned with the image's edges"
    )
    parser.add_argument(
        "--min-confidence", type=float, default=0.0, help="masks of images below this confidence are empty"
    )
    parser.add_argument("--seed", type=int, default=0)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f'"{text}" is not I/N; with eight shards, I/N runs from 0/8 to 7/8')
    return int(index), int(count)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'"{text}" is not a number from 0 on')
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number from 1 on')
    return int(text)


def _bar(total: int | None, what: str, unit: str = "image") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, mininterval=0.5)


def _load(options: argparse.Namespace) -> Any:
    return load_model(options.model, options.device, options.dtype, options.comfyui)


def _train(options: argparse.Namespace) -> None:
    if options.output.exists() and not options.overwrite:
        raise SlimeError(f"{options.output} exists already. Choose another name, or add --overwrite.")
    annotated = read_annotations(options.examples, options.parts)
    examples = read_examples(annotated, options.shots)
    _tell_skipped(options, annotated)
    backbone = _load(options)
    texts = {field.name for field in fields(TRAINERS[options.preset].settings) if field.type == "str"}
    pairs = (text.partition("=") for text in options.set)
    changes = {name: value if name in texts else _value(value) for name, _, value in pairs}
    settings = preset(options.preset, backbone.info, **changes)
    with _bar(None, "training", "step") as bar:

        def on_step(report: Any) -> None:
            if bar.desc != report.stage:
                bar.reset(report.steps)
                bar.set_description_str(report.stage, refresh=False)
            bar.update(report.step - bar.n)

        with torch.inference_mode():
            embeddings = train(backbone, examples, settings, on_step=on_step)
    save_embeddings(embeddings, options.output, options.overwrite)
    sys.stdout.write(f"{options.output}: {', '.join(embeddings.names)}, trained on {len(examples)} images\n")


def _tell_skipped(options: argparse.Namespace, annotated: AnnotatedSet) -> None:
    """Write a line about annotations that cannot be used; raise SlimeError with --strict."""
    text = said_of(annotated.skipped, most=10)
    if text and options.strict:
        raise SlimeError(text)
    if text:
        sys.stderr.write(f"slime: {text}\n")


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}  # as Python has them, and JSON in small letters
    try:
        return words[text] if text in words else json.loads(text)
    except json.JSONDecodeError:
        return text


def _segmenter(options: argparse.Namespace, embeddings: PartEmbeddings) -> Segmenter:
    return Segmenter(_load(options), embeddings, _settings(options))


def _settings(options: argparse.Namespace) -> SegmentSettings:
    return SegmentSettings(
        seed=options.seed, refine=options.refine, min_confidence=options.min_confidence, batch_size=options.batch
    )


def _segment(options: argparse.Namespace) -> None:
    if options.ray is not None:
        _segment_with_ray(options)
        return
    options.output = Path(options.output)
    if "jsonl" in options.format:
        raise SlimeError("Without --ray the records are in records.jsonl anyway; choose another --format.")
    embeddings = load_embeddings(options.embeddings)
    digest = fingerprint(str(options.embeddings))
    about = {
        "embeddings": digest,
        "model": fingerprint(options.model),
        "names": list(embeddings.names),
        "formats": list(options.format),
        "input": options.input,
        "settings": {name: getattr(options, name) for name in ("refine", "seed", "min_confidence", "dtype")},
    }
    version = f"slime-{digest[:12]}"
    names = list(source_names(options.input, options.output))
    run_log = RunLog(options.output, about, options.shard)
    parts = embeddings.names if "masks" in options.format else ()
    before = {name: file for kind, name, file in read_table(options.output) if kind == "image"}
    file_names = FileNames(names, {name: safe_path(name) for name in run_log.done} | before)
    write_table(options.output, changed_names(names, file_names, parts))
    outputs = [FORMATS[name](options.output, embeddings, version, file_names) for name in options.format]
    engine = Engine(_segmenter(options, embeddings))
    source: Iterable[SourceImage] = source_images(options.input, options.shard, options.limit, options.output)
    if Path(options.input).suffix.lower() not in STREAMED:
        source = list(source)
    with _bar(len(source) if isinstance(source, list) else None, "segmenting") as bar:
        segment_images(engine, source, outputs, run_log, options.workers, bar.update)
    for output in outputs:
        output.finish(run_log)
    _write_review(options, run_log, embeddings)
    manifest = run_log.close(versions())
    counts = manifest["counts"]
    sys.stdout.write(f"{options.output}: {counts['images']} images, {counts['errors']} errors (errors.jsonl)\n")


def _segment_with_ray(options: argparse.Namespace) -> None:
    from .ray_engine import segment_with_ray

    if options.format not in (["parquet"], ["jsonl"]) or options.limit or options.shard != (0, 1):
        raise SlimeError(
            "With --ray give --format parquet or jsonl, and neither --limit nor --shard: Ray distributes the images."
        )
    if options.order or options.review:
        raise SlimeError("With --ray there is neither --order nor --review: sort the table by its confidence.")
    segment_with_ray(
        options.input,
        options.output,
        (options.model, options.device, options.dtype, options.comfyui),
        load_embeddings(options.embeddings),
        _settings(options),
        kind=options.format[0],
        actors=options.actors,
        gpus=options.gpus,
        address=options.ray,
    )


def _write_review(options: argparse.Namespace, run_log: RunLog, embeddings: PartEmbeddings) -> None:
    if options.order:
        names = (
            record.name for record in sorted(run_log.records(), key=lambda record: (record.confidence, record.name))
        )
        write_whole(options.output / "order.txt", "".join(f"{name}\n" for name in names).encode())
    if options.review:
        records = least_confident(run_log.records(), options.review)
        wanted = {record.name for record in records}
        pixels = dict[str, np.ndarray]()
        for image in source_images(options.input, without=options.output):
            if image.name in wanted:
                try:
                    pixels[image.name] = decode(image.read())
                except (SlimeError, OSError) as error:
                    sys.stderr.write(f"slime: {image.name} is not in review.html: {error}\n")
        page = review_page(
            [record for record in records if record.name in pixels],
            pixels.__getitem__,
            embeddings.names,
            embeddings.palette,
        )
        write_whole(options.output / "review.html", page.encode())


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["slime"] = metadata.version("slime-segment-like-me")
    except metadata.PackageNotFoundError:
        found["slime"] = "unreleased"
    return found


def _evaluate(options: argparse.Namespace) -> None:
    if bool(options.labels) == bool(options.embeddings and options.model) or (
        options.labels and (options.embeddings or options.model)
    ):
        raise SlimeError("Give --labels alone, or both --model and --embeddings.")
    skipped = list[str]()
    if options.labels:
        truth = read_annotations(options.ground_truth)
        annotated = read_annotations(options.labels, truth.names, required=False)
        names, label_maps = truth.names, {image.name: image.labels for image in annotated.images}
        skipped = annotated.skipped
        counts_by_name = Counter(image.name for image in annotated.images)
        skipped += [f"{name} occurs {count} times" for name, count in counts_by_name.items() if count > 1]
        without = [image.name for image in truth.images if image.name not in label_maps]
        if len(without) == len(truth.images):
            there, here = annotated.images[0].name, without[0]
            raise SlimeError(
                f'The two sets have no image name in common (for example "{here}", and "{there}" in {options.labels}).'
            )
        if without:
            sys.stderr.write(f"slime: {len(without)} images ({without[0]} ...) have no labels, and count as empty.\n")
    else:
        embeddings = load_embeddings(options.embeddings)
        names, engine = embeddings.names, Engine(_segmenter(options, embeddings))
        truth = read_annotations(options.ground_truth, names, required=False)
    counts = EvaluationCounts(len(names) + 1)
    boundary = list[float]()
    with _bar(len(truth.images), "evaluating") as bar:
        for image in truth.images:
            try:
                labels = image.labels()
                if not options.labels:
                    prediction = engine.segment([engine.prepare(image.name, image.pixels())])[0]()[1]
                elif image.name in label_maps:
                    prediction = label_maps[image.name]()
                else:
                    prediction = np.zeros_like(labels)
                if prediction.shape != labels.shape:
                    sizes = f"{prediction.shape[1]} x {prediction.shape[0]}, not {labels.shape[1]} x {labels.shape[0]}"
                    raise SlimeError(f"{image.name}: the labels to evaluate are of {sizes} pixels.")
            except SlimeError as error:
                truth.skipped.append(str(error))
            else:
                counts.add(prediction, labels)
                boundary.append(boundary_f(prediction, labels, len(names) + 1))
            bar.update(1)
    truth.skipped.extend(line for line in skipped if line not in truth.skipped)
    _tell_skipped(options, truth)
    if not boundary:
        raise SlimeError("No image could be evaluated.")
    scores = counts.scores()
    figures = {
        "images": len(boundary),
        "part_miou": _figure(scores.part_miou),
        "miou": _figure(scores.miou),
        "pooled_part_miou": _figure(scores.pooled_part_miou),
        "boundary_f": _figure(float(mean_known(np.array(boundary)))),
        "iou": dict(zip(names, map(_figure, scores.per_class[1:]), strict=True)),
    }
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    sys.stdout.write(text + "\n")
    if options.json:
        write_whole(options.json, text.encode())


def _figure(value: float) -> float | None:
    """Return a rounded figure; None for a part that no image contains."""
    return None if np.isnan(value) else round(float(value), 4)


def _info(options: argparse.Namespace) -> None:
    sys.stdout.write(describe(load_embeddings(options.embeddings)) + "\n")
