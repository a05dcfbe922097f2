"""Requests of libtgate: step by step, together, stopped, begun anew, and in a room of a known size."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.cpp import library as c
from tests.cpp.library import Failure, Library, Request, Session, batch
from tests.cpp.twins import Twins, same
from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.footprint import memory
from tgate_runtime.mini import place_of
from tgate_runtime.text import TextEncoder

PROMPTS = ("a large red circle", "a small blue square", "a green star", "a yellow ring above a red disk")
PLANS = ("default", "ungated", "guidance_stopped")


@pytest.fixture(scope="module")
def mini(library: Library) -> Twins:
    return Twins(library, place_of("mini"))


@pytest.fixture(scope="module")
def alone(mini: Twins) -> dict[int, Any]:
    """Final latents of the requests of :func:`asked`, each drawn by itself."""
    return {i: mini.draw(**asked(i)) for i in range(len(PROMPTS))}


def asked(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "plan": PLANS[i % 3], "seed": 10 * i, "guidance_scale": 3.0 + i, "images": 1 + i % 2}


def test_step_by_step_and_heard(mini: Twins) -> None:
    heard: list[tuple[int, int]] = []

    def hear(done: int, total: int) -> bool:
        heard.append((done, total))
        return True

    request = mini.request(PROMPTS[0], seed=4, on_step=hear)
    graphs = [step.graph for step in mini.python.session.manifest.plans["default"].steps]
    seen = []
    while (graph := request.progress()[2]) is not None:
        seen.append(graph)
        request.step()
    assert seen == graphs
    assert heard == [(i + 1, len(graphs)) for i in range(len(graphs))]
    request.step()  # at the end there is nothing to do
    same(request.latents(), mini.wanted(PROMPTS[0], seed=4).latents)


def test_requests_at_different_steps_share_calls_and_equal_their_solo_runs(mini: Twins, alone: dict[int, Any]) -> None:
    """They join at different times, and whoever waits for one graph goes together, whichever rows they are in."""
    pool = mini.pool(sum(asked(i)["images"] for i in alone), plans=PLANS)
    flying: dict[int, Any] = {}
    shared, mixed, left, rng = 0, 0, list(alone), np.random.default_rng(3)
    while left or flying:
        if left and rng.random() < 0.2:
            i = left.pop(0)
            flying[i] = mini.request(pool=pool, **asked(i))
        waiting: dict[str, list[int]] = {}
        for i, request in flying.items():
            waiting.setdefault(str(request.progress()[2]), []).append(i)
        if not waiting:
            continue
        together = waiting[rng.choice([*waiting])]
        rng.shuffle(together)
        shared += len(together) > 1
        mixed += len({flying[i].progress()[0] for i in together}) > 1
        assert batch([flying[i] for i in together]) == [0] * len(together)
        for i in [i for i in together if flying[i].progress()[2] is None]:
            same(flying[i].latents(), alone[i])
            flying.pop(i).close()
    assert shared > 10
    assert mixed > 10
    assert pool.moved > 0
    assert pool.room == sum(asked(i)["images"] for i in alone)


def test_who_stays_together_is_not_moved(mini: Twins) -> None:
    pool = mini.pool(4)
    requests = [mini.request(PROMPTS[i], pool=pool, seed=i) for i in range(4)]
    for _ in range(3):
        batch(requests)
    assert pool.moved == 0
    for _ in range(3):
        batch([requests[3], requests[0]])
    moved = pool.moved
    assert 0 < moved <= 3
    for _ in range(3):
        batch([requests[0], requests[3]])
    assert pool.moved == moved


def test_a_pool_is_of_plans_that_its_session_has_loaded(library: Library) -> None:
    """Others were not checked, and buffers are made of what their graphs say."""
    twins = Twins(library, place_of("mini"), ["guidance_stopped"])
    for images in (1, 9):
        with pytest.raises(Failure, match="is not loaded; name its plan in the session's options") as failure:
            twins.pool(images, plans=["default"])
        assert failure.value.code == c.ENGINE
        with pytest.raises(Failure, match="is not loaded"):
            twins.request(PROMPTS[0], images=images)


def test_a_plan_file_does_not_pass_for_a_plan_of_the_bundle(library: Library, mini: Twins, tmp_path: Path) -> None:
    """Both may be called the same, and then the name alone says nothing."""
    other = Bundle.open(place_of("mini")).manifest.plan("ungated")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**other.to_json(), "name": "default", "baselines": []}))
    session = Session(mini.bundle, plans=["default", str(file)], threads=1)
    for plan in ("default", None):
        with pytest.raises(Failure, match="with two plans called 'default'; give the file") as failure:
            Request(session, prompt=PROMPTS[0], plan=plan)
        assert failure.value.code == c.REQUEST
    drawn = Request(session, prompt=PROMPTS[0], plan=str(file), seed=3).run().latents()
    same(drawn, mini.wanted(PROMPTS[0], plan="ungated", seed=3).latents)
    alone = Session(mini.bundle, plans=[str(file)], threads=1)  # where there is one, it is meant
    same(Request(alone, prompt=PROMPTS[0], seed=3).run().latents(), drawn)


def test_what_a_batch_refuses(mini: Twins) -> None:
    pool = mini.pool(3, plans=PLANS)
    one, other = (mini.request(PROMPTS[0], pool=pool, plan=plan) for plan in ("default", "guidance_stopped"))
    elsewhere = mini.request(PROMPTS[0])
    while one.progress()[2] == other.progress()[2]:
        batch([one, other])
    before = one.progress()
    for requests, code, says in (
        ([one, other], c.REQUEST, "run one graph; got"),
        ([one, elsewhere], c.REQUEST, "of different pools"),
        ([one, one], c.ARGUMENT, "twice in a batch"),
    ):
        with pytest.raises(Failure, match=says) as failure:
            batch(requests)
        assert failure.value.code == code
    assert one.progress() == before
    one.run()
    with pytest.raises(Failure, match="at its end"):
        batch([one])


def test_a_pool_has_the_room_that_was_said(mini: Twins) -> None:
    path = place_of("mini")
    manifest = Bundle.open(path).manifest
    for plan in PLANS:
        for images in (1, 3):
            said = mini.bundle.memory(plan, images=images)
            wanted = memory(manifest.plans[plan], manifest, manifest.shapes[0], batch=images)
            assert said == wanted
            assert mini.pool(images, plans=[plan]).bytes == wanted["request"]
    pool = mini.pool(2)
    requests = [mini.request(PROMPTS[0], pool=pool) for _ in range(2)]
    with pytest.raises(Failure, match="room for 0 more images, got 1") as failure:
        mini.request(PROMPTS[0], pool=pool)
    assert failure.value.code == c.REQUEST
    requests.pop().close()
    assert pool.room == 1
    with pytest.raises(Failure, match="none of the pool's: default"):
        mini.request(PROMPTS[0], pool=pool, plan="ungated")
    assert pool.room == 1


def test_a_callback_stops_a_request(mini: Twins) -> None:
    request = mini.request(PROMPTS[0], on_step=lambda done, _: done < 3)
    with pytest.raises(Failure) as failure:
        request.run()
    assert failure.value.code == c.CANCELLED
    assert request.progress()[0] == 3
    with pytest.raises(Failure) as failure:
        request.step()
    assert failure.value.code == c.CANCELLED


def test_a_callback_may_step_requests_of_another_pool(mini: Twins, alone: dict[int, Any]) -> None:
    """More of them than there are in the batch that it is called from, whose list has to stay as it is."""
    several = [mini.request(PROMPTS[i], pool=pool, seed=i) for pool in [mini.pool(9)] for i in range(4)]
    others: list[Any] = []

    def hear(done: int, total: int) -> bool:
        batch(several)
        with pytest.raises(Failure, match="in use, by another thread or from a callback") as failure:
            others[0].step()
        with pytest.raises(Failure, match="in use, by another thread or from a callback"):
            batch(others[:1])
        return failure.value.code == c.ARGUMENT

    pool = mini.pool(3)
    others += [mini.request(pool=pool, on_step=hear if i == 0 else None, **asked(0)) for i in range(3)]
    while others[0].progress()[2] is not None:
        assert batch(others) == [0, 0, 0]
        assert len({request.progress()[0] for request in (*others, *several)}) == 1
    for request in others:
        same(request.latents(), alone[0])
    same(several[3].latents(), mini.wanted(PROMPTS[3], seed=3).latents)


def test_cancelled_from_another_thread_in_the_middle_of_a_step(library: Library) -> None:
    twins = Twins(library, place_of("mini"), ["default"])
    images = 4
    pool = twins.pool(images)
    request = twins.request(PROMPTS[0], images=images, pool=pool)
    begin = time.perf_counter()
    request.run()
    whole = time.perf_counter() - begin
    for part in (0.1, 0.5):
        request.reset(prompt=PROMPTS[1], images=images)
        timer = threading.Timer(part * whole, request.cancel)
        timer.start()
        with pytest.raises(Failure) as failure:
            request.run()
        timer.join()
        assert failure.value.code == c.CANCELLED
        assert request.progress()[0] < 25
    request.reset(prompt=PROMPTS[0], images=images)
    same(request.run().latents(), twins.wanted(PROMPTS[0], images=images, seed=0).latents)


def test_one_of_a_batch_is_cancelled_and_the_others_are_not_touched(mini: Twins) -> None:
    pool = mini.pool(3)
    requests = [mini.request(PROMPTS[i], pool=pool, seed=i) for i in range(3)]
    for step in range(25):
        if step == 7:
            requests[1].cancel()
        stopped = batch(requests)
        assert stopped == [0, int(step >= 7), 0]
    for i in (0, 2):
        same(requests[i].latents(), mini.wanted(PROMPTS[i], seed=i).latents)
    assert requests[1].progress()[0] == 7


def test_latents_are_decoded_beside_the_thread_that_steps(mini: Twins) -> None:
    library, finished = mini.session.library, mini.request(PROMPTS[0], seed=1).run()
    latents, running = finished.latents(), mini.request(PROMPTS[1])
    seen: list[NDArray[np.uint8]] = []
    thread = threading.Thread(target=lambda: seen.append(mini.session.decode(latents[0])))
    thread.start()
    running.run()
    thread.join()
    same(seen[0], finished.decode())
    out, rows = (ctypes.c_uint8 * 49152)(), np.ascontiguousarray(latents[0])
    numbers = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    for size, count, room, code, says in (
        (None, rows.size - 1, 49152, c.ARGUMENT, "latents of 128x128 are 1024 numbers, got 1023"),
        (None, rows.size, 49151, c.ARGUMENT, "a picture takes 49152 bytes, got room for 49151"),
        (b"1x1", rows.size, 49152, c.REQUEST, "size '1x1' is not loaded"),
    ):
        arguments = (mini.session.handle, size, numbers, ctypes.c_size_t(count), out, ctypes.c_size_t(room))
        with pytest.raises(Failure, match=says) as failure:
            library.call("session_decode", *arguments)
        assert failure.value.code == code
    rows[:] = np.inf
    with pytest.raises(Failure, match="the latents must be finite"):
        mini.session.decode(rows)


def test_begun_anew(mini: Twins) -> None:
    """Everything but plan, size and number of images may be another's; what was there before leaves no trace."""
    request = mini.request(PROMPTS[0], seed=1, plan="ungated").run()
    for asked_for in ({"seed": 2}, {"seed": 2, "negative_prompt": PROMPTS[2]}, {"seed": 3, "guidance_scale": 2.0}):
        request.step()
        request.reset(prompt=PROMPTS[1], **asked_for)
        same(request.run().latents(), mini.wanted(PROMPTS[1], plan="ungated", **asked_for).latents)
    with pytest.raises(Failure, match="the plan and the images that it was made with"):
        request.reset(prompt=PROMPTS[0], plan="default")
    with pytest.raises(Failure, match="the plan and the images that it was made with"):
        request.reset(prompt=PROMPTS[0], images=2)


