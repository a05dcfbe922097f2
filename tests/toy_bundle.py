"""Writes a bundle of :mod:`tests.toy_model`: real graphs, real carries, a real tokenizer, in milliseconds.

It stands in for an export where a test is about the contract, run time or the command line alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from tests import toy_model
from tests.toy_model import BLOCKS, FEATURES, LATENTS, LENGTH, WIDTH, WORDS
from tgate_engine.atomic import staging
from tgate_engine.bundle import digests_of
from tgate_engine.control import picture_name, residual_name, scale_name
from tgate_engine.dtypes import DTYPES
from tgate_engine.graph import (
    BATCH,
    CONTROL,
    DECODE,
    DENOISE,
    ENCODE,
    IMAGE,
    PREVIEW,
    REFERENCE,
    TEXT,
    Dim,
    GraphSpec,
    Macs,
    Role,
    TensorSpec,
)
from tgate_engine.manifest import MANIFEST_FILE, Conditioning, Golden, Manifest, Shape, Tokenizer
from tgate_engine.manifest_json import content_digest, dump_manifest
from tgate_engine.plan import Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.sampler import HISTORY, Fact, Sampler, SamplerStep
from tgate_engine.sampler_tables import dump_tables
from tgate_engine.starts import STARTS, Start, start_rows
from tgate_engine.step import (
    GUIDANCE,
    INPUT_SCALE,
    LATENTS_COLUMNS,
    NOISE,
    NOISE_COLUMN,
    OUTPUT_COLUMNS,
    STEP,
    STEP_OUTPUTS,
    STEP_ROW,
    TIMESTEP,
    half,
    past,
)
from tgate_export.methods.base import FULL, UNGUIDED, Settings
from tgate_export.methods.tgate import REUSE_BOTH, REUSE_CROSS, REUSE_SELF, Tgate
from tgate_export.plans import make_plans

WEIGHTS = "weights.safetensors"
SAMPLERS = "samplers.safetensors"
TABLE_STEPS = range(1, 13)
"""Steps of which the bundle has a table of the toy's sampler."""
REFERENCES = (Conditioning(name="seen", source="reference"), Conditioning(name="much", source="scale", negative="same"))
"""What conditions a toy that refers to a picture: WIDTH numbers of it, and how much of them is added to the text."""
SEEN = Conditioning(name="pooled", source="image", negative="same")
"""What conditions a toy beside its text, of a picture."""
AROUND = Conditioning(name="masked", source="masked", negative="same")
"""What conditions a toy that inpaints: a mask, and latents of what is left."""
MACS = {
    FULL: Macs(paper=2000, all=2600),
    REUSE_SELF: Macs(paper=1600, all=1700),
    REUSE_CROSS: Macs(paper=800, all=1100),
    REUSE_BOTH: Macs(paper=600, all=600),
    UNGUIDED: Macs(paper=1000, all=1300),
}


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What a toy bundle is like.

    ``batches``: ranges of images in a call, each with graphs of its own. ``sizes``: (width, height) of each, 16 pixels,
    the default first. ``carry_dtype``: of carries; the arithmetic stays float32. ``settings``: of each plan by its
    name; their baselines are stored beside them. ``pictured``: conditioned by a picture instead of a text. ``sees``: by
    both, ``pooled`` being the picture's, without noise. ``begins``:
    with an encoder, and starts for its samplers, of which those of 4 steps take no mask.
    ``small``: with a small decoder, whose pictures have half the contrast. ``refers``: with what makes a picture beside
    the prompt a part of the text; it has no goldens. ``inpaints``: it is told of a mask, and of the latents around it;
    its encoder leaves out what a mask covers, and it has no goldens. ``controls``: the names of its ControlNets.
    """

    guided: bool = True
    pictured: bool = False
    sees: bool = False
    begins: bool = False
    small: bool = False
    refers: bool = False
    inpaints: bool = False
    controls: Sequence[str] = ()
    batches: Sequence[tuple[int, int]] = ((1, 4),)
    sizes: Sequence[tuple[int, int]] = ((4, 4),)
    zero_negative: bool = True
    carry_dtype: str = "float32"
    guidance_scale: float = 3.0
    settings: Mapping[str, Settings] = field(
        default_factory=lambda: {"default": Settings(steps=8, gate=5, self_interval=2)}
    )

    @property
    def scale(self) -> float:
        """``guidance_scale``, or 1 where there is no guidance to scale."""
        return self.guidance_scale if self.guided else 1.0


def sampler(steps: int, *, lead_in: int = 0, lag: int = 3, seed: int = 0, noise: float = 0.0) -> Sampler:
    """A stable linear sampler that reads ``lag`` pairs back and adds ``noise`` times its own noise in all steps but the
    last."""
    rng = np.random.default_rng(seed)
    calls = []
    for i in range(steps + lead_in):
        reach = min(lag, i)
        earlier = rng.uniform(-0.1, 0.1, (2, 3)) * (np.arange(3) < reach)
        calls.append(
            SamplerStep(
                timestep=float(999 - 30 * i) + 0.5,
                input_scale=float(rng.uniform(0.5, 1.0)),
                latents=(0.8, *map(float, earlier[0])),
                outputs=(-0.2, *map(float, earlier[1])),
                noise=noise if i < steps + lead_in - 1 else 0.0,
            )
        )
    return Sampler(
        name="toy", steps=steps, initial_scale=1.25, calls=tuple(calls), lead_in=lead_in, prediction_type="epsilon"
    )


def starts(whole: Sampler) -> tuple[Start, ...]:
    """Where a toy sampler begins: its first three calls look back no further than there is something."""
    count = len(whole.calls)
    levels = tuple((0.9 - 0.05 * (count - i), 0.1 * (count - i)) for i in range(count))
    found = []
    for begin in range(count):
        calls = []
        for own, call in enumerate(whole.calls[begin : begin + HISTORY]):
            there = np.arange(HISTORY + 1) <= own
            latents, outputs = (tuple(np.where(there, each, 0.0).tolist()) for each in (call.latents, call.outputs))
            calls.append(replace(call, latents=latents, outputs=outputs))
        found.append(Start(begin=begin, levels=levels[begin:], calls=tuple(calls), free=whole.steps != 4))
    return tuple(found)


def build(path: Path, toy: Toy | None = None, *, goldens: bool = True) -> Path:
    """Write the bundle at ``path``, which must not exist. Returns ``path``."""
    toy = toy or Toy()
    with staging(path) as stage:
        offsets = _save_weights(stage / WEIGHTS)
        shapes = tuple(_shape(stage, offsets, toy, size, batch) for size in toy.sizes for batch in toy.batches)
        source, negative = ("image", "zeros") if toy.pictured else ("text", "own")
        tables = [sampler(steps) for steps in TABLE_STEPS]
        rows = {f"toy.{each.steps}{STARTS}": start_rows(starts(each)) for each in tables if toy.begins}
        (stage / SAMPLERS).write_bytes(dump_tables(tables, rows))
        manifest = Manifest(
            model="toy",
            family="toy",
            licence="Apache-2.0",
            dtype="float32",
            frames=1,
            fps=0,
            guidance="classifier-free" if toy.guided else "none",
            guidance_scale=toy.scale,
            guidance_rescale=0.0,
            clip_skip=0,
            zero_negative=toy.zero_negative,
            weights=WEIGHTS,
            samplers=SAMPLERS,
            shapes=shapes,
            carries=carries(toy),
            conditioning=(
                Conditioning(name="text", source=source, negative=negative),
                SEEN if toy.sees else Conditioning(name="pooled", source=source, negative=negative),
                Conditioning(name="time_ids", source="constant"),
                *(REFERENCES if toy.refers else ()),
                *((AROUND,) if toy.inpaints else ()),
            ),
            tokenizers=() if toy.pictured else _save_tokenizers(stage),
            plans=_plans(toy, shapes[0].graphs),
            goldens={},
            files={},
            scheduler={},
        )
        recorded = _goldens(stage, manifest, toy) if goldens and not toy.refers and not toy.inpaints else {}
        manifest = replace(manifest, goldens=recorded, files=digests_of(stage))
        (stage / MANIFEST_FILE).write_text(dump_manifest(manifest), encoding="utf-8")
    return path


def make_plan(
    name: str,
    settings: Settings,
    toy: Toy,
    graphs: Mapping[str, GraphSpec],
    *,
    lead_in: int = 0,
    own_sampler: Sampler | None = None,
) -> Plan:
    """The plan of TGATE with those settings, alone; ``own_sampler`` in place of :func:`sampler`."""
    return build_plan(
        name,
        Tgate().program(settings, lead_in),
        sampler=own_sampler or sampler(settings.steps, lead_in=lead_in),
        guidance_scale=toy.scale,
        graphs=graphs,
        carries=carries(toy),
        settings=Tgate().facts(settings),
    )


def _plans(toy: Toy, graphs: Mapping[str, GraphSpec]) -> dict[str, Plan]:
    plans: dict[str, Plan] = {}
    for name, settings in toy.settings.items():
        plans |= make_plans(
            name,
            Tgate(),
            settings,
            sampler=sampler(settings.steps),
            guidance_scale=toy.scale,
            guided=toy.guided,
            graphs=graphs,
            carries=carries(toy),
            existing=plans,
        )
    return plans


def edit_manifest(bundle: Path, edit: Any) -> None:
    """Change a bundle's manifest as a mischievous hand would, with a digest that fits again.

    ``edit`` takes the manifest's JSON object and changes it in place.
    """
    file = bundle / MANIFEST_FILE
    data = json.loads(file.read_text(encoding="utf-8"))
    del data["digest"]
    edit(data)
    data["digest"] = content_digest(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def random_conditioning(
    batch: int, *, guided: bool = True, seed: int = 3, size: tuple[int, int] = (4, 4)
) -> dict[str, NDArray[np.float32]]:
    """``<name>.<half>`` to [batch, ...], as the denoising graphs of a size take it."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for which in ("negative", "positive") if guided else ("positive",):
        tensors[f"text.{which}"] = rng.standard_normal((batch, LENGTH, WIDTH)).astype(np.float32)
        tensors[f"pooled.{which}"] = rng.standard_normal((batch, WIDTH)).astype(np.float32)
        tensors[f"time_ids.{which}"] = np.tile(np.array(toy_model.time_ids(*size), np.float32), (batch, 1))
    return tensors


