"""Requests with adapters, at a server: each is what it is alone, whoever else is there."""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.running import Server, alone, pixels, running, until
from tgate_engine.plan import Plan
from tgate_export.adapt import adapt
from tgate_export.families import location
from tgate_runtime.files import load_notes
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_serve.model import Model, Wish
from tgate_serve.places import Lane
from tgate_serve.scheduler import Busy
from tgate_serve.worker import Worker

WAIT_S = 120.0
SCALES: list[dict[str, float] | None] = [None, {"style": 1.0}, {"style": 0.5, "face": -1.0}]


@pytest.fixture(scope="module")
def adapted(shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """``mini`` with two adapters, of its T5 encoder and its transformer."""
    folder = tmp_path_factory.mktemp("loras")
    place = shutil.copytree(shipped_bundle, folder / "bundle")
    weights = load_file(Path(location("mini-pixart")) / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = {
        n.removesuffix(".weight"): w.shape for n, w in weights.items() if n.endswith(("to_q.weight", "to_v.weight"))
    }
    for seed, name in enumerate(("style", "face")):
        torch.manual_seed(seed)
        tensors = {}
        for layer, (outputs, inputs) in layers.items():
            tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, inputs) / inputs**0.5
            tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, 4) * 0.1
        save_file(tensors, folder / f"{name}.safetensors")
        adapt(place, folder / f"{name}.safetensors", name=name)
    with Session.open(place, threads=1, adapted=2) as session:
        yield session


@pytest.fixture(scope="module")
def server(adapted: Session) -> Iterator[Server]:
    with running(adapted, added=0.1, adapted=2) as made:
        yield made


def test_everybody_gets_what_a_pipeline_draws_of_it(server: Server, adapted: Session) -> None:
    """Bit for bit, however they come."""
    asked: list[dict[str, Any]] = [{"seed": seed, "loras": loras} for seed in (1, 2) for loras in SCALES]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: server.draw(**one).json(), asked))
    drawn = [pixels(answer["data"][0]["b64_json"]) for answer in answers]
    for one, found in zip(asked, drawn, strict=True):
        np.testing.assert_array_equal(found, alone(adapted, **one)[0])
    assert len({array.tobytes() for array in drawn}) == len(asked)


def test_those_of_the_same_adapters_share_calls(adapted: Session) -> None:
    held, real = threading.Event(), State.take
    with pytest.MonkeyPatch.context() as patch, Worker(adapted, added=0.1, adapted=2) as worker:
        patch.setattr(State, "take", lambda self, rows: held.wait(WAIT_S) and real(self, rows))
        model = Model("mini", adapted, worker)
        drawings = [
            model.submit(Wish(prompt="a green star", seed=seed, loras=loras))
            for seed in (1, 2)
            for loras in ({"style": 1.0}, None)
        ]
        held.set()
        for drawing in drawings:
            drawing.handle.result(WAIT_S)
        calls = worker.counts.calls
    assert max(images for _, _, images in calls) == 2, "of four, two with adapters and two without"
    assert sum(count * images for (_, _, images), count in calls.items()) == 4 * len(adapted.plan("default").steps)
    assert {size for size, _, _ in calls} == {"128x128"}


def test_more_combinations_than_are_served_wait_outside(adapted: Session) -> None:
    held, real = threading.Event(), State.take
    with pytest.MonkeyPatch.context() as patch, Worker(adapted, adapted=1) as worker:
        patch.setattr(State, "take", lambda self, rows: held.wait(WAIT_S) and real(self, rows))
        model = Model("mini", adapted, worker)
        first = model.submit(Wish(prompt="a green star", seed=1, loras={"style": 1.0}))
        loaded = adapted.adapted({"style": 1.0})
        with pytest.raises(
            Busy, match="1 other combinations of adapters are drawn, as many as are served at once"
        ) as full:
            model.submit(Wish(prompt="a green star", seed=1, loras={"face": 1.0}))
        assert full.value.after_s is not None
        assert [*adapted._adapted][-1] == loaded.loras, "nothing was loaded for the one that was refused"
        assert worker.counts.refused == 1
        plain = model.submit(Wish(prompt="a green star", seed=1))
        held.set()
        for drawing in (first, plain):
            drawing.handle.result(WAIT_S)
        second = model.submit(Wish(prompt="a green star", seed=1, loras={"face": 1.0}))
        assert len(worker._lanes) == 2, "the idle lane has gone"
        found = worker.pictures(second.handle.result(WAIT_S))[0][0]
    np.testing.assert_array_equal(np.asarray(found), alone(adapted, seed=1, loras={"face": 1.0})[0])