def test_token_ids_are_as_good_as_a_prompt(mini: Twins) -> None:
    tokenizer = mini.python._encoder._text._tokenizers[0]  # type: ignore[union-attr]
    ids, none = ([tokenizer.encode(text).ids] for text in (PROMPTS[3], ""))
    same(mini.draw(ids=ids, negative_ids=none, seed=2), mini.draw(PROMPTS[3], seed=2))
    with pytest.raises(Failure, match="give negative_ids beside ids"):
        mini.draw(ids=ids)
    with pytest.raises(Failure, match="tokenizer 0 has a length of 120, got 121 ids"):
        mini.draw(ids=[[1] * 121], negative_ids=none)
    with pytest.raises(Failure, match="has 1 tokenizers, got ids of 2"):
        mini.draw(ids=ids * 2)


def test_what_of_a_prompt_does_not_fit(mini: Twins) -> None:
    long = "a red circle and " * 100
    request = mini.request(long)
    assert request.cut() == mini.python._encoder._text.encode(long).cut != ""  # type: ignore[union-attr]
    request.reset(prompt=PROMPTS[0])
    assert request.cut() == ""


@pytest.mark.parametrize(
    ("asked_for", "says"),
    [
        ({}, "give prompt, ids, or tensors, and nothing else; got 0"),
        ({"prompt": "a", "tensors": {"prompt_embeds.positive": np.zeros(3, np.float32)}}, "nothing else; got 2"),
        ({"picture": np.zeros((128, 128, 3), np.uint8)}, "is conditioned by a prompt"),
        ({"prompt": "a", "guidance_scale": 1.0}, "takes a scale above 1, got 1.0"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "must be finite and at most 1000000, got nan"),
        ({"prompt": "a", "guidance_scale": float("-inf")}, "must be finite and at most 1000000, got -inf"),
        ({"prompt": "a", "guidance_scale": 1e300}, "must be finite"),
        ({"prompt": "a", "seed": 2**63}, "must be below"),
        ({"prompt": "a", "seed": 2**63 - 1, "images": 2}, "must be below"),
        ({"prompt": "a", "images": 0}, "the number of images must be 1 to 65536, got 0"),
        ({"prompt": "a", "images": 2**63}, "the number of images must be 1 to 65536"),
        ({"prompt": "a", "plan": "none"}, "no plan"),
        ({"prompt": "a", "image_size": "1x1"}, "size '1x1' is not loaded; there is 128x128"),
        ({"prompt": "a", "generator": "mt19937"}, "numpy"),
        ({"prompt": b"\xff"}, "UTF-8|Unicode"),
        ({"prompt": b"\xed\xa0\x80"}, "UTF-8|Unicode"),
        ({"prompt": "a" * 2**16}, "characters"),
        ({"prompt": "a", "initial_latents": np.zeros(5, np.float32)}, "initial latents must be"),
        ({"tensors": {"other": np.zeros(3, np.float32)}}, "other|is not given"),
    ],
)
def test_what_a_request_refuses(mini: Twins, asked_for: dict[str, Any], says: str) -> None:
    with pytest.raises(Failure, match=says) as failure:
        mini.request(**asked_for)
    assert failure.value.code in (c.REQUEST, c.BUNDLE)
    assert "\n" not in str(failure.value)


