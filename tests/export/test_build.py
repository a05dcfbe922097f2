"""Files of a bundle: names of graphs, what is kept of a scheduler; whole exports are in tests/whole/test_export.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tgate_engine.graph import DECODE, DENOISE, TEXT
from tgate_export.build import _file, _plain
from tgate_export.families.base import Size

FIRST, OTHER = Size(width=1024, height=1024), Size(width=832, height=1216)


@pytest.mark.parametrize(
    ("role", "name", "size", "file"),
    [
        (DENOISE, "full", FIRST, "full.onnx"),
        (DENOISE, "full", OTHER, "full-832x1216.onnx"),
        (TEXT, "text_encoder", OTHER, "text_encoder.onnx"),
        (DECODE, "vae_decoder", OTHER, "vae_decoder-832x1216.onnx"),
    ],
)
def test_a_graph_of_a_further_size_is_called_so(role: str, name: str, size: Size, file: str) -> None:
    job: Any = SimpleNamespace(sizes=(FIRST, OTHER), batches=((1, 4),))
    assert _file(job, SimpleNamespace(name=name, role=role), size, (1, 4)) == file  # type: ignore[arg-type]


def test_ranges_of_batches_have_denoising_graphs_of_their_own() -> None:
    job: Any = SimpleNamespace(sizes=(FIRST,), batches=((1, 1), (2, 4)))
    graph, decoder = SimpleNamespace(name="full", role=DENOISE), SimpleNamespace(name="vae_decoder", role=DECODE)
    assert _file(job, graph, FIRST, (2, 4)) == "full-batch-2-4.onnx"  # type: ignore[arg-type]
    assert _file(job, decoder, FIRST, (2, 4)) == "vae_decoder.onnx"  # type: ignore[arg-type]


def test_of_a_schedulers_private_notes_those_are_kept_that_samplers_go_by() -> None:
    kept = {"_class_name": "DDIMScheduler", "_use_default_values": ["clip_sample"], "a": 1}
    assert _plain({**kept, "_diffusers_version": "0.1"}) == kept
