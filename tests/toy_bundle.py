"""Writes a bundle of :mod:`tests.toy_model`: real graphs, real carries, a real tokenizer, in milliseconds.

It stands in for an export where a test is about the contract or run time alone.
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
from tests.toy_model import BLOCKS, FEATURES, LATENTS, LENGTH, TIME_IDS, WIDTH, WORDS
from tgate_engine import plan as names
from tgate_engine.bundle import digests_of, staging
from tgate_engine.manifest import (
    MANIFEST_FILE,
    Carry,
    Conditioning,
    Golden,
    GraphSpec,
    Macs,
    Manifest,
    TensorSpec,
    Tokenizer,
    _content_digest,
    dump_manifest,
)
from tgate_engine.plan import Plan, build_plan
from tgate_engine.rows import GUIDANCE, INPUT_SCALE, OUTPUTS, STEP_ROW, TIMESTEP
from tgate_engine.rows import LATENTS as LATENT_COLUMNS
from tgate_engine.sampler import Sampler, SamplerStep
from tgate_engine.schedule import Schedule

ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
WEIGHTS = "weights.safetensors"
MACS = {
    names.FULL: Macs(paper=2000, all=2600),
    names.REUSE_SELF: Macs(paper=1600, all=1700),
    names.REUSE_CROSS: Macs(paper=800, all=1100),
    names.REUSE_BOTH: Macs(paper=600, all=600),
    names.UNGUIDED: Macs(paper=1000, all=1300),
}


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What a toy bundle is like. ``carry_dtype``: of carries; the arithmetic stays float32."""

    guided: bool = True
    batch: tuple[int, int] = (1, 4)
    zero_negative: bool = True
    carry_dtype: str = "float32"
    guidance_scale: float = 3.0
    schedules: Mapping[str, Schedule] = field(
        default_factory=lambda: {"default": Schedule(steps=8, gate=5, self_interval=2)}
    )


def sampler(steps: int, *, lead_in: int = 0, lag: int = 3, seed: int = 0) -> Sampler:
    """A stable linear sampler that reads ``lag`` pairs back."""
    rng = np.random.default_rng(seed)
    calls = []
    for i in range(steps + lead_in):
        reach = min(lag, i)
        past = rng.uniform(-0.1, 0.1, (2, 3)) * (np.arange(3) < reach)
        calls.append(
            SamplerStep(
                timestep=float(999 - 30 * i) + 0.5,
                input_scale=float(rng.uniform(0.5, 1.0)),
                latents=(0.8, *map(float, past[0])),
                outputs=(-0.2, *map(float, past[1])),
            )
        )
    return Sampler(
        name="toy", steps=steps, initial_scale=1.25, calls=tuple(calls), lead_in=lead_in, prediction_type="epsilon"
    )


def build(path: Path, toy: Toy | None = None, *, goldens: bool = True) -> Path:
    """Write the bundle at ``path``, which must not exist. Returns ``path``."""
    toy = toy or Toy()
    with staging(path) as stage:
        offsets = _save_weights(stage / WEIGHTS)
        graphs = {name: _denoiser(stage, offsets, name, toy) for name in _graph_names(toy)}
        graphs["text"] = _text(stage, offsets)
        graphs["decoder"] = _decoder(stage, offsets)
        (stage / "tokenizer").mkdir()
        pads = (0, 2)
        for i in range(2):
            _tokenizer().save(str(stage / "tokenizer" / f"{i}.json"))
        manifest = Manifest(
            model="toy",
            family="toy",
            licence="Apache-2.0",
            dtype="float32",
            height=LATENTS[1],
            width=LATENTS[2],
            latents=LATENTS,
            batch=toy.batch,
            guidance="classifier-free" if toy.guided else "none",
            frames=1,
            fps=0,
            image="",
            guidance_scale=toy.guidance_scale,
            zero_negative=toy.zero_negative,
            weights=WEIGHTS,
            text="text",
            decoder="decoder",
            graphs=graphs,
            carries=_carries(toy),
            conditioning=(
                Conditioning(name="text", source="text"),
                Conditioning(name="pooled", source="text"),
                Conditioning(name="time_ids", source="constant", value=TIME_IDS),
            ),
            tokenizers=tuple(
                Tokenizer(file=f"tokenizer/{i}.json", input=f"ids.{i}", length=LENGTH, pad_id=pads[i]) for i in range(2)
            ),
            plans={name: make_plan(name, s, toy, graphs) for name, s in toy.schedules.items()},
            goldens={},
            files={},
            scheduler={},
        )
        found = _goldens(stage, manifest) if goldens else {}
        manifest = replace(manifest, goldens=found, files=digests_of(stage))
        (stage / MANIFEST_FILE).write_text(dump_manifest(manifest), encoding="utf-8")
    return path


