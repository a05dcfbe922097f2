"""One graph, with buffers of its own that are bound once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import toy_model
from tgate_engine.errors import EngineError
from tgate_engine.graph import TEXT, GraphSpec
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.session import Session


@pytest.fixture(scope="module")
def text(session: Session) -> GraphSpec:
    graph = session.graph(TEXT)
    assert graph is not None
    return graph


def test_inputs_are_written_and_outputs_read(session: Session, text: GraphSpec) -> None:
    call = GraphCall(session, text)
    assert (set(call.inputs), set(call.outputs)) == ({"ids.0", "ids.1"}, {"text", "pooled"})
    for ids in (np.array([[1, 2, 3, 4, 5, 6, 7, 8]]), np.array([[8, 7, 6, 5, 4, 3, 2, 1]])):
        for buffer in call.inputs.values():
            buffer.write(ids)
        call()
        np.testing.assert_array_equal(call.outputs["text"].read(), toy_model.weights()["embed.0"][ids])


def test_buffers_are_for_as_many_images_as_asked_for(session: Session) -> None:
    call = GraphCall(session, session.shapes()[0].graphs["full"], batch=3)
    assert call.inputs["latents"].shape == (3, 2, 4, 4)
    assert call.outputs["self.0"].shape == (3, 2, 32)
    with pytest.raises(EngineError, match="for 1 to 4 images"):
        GraphCall(session, session.shapes()[0].graphs["full"], batch=5)


def test_the_session_keeps_it_for_the_next_request(session: Session, text: GraphSpec) -> None:
    session.trim()
    with GraphCall.borrow(session, text) as first, GraphCall.borrow(session, text) as second:
        assert first is not second
        assert first.inputs["ids.0"].address != second.inputs["ids.0"].address
    with GraphCall.borrow(session, text) as again:
        assert again in (first, second)


def test_a_graph_that_is_not_loaded(toy_path: Path) -> None:
    small = Session.open(toy_path, plans=[], threads=1)
    with small, pytest.raises(EngineError, match=r"graph full\.onnx is not loaded"):
        GraphCall(small, small.shapes()[0].graphs["full"])