def test_a_lane_whose_images_were_called_off_can_go(adapted: Session) -> None:
    """Also while a call for them is made."""
    held, began, real = threading.Event(), threading.Event(), State.take

    def take(self: State, rows: range) -> Any:
        began.set()
        assert held.wait(WAIT_S)
        return real(self, rows)

    with pytest.MonkeyPatch.context() as patch, Worker(adapted, adapted=1) as worker:
        patch.setattr(State, "take", take)
        model = Model("mini", adapted, worker)
        first = model.submit(Wish(prompt="a green star", seed=1, loras={"style": 1.0}))
        assert began.wait(WAIT_S)
        assert first.handle.cancel()
        second = model.submit(Wish(prompt="a green star", seed=2, loras={"face": 1.0}))
        held.set()
        found = worker.pictures(second.handle.result(WAIT_S))[0][0]
        assert not worker.failed
    np.testing.assert_array_equal(np.asarray(found), alone(adapted, seed=2, loras={"face": 1.0})[0])


def test_a_session_whose_lane_is_open_is_not_loaded_again(adapted: Session) -> None:
    """Also where others have pushed it out of what the session keeps."""
    with Worker(adapted, adapted=1) as worker:
        model = Model("mini", adapted, worker)
        model.submit(Wish(prompt="a green star", seed=1, loras={"style": 1.0})).handle.result(WAIT_S)
        (lane,) = (lane for lane in worker._lanes.values() if lane.session is not adapted)
        adapted.trim()
        assert worker.adapted(lane.size, {"style": 1.0}) is lane.session
        assert worker.adapted(lane.size, None) is adapted
        model.submit(Wish(prompt="a green star", seed=1, loras={"style": 1.0})).handle.result(WAIT_S)
        assert not adapted._adapted


def test_a_lane_may_go_while_its_image_begins(adapted: Session) -> None:
    """Called off, and the lane closed for another, wherever the thread looks for it without the lock."""
    handles: list[Any] = []

    class Lanes(dict[str, Lane]):
        def __getitem__(self, name: str) -> Lane:
            if threading.current_thread() is worker._thread and not worker._changed._is_owned():  # type: ignore[attr-defined]
                handles[0].cancel()
                worker._make_way()
            return super().__getitem__(name)

    with Worker(adapted, adapted=1) as worker:
        worker._lanes = Lanes(worker._lanes)
        model = Model("mini", adapted, worker)
        with worker._changed:  # the thread takes it up once the handle is known
            handles.append(model.submit(Wish(prompt="a green star", seed=1, loras={"style": 1.0})).handle)
        handles[0].result(WAIT_S)
        assert not worker.failed


def test_the_picture_says_what_it_was_drawn_with(server: Server, adapted: Session, tmp_path: Path) -> None:
    answer = server.draw(seed=3, loras={"style": 0.5}).json()
    path = tmp_path / "x.png"
    path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    record: Any = load_notes(path)
    file = adapted.manifest.adapters["style"].file
    assert record.loras["style"].scale == 0.5
    assert record.loras["style"].sha256 == adapted.manifest.files[file].sha256


@pytest.mark.parametrize(
    ("loras", "says"),
    [
        ({"other": 1.0}, "the bundle has no adapter 'other'; it has face, style"),
        ({"style": 0}, "a number other than 0"),
        ({"style": 1e9}, "of at most 10000 is wanted"),
        ({"style": "much"}, "loras"),
        ("style", "loras"),
    ],
)
def test_what_cannot_be_drawn_is_refused(server: Server, loras: Any, says: str) -> None:
    status, error = server.refused(loras=loras)
    assert status == 400
    assert says in error["message"]


def test_a_model_names_its_adapters(server: Server) -> None:
    (model,) = server.http.get("/v1/models").json()["data"]
    assert sorted(model["tgate"]["loras"]) == ["face", "style"]
    assert until(lambda: server.worker.load() == (0, 0))


def test_planned_memory_counts_them(adapted: Session) -> None:
    plans: list[str | Plan] = ["default"]
    with Worker(adapted, plans=plans, adapted=1) as one, Worker(adapted, plans=plans, adapted=3) as three:
        each = (three.planned_bytes - one.planned_bytes) / 2
        weights = adapted.manifest.files[adapted.manifest.weights].bytes
        assert each > weights
