"""``tgate generate``: pictures, or videos, into files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tgate_cli.command import (
    RUN_ADVICE,
    Show,
    asked_engine,
    bundle_asked,
    engine_advice,
    needs,
    print_json,
    print_lines,
)
from tgate_cli.values import MOST
from tgate_engine.atomic import write_atomically
from tgate_engine.errors import RequestError, shown
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.manifest_json import bundle_digest
from tgate_engine.plain_files import read_plain
from tgate_engine.report import Reporter

if TYPE_CHECKING:
    from tgate_engine.plan import Plan
    from tgate_runtime.control import Control
    from tgate_runtime.engines.protocol import Engine
    from tgate_runtime.parameters import Parameters
    from tgate_runtime.pipeline import Progress, Result
    from tgate_runtime.record import LoraRecord, Record

STDOUT = Path("-")
MOST_BYTES = 16 << 20
"""Of a file of prompts."""


def generate(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate generate``."""
    record, noted = (None, None) if args.source is None else _notes(args.source)
    texts = _prompts(args)
    is_named = args.bundle is not None
    if noted is not None and not is_named:
        raise RequestError(
            f"{args.source} was drawn by another program, whose model is no bundle: tgate generate BUNDLE --from "
            f"{args.source} names the one to draw with"
        )
    args.bundle = args.bundle if is_named else "mini"
    bundle = bundle_asked(args)
    manifest = bundle.manifest
    with needs("drawing", engine_advice(args)):
        from tgate_runtime import files
        from tgate_runtime.adapters import scales_of_adapters
        from tgate_runtime.control import check_controls, scales_of_controls
        from tgate_runtime.pipeline import Pipeline
        from tgate_runtime.record import loras_of
        from tgate_runtime.request import check_room, seeds_of
        from tgate_runtime.session import graphs_of

    # All that the arguments and the manifest tell, before anything is loaded or hashed.
    if record is not None and not is_named and record.bundle != bundle_digest(manifest):
        raise RequestError(
            f"{args.source} was drawn by another bundle than mini, of {shown(record.model)}: tgate generate --from "
            f"{args.source} BUNDLE names its directory"
        )
    request = _request(args, texts, record or noted, manifest)
    loras = scales_of_adapters(request["loras"], manifest)
    plan, shapes = _plan(args, record, manifest), manifest.shapes_of(request["size"])
    graphs_of(bundle, [plan], [shapes[0].size])
    _check_files(args, record, replaced=bool(texts))
    _check_source(args, request, manifest)
    given = _given(args, record)
    controls = _controls(args, record)
    if request["strength"] is None:  # which steps are left of a plan, the pipeline finds
        scales_of_controls(controls, plan, manifest)
    else:
        check_controls(controls, manifest)
    count = _check_numbers(args, request, given, plan, manifest)
    parts = list(_parts(request, given, args.num_images, count, most=shapes[-1].batch[1]))
    check_room(max(len(images) for images, _ in parts), shapes[0], manifest.frames)
    seeds = seeds_of(request["seed"], count)
    output = _Output(args, manifest, count, request["decoder"])
    if noted is not None:
        _tell_taken(args.source, noted, report)
    report.stage(f"loading {args.engine}")
    engine = asked_engine(args)
    if record is not None:
        named = loras_of(loras, manifest)
        _tell_differences(args.source, record, manifest, plan, engine, named, controls, given, report)
    report.stage(f"opening {args.bundle}")
    bundle = bundle.checked()
    results: list[Result] = []
    options: dict[str, Any] = {"plans": [plan], "sizes": [shapes[0].size], "on_build": report.progress}
    with Pipeline.open(bundle, engine=engine, **options) as pipe:
        report.stage("drawing")
        for images, part in parts:
            of = "" if len(images) == count else f", images {images.start + 1} to {images.stop} of {count}"
            on_step = partial(_on_step, args, report, shapes[0], f"steps{of}")
            own = seeds[images.start : images.stop]
            result = pipe(
                **part, seed=own, plan=plan, num_images=args.num_images, controls=controls or None, on_step=on_step
            )
            output.save(result, images)
            results.append(replace(result, images=[], videos=[]))  # they are written
    if args.save_latents is not None:
        files.save_array(np.concatenate([result.latents for result in results]), args.save_latents)
    if args.metadata and not output.holds_records:
        report.note(f"{output.suffix} holds no record of what it was drawn from; --json prints it")
    facts = {
        "outputs": [str(path) for path in output.paths],
        "seeds": seeds,
        "plan": plan.name,
        "size": shapes[0].size,
        "latents": None if args.save_latents is None else str(args.save_latents),
        "records": [record.to_json() for result in results for record in result.records],
    }

    def show() -> None:
        if request["seed"] is None:  # they were drawn, and are told even with --quiet
            print(f"seed {seeds[0]}" if count == 1 else f"seeds {seeds[0]} to {seeds[-1]}", file=sys.stderr)
        if args.json:
            print_json(facts)
        elif output.content is not None:
            sys.stdout.buffer.write(output.content)
        else:
            print_lines(output.paths)

    return show