def test_a_prompt_and_a_picture_at_once_are_brought_as_tensors(library: Library, tmp_path: Path) -> None:
    both = Twins(library, build(tmp_path / "toy", Toy(sees=True), goldens=False))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    wrong: list[dict[str, Any]] = [{"prompt": "a"}, {"picture": pixels}, {"prompt": "a", "picture": pixels}, {}]
    for given in wrong:
        with pytest.raises(Failure, match=r"by a prompt and a picture at once, .*: give tensors that hold what both"):
            both.request(**given)
    text = TextEncoder(both.python.session).encode(PROMPTS[0]).tensors["text"]
    pooled = (pixels.transpose(2, 0, 1).ravel()[-4:] / np.float32(255))[np.newaxis]
    tensors = {"text.positive": text, "text.negative": np.zeros_like(text)}
    tensors |= {f"pooled.{half}": pooled for half in ("positive", "negative")}
    wanted = both.python(PROMPTS[0], image=Image.fromarray(pixels), seed=3).latents
    same(both.draw(tensors=tensors, seed=3), wanted)


def test_numbers_that_are_not_finite(mini: Twins) -> None:
    shape = mini.python.session.shapes()[0].latents
    start = np.zeros((1, *shape), np.float32)
    start[0, 0, 0, 0] = np.nan
    with pytest.raises(Failure, match="initial latents must be finite"):
        mini.request("a", initial_latents=start)
    tensors = {name: np.zeros((1, *dims), np.float32) for name, dims in mini.bundle.tensors().items()}
    tensors["prompt_embeds.positive"][0, 0, 0] = np.inf
    with pytest.raises(Failure, match=r"conditioning prompt_embeds.positive must be finite"):
        mini.request(tensors=tensors)
    tensors["prompt_embeds.positive"][0, 0, 0] = 3e38  # finite, but what is made of it is not
    tensors["prompt_embeds.positive"][0, 1, 0] = -3e38
    request = mini.request(tensors=tensors)
    with pytest.raises(Failure, match="not finite") as failure:
        request.run()
    assert failure.value.code == c.ENGINE
    with pytest.raises(Failure, match="not finite"):
        request.decode()
