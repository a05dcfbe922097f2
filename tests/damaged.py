"""Bundles that are damaged or lie: one list, which every host walks and refuses.

Each damages a copy of the toy bundle (:mod:`tests.toy_bundle`, as it is by default). A manifest that is changed is
signed again, so that its digest helps nobody.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.hostile import Place, Raw, put, sign
from tests.toy_bundle import WEIGHTS, edit_manifest
from tgate_engine.errors import BundleError, PlanError, TgateError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.sampler import MOST_CALLS, MOST_LEAD_IN, MOST_STEPS

Harm = Callable[[Path], object]
"""Damages the bundle of that directory."""

Seen = Literal["opening", "graphs", "tokenizers"]
"""What a host was doing when it saw the damage: opening the bundle, reading its graphs, or its tokenizers."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """``harm`` does it, and ``says`` is a part of the line that every host refuses the bundle with; ``error`` is
    Python's class of it."""

    harm: Harm
    says: str
    seen: Seen = "opening"
    error: type[TgateError] = BundleError


# --- ways to damage a bundle --------------------------------------------------------------------


def manifest(edit: Callable[[dict[str, Any]], object]) -> Harm:
    """The manifest's object changed in place, and signed."""
    return lambda bundle: edit_manifest(bundle, edit)


def text(content: bytes) -> Harm:
    """Another manifest altogether."""
    return lambda bundle: (bundle / MANIFEST_FILE).write_bytes(content)


def spelt(value: str, *place: str | int) -> Harm:
    """JSON text put into a place of the manifest, as Python would not write it."""

    def harm(bundle: Path) -> None:
        data = json.loads((bundle / MANIFEST_FILE).read_bytes())
        del data["digest"]
        where: Place = place
        (bundle / MANIFEST_FILE).write_text(sign(put(data, where, Raw(value))), encoding="utf-8")

    return harm


