"""A bundle on disk whose one graph, a decoder in float16, has a weight to be turned and two to be made float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from tests.runtime.engines.small import WEIGHTS, manifest_of, outside, save, tensor
from tgate_engine.bundle import Bundle
from tgate_engine.graph import BATCH, DECODE
from tgate_engine.manifest import MANIFEST_FILE, Shape
from tgate_engine.manifest_json import dump_manifest
from tgate_runtime.weights import read_places


def halves(folder: Path, *, groups: int = 2, seed: int = 0) -> Bundle:
    """[batch, 4, 3, 5] latents to [batch, 3, 5, 8] colours: a convolution, a normalization of so many groups."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = {"conv.weight": (8, 4, 3, 3), "conv.bias": (8,), "norm.weight": (8,), "norm.bias": (8,)}
    weights = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    save_file(weights, folder / WEIGHTS)
    places = read_places(folder / WEIGHTS)
    node = helper.make_node
    nodes = [
        node("Cast", ["latents"], ["half"], to=TensorProto.FLOAT16),
        node("Conv", ["half", "conv.weight", "conv.bias"], ["sum"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("GroupNormalization", ["sum", "norm.weight", "norm.bias"], ["norm"], num_groups=groups),
        node("Transpose", ["norm"], ["last"], perm=[0, 2, 3, 1]),
        node("Cast", ["last"], ["image"], to=TensorProto.UINT8),
    ]
    initializers = [outside(n, p.offset, p.length, p.shape, p.dtype) for n, p in places.items()]
    inputs, outputs = [tensor("latents", BATCH, 4, 3, 5)], [tensor("image", BATCH, 3, 5, 8, dtype="uint8")]
    spec = save(folder / "decoder.onnx", nodes, inputs, outputs, initializers, role=DECODE)
    shape = Shape(width=5, height=3, batch=(1, 4), latents=(4, 3, 5), constants={}, graphs={"decoder": spec})
    (folder / MANIFEST_FILE).write_text(dump_manifest(manifest_of(folder, shape)), encoding="utf-8")
    return Bundle.open(folder)