# --- graphs -------------------------------------------------------------------------------------


def carries(toy: Toy) -> dict[str, dict[str, Fact]]:
    """Facts of each carry, by name. Without guidance there is no mean: carries are as they were before the gate."""
    facts: dict[str, dict[str, Fact]] = {}
    for block in range(BLOCKS):
        names = {f"self.{block}": "all", f"cross.{block}": "mean" if toy.guided else "all"}
        if toy.guided:
            names[f"self.{block}.mean"] = "mean"
        for name, of in names.items():
            attention = name.partition(".")[0]
            facts[name] = {"keeps": f"{attention}-attention", "of": of, "module": f"blocks.{block}.{attention}"}
    return facts


def _shape(stage: Path, offsets: Mapping[str, Any], toy: Toy, size: tuple[int, int], batch: tuple[int, int]) -> Shape:
    of_size = "" if size == toy.sizes[0] else "-{}x{}".format(*size)
    of_batch = f"-batch-{batch[0]}-{batch[1]}" if len(toy.batches) > 1 else ""
    latents = (LATENTS[0], size[1], size[0])
    names = (FULL, REUSE_SELF, REUSE_CROSS, REUSE_BOTH, *((UNGUIDED,) if toy.guided else ()))
    graphs = {
        name: _denoiser(stage / f"{name}{of_size}{of_batch}.onnx", offsets, name, toy, latents, batch) for name in names
    }
    for net in toy.controls:
        for halves in dict.fromkeys(_halves(toy, name) for name in names):
            name = f"control-{net}-{'-'.join(halves)}"
            graphs[name] = _control(stage / f"{name}{of_size}{of_batch}.onnx", offsets, net, halves, latents, batch)
    if toy.pictured or toy.sees:
        graphs["image"] = _image(stage / f"image{of_size}.onnx", offsets, latents, beside=toy.sees)
    if not toy.pictured:
        graphs["text"] = _text(stage / "text.onnx", offsets, beside=toy.sees)
    graphs["decoder"] = _decoder(stage / f"decoder{of_size}.onnx", offsets, latents)
    if toy.small:
        graphs["small"] = _decoder(stage / f"small{of_size}.onnx", offsets, latents, PREVIEW)
    if toy.begins:
        graphs["encoder"] = _encoder(stage / f"encoder{of_size}.onnx", offsets, latents, masked=toy.inpaints)
    if toy.refers:
        graphs["reference"] = _reference(stage / "reference.onnx", offsets, toy)
    return Shape(
        width=size[0],
        height=size[1],
        batch=batch,
        latents=latents,
        constants={"time_ids": toy_model.time_ids(*size)},
        graphs=graphs,
    )