def make_plan(name: str, schedule: Schedule, toy: Toy, graphs: Mapping[str, GraphSpec]) -> Plan:
    return build_plan(
        name,
        schedule=schedule,
        sampler=sampler(schedule.steps, lead_in=schedule.lead_in),
        guidance_scale=toy.guidance_scale,
        graphs=graphs,
        carries=_carries(toy),
    )


def edit_manifest(bundle: Path, edit: Any) -> None:
    """Change a bundle's manifest as a mischievous hand would, with a digest that fits again.

    ``edit`` takes the manifest's JSON object and changes it in place.
    """
    file = bundle / MANIFEST_FILE
    data = json.loads(file.read_text(encoding="utf-8"))
    del data["digest"]
    edit(data)
    data["digest"] = _content_digest(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def random_conditioning(batch: int, *, guided: bool = True, seed: int = 3) -> dict[str, NDArray[np.float32]]:
    """``<name>.<half>`` to [batch, ...], as the denoising graphs take it."""
    rng = np.random.default_rng(seed)
    found: dict[str, NDArray[np.float32]] = {}
    for half in ("negative", "positive") if guided else ("positive",):
        found[f"text.{half}"] = rng.standard_normal((batch, LENGTH, WIDTH)).astype(np.float32)
        found[f"pooled.{half}"] = rng.standard_normal((batch, WIDTH)).astype(np.float32)
        found[f"time_ids.{half}"] = np.tile(np.array(TIME_IDS, np.float32), (batch, 1))
    return found


# --- graphs -------------------------------------------------------------------------------------


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

    def columns(self, start: int, stop: int) -> str:
        """Columns of ``step`` [B, 11], as [B, stop - start]."""
        axis = self.constant([1])
        return self.add("Slice", "step", self.constant([start]), self.constant([stop]), axis)

    def save(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], macs: Macs) -> GraphSpec:
        def info(spec: TensorSpec) -> Any:
            return helper.make_tensor_value_info(
                spec.name, ONNX_TYPE[spec.dtype], [str(d) if isinstance(d, str) else d for d in spec.shape]
            )

        graph = helper.make_graph(
            self.nodes, path.stem, [*map(info, inputs)], [*map(info, outputs)], [*self.initializers.values()]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        path.write_bytes(model.SerializeToString())
        return GraphSpec(file=path.name, inputs=tuple(inputs), outputs=tuple(outputs), macs=macs)


def _graph_names(toy: Toy) -> tuple[str, ...]:
    every = (names.FULL, names.REUSE_SELF, names.REUSE_CROSS, names.REUSE_BOTH)
    return (*every, names.UNGUIDED) if toy.guided else every


def _carries(toy: Toy) -> tuple[Carry, ...]:
    both = "2*batch" if toy.guided else "batch"
    found = []
    for block in range(BLOCKS):
        for name, attention, mean in (
            (f"self.{block}", "self", False),
            (f"self.{block}.mean", "self", True),
            (f"cross.{block}", "cross", True),
        ):
            shape = ("batch" if mean else both, FEATURES)
            module = f"blocks.{block}.{attention}"
            found.append(
                Carry(name=name, module=module, attention=attention, mean=mean, dtype=toy.carry_dtype, shape=shape)
            )
    return tuple(found)


def _denoiser(stage: Path, offsets: Mapping[str, Any], name: str, toy: Toy) -> GraphSpec:
    g = _Graph(offsets)
    both = toy.guided and name in (names.FULL, names.REUSE_SELF)
    reuses_cross = name in (names.REUSE_CROSS, names.REUSE_BOTH)
    reuses_self = name in (names.REUSE_SELF, names.REUSE_BOTH)
    half = "negative" if toy.guided and reuses_cross else "positive"
    halves = ("negative", "positive") if both else (half,)
    specs = {carry.name: TensorSpec(name=carry.name, dtype=carry.dtype, shape=carry.shape) for carry in _carries(toy)}
    image = ("batch", *LATENTS)
    inputs = [TensorSpec(name="latents", dtype="float32", shape=image)]
    for lag in (1, 2, 3):
        inputs.append(TensorSpec(name=f"latents.{lag}", dtype="float32", shape=image))
        inputs.append(TensorSpec(name=f"output.{lag}", dtype="float32", shape=image))
    inputs.append(TensorSpec(name="step", dtype="float32", shape=("batch", STEP_ROW)))
    outputs = [TensorSpec(name=n, dtype="float32", shape=image) for n in ("next_latents", "output")]

    def condition(tensor: str, *shape: int) -> str:
        inputs.extend(TensorSpec(name=f"{tensor}.{h}", dtype="float32", shape=("batch", *shape)) for h in halves)
        return g.add("Concat", *[f"{tensor}.{h}" for h in halves], axis=0)

    def read(carry: str) -> str:
        inputs.append(specs[carry])
        return g.add("Cast", carry, to=TensorProto.FLOAT)

    def write(value: str, carry: str, *, mean: bool) -> None:
        outputs.append(specs[carry])
        if mean and both:
            first, second = f"{carry}.n", f"{carry}.p"
            g.nodes.append(helper.make_node("Split", [value], [first, second], axis=0, num_outputs=2))
            value = g.add("Mul", g.add("Add", first, second), g.constant(0.5, np.float32))
        g.add("Cast", value, output=carry, to=ONNX_TYPE[toy.carry_dtype])

    rows = g.add("Flatten", g.add("Mul", "latents", _cube(g, INPUT_SCALE)), axis=1)
    time = g.add("Mul", g.columns(TIMESTEP, TIMESTEP + 1), g.constant(1e-3, np.float32))
    hidden = g.add("Add", rows, time)
    if both:
        hidden = g.add("Concat", hidden, hidden, axis=0)
    text = ""
    if not reuses_cross:
        text = g.add("ReduceMean", condition("text", LENGTH, WIDTH), g.constant([1]), keepdims=0)
    for block in range(BLOCKS):
        if reuses_self:
            self_ = read(f"self.{block}.mean" if reuses_cross else f"self.{block}")
        else:
            self_ = g.add("Tanh", g.add("MatMul", hidden, g.weight(f"self.{block}")))
            if name == names.FULL:
                write(self_, f"self.{block}", mean=False)
            if name in (names.FULL, names.REUSE_CROSS):
                write(self_, f"self.{block}.mean", mean=True)
        hidden = g.add("Add", hidden, self_)
        if reuses_cross:
            cross = read(f"cross.{block}")
        else:
            words = g.add("MatMul", text, g.weight(f"text.{block}"))
            cross = g.add("Tanh", g.add("Add", g.add("MatMul", hidden, g.weight(f"cross.{block}")), words))
            if name == names.FULL:
                write(cross, f"cross.{block}", mean=True)
        hidden = g.add("Add", hidden, cross)
    out = g.add("MatMul", hidden, g.weight("out"))
    out = g.add("Add", out, g.add("MatMul", condition("pooled", WIDTH), g.weight("pooled")))
    out = g.add("Add", out, g.add("MatMul", condition("time_ids", len(TIME_IDS)), g.weight("time")))
    if both:
        g.nodes.append(helper.make_node("Split", [out], ["n", "p"], axis=0, num_outputs=2))
        weight = g.columns(GUIDANCE, GUIDANCE + 1)
        out = g.add("Add", "n", g.add("Mul", weight, g.add("Sub", "p", "n")))
    g.add("Reshape", out, g.constant([-1, *LATENTS]), output="output")
    terms = []
    for lag in range(4):
        suffix = f".{lag}" if lag else ""
        terms.append(g.add("Mul", f"latents{suffix}", _cube(g, LATENT_COLUMNS.start + lag)))
        terms.append(g.add("Mul", f"output{suffix}", _cube(g, OUTPUTS.start + lag)))
    g.add("Sum", *terms, output="next_latents")
    return g.save(stage / f"{name}.onnx", inputs, outputs, MACS[name])


def _cube(g: _Graph, column: int) -> str:
    """One column of ``step`` as [B, 1, 1, 1]."""
    return g.add("Reshape", g.columns(column, column + 1), g.constant([-1, 1, 1, 1]))


def _text(stage: Path, offsets: Mapping[str, Any]) -> GraphSpec:
    g = _Graph(offsets)
    inputs = [TensorSpec(name=f"ids.{i}", dtype="int64", shape=(1, LENGTH)) for i in range(2)]
    outputs = [
        TensorSpec(name="text", dtype="float32", shape=(1, LENGTH, WIDTH)),
        TensorSpec(name="pooled", dtype="float32", shape=(1, WIDTH)),
    ]
    g.add("Gather", g.weight("embed.0"), "ids.0", output="text")
    g.add("ReduceMean", g.add("Gather", g.weight("embed.1"), "ids.1"), g.constant([1]), output="pooled", keepdims=0)
    return g.save(stage / "text.onnx", inputs, outputs, Macs(paper=0, all=0))


def _decoder(stage: Path, offsets: Mapping[str, Any]) -> GraphSpec:
    g = _Graph(offsets)
    inputs = [TensorSpec(name="latents", dtype="float32", shape=(1, *LATENTS))]
    outputs = [TensorSpec(name="image", dtype="uint8", shape=(1, LATENTS[1], LATENTS[2], 3))]
    colours = g.add("MatMul", g.add("Transpose", "latents", perm=[0, 2, 3, 1]), g.weight("image"))
    scaled = g.add("Add", g.add("Mul", colours, g.constant(60, np.float32)), g.constant(127.5, np.float32))
    clipped = g.add("Clip", scaled, g.constant(0, np.float32), g.constant(255, np.float32))
    g.add("Cast", clipped, output="image", to=TensorProto.UINT8)
    return g.save(stage / "decoder.onnx", inputs, outputs, Macs(paper=96, all=96))


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


def _tokenizer() -> Any:
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    found.normalizer = tokenizers.normalizers.Lowercase()
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
    )
    return found