class _Output:
    """Where results go: files that were named, the next free ones, or standard output."""

    def __init__(self, args: argparse.Namespace, manifest: Manifest, count: int, decoder: str | None) -> None:
        """``decoder``: what makes the pictures. Raises :class:`RequestError` where nothing can be written there."""
        from tgate_runtime import files
        from tgate_runtime.request import decoder_of

        self.paths: list[Path] = []
        self.content: bytes | None = None
        """What goes to standard output."""
        self._decoded = manifest.graph(decoder_of(decoder, manifest), args.size) is not None
        self._fps, self._metadata = manifest.fps, args.metadata
        video = manifest.frames > 1
        self._video = video
        usual = ".npy" if not self._decoded else ".mp4" if video else ".png"
        self._stem = Path(args.bundle).resolve().name
        self._to_stdout, self._is_named = args.output == STDOUT, args.output not in (None, STDOUT)
        path = args.output if self._is_named else Path(f"{self._stem}-0001{usual}")
        self._named = files.output_paths(path, count, decoded=self._decoded, video=video)
        self.suffix = path.suffix.lower()
        self.holds_records = files.holds_record(self.suffix)
        if self._to_stdout and count > 1:
            raise RequestError(f"--output - writes one result to standard output, asked for are {count}; name a file")
        if self._to_stdout and sys.stdout.isatty():
            raise RequestError("--output - writes bytes to standard output, which is a terminal; redirect it")

    def save(self, result: Result, images: range) -> None:
        """Write the results of a request, which are ``images`` of all."""
        from tgate_runtime import files

        contents = (self._bytes(result, i) for i in range(len(images)))
        if self._to_stdout:
            (self.content,) = contents
            return
        named = self._named[images.start : images.stop]
        with nullcontext(named) if self._is_named else files.new_files(self._stem, self.suffix, len(images)) as paths:
            for path, content in zip(paths, contents, strict=True):
                write_atomically(path, content)
        self.paths += paths

    def _bytes(self, result: Result, i: int) -> bytes:
        from tgate_runtime import files

        record = result.records[i] if self._metadata else None
        if not self._decoded:
            return files.array_bytes(result.latents[i : i + 1])
        if self._video:
            return files.video_bytes(result.videos[i], self.suffix, fps=self._fps, record=record)
        return files.picture_bytes(result.images[i], self.suffix, record)


# --- what is asked for --------------------------------------------------------------------------


def _prompts(args: argparse.Namespace) -> list[str]:
    """PROMPT, those of --prompt and those of a file, in this order."""
    texts = [*([] if args.prompt is None else [args.prompt]), *args.prompts]
    if args.prompts_file is not None:
        texts += prompts_of(args.prompts_file)
    if len(texts) > MOST:
        raise RequestError(f"got {len(texts)} prompts, at most {MOST} are taken at a time")
    return texts


def prompts_of(path: Path) -> list[str]:
    """The lines of a file that are neither empty nor begin with #; ``-`` is standard input."""
    if path == STDOUT:
        content = sys.stdin.buffer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RequestError(f"standard input holds more than {MOST_BYTES} bytes of prompts")
    else:
        content = read_plain(path, MOST_BYTES, RequestError)
    name = "standard input" if path == STDOUT else str(path)
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as that"
        ) from None
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise RequestError(f"{name} holds no prompts: one a line, and lines that begin with # are comments")
    return texts


def _notes(path: Path) -> tuple[Record | None, Parameters | None]:
    """What a picture was drawn from: our record, or else what another program noted."""
    with needs("reading a picture's record", RUN_ADVICE):
        from tgate_runtime import files
        from tgate_runtime.parameters import Parameters
    found = files.load_notes(path)
    return (None, found) if isinstance(found, Parameters) else (found, None)


def _request(
    args: argparse.Namespace, texts: Sequence[str], record: Record | Parameters | None, manifest: Manifest
) -> dict[str, Any]:
    """The arguments of a Pipeline that the record has, and in their place those of the command line."""
    from tgate_runtime.request import begins_from, takes_both

    request: dict[str, Any] = {"prompt": None, "negative_prompt": None, "seed": None, "size": None, "strength": None}
    request |= {"generator": "numpy", "guidance_scale": None, "loras": None, "decoder": None, "ip_adapter_scale": None}
    if record is not None:
        request |= record.request()
        request["prompt"] = None if record.prompt is None else [record.prompt]
    conditions = args.image is not None and not begins_from(manifest, args.image) and not takes_both(manifest)
    if conditions or args.prompt_embeds is not None:
        request |= {"prompt": None, "negative_prompt": None}
    asked = {name: getattr(args, name) for name in request if name not in ("prompt", "loras")}
    asked |= {"prompt": list(texts) or None, "loras": dict(args.loras) or None}
    return request | {name: value for name, value in asked.items() if value is not None}


