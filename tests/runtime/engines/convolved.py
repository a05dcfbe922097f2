"""A bundle of one denoising graph as a U-Net's are: convolutions, a normalisation over groups, attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from tests.runtime.engines.small import WEIGHTS, manifest_of, offsets_of, outside, save, tensor
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES, decode, encode
from tgate_engine.graph import BATCH
from tgate_engine.manifest import Shape

LATENTS = (3, 5, 5)
"""In 16 bits a row takes 150 bytes: the second begins where no kernel can read 16 bytes at once."""
CHANNELS, PLACES = 32, 25
KERNELS = ("conv.in", "conv.middle", "conv.out")


class Convolved:
    """A bundle in ``dtype`` whose graph ``spec`` gives ``next_latents`` and a carry, ``self.0``, of ``latents``."""

    def __init__(self, folder: Path, *, batch: tuple[int, int] = (1, 3), dtype: str = "float32") -> None:
        folder.mkdir()
        rng = np.random.default_rng(0)
        shapes = {
            "conv.in": (CHANNELS, LATENTS[0], 3, 3),
            "conv.middle": (CHANNELS, CHANNELS, 3, 3),
            "conv.out": (LATENTS[0], CHANNELS, 1, 1),
            "norm.scale": (CHANNELS,),
            "norm.bias": (CHANNELS,),
        }
        self._weights = {
            name: encode(rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), dtype)
            for name, shape in shapes.items()
        }
        save_file(self._weights, folder / WEIGHTS)
        places = offsets_of(folder / WEIGHTS)
        initializers = [
            *(outside(name, *places[name], dtype) for name in shapes),
            numpy_helper.from_array(np.array([0, CHANNELS, PLACES]), "in.places"),
            numpy_helper.from_array(np.array([0, CHANNELS, *LATENTS[1:]]), "in.lines"),
        ]
        node = helper.make_node
        nodes = [
            node("Conv", ["latents", "conv.in"], ["a"], pads=[1, 1, 1, 1]),
            node("GroupNormalization", ["a", "norm.scale", "norm.bias"], ["b"], num_groups=4),
            node("Sigmoid", ["b"], ["c"]),
            node("Mul", ["b", "c"], ["d"]),
            node("Conv", ["d", "conv.middle"], ["e"], pads=[1, 1, 1, 1]),
            node("Reshape", ["e", "in.places"], ["f"]),
            node("Transpose", ["f"], ["g"], perm=[0, 2, 1]),
            node("Attention", ["g", "g", "g"], ["self.0"], q_num_heads=2, kv_num_heads=2),
            node("Transpose", ["self.0"], ["h"], perm=[0, 2, 1]),
            node("Reshape", ["h", "in.lines"], ["i"]),
            node("Add", ["e", "i"], ["j"]),
            node("Conv", ["j", "conv.out"], ["k"]),
            node("Add", ["latents", "k"], ["next_latents"]),
        ]
        inputs = [tensor("latents", BATCH, *LATENTS, dtype=dtype)]
        outputs = [
            tensor("next_latents", BATCH, *LATENTS, dtype=dtype),
            tensor("self.0", BATCH, PLACES, CHANNELS, dtype=dtype),
        ]
        self.spec = save(folder / "full.onnx", nodes, inputs, outputs, initializers, batch=batch)
        shape = Shape(width=5, height=5, batch=batch, latents=LATENTS, constants={}, graphs={"full": self.spec})
        self.bundle = Bundle(folder, replace(manifest_of(folder, shape), dtype=dtype))
        self._dtype = dtype

    def expected(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """The graph's outputs by ONNX's own evaluator, in float32, from weights and inputs as they are rounded."""
        model = onnx.load_model(self.bundle.file(self.spec.file), load_external_data=False)
        for each in model.graph.initializer:
            if each.name in self._weights:
                each.CopyFrom(numpy_helper.from_array(decode(self._weights[each.name], self._dtype), each.name))
        for info in (*model.graph.input, *model.graph.output):
            info.type.tensor_type.elem_type = DTYPES["float32"].onnx
        given = {name: decode(values, self._dtype).astype(np.float32) for name, values in inputs.items()}
        names = self.spec.output_names()
        return dict(zip(names, ReferenceEvaluator(model).run(list(names), given), strict=True))

    def assert_close(self, got: Mapping[str, NDArray[Any]], inputs: Mapping[str, NDArray[Any]], bound: float) -> None:
        """Each output within ``bound`` times its largest value."""
        for name, want in self.expected(inputs).items():
            error = np.abs(decode(got[name], self._dtype).astype(np.float64) - want).max()
            assert error <= bound * np.abs(want).max(), name