# --- goldens ------------------------------------------------------------------------------------


def _goldens(stage: Path, manifest: Manifest) -> dict[str, Golden]:
    """The reference's trajectory of the default plan, and its picture."""
    plan = manifest.plan("default")
    schedule = plan.schedule
    noise = np.random.default_rng(11).standard_normal((1, *LATENTS)).astype(np.float32)
    conditioning = random_conditioning(1, guided=manifest.guided)
    weights = toy_model.weights()
    states = toy_model.trajectory(
        weights,
        plan.sampler,
        noise,
        conditioning,
        manifest.guidance_scale,
        guided=manifest.guided,
        m=schedule.gate,
        k=schedule.self_interval,
        warm_up=schedule.warm_up,
        f=schedule.fidelity_interval,
    )
    tensors: dict[str, NDArray[Any]] = {
        "latents.0": noise,
        "guidance_scale": np.array([manifest.guidance_scale], np.float32),
    }
    tensors |= {f"conditioning.{name}": value for name, value in conditioning.items()}
    tensors |= {f"latents.{i}": state.astype(np.float32) for i, state in enumerate(states) if i}
    image = np.clip(states[-1].transpose(0, 2, 3, 1) @ weights["image"] * 60 + 127.5, 0, 255).astype(np.uint8)
    (stage / "golden").mkdir()
    save_file(tensors, stage / "golden" / "trajectory.safetensors")
    save_file(
        {"input.latents": states[-1].astype(np.float32), "output.image": image}, stage / "golden" / "image.safetensors"
    )
    tolerance = 1e-5 if _carries_are_float32(manifest) else 5e-2
    return {
        "trajectory": Golden(file="golden/trajectory.safetensors", tolerance=tolerance, plan=plan),
        "image": Golden(file="golden/image.safetensors", tolerance=0.01, graph="decoder"),
    }


def _carries_are_float32(manifest: Manifest) -> bool:
    return all(carry.dtype == "float32" for carry in manifest.carries)