def _check_files(args: argparse.Namespace, record: Record | None, *, replaced: bool) -> None:
    """Raises :class:`RequestError` where the record needs a file that is not named. ``replaced``: a prompt comes in
    place of what conditioned the record's image; one that it began from has none."""
    beside = {name for name in ("ip_adapter_image",) if getattr(args, name) is not None}
    named = {name for name in ("image", "mask", "initial_latents", "prompt_embeds") if getattr(args, name) is not None}
    for name, digest in ({} if record is None else record.given).items():
        replacement = args.seed is not None if name == "initial_latents" else replaced or named
        if record is not None and record.strength is not None and name in ("image", "mask"):
            replacement = False
        if name == "ip_adapter_image":  # no prompt comes in its place
            replacement = False
        if name not in named | beside and not replacement:
            raise RequestError(
                f"{args.source} was drawn from --{name.replace('_', '-')}, of which its record holds the SHA-256 alone "
                f"({digest[:16]}…); give the same file again"
            )


def _given(args: argparse.Namespace, record: Record | None) -> dict[str, Any]:
    """What the files of the command line hold, by the names of a Pipeline's arguments; of rows for several images, the
    record's alone. Raises :class:`RequestError` for a file that cannot be read."""
    from tgate_runtime import files
    from tgate_runtime.record import rows_with

    given: dict[str, Any] = {}
    if args.image is not None:
        given["image"] = files.load_picture(args.image)
    if args.mask is not None:
        given["mask"] = files.load_mask(args.mask)
    if args.ip_adapter_image is not None:
        given["ip_adapter_image"] = files.load_picture(args.ip_adapter_image)
    if args.initial_latents is not None:
        given["initial_latents"] = files.load_array(args.initial_latents)
    if args.prompt_embeds is not None:
        given["prompt_embeds"] = files.load_embeddings(args.prompt_embeds)
    for name, digest in ({} if record is None else record.given).items():
        if name == "initial_latents" and name in given:
            given[name] = rows_with(digest, {"": given[name]})[""]
        if name == "prompt_embeds" and name in given:
            given[name] = rows_with(digest, given[name])
    return given


def _controls(args: argparse.Namespace, record: Record | None) -> dict[str, Control]:
    """What is asked of ControlNets: the command line's, over what the record says of those whose pictures are given
    again. Raises :class:`RequestError` for a picture that cannot be read, and one of the record's that is not given."""
    from tgate_runtime import files
    from tgate_runtime.control import Control

    drawn = {} if record is None else record.controls
    pictures, scales, spans = dict(args.controls), dict(args.control_scale), dict(args.control_span)
    if missing := [name for name in drawn if name not in pictures]:
        raise RequestError(
            f"{args.source} was drawn with --control {shown(missing[0], 80)}, of whose picture its record holds the "
            f"SHA-256 alone ({drawn[missing[0]].sha256[:16]}…); give the same file again"
        )
    controls: dict[str, Control] = {}
    for name, path in pictures.items():
        own = drawn.get(name)
        start, end = spans.get(name, (0.0, 1.0) if own is None else (own.start, own.end))
        controls[name] = Control(
            image=files.load_picture(path),
            scale=scales.get(name, 1.0 if own is None else own.scale),
            start=start,
            end=end,
            until_gate=name in args.control_until_gate or (own is not None and own.until_gate),
        )
    return controls


def _check_source(args: argparse.Namespace, request: Mapping[str, Any], manifest: Manifest) -> None:
    """What conditions the images, before a file of it is read. Raises :class:`RequestError`."""
    from tgate_runtime.reference import reference_scale_of
    from tgate_runtime.request import check_prompts, check_source, strength_of

    texts = {"prompt": request["prompt"], "negative_prompt": request["negative_prompt"]}
    check_source(manifest, **texts, image=args.image, prompt_embeds=args.prompt_embeds)
    strength_of(request["strength"], manifest, args.image, args.mask)
    reference_scale_of(request["ip_adapter_scale"], manifest, args.ip_adapter_image)
    if request["prompt"] is not None:
        check_prompts(request["prompt"], request["negative_prompt"])