def unsigned(edit: Callable[[dict[str, Any]], object]) -> Harm:
    """The manifest's object changed, with the digest that it had."""

    def harm(bundle: Path) -> None:
        data = json.loads((bundle / MANIFEST_FILE).read_bytes())
        edit(data)
        (bundle / MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")

    return harm


def file(name: str, change: Callable[[Path], object]) -> Harm:
    """A file changed, or something else in its place, and the manifest as it was."""
    return lambda bundle: change(bundle / name)


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else by the name of a file."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def listed(name: str, change: Callable[[bytes], bytes]) -> Harm:
    """A file with other content, which the manifest lists as if it had always been there."""

    def harm(bundle: Path) -> None:
        content = change((bundle / name).read_bytes())
        (bundle / name).write_bytes(content)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        edit_manifest(bundle, lambda data: data["files"].update({name: entry}))

    return harm


def graph(edit: Callable[[Any], object]) -> Harm:
    """A denoising graph rewritten, by a change of the ONNX model in place."""

    def change(content: bytes) -> bytes:
        model = onnx.ModelProto.FromString(content)
        edit(model)
        written: bytes = model.SerializeToString()
        return written

    return listed("full.onnx", change)


def header(edit: Callable[[dict[str, Any]], object]) -> Harm:
    """The weights' header rewritten; what comes after it stays."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        data = json.loads(content[8 : 8 + length])
        edit(data)
        head = json.dumps(data, separators=(",", ":")).encode()
        return _weights(head.ljust(length), content[8 + length :])

    return listed(WEIGHTS, change)


def _weights(head: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + rest


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Harm:
    """A tokenizer's JSON changed in place."""

    def change(content: bytes) -> bytes:
        data = json.loads(content)
        edit(data)
        return json.dumps(data).encode()

    return listed("tokenizer/0.json", change)


def _link(bundle: Path, name: str) -> None:
    """What ``name`` was, outside the bundle, and a link to it."""
    elsewhere = bundle.parent / f"{bundle.name}-elsewhere"
    shutil.move(bundle / name, elsewhere)
    (bundle / name).symlink_to(elsewhere)


def _shape(data: dict[str, Any]) -> Any:
    return data["shapes"][0]


def _graphs(data: dict[str, Any]) -> Any:
    return _shape(data)["graphs"]


def _full(data: dict[str, Any]) -> Any:
    return _graphs(data)["full"]


def _plan(data: dict[str, Any]) -> Any:
    return data["plans"]["default"]


def _step(data: dict[str, Any], index: int) -> Any:
    return _plan(data)["steps"][index]


def _weight(model: Any, key: str) -> Any:
    """An entry of the first weight that lies outside the graph's file."""
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    return next(entry for entry in tensor.external_data if entry.key == key)


def _elsewhere(key: str, value: str) -> Harm:
    return graph(lambda model: setattr(_weight(model, key), "value", value))


def _loop(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def _node(operator: str, domain: str = "") -> Harm:
    made = helper.make_node(operator, ["latents"], ["more"], domain=domain)
    return graph(lambda model: model.graph.node.append(made))


# --- the list -----------------------------------------------------------------------------------

FILES: dict[str, Damage] = {
    "no manifest": Damage(harm=file(MANIFEST_FILE, Path.unlink), says="it has no manifest.json"),
    "a manifest that is a directory": Damage(
        harm=file(MANIFEST_FILE, instead(Path.mkdir)), says="manifest.json cannot be read as a plain file"
    ),
    "a manifest that is a pipe": Damage(
        harm=file(MANIFEST_FILE, instead(os.mkfifo)), says="manifest.json cannot be read as a plain file"
    ),
    "a manifest that is a link": Damage(
        harm=lambda bundle: _link(bundle, MANIFEST_FILE), says="manifest.json cannot be read as a plain file"
    ),
    "a manifest beyond all bounds": Damage(
        harm=file(MANIFEST_FILE, lambda path: os.truncate(path, 2**40)), says="it holds more than 33554432 bytes"
    ),
    "a manifest that is cut short": Damage(
        harm=file(MANIFEST_FILE, lambda path: os.truncate(path, 1000)), says="manifest.json is not JSON"
    ),
    "a graph that is missing": Damage(
        harm=file("full.onnx", Path.unlink), says="full.onnx is missing or not a plain file"
    ),
    "weights that are missing": Damage(
        harm=file(WEIGHTS, Path.unlink), says="weights.safetensors is missing or not a plain file"
    ),
    "a tokenizer that is missing": Damage(
        harm=file("tokenizer/0.json", Path.unlink), says="tokenizer/0.json is missing or not a plain file"
    ),
    "a golden that is missing": Damage(
        harm=file("golden/image.safetensors", Path.unlink), says="golden/image.safetensors is missing or not a plain"
    ),
    "a directory that is missing": Damage(
        harm=lambda bundle: shutil.rmtree(bundle / "tokenizer"), says="tokenizer/0.json is missing or not a plain file"
    ),
    "a file that is too short": Damage(
        harm=file("text.onnx", lambda path: os.truncate(path, 10)), says="text.onnx holds 10 bytes, the manifest says"
    ),
    "a file that is too long": Damage(
        harm=file("text.onnx", lambda path: path.write_bytes(path.read_bytes() + b"x")), says="text.onnx holds"
    ),
    "a file of nothing": Damage(
        harm=file(WEIGHTS, lambda path: os.truncate(path, 0)), says="weights.safetensors holds 0 bytes"
    ),
    "one bit of a graph": Damage(harm=file("full.onnx", flipped), says="full.onnx has SHA-256"),
    "one bit of the weights": Damage(harm=file(WEIGHTS, flipped), says="weights.safetensors has SHA-256"),
    "one bit of a golden": Damage(
        harm=file("golden/trajectory.safetensors", flipped), says="golden/trajectory.safetensors has SHA-256"
    ),
    "a graph that is a link": Damage(
        harm=lambda bundle: _link(bundle, "full.onnx"), says="full.onnx is missing or not a plain file"
    ),
    "a directory that is a link": Damage(
        harm=lambda bundle: _link(bundle, "tokenizer"), says="tokenizer/0.json is missing or not a plain file"
    ),
    "a link to itself": Damage(
        harm=file("full.onnx", instead(lambda path: path.symlink_to(path))), says="full.onnx is missing or not a plain"
    ),
    "a link to a device": Damage(
        harm=file("full.onnx", instead(lambda path: path.symlink_to("/dev/zero"))),
        says="full.onnx is missing or not a plain",
    ),
    "a pipe that nobody writes to": Damage(
        harm=file("full.onnx", instead(os.mkfifo)), says="full.onnx is missing or not a plain file"
    ),
    "a directory in place of a file": Damage(
        harm=file(WEIGHTS, instead(Path.mkdir)), says="weights.safetensors is missing or not a plain file"
    ),
}
"""What lies in the directory."""

TEXTS: dict[str, Damage] = {
    "nothing": Damage(harm=text(b""), says="manifest.json is not JSON"),
    "no JSON": Damage(harm=text(b"model: toy"), says="manifest.json is not JSON"),
    "a byte order mark": Damage(harm=text(b"\xef\xbb\xbf{}"), says="manifest.json is not JSON"),
    "UTF-16": Damage(harm=text("{}".encode("utf-16-le")), says="manifest.json is not JSON"),
    "bytes that are no text": Damage(harm=text(b'{"model": "\xff\xfe"}'), says="manifest.json is not JSON"),
    "a NUL after the end": Damage(harm=text(b"{}\x00"), says="manifest.json is not JSON"),
    "a list": Damage(harm=text(b"[]"), says="manifest.json holds list, not an object"),
    "a number": Damage(harm=text(b"3"), says="manifest.json holds int, not an object"),
    "an object of nothing": Damage(harm=text(b"{}"), says="has no schema_version: this is not a tgate bundle"),
    "no schema version": Damage(harm=manifest(lambda d: d.pop("schema_version")), says="this is not a tgate bundle"),
    "a schema version that is a flag": Damage(
        harm=manifest(lambda d: d.update(schema_version=True)), says="this is not a tgate bundle"
    ),
    "an older schema": Damage(
        harm=manifest(lambda d: d.update(schema_version=2)), says="the bundle has schema version 2, this"
    ),
    "a newer schema": Damage(
        harm=manifest(lambda d: d.update(schema_version=4)), says="the bundle has schema version 4, this"
    ),
    "no digest": Damage(harm=unsigned(lambda d: d.pop("digest")), says="does not match its own digest"),
    "a digest of something else": Damage(
        harm=unsigned(lambda d: d.update(digest="0" * 64)), says="does not match its own digest"
    ),
    "a digest that is no text": Damage(
        harm=unsigned(lambda d: d.update(digest=None)), says="does not match its own digest"
    ),
    "an edit by hand": Damage(harm=unsigned(lambda d: d.update(model="other")), says="does not match its own digest"),
    "a key that is there twice": Damage(harm=spelt('{"a": 1, "a": 2}', "tools"), says="has the key 'a' twice"),
    "NaN": Damage(harm=spelt("NaN", "guidance_scale"), says="manifest.json is not JSON"),
    "infinity": Damage(harm=spelt("-Infinity", "scheduler"), says="manifest.json is not JSON"),
    "a number beyond all numbers": Damage(harm=spelt("1e999", "guidance_scale"), says="1e999 is beyond every number"),
    "a number of 5000 digits": Damage(
        harm=spelt("1" + "0" * 5000, "clip_skip"), says="… is no whole number of 64 bits"
    ),
    "a number of 64 bits and one": Damage(
        harm=spelt(str(2**63), "clip_skip"), says="9223372036854775808 is no whole number of 64 bits"
    ),
    "half a surrogate pair": Damage(harm=spelt('"\\ud800"', "model"), says="manifest.json is not JSON"),
    "half a surrogate pair in a key": Damage(harm=spelt('{"\\udc00": "x"}', "tools"), says="manifest.json is not JSON"),
    "brackets in brackets": Damage(harm=text(b"[" * 1_000_000), says="it is nested more than 100 deep"),
    "a hundred brackets": Damage(
        harm=spelt("[" * 101 + "]" * 101, "scheduler"), says="it is nested more than 100 deep"
    ),
}
"""What the manifest is as a text."""


def _field(says: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    return Damage(harm=manifest(edit), says=says)


FIELDS: dict[str, Damage] = {
    "a field that is missing": _field("manifest.json: 'family' is missing", lambda d: d.pop("family")),
    "a field that nobody knows": _field("manifest.json: 'magic' is not known here", lambda d: d.update(magic=1)),
    "a field of a shape that nobody knows": _field(
        "manifest.json.shapes[0]: 'depth' is not known here", lambda d: _shape(d).update(depth=1)
    ),
    "a field of a graph that nobody knows": _field(
        "manifest.json.shapes[0].graphs.full: 'code' is not known here", lambda d: _full(d).update(code="x")
    ),
    "a field of a file that nobody knows": _field(
        "'mode' is not known here", lambda d: d["files"]["full.onnx"].update(mode=0o755)
    ),
    "a field of a step that nobody knows": _field(
        "manifest.json.plans.default.steps[3]: 'seed' is not known here", lambda d: _step(d, 3).update(seed=1)
    ),
    "a field of a sampler that nobody knows": _field(
        "plans.default.sampler: 'order' is not known here", lambda d: _plan(d)["sampler"].update(order=2)
    ),
    "a number for a text": _field("manifest.json.model: expected str, got 3", lambda d: d.update(model=3)),
    "a text for a number": _field(
        "manifest.json.shapes[0].height: expected int, got '4'", lambda d: _shape(d).update(height="4")
    ),
    "a flag for a number": _field("manifest.json.frames: expected int, got", lambda d: d.update(frames=True)),
    "a number for a flag": _field("manifest.json.zero_negative: expected bool", lambda d: d.update(zero_negative=1)),
    "a fraction for a whole number": _field("manifest.json.clip_skip: expected int", lambda d: d.update(clip_skip=1.0)),
    "a list for an object": _field("manifest.json.plans: expected dict", lambda d: d.update(plans=[])),
    "an object for a list": _field("manifest.json.shapes: expected list", lambda d: d.update(shapes={})),
    "a text beyond its bound": _field(
        "manifest.json.licence: expected at most 4096 characters, got 5000", lambda d: d.update(licence="x" * 5000)
    ),
    "no frames": _field("manifest.json.frames: expected at least 1, got 0", lambda d: d.update(frames=0)),
    "frames without end": _field("manifest.json.frames: expected at most 65536", lambda d: d.update(frames=2**40)),
    "a guidance of nobody": _field("expected one of classifier-free, embedded, none", lambda d: d.update(guidance="x")),
    "guidance of a scale of 1": _field("guidance_scale: a bundle with guidance", lambda d: d.update(guidance_scale=1)),
    "no guidance, and a scale": _field("guidance_scale: a bundle with guidance", lambda d: d.update(guidance="none")),
    "a guidance below 0": _field("guidance_scale: expected 0", lambda d: d.update(guidance_scale=-2.0)),
    "a guidance beyond float32": _field("guidance_scale: expected a finite", lambda d: d.update(guidance_scale=1e39)),
    "a rescale beyond 1": _field("guidance_rescale: expected 0", lambda d: d.update(guidance_rescale=1.5)),
    "a dtype of nobody": _field("manifest.json.dtype: expected one of float32", lambda d: d.update(dtype="float8")),
    "no shapes": _field("manifest.json.shapes: expected at least one", lambda d: d.update(shapes=[])),
    "a hundred shapes": _field(
        "manifest.json.shapes: expected at most 64 entries, got 100", lambda d: d.update(shapes=d["shapes"] * 100)
    ),
    "a side of no pixels": _field("shapes[0].width: expected at least 1", lambda d: _shape(d).update(width=0)),
    "a side without end": _field("shapes[0].width: expected at most 65536", lambda d: _shape(d).update(width=10**9)),
    "batches the wrong way round": _field(
        "shapes[0].batch: expected [least, most], got [4", lambda d: _shape(d).update(batch=[4, 1])
    ),
    "a batch of one number": _field("shapes[0].batch: expected [least, most]", lambda d: _shape(d).update(batch=[1])),
    "a batch of nobody": _field("shapes[0].batch: expected", lambda d: _shape(d).update(batch=[0, 4])),
    "latents of nothing": _field("shapes[0].latents: expected", lambda d: _shape(d).update(latents=[2, 0, 4])),
    "latents that overflow": _field(
        "shapes[0].latents: expected at most", lambda d: _shape(d).update(latents=[65536] * 8)
    ),
    "latents of nine dimensions": _field("shapes[0].latents", lambda d: _shape(d).update(latents=[1] * 9)),
    "a constant that is a text": _field(
        "shapes[0].constants.time_ids: expected", lambda d: _shape(d)["constants"].update(time_ids=["4"])
    ),
    "a constant beyond float32": _field(
        "shapes[0].constants.time_ids: expected", lambda d: _shape(d)["constants"].update(time_ids=[-1e39])
    ),
    "a constant that is missing": _field("4x4 has no constant 'time_ids'", lambda d: _shape(d).update(constants={})),
    "a constant without numbers": _field(
        "4x4 has no constant 'time_ids'", lambda d: _shape(d)["constants"].update(time_ids=[])
    ),
    "a role of nobody": _field(
        "graphs.full.role: expected one of denoise, text, image, decode", lambda d: _full(d).update(role="magic")
    ),
    "work below 0": _field("graphs.full.macs.all: expected at least 0", lambda d: _full(d)["macs"].update(all=-1)),
    "memory below 0": _field("graphs.full.scratch_bytes: expected", lambda d: _full(d).update(scratch_bytes=-1)),
    "a tensor of no dtype": _field(
        "graphs.full.inputs[0].dtype: expected one of", lambda d: _full(d)["inputs"][0].update(dtype="string")
    ),
    "a size that is a name": _field(
        "is neither a size nor, in the first place, 'batch'", lambda d: _full(d)["inputs"][0].update(shape=["2*batch"])
    ),
    "a batch in the second place": _field(
        "is neither a size nor, in the first place, 'batch'",
        lambda d: _full(d)["inputs"][0].update(shape=["batch", "batch"]),
    ),
    "a size below 1": _field(
        "is neither a size nor, in the first place, 'batch'", lambda d: _full(d)["outputs"][0].update(shape=[0])
    ),
    "a tensor beyond every memory": _field(
        "graphs.full.inputs: latents ", lambda d: _full(d)["inputs"][0].update(shape=["batch", 2**62, 2**62, 2**62])
    ),
    "a tensor whose bytes are 2^64": _field(
        "graphs.full.outputs: next_latents ", lambda d: _full(d)["outputs"][0].update(shape=[2**31, 2**31])
    ),
    "two tensors of one name": _field(
        "graphs.full.inputs: 'latents' is there twice", lambda d: _full(d)["inputs"].append(_full(d)["inputs"][0])
    ),
    "tensors without end": _field(
        "graphs.full.outputs: expected at most 1024 entries, got 2000",
        lambda d: _full(d).update(outputs=_full(d)["outputs"][:1] * 2000),
    ),
    "a name with a line break": _field(
        "expected a name of 1 to 200 printable characters, got 'a\\nb'",
        lambda d: _full(d)["inputs"][0].update(name="a\nb"),
    ),
    "a name that steers a terminal": _field(
        "expected a name of 1 to 200 printable characters", lambda d: d["plans"].update({"\x1b[2J": _plan(d)})
    ),
    "a name without end": _field(
        "expected a name of 1 to 200 printable characters", lambda d: d["conditioning"][0].update(name="x" * 201)
    ),
    "a source of nobody": _field(
        "conditioning[0].source: expected one of text, image, constant",
        lambda d: d["conditioning"][0].update(source="?"),
    ),
    "a negative of nobody": _field(
        "conditioning[0].negative: expected one of own, same, zeros",
        lambda d: d["conditioning"][0].update(negative="?"),
    ),
    "two conditionings of one name": _field(
        "conditioning: 'text' is there twice", lambda d: d["conditioning"].append(d["conditioning"][0])
    ),
    "a tokenizer of one token": _field(
        "tokenizers[0].length: expected at least 2, got 1", lambda d: d["tokenizers"][0].update(length=1)
    ),
    "padding below 0": _field("tokenizers[0].pad_id: expected", lambda d: d["tokenizers"][0].update(pad_id=-1)),
    "two tokenizers of one input": _field(
        "tokenizers: 'ids.0' is there twice", lambda d: d["tokenizers"].append(d["tokenizers"][0])
    ),
    "a carry's fact that is a list": _field("of", lambda d: d["carries"]["self.0"].update(of=["mean"])),
    "a carry that is no object": _field("manifest.json.carries", lambda d: d["carries"].update({"self.0": "all"})),
    "a tool that is a number": _field("manifest.json.tools: expected text", lambda d: d["tools"].update(torch=2.13)),
    "a scheduler of brackets": _field(
        "manifest.json.scheduler: expected an object that is nested at most 16 deep",
        lambda d: d["scheduler"].update(x=json.loads("[" * 20 + "]" * 20)),
    ),
    "a digest of 63 digits": _field(
        "sha256: expected 64 hexadecimal digits", lambda d: d["files"]["full.onnx"].update(sha256="0" * 63)
    ),
    "a digest in capitals": _field(
        "sha256: expected 64 hexadecimal digits", lambda d: d["files"]["full.onnx"].update(sha256="A" * 64)
    ),
    "a file of less than nothing": _field(
        "bytes: expected at least 0, got -1", lambda d: d["files"]["full.onnx"].update(bytes=-1)
    ),
    "a file above the bundle": _field(
        "file name '../x' is not a plain name inside the bundle",
        lambda d: d["files"].update({"../x": d["files"]["full.onnx"]}),
    ),
    "a graph above the bundle": _field("'../../x' is not a plain name", lambda d: _full(d).update(file="../../x")),
    "a graph anywhere": _field("'/etc/passwd' is not a plain name", lambda d: _full(d).update(file="/etc/passwd")),
    "weights anywhere": _field("'/etc/passwd' is not a plain name", lambda d: d.update(weights="/etc/passwd")),
    "samplers in a hidden file": _field("'.hidden' is not a plain name", lambda d: d.update(samplers=".hidden")),
    "a tokenizer by a way round": _field(
        "'tokenizer/../full.onnx' is not a plain name",
        lambda d: d["tokenizers"][0].update(file="tokenizer/../full.onnx"),
    ),
    "a golden by no name": _field("is not a plain name", lambda d: d["goldens"]["image"].update(file="")),
    "a graph that is not listed": _field("lists no file 'other'", lambda d: _full(d).update(file="other")),
    "weights that are not listed": _field("lists no file 'other'", lambda d: d.update(weights="other")),
    "samplers that are not listed": _field("lists no file 'other'", lambda d: d.update(samplers="other")),
    "a tokenizer that is not listed": _field(
        "lists no file 'other'", lambda d: d["tokenizers"][1].update(file="other")
    ),
    "a golden that is not listed": _field(
        "lists no file 'other'", lambda d: d["goldens"]["image"].update(file="other")
    ),
    "a golden of another size": _field(
        "has no size 5x5; it has 4x4", lambda d: d["goldens"]["image"].update(size="5x5")
    ),
    "a golden of another graph": _field(
        "golden image names graph 'other', which is not there", lambda d: d["goldens"]["image"].update(graph="other")
    ),
    "a golden whose plan is a text": _field(
        "goldens.image.plan", lambda d: d["goldens"]["image"].update(plan="default")
    ),
    "two shapes of one size and batch": _field(
        "there are two shapes 4x4 of batch [1, 4]", lambda d: d["shapes"].append(_shape(d))
    ),
    "a file that is described twice": _field(
        "text.onnx is described twice, and differently",
        lambda d: d["shapes"].append(
            {**_shape(d), "width": 8, "graphs": {**_graphs(d), "text": {**_graphs(d)["text"], "batch": [2, 2]}}}
        ),
    ),
}
"""What the manifest says."""


def _planned(says: str, edit: Callable[[dict[str, Any]], object], error: type[TgateError] = BundleError) -> Damage:
    return Damage(harm=manifest(edit), says=says, error=error)


PLANS: dict[str, Damage] = {
    "a plan that is a list": _planned("manifest.json.plans.default", lambda d: d["plans"].update(default=[])),
    "a plan without a name": _planned("plans.default: 'name' is missing", lambda d: _plan(d).pop("name")),
    "a plan of another guidance": _planned(
        "plan 'default' has guidance scale 1.0", lambda d: _plan(d).update(guidance_scale=1.0), PlanError
    ),
    "a plan of a guidance below 0": _planned(
        "plans.default.guidance_scale: expected 0", lambda d: _plan(d).update(guidance_scale=-7.5)
    ),
    "a plan of a setting that is a list": _planned("m", lambda d: _plan(d)["settings"].update(m=[5])),
    "a plan of a call too many": _planned(
        f"plans.default.steps: expected at most {MOST_CALLS} entries, got {MOST_CALLS + 1}",
        lambda d: _plan(d).update(steps=_plan(d)["steps"][:1] * (MOST_CALLS + 1)),
    ),
    "a sampler of a step too many": _planned(
        f"plans.default.sampler.steps: expected at most {MOST_STEPS}, got {MOST_STEPS + 1}",
        lambda d: _plan(d)["sampler"].update(steps=MOST_STEPS + 1),
    ),
    "a sampler of a lead-in too many": _planned(
        f"plans.default.sampler.lead_in: expected at most {MOST_LEAD_IN}, got {MOST_LEAD_IN + 1}",
        lambda d: _plan(d)["sampler"].update(steps=6, lead_in=MOST_LEAD_IN + 1),
    ),
    "a plan of no steps": _planned(
        "a sampler of 8 steps and 0 lead-in calls needs", lambda d: _plan(d).update(steps=[])
    ),
    "a sampler of other steps": _planned(
        "a sampler of 9 steps and 0 lead-in calls needs", lambda d: _plan(d)["sampler"].update(steps=9)
    ),
    "a sampler that scales by 0": _planned("initial_scale", lambda d: _plan(d)["sampler"].update(initial_scale=0)),
    "a sampler that leads in backwards": _planned("lead_in", lambda d: _plan(d)["sampler"].update(lead_in=-1)),
    "a step of three coefficients": _planned(
        "steps[0].latents: expected 4 coefficients, got 3", lambda d: _step(d, 0).update(latents=[1, 0, 0])
    ),
    "a step of noise without bound": _planned(
        "steps[0].noise: expected a finite number, of float32", lambda d: _step(d, 0).update(noise=1e39)
    ),
    "a step that reads what does not exist yet": _planned(
        "reads 2 pairs back, but only 1 exist before it", lambda d: _step(d, 1).update(outputs=[1, 0, 0.5, 0])
    ),
    "a carry that is read twice": _planned(
        "steps[7].reads: expected names that differ", lambda d: _step(d, 7)["reads"].append(_step(d, 7)["reads"][0])
    ),
    "a plan of another name": _planned(
        "plan 'other' is listed as 'default'", lambda d: _plan(d).update(name="other"), PlanError
    ),
    "a baseline that is not there": _planned(
        "plan 'default' names baseline 'ungated', which is not there", lambda d: d["plans"].pop("ungated"), PlanError
    ),
    "a step of another number": _planned(": expected index 2", lambda d: _step(d, 2).update(index=3), PlanError),
    "a graph that is not there": _planned(
        "step 0 runs graph 'nothing'; the bundle has full", lambda d: _step(d, 0).update(graph="nothing"), PlanError
    ),
    "a graph that is no denoiser": _planned(
        "step 0 runs graph 'decoder'; the bundle has full", lambda d: _step(d, 0).update(graph="decoder"), PlanError
    ),
    "a carry that nobody wrote": _planned(
        "step 5 reads cross.0, which no earlier step writes", lambda d: _step(d, 4).update(writes=[]), PlanError
    ),
    "a carry that is not read": _planned(
        "the plan differs in cross.1", lambda d: _step(d, 7).update(reads=["cross.0"]), PlanError
    ),
    "a carry that the graph does not give": _planned(
        "writes self.0, which graph 'reuse_self' does not give",
        lambda d: next(s for s in _plan(d)["steps"] if s["graph"] == "reuse_self").update(writes=["self.0"]),
        PlanError,
    ),
    "a carry that is written for nobody": _planned(
        "a step writes the carries of its graph that a later step reads, no others; the plan differs in self.0",
        lambda d: _step(d, 4)["writes"].append("self.0"),
        PlanError,
    ),
    "a carry of another form": _planned(
        "reads cross.0 as",
        lambda d: next(t for t in _graphs(d)["reuse_cross"]["inputs"] if t["name"] == "cross.0").update(
            dtype="float16"
        ),
        PlanError,
    ),
    "a shape without the plans' graphs": _planned(
        "step 0 runs graph 'full'; the bundle has unguided",
        lambda d: d["shapes"].append({**_shape(d), "width": 8, "graphs": {"unguided": _graphs(d)["unguided"]}}),
        PlanError,
    ),
    "a golden's plan that does not run": _planned(
        "step 5 reads cross.0, which no earlier step writes",
        lambda d: d["goldens"]["trajectory"]["plan"]["steps"][4].update(writes=[]),
        PlanError,
    ),
}
"""What the plans say."""


def _graph(says: str, harm: Harm) -> Damage:
    return Damage(harm=harm, says=says, seen="graphs")


GRAPHS: dict[str, Damage] = {
    "a graph that is no ONNX": _graph("full.onnx", listed("full.onnx", lambda _: b"\xff" * 100)),
    "a graph of nothing": _graph("full.onnx", listed("full.onnx", lambda _: b"")),
    "two graphs in one file": _graph("full.onnx", listed("full.onnx", lambda content: content * 2)),
    "an operator of nobody": _graph("operator 'NoSuch'", _node("NoSuch")),
    "an operator of somebody else": _graph("com.microsoft", _node("Gelu", "com.microsoft")),
    "an endless loop": _graph("full.onnx", graph(_loop)),
    "noise of its own": _graph("operator 'RandomNormalLike'", _node("RandomNormalLike")),
    "operators of another version": _graph(
        "imports operators", graph(lambda m: setattr(m.opset_import[0], "version", 7))
    ),
    "another form of ONNX": _graph("IR version 3", graph(lambda m: setattr(m, "ir_version", 3))),
    "a function in place of an operator": _graph(
        "full.onnx",
        graph(lambda m: m.functions.append(helper.make_function("", "Add", ["a"], ["b"], [], m.opset_import[:1]))),
    ),
    "notes for an engine": _graph(
        "full.onnx", graph(lambda m: m.metadata_props.add(key="session.load_custom_op_library", value="x.so"))
    ),
    "weights in another file": _graph("full.onnx has weight", _elsewhere("location", "full.onnx")),
    "weights above the bundle": _graph("full.onnx has weight", _elsewhere("location", "../weights.safetensors")),
    "weights in a file of the system": _graph("full.onnx has weight", _elsewhere("location", "/etc/passwd")),
    "weights in the process's memory": _graph("full.onnx has weight", _elsewhere("location", "*/_ORT_MEM_ADDR_/*")),
    "weights at another place": _graph("full.onnx has weight", _elsewhere("offset", "8")),
    "weights beyond the end": _graph("full.onnx has weight", _elsewhere("offset", str(2**62))),
    "weights of another length": _graph("full.onnx has weight", _elsewhere("length", "4")),
    "a weight that is not there": _graph(
        "full.onnx",
        graph(lambda m: m.graph.initializer.append(numpy_helper.from_array(_nothing(), "latents"))),
    ),
    "an input of another name": _graph("full.onnx", graph(lambda m: setattr(m.graph.input[0], "name", "other"))),
    "an output of another size": _graph(
        "full.onnx",
        graph(lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 2**40)),
    ),
    "a weights' header beyond all bounds": _graph(
        "weights.safetensors", listed(WEIGHTS, lambda content: b"\xff" * 8 + content[8:])
    ),
    "a weights' header beyond the file": _graph(
        "it ends in its header", listed(WEIGHTS, lambda content: struct.pack("<Q", 2**25) + content[8:])
    ),
    "a weights' header that is shorter than it says": _graph(
        "it ends in its header", listed(WEIGHTS, lambda _: struct.pack("<Q", 3) + b"{}")
    ),
    "weights of seven bytes": _graph("weights.safetensors", listed(WEIGHTS, lambda content: content[:7])),
    "a weights' header that is no JSON": _graph(
        "weights.safetensors", listed(WEIGHTS, lambda content: _weights(b"{", content))
    ),
    "a weights' header of lists": _graph("weights.safetensors", listed(WEIGHTS, lambda content: _weights(b"[]", b""))),
    "a weight that is there twice": _graph(
        "twice", listed(WEIGHTS, lambda content: _weights(b'{"w": 1, "w": 2}', content))
    ),
    "a weight of another dtype": _graph("weights.safetensors", header(lambda h: h["w.out"].update(dtype="F64"))),
    "a weight that ends beyond the file": _graph(
        "weights.safetensors",
        header(
            lambda h: h["w.out"].update(
                data_offsets=[2**40, 2**40 + h["w.out"]["data_offsets"][1] - h["w.out"]["data_offsets"][0]]
            )
        ),
    ),
    "a weight that ends before it begins": _graph(
        "weights.safetensors", header(lambda h: h["w.out"].update(data_offsets=h["w.out"]["data_offsets"][::-1]))
    ),
    "a weight whose size overflows": _graph(
        "weights.safetensors", header(lambda h: h["w.out"].update(shape=[2**32, 2**32]))
    ),
    "a weight that the header leaves out": _graph("w.out", header(lambda h: h.pop("w.out"))),
}
"""What the graphs and the weights' header say."""


def _nothing() -> Any:
    import numpy as np

    return np.zeros(1, np.float32)


def _token(says: str, harm: Harm) -> Damage:
    return Damage(harm=harm, says=says, seen="tokenizers")


TOKENIZERS: dict[str, Damage] = {
    "a tokenizer that is no JSON": _token("tokenizer/0.json", listed("tokenizer/0.json", lambda _: b"{")),
    "a tokenizer that is a list": _token("tokenizer/0.json", listed("tokenizer/0.json", lambda _: b"[]")),
    "a tokenizer of brackets": _token("tokenizer/0.json", listed("tokenizer/0.json", lambda _: b"[" * 1_000_000)),
    "a tokenizer of another version": _token("version is 2.0", tokenizer(lambda t: t.update(version="2.0"))),
    "a field of a tokenizer that nobody knows": _token("code", tokenizer(lambda t: t.update(code="x"))),
    "a model of nobody": _token("tokenizer/0.json", tokenizer(lambda t: t["model"].update(type="Magic"))),
    "a normalizer of nobody": _token("tokenizer/0.json", tokenizer(lambda t: t.update(normalizer={"type": "Magic"}))),
    "a regular expression that never ends": _token(
        "tokenizer/0.json",
        tokenizer(
            lambda t: t.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": True}
            )
        ),
    ),
    "replacements that double a prompt each": _token(
        "tokenizer/0.json",
        tokenizer(
            lambda t: t.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}] * 64,
                }
            )
        ),
    ),
    "an id beyond all bounds": _token("tokenizer/0.json", tokenizer(lambda t: t["model"]["vocab"].update(red=2**40))),
    "padding that is no token": _token("tokenizer/0.json", manifest(lambda d: d["tokenizers"][0].update(pad_id=10**6))),
}
"""What the tokenizers say."""

DAMAGES: dict[str, Damage] = {**FILES, **TEXTS, **FIELDS, **PLANS, **GRAPHS, **TOKENIZERS}
"""All of them, by what is wrong."""