def _halves(toy: Toy, name: str) -> tuple[str, ...]:
    if toy.guided and name in (FULL, REUSE_SELF):
        return ("negative", "positive")
    return ("negative" if toy.guided and name in (REUSE_CROSS, REUSE_BOTH) else "positive",)


class _Graph:
    """Collects nodes; ``add`` returns the name of the node's output."""

    def __init__(self, offsets: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        self.offsets = offsets
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return name

    def weight(self, name: str) -> str:
        """A weight as external data in the bundle's one weights file."""
        offset, shape = self.offsets[name]
        tensor = TensorProto(name=f"w.{name}", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        size = 4 * int(np.prod(shape))
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[tensor.name] = tensor
        return tensor.name

    def reshape(self, value: str, *shape: int, output: str = "") -> str:
        return self.add("Reshape", value, self.constant(shape), output=output)

    def interleave(self, values: Sequence[str], *shape: int) -> str:
        """Halves of [B, shape] each as [halves * B, shape], an image's halves next to each other."""
        if len(values) == 1:
            return values[0]
        pairs = self.add("Concat", *[self.reshape(value, -1, 1, *shape) for value in values], axis=1)
        return self.reshape(pairs, -1, *shape)

    def split(self, value: str) -> tuple[str, str]:
        """[2B, 32], interleaved, as the two halves, [B, 32] each."""
        pairs = self.reshape(value, -1, 2, FEATURES)
        first, second = (self.add("Gather", pairs, self.constant(which), axis=1) for which in (0, 1))
        return first, second

    def column(self, index: int, *shape: int) -> str:
        """One column of ``step`` [B, 12], as [B, 1] or of the shape that is named."""
        ends = self.constant([index]), self.constant([index + 1])
        column = self.add("Slice", STEP, *ends, self.constant([1]))
        return self.reshape(column, *shape) if shape else column

    def save(
        self,
        path: Path,
        role: Role,
        batch: tuple[int, int],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        macs: Macs,
    ) -> GraphSpec:
        def info(spec: TensorSpec) -> Any:
            return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype].onnx, list(spec.shape))

        graph = helper.make_graph(
            self.nodes, path.stem, [*map(info, inputs)], [*map(info, outputs)], [*self.initializers.values()]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        path.write_bytes(model.SerializeToString())
        return GraphSpec(
            file=path.name, role=role, batch=batch, inputs=tuple(inputs), outputs=tuple(outputs), macs=macs
        )


def _denoiser(
    path: Path, offsets: Mapping[str, Any], name: str, toy: Toy, latents: tuple[int, ...], batch: tuple[int, int]
) -> GraphSpec:
    g = _Graph(offsets)
    halves = _halves(toy, name)
    both = len(halves) == 2
    reuses_cross = name in (REUSE_CROSS, REUSE_BOTH)
    reuses_self = name in (REUSE_SELF, REUSE_BOTH)
    mean = ".mean" if toy.guided else ""
    image: tuple[Dim, ...] = (BATCH, *latents)

    def float32(tensor: str, *shape: Dim) -> TensorSpec:
        return TensorSpec(name=tensor, dtype="float32", shape=shape)

    names = [past(which, lag) for lag in range(1, 4) for which in ("latents", "output")]
    inputs = [float32(tensor, *image) for tensor in ("latents", *names, NOISE)]
    inputs.append(float32(STEP, BATCH, STEP_ROW))
    outputs = [float32(tensor, *image) for tensor in STEP_OUTPUTS]

    def condition(tensor: str, *shape: int) -> str:
        own = [half(tensor, which) for which in halves]
        inputs.extend(float32(value, BATCH, *shape) for value in own)
        return g.interleave(own, *shape)

    def carry(tensor: str) -> TensorSpec:
        pairs = toy.guided and tensor.startswith("self") and not tensor.endswith(".mean")
        shape: tuple[Dim, ...] = (BATCH, 2, FEATURES) if pairs else (BATCH, FEATURES)
        return TensorSpec(name=tensor, dtype=toy.carry_dtype, shape=shape)

    def read(tensor: str) -> str:
        inputs.append(carry(tensor))
        return g.reshape(g.add("Cast", tensor, to=TensorProto.FLOAT), -1, FEATURES)

    def write(value: str, tensor: str) -> None:
        spec = carry(tensor)
        outputs.append(spec)
        if both and len(spec.shape) == 2:
            value = g.add("Mul", g.add("Add", *g.split(value)), g.constant(0.5, np.float32))
        rows = g.reshape(value, -1, *(dim for dim in spec.shape[1:] if isinstance(dim, int)))
        g.add("Cast", rows, output=tensor, to=DTYPES[toy.carry_dtype].onnx)

    rows = g.reshape(g.add("Mul", "latents", g.column(INPUT_SCALE, -1, 1, 1, 1)), -1, FEATURES)
    hidden = g.add("Add", rows, g.add("Mul", g.column(TIMESTEP), g.constant(1e-3, np.float32)))
    if both:
        hidden = g.interleave([hidden, hidden], FEATURES)

    def residual(index: int) -> list[str]:
        """What each ControlNet adds, times its scale."""
        added = []
        for net in toy.controls:
            column = g.interleave([g.reshape(scale_name(net), -1, 1)] * len(halves), 1)
            added.append(g.add("Mul", condition(residual_name(net, index), FEATURES), column))
        return added

    inputs.extend(float32(scale_name(net), BATCH) for net in toy.controls)
    for added in residual(0):
        hidden = g.add("Add", hidden, added)
    if toy.inpaints:
        around = condition("masked", latents[0] + 1, *latents[1:])
        ends = [g.constant([end]) for end in (0, 1, latents[0] + 1, 1)]
        mask = g.add("Slice", around, ends[0], ends[1], ends[3])
        left = g.add("Slice", around, ends[1], ends[2], ends[3])
        hidden = g.add("Add", hidden, g.reshape(g.add("Sub", left, mask), -1, FEATURES))
    text = ""
    if not reuses_cross:
        # The mean of the tokens as a product: ONNX Runtime sums a middle axis in another order where there is one row.
        tokens = g.reshape(condition("text", LENGTH, WIDTH), -1, LENGTH * WIDTH)
        mean_of_tokens = np.tile(np.eye(WIDTH) / LENGTH, (LENGTH, 1))
        text = g.add("MatMul", tokens, g.constant(mean_of_tokens, np.float32))
        if toy.refers:
            text = g.add("Add", text, g.add("Mul", condition("seen", WIDTH), condition("much", 1)))
    for block in range(BLOCKS):
        if reuses_self:
            self_ = read(f"self.{block}{mean}" if reuses_cross else f"self.{block}")
        else:
            self_ = g.add("Tanh", g.add("MatMul", hidden, g.weight(f"self.{block}")))
            kept = {FULL: dict.fromkeys(["", mean]), REUSE_CROSS: (mean,)}.get(name, ())
            for suffix in kept:
                write(self_, f"self.{block}{suffix}")
        hidden = g.add("Add", hidden, self_)
        if reuses_cross:
            cross = read(f"cross.{block}")
        else:
            words = g.add("MatMul", text, g.weight(f"text.{block}"))
            cross = g.add("Tanh", g.add("Add", g.add("MatMul", hidden, g.weight(f"cross.{block}")), words))
            if name == FULL:
                write(cross, f"cross.{block}")
        hidden = g.add("Add", hidden, cross)
    for added in residual(1):
        hidden = g.add("Add", hidden, added)
    out = g.add("MatMul", hidden, g.weight("out"))
    out = g.add("Add", out, g.add("MatMul", condition("pooled", WIDTH), g.weight("pooled")))
    out = g.add("Add", out, g.add("MatMul", condition("time_ids", len(toy_model.TIME_IDS)), g.weight("time")))
    if both:
        negative, positive = g.split(out)
        difference = g.add("Sub", positive, negative)
        out = g.add("Add", negative, g.add("Mul", g.column(GUIDANCE), difference))
    g.reshape(out, -1, *latents, output="output")
    terms = [g.add("Mul", NOISE, g.column(NOISE_COLUMN, -1, 1, 1, 1))]
    for lag in range(4):
        terms.append(g.add("Mul", past("latents", lag), g.column(LATENTS_COLUMNS.start + lag, -1, 1, 1, 1)))
        terms.append(g.add("Mul", past("output", lag), g.column(OUTPUT_COLUMNS.start + lag, -1, 1, 1, 1)))
    g.add("Sum", *terms, output="next_latents")
    return g.save(path, DENOISE, batch, inputs, outputs, MACS[name])


def _control(
    path: Path,
    offsets: Mapping[str, Any],
    net: str,
    halves: Sequence[str],
    latents: tuple[int, ...],
    batch: tuple[int, int],
) -> GraphSpec:
    """The first two colours of a picture from 0 to 1, plus a thousandth of the timestep, the latents and the half's
    pooled text, repeated; and half of that, negated."""
    g = _Graph(offsets)
    height, width = latents[1:]

    def rows(tensor: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=tensor, dtype="float32", shape=(BATCH, *shape))

    inputs = [rows("latents", *latents), rows(STEP, STEP_ROW)]
    inputs += [rows(half("pooled", which), WIDTH) for which in halves]
    inputs.append(TensorSpec(name=picture_name(net), dtype="uint8", shape=(BATCH, height, width, 3)))
    planes = g.add("Transpose", g.add("Cast", picture_name(net), to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    colours = g.add("Slice", planes, g.constant([0]), g.constant([2]), g.constant([1]))
    seen = g.reshape(g.add("Div", colours, g.constant(255, np.float32)), -1, FEATURES)
    seen = g.add("Add", seen, g.add("Mul", g.column(TIMESTEP), g.constant(1e-3, np.float32)))
    seen = g.add("Add", seen, g.reshape("latents", -1, FEATURES))
    outputs = []
    for which in halves:
        pooled = g.add("Concat", *[half("pooled", which)] * (FEATURES // WIDTH), axis=1)
        outputs += [rows(half(residual_name(net, index), which), FEATURES) for index in (0, 1)]
        g.add("Add", seen, pooled, output=half(residual_name(net, 0), which))
        both = half(residual_name(net, 0), which), g.constant(-0.5, np.float32)
        g.add("Mul", *both, output=half(residual_name(net, 1), which))
    return g.save(path, CONTROL, batch, inputs, outputs, Macs(paper=100, all=100))


def _text(path: Path, offsets: Mapping[str, Any], *, beside: bool) -> GraphSpec:
    """``beside``: a picture, which makes what is pooled; the text's is of no use then."""
    g, pooled = _Graph(offsets), "spare" if beside else "pooled"
    inputs = [TensorSpec(name=f"ids.{i}", dtype="int64", shape=(1, LENGTH)) for i in range(2)]
    outputs = [
        TensorSpec(name="text", dtype="float32", shape=(1, LENGTH, WIDTH)),
        TensorSpec(name=pooled, dtype="float32", shape=(1, WIDTH)),
    ]
    g.add("Gather", g.weight("embed.0"), "ids.0", output="text")
    g.add("ReduceMean", g.add("Gather", g.weight("embed.1"), "ids.1"), g.constant([1]), output=pooled, keepdims=0)
    return g.save(path, TEXT, (1, 1), inputs, outputs, Macs(paper=0, all=0))


def _image(path: Path, offsets: Mapping[str, Any], latents: tuple[int, ...], *, beside: bool) -> GraphSpec:
    """Of the numbers of a picture, from 0 to 1, and a tenth of the noise, 3 * 16 one after the other: the first 32 as
    the text, the last 4 pooled. ``beside`` a text, these alone, and no noise."""
    g = _Graph(offsets)
    height, width = latents[1:]
    inputs = [
        TensorSpec(name="picture", dtype="uint8", shape=(1, height, width, 3)),
        TensorSpec(name="noise", dtype="float32", shape=(1, 3, height, width)),
    ]
    outputs = [
        TensorSpec(name="text", dtype="float32", shape=(1, LENGTH, WIDTH)),
        TensorSpec(name="pooled", dtype="float32", shape=(1, WIDTH)),
    ]
    planes = g.add("Transpose", g.add("Cast", "picture", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    numbers = g.add("Div", planes, g.constant(255, np.float32))
    ends = {"text": (0, LENGTH * WIDTH), "pooled": (3 * 16 - WIDTH, 3 * 16)}
    if beside:
        del inputs[1], outputs[0], ends["text"]
    else:
        numbers = g.add("Add", numbers, g.add("Mul", "noise", g.constant(0.1, np.float32)))
    numbers = g.reshape(numbers, 1, -1)
    for name, (start, stop) in ends.items():
        own = g.add("Slice", numbers, g.constant([start]), g.constant([stop]), g.constant([1]))
        g.reshape(own, 1, *((LENGTH,) if name == "text" else ()), WIDTH, output=name)
    return g.save(path, IMAGE, (1, 1), inputs, outputs, Macs(paper=0, all=0))


def _decoder(path: Path, offsets: Mapping[str, Any], latents: tuple[int, ...], role: Role = DECODE) -> GraphSpec:
    g = _Graph(offsets)
    contrast = 60 if role == DECODE else 30
    inputs = [TensorSpec(name="latents", dtype="float32", shape=(1, *latents))]
    outputs = [TensorSpec(name="image", dtype="uint8", shape=(1, *latents[1:], 3))]
    colours = g.add("MatMul", g.add("Transpose", "latents", perm=[0, 2, 3, 1]), g.weight("image"))
    scaled = g.add("Add", g.add("Mul", colours, g.constant(contrast, np.float32)), g.constant(127.5, np.float32))
    clipped = g.add("Clip", scaled, g.constant(0, np.float32), g.constant(255, np.float32))
    g.add("Cast", clipped, output="image", to=TensorProto.UINT8)
    return g.save(path, role, (1, 1), inputs, outputs, Macs(paper=96, all=96))


def _encoder(path: Path, offsets: Mapping[str, Any], latents: tuple[int, ...], *, masked: bool) -> GraphSpec:
    """The mean is a picture's first colour from 0 to 1 in every channel, the deviation a tenth of it; what a mask
    covers is 0."""
    g = _Graph(offsets)
    inputs = [TensorSpec(name="picture", dtype="uint8", shape=(1, *latents[1:], 3))]
    outputs = [TensorSpec(name=name, dtype="float32", shape=(1, *latents)) for name in ("latents", "deviation")]
    planes = g.add("Transpose", g.add("Cast", "picture", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    first = g.add("Slice", planes, g.constant([0]), g.constant([1]), g.constant([1]))
    scaled = g.add("Div", first, g.constant(255, np.float32))
    if masked:
        inputs.append(TensorSpec(name="mask", dtype="uint8", shape=(1, *latents[1:])))
        left = g.add("Cast", g.add("Equal", "mask", g.constant(0, np.uint8)), to=TensorProto.FLOAT)
        scaled = g.add("Mul", scaled, g.reshape(left, 1, 1, *latents[1:]))
    g.add("Concat", *[scaled] * latents[0], output="latents", axis=1)
    g.add("Mul", "latents", g.constant(0.1, np.float32), output="deviation")
    return g.save(path, ENCODE, (1, 1), inputs, outputs, Macs(paper=0, all=0))


def _reference(path: Path, offsets: Mapping[str, Any], toy: Toy) -> GraphSpec:
    """The first numbers of a picture of 4 by 4, from 0 to 1; without one, all are a quarter."""
    g = _Graph(offsets)
    inputs = [TensorSpec(name="picture", dtype="uint8", shape=(1, 4, 4, 3))]
    halves = ("negative", "positive") if toy.guided else ("positive",)
    outputs = [TensorSpec(name=half("seen", which), dtype="float32", shape=(1, WIDTH)) for which in halves]
    colours = g.add("Cast", "picture", to=TensorProto.FLOAT)
    numbers = g.reshape(g.add("Div", colours, g.constant(255, np.float32)), 1, -1)
    ends = (g.constant([end]) for end in (0, WIDTH, 1))
    g.add("Slice", numbers, *ends, output="seen.positive")
    if toy.guided:
        nothing = g.add("Mul", "seen.positive", g.constant(0, np.float32))
        g.add("Add", nothing, g.constant(0.25, np.float32), output="seen.negative")
    return g.save(path, REFERENCE, (1, 1), inputs, outputs, Macs(paper=0, all=0))


def _save_weights(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Writes the weights, under their initializers' names; where each one's bytes begin in the file, and its shape."""
    save_file({f"w.{name}": values for name, values in toy_model.weights().items()}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {
        name.removeprefix("w."): (8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _save_tokenizers(stage: Path) -> tuple[Tokenizer, ...]:
    """Two, which differ in what they fill up with."""
    (stage / "tokenizer").mkdir()
    for i in range(2):
        _tokenizer().save(str(stage / "tokenizer" / f"{i}.json"))
    return tuple(
        Tokenizer(file=f"tokenizer/{i}.json", input=f"ids.{i}", length=LENGTH, pad_id=pad)
        for i, pad in enumerate((0, 2))
    )


def _tokenizer() -> Any:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
    )
    return tokenizer


# --- goldens ------------------------------------------------------------------------------------


def _goldens(stage: Path, manifest: Manifest, toy: Toy) -> dict[str, Golden]:
    """The reference's trajectory of the default plan, and its picture, for one image of each size."""
    plan, settings = manifest.plan("default"), toy.settings["default"]
    weights = toy_model.weights()
    (stage / "golden").mkdir()
    recorded: dict[str, Golden] = {}
    for number, size in enumerate(toy.sizes):
        label = "{}x{}".format(*size)
        suffix = f"-{label}" if number else ""
        shape = (1, *manifest.shapes_of(label)[0].latents)
        noise = np.random.default_rng((11, number) if number else 11).standard_normal(shape).astype(np.float32)
        conditioning = random_conditioning(1, guided=manifest.guided, size=size)
        states = toy_model.trajectory(
            weights,
            plan.sampler,
            noise,
            conditioning,
            manifest.guidance_scale,
            guided=manifest.guided,
            m=settings.gate,
            k=settings.self_interval,
            warm_up=settings.warm_up,
            f=settings.fidelity_interval,
        )
        tensors: dict[str, NDArray[Any]] = {
            "latents.0": noise,
            "guidance_scale": np.array([manifest.guidance_scale], np.float32),
        }
        tensors |= {f"conditioning.{name}": value for name, value in conditioning.items()}
        tensors |= {f"latents.{i}": state.astype(np.float32) for i, state in enumerate(states) if i}
        save_file(tensors, stage / "golden" / f"trajectory{suffix}.safetensors")
        final = states[-1]
        image = np.clip(final.transpose(0, 2, 3, 1) @ weights["image"] * 60 + 127.5, 0, 255).astype(np.uint8)
        save_file(
            {"input.latents": final.astype(np.float32), "output.image": image},
            stage / "golden" / f"image{suffix}.safetensors",
        )
        recorded[f"trajectory{suffix}"] = Golden(
            file=f"golden/trajectory{suffix}.safetensors",
            size=label,
            tolerance=1e-5 if toy.carry_dtype == "float32" else 5e-2,
            plan=plan,
        )
        recorded[f"image{suffix}"] = Golden(
            file=f"golden/image{suffix}.safetensors", size=label, tolerance=0.01, graph="decoder"
        )
    return recorded