def _check_numbers(
    args: argparse.Namespace, request: Mapping[str, Any], given: Mapping[str, Any], plan: Plan, manifest: Manifest
) -> int:
    """How many images are asked for. Raises :class:`RequestError` for numbers that they cannot be drawn with, and for
    files that cannot be written beside them."""
    from tgate_runtime import files
    from tgate_runtime.conditioning import check_embeddings, rows_of
    from tgate_runtime.generators import check_generator
    from tgate_runtime.preview import check_previews
    from tgate_runtime.request import check_latents, scales_of

    shape, embeds = manifest.shapes_of(request["size"])[0], given.get("prompt_embeds", {})
    if "prompt_embeds" in given:
        check_embeddings(embeds, manifest, shape, pictured="image" in given)
    count: int = (len(request["prompt"] or ()) or rows_of(embeds, manifest) or 1) * args.num_images
    scales_of(request["guidance_scale"], 1, plan, manifest)
    check_generator(request["generator"], shape.latents)
    if "initial_latents" in given:
        check_latents(given["initial_latents"], (count, *shape.latents))
    if args.save_latents is not None:
        files.check_place(args.save_latents)
    if args.preview is not None:
        files.output_paths(args.preview, 1)
        check_previews(manifest)
    return count


def _parts(
    request: Mapping[str, Any], given: Mapping[str, Any], each: int, count: int, *, most: int
) -> Iterator[tuple[range, dict[str, Any]]]:
    """Which images, and the arguments that draw them, for as many prompts as fill a call of ``most`` images: what is
    drawn is written before the next begins. ``each``: images of a prompt."""
    common = {name: value for name, value in request.items() if name not in ("prompt", "seed")}
    prompts = request["prompt"]
    if prompts is None:
        yield range(count), {**common, **given}
        return
    step = max(1, most // each)
    for first in range(0, len(prompts), step):
        images = range(first * each, min((first + step) * each, count))
        part = {**common, **given, "prompt": prompts[first : first + step]}
        if "initial_latents" in given and count > len(images):
            part["initial_latents"] = given["initial_latents"][images.start : images.stop]
        yield images, part


# --- drawn again --------------------------------------------------------------------------------


def _plan(args: argparse.Namespace, record: Record | None, manifest: Manifest) -> Plan:
    """The plan that is meant: --plan, the record's, or the default. Raises :class:`RequestError` where the bundle has
    not the record's."""
    from tgate_runtime.record import plan_for
    from tgate_runtime.session import plan_of

    if record is None:
        return plan_of(manifest, args.plan or "default")
    return plan_for(record, manifest) if args.plan is None else plan_of(manifest, args.plan)


def _tell_taken(source: Path, noted: Parameters, report: Reporter) -> None:
    """Say, in one line, what is taken of another program's notes and what is not."""
    taken = noted.request()
    left = ", ".join(f"{shown(name, 40)}: {shown(value, 40)}" for name, value in noted.left.items())
    report.warn(
        f"{source} was drawn by another program, and this is another picture of its "
        f"{', '.join(name.replace('_', ' ') for name in taken)}; the seed draws other noise; not taken: {left}"
    )


def _tell_differences(
    source: Path,
    record: Record,
    manifest: Manifest,
    plan: Plan,
    engine: Engine,
    loras: Mapping[str, LoraRecord],
    controls: Mapping[str, Control],
    given: Mapping[str, Any],
    report: Reporter,
) -> None:
    """Warn, in one line, of what is not as it was."""
    from tgate_engine import __version__
    from tgate_runtime.record import EngineRecord, PlanRecord, controls_of, digests_of_given

    (digests,) = digests_of_given(1, **given)
    now = replace(
        record,
        plan=PlanRecord.of(plan),
        model=manifest.model,
        bundle=bundle_digest(manifest),
        engine=EngineRecord.of(engine),
        loras=loras,
        controls=controls_of(controls),
        version=__version__,
        given=digests,
    )
    if differences := record.differences(now):
        report.warn(f"this is not how {source} was drawn: {'; '.join(differences)}")


# --- while it is drawn --------------------------------------------------------------------------


def _on_step(args: argparse.Namespace, report: Reporter, shape: Shape, text: str, progress: Progress) -> None:
    """Tells a step; at every --preview-every writes its images side by side, as large as they will be."""
    report.progress(progress.done, progress.total, text)
    if args.preview is None or progress.done % args.preview_every:
        return
    from PIL import Image

    from tgate_runtime import files

    pictures = progress.preview()
    strip = Image.new("RGB", (shape.width * len(pictures), shape.height))
    for i, picture in enumerate(pictures):
        strip.paste(picture.resize((shape.width, shape.height), Image.Resampling.BICUBIC), (shape.width * i, 0))
    files.save_picture(strip, args.preview)
