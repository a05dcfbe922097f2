"""What a picture was drawn from: as JSON and back, from strangers too; the plan it was drawn by; what differs."""

from __future__ import annotations

import hashlib
import json
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.runtime.records import PROMPTS, record
from tests.toy_bundle import Toy, build, make_plan
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.manifest import Manifest
from tgate_export.methods.base import Settings
from tgate_export.plans import add_plan
from tgate_runtime.record import (
    EngineRecord,
    PlanRecord,
    Record,
    digest_of_arrays,
    digest_of_plan,
    digests_of_given,
    parse_record,
    plan_for,
    rows_with,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle. Read only."""
    settings = {"default": Settings(steps=8, gate=5, self_interval=2), "fast": Settings(steps=6, gate=2)}
    return build(tmp_path_factory.mktemp("record") / "toy", Toy(settings=settings), goldens=False)


@pytest.fixture
def manifest(place: Path) -> Manifest:
    return Bundle.open(place).manifest


# --- as JSON ------------------------------------------------------------------------------------


def test_what_a_record_need_not_say_is_not_in_its_json() -> None:
    usual = record()
    assert not {"strength", "decoder", "loras"} & usual.to_json().keys()
    small = replace(usual, decoder="preview")
    assert small.to_json() == {**usual.to_json(), "decoder": "preview"}
    assert parse_record(json.dumps(small.to_json()), "x") == small
    assert (usual.request()["decoder"], small.request()["decoder"]) == (None, "preview")
    for odd in ("full", "", None, 1, ["preview"]):
        with pytest.raises(RequestError, match="decoder"):
            parse_record(json.dumps({**usual.to_json(), "decoder": odd}), "x")


@pytest.mark.parametrize("prompt", [*PROMPTS.values(), None])
def test_a_record_there_and_back(prompt: str | None) -> None:
    of = record(prompt=prompt, negative_prompt=prompt, guidance_scale=0.1 + 0.2, given={"image": "0f" * 32})
    for ascii_only in (True, False):
        assert parse_record(json.dumps(of.to_json(), ensure_ascii=ascii_only), "x") == of
    assert "/" not in json.dumps({**of.to_json(), "prompt": "", "negative_prompt": ""})


def changed(*path: str, to: Any) -> str:
    data = record(given={"image": "0f" * 32}).to_json()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(data)


def leaves(data: Any, *path: str) -> list[tuple[str, ...]]:
    if not isinstance(data, dict):
        return [path]
    return [path, *(leaf for key, value in data.items() for leaf in leaves(value, *(*path, key)))]


PLACES = [path for path in leaves(record(given={"image": "0f" * 32}).to_json()) if path]
FREE = {("plan", "settings", key) for key in ("method", "n", "m", "k", "w", "f")}
FREE_VALUES = (0, 1, 2, 5, 6, 7, 8, 9)
"""Facts: of any kind that is none of JSON's containers."""


VALUES: tuple[Any, ...] = (None, True, -1, 2**63, 10**400, 1e308, "", "x", "\x1b[2J\n", "x" * 300, [], {}, {"a": {}})
TAKEN: dict[tuple[str, ...], tuple[int, ...]] = {
    ("prompt",): (0, 6, 7, 8, 9),
    ("negative_prompt",): (0, 6, 7, 8, 9),
    ("model",): (6, 7, 8, 9),
    ("generator",): (7,),
    ("guidance_scale",): (2,),
    ("version",): (7,),
    ("given",): (11,),
    ("plan", "name"): (7,),
    ("plan", "sampler"): (7,),
    ("plan", "settings"): (11,),
    ("engine", "name"): (7,),
    ("engine", "version"): (7,),
    ("engine", "precision"): (6, 7, 8, 9),
}
"""Which of the values are fine in which place."""


@pytest.mark.parametrize("path", PLACES, ids=".".join)
def test_every_place_with_every_other_value(path: tuple[str, ...]) -> None:
    """It ends in one line, or is a record whose own JSON comes back."""
    for i, value in enumerate(VALUES):
        text = changed(*path, to=value)
        if i in TAKEN.get(path, FREE_VALUES if path in FREE else ()):
            got = parse_record(text, "x")
            assert parse_record(json.dumps(got.to_json()), "x") == got
            continue
        with pytest.raises(RequestError) as caught:
            parse_record(text, "x")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
        assert "export the bundle" not in str(caught.value)


@pytest.mark.parametrize("path", PLACES, ids=".".join)
def test_nothing_may_be_missing(path: tuple[str, ...]) -> None:
    data = record(given={"image": "0f" * 32}).to_json()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    if path in FREE or (path[0] == "given" and len(path) == 2):
        parse_record(json.dumps(data), "x")
        return
    with pytest.raises(RequestError, match=f"record in x.*{path[-1]!r} is missing; draw the picture anew"):
        parse_record(json.dumps(data), "x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("[]", "expected an object, got list"),
        ('{"form": 1, "form": 1}', "twice"),
        ("{" * 10**5, "is not JSON"),
        (b"\xff", "is not JSON"),
        (changed("form", to=2), "has form 2, this tgate-engine reads form 1; update tgate-engine"),
        (changed("size", to="0x5"), "expected WIDTHxHEIGHT, got '0x5'"),
        (changed("bundle", to="2B" * 32), "expected 64 hexadecimal digits"),
        (
            changed("given", to={"paths": "0f" * 32}),
            "expected image, mask, initial_latents, prompt_embeds, ip_adapter_image, got 'paths'",
        ),
        (changed("plan", "settings", to={str(i): 1 for i in range(65)}), "plan.settings: expected at most 64, got 65"),
        (changed("seed", to=1.5), "expected int, got 1.5; draw the picture anew"),
        ("x" * 2**21, "of at most 1048576"),
    ],
)
def test_what_is_no_record_is_told_in_one_line(text: str | bytes, says: str) -> None:
    with pytest.raises(RequestError, match=r"the record in x\.png") as caught:
        parse_record(text, "x.png")
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


# --- the plan -----------------------------------------------------------------------------------


def of_plan(manifest: Manifest, like: str, **fields: Any) -> Record:
    return record(plan=replace(PlanRecord.of(manifest.plan(like)), **fields))


def test_a_plan_is_found_by_what_it_does_whatever_it_is_called(manifest: Manifest) -> None:
    assert plan_for(of_plan(manifest, "fast"), manifest) is manifest.plans["fast"]
    assert plan_for(of_plan(manifest, "fast", name="mine"), manifest) is manifest.plans["fast"]
    twins = {**manifest.plans, "twin": replace(manifest.plans["fast"], name="twin", guidance_scale=9.0)}
    both = replace(manifest, plans=twins)
    assert plan_for(of_plan(manifest, "fast", name="twin"), both).name == "twin"
    assert plan_for(of_plan(manifest, "fast"), both).name == "fast"


def test_the_digest_is_of_all_that_a_plan_does_and_of_no_name(manifest: Manifest) -> None:
    plan = manifest.plans["fast"]
    *_, last = plan.sampler.calls
    others = [
        replace(plan, steps=(*plan.steps[:-1], replace(plan.steps[-1], graph="full"))),
        replace(plan, steps=(*plan.steps[:-1], replace(plan.steps[-1], reads=()))),
        replace(plan, steps=(replace(plan.steps[0], writes=("cross.0",)), *plan.steps[1:])),
        replace(plan, steps=plan.steps[:-1]),
        replace(plan, sampler=replace(plan.sampler, initial_scale=1.0)),
        *(
            replace(plan, steps=(*plan.steps[:-1], replace(plan.steps[-1], call=call)))
            for call in (
                replace(last, timestep=1.0),
                replace(last, input_scale=0.1),
                replace(last, noise=0.5),
                replace(last, latents=(0.8, 0, 0, 0)),
                replace(last, outputs=(0.1, 0, 0, 0)),
            )
        ),
    ]
    digests = {digest_of_plan(other) for other in [plan, *others]}
    assert len(digests) == len(others) + 1
    named = replace(plan.sampler, name="another", options={}, prediction_type="unstated")
    same = replace(plan, name="x", settings={}, baselines=(), guidance_scale=1.5, sampler=named)
    assert digest_of_plan(same) == digest_of_plan(plan)


def test_the_command_that_a_refusal_names_adds_the_plan(tmp_path: Path) -> None:
    """What it says is run, and then the picture's plan is there."""
    settings = Settings(steps=7, gate=4, self_interval=3, warm_up=1)
    drawn = make_plan("my plan", settings, Toy(), Bundle.open(build(tmp_path / "a")).manifest.shapes[0].graphs)
    of = record(plan=PlanRecord.of(drawn))
    manifest = Bundle.open(tmp_path / "a").manifest
    with pytest.raises(RequestError, match="the picture was drawn by plan 'my plan' \\(tgate, n=7, m=4") as caught:
        plan_for(of, manifest)
    (command,) = str(caught.value).split("`")[1::2]
    words = shlex.split(command)
    assert words[:5] == ["tgate", "plan", "BUNDLE", "--name", "my plan"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    added = add_plan(
        tmp_path / "a",
        name=options["--name"],
        m=int(options["--m"]),
        k=int(options["--k"]),
        steps=int(options["--steps"]),
        warm_up=int(options["--warm-up"]),
        fidelity_interval=int(options["--fidelity-interval"]),
        sampler=options["--sampler"],
    )
    assert plan_for(of, Bundle.open(tmp_path / "a").manifest) == added["my plan"]


def test_the_command_of_a_plan_with_forecasts_names_them(tmp_path: Path) -> None:
    drawn = add_plan(build(tmp_path / "a"), name="quick", m=4, steps=8, forecast_interval=2)["quick"]
    manifest = Bundle.open(build(tmp_path / "b")).manifest
    with pytest.raises(RequestError, match=r"'quick' \(tgate, n=8, m=4, .*r=2, .*--forecast 2"):
        plan_for(record(plan=PlanRecord.of(drawn)), manifest)


def test_a_plan_of_that_name_that_is_another_is_told(manifest: Manifest) -> None:
    with pytest.raises(RequestError, match=r"none like it, but another 'fast' \(tgate, n=6, m=2.*--name fast-again"):
        plan_for(of_plan(manifest, "fast", digest="0" * 64), manifest)
    with pytest.raises(RequestError, match=r"has none like it: --plan takes one of default, fast, .*ungated"):
        plan_for(of_plan(manifest, "ungated", digest="0" * 64, name="x"), manifest)


def test_a_strangers_plan_is_no_command_of_a_shell(manifest: Manifest) -> None:
    evil = of_plan(
        manifest,
        "fast",
        digest="0" * 64,
        name="x; rm -rf ~ $(id) `id`",
        sampler="'; id",
        settings={"method": "tgate", "m": 2, "n": "6; id", "k": True, "$(id)": 3},
    )
    with pytest.raises(RequestError) as caught:
        plan_for(evil, manifest)
    command = str(caught.value).partition("`tgate")[2].rpartition("` adds it")[0]
    assert shlex.split(f"tgate{command}") == [
        *("tgate", "plan", "BUNDLE", "--name", "x; rm -rf ~ $(id) `id`"),
        *("--m", "2", "--sampler", "'; id"),
    ]


# --- what differs, and what was given -----------------------------------------------------------


def test_what_differs_is_told_by_name() -> None:
    of = record(given={"image": "0f" * 32})
    assert of.differences(of) == []
    other = replace(
        of,
        bundle="9e" * 32,
        engine=EngineRecord(name="openvino", version="2026.2", precision=""),
        version="0.2\x1b",
        given={},
        plan=replace(of.plan, name="the same by another name"),
        prompt="what is asked for is no difference",
        seed=8,
    )
    assert of.differences(other) == [
        "bundle 9e9e9e9e9e9e9e9e… instead of 2b2b2b2b2b2b2b2b…",
        "engine openvino 2026.2 instead of ort-cpu 1.31.1 f32",
        "tgate-engine 0.2\\x1b instead of 0.1.0",
        "image none instead of 0f0f0f0f0f0f0f0f…",
    ]
    (plan,) = of.differences(replace(of, plan=replace(of.plan, name="p", digest="3d" * 32)))
    assert plan.startswith("plan 'p' (tgate, n=25")


def test_the_digest_of_an_array_is_of_its_form_and_numbers() -> None:
    """Against the bytes written out; the same on machines of either byte order."""
    expected = hashlib.sha256(b" <f4 (2,)\n" + struct.pack("<2f", 1, -2)).hexdigest()
    for values in (np.array([1, -2], "<f4"), np.array([1, -2], ">f4"), np.array([1, 0, -2, 0], "f4")[::2]):
        assert digest_of_arrays({"": values}) == expected
    two = {"b": np.zeros(2), "a": np.ones(1)}
    assert digest_of_arrays(two) == digest_of_arrays(dict(reversed(two.items())))
    others: list[dict[str, NDArray[Any]]] = [
        {"a": np.zeros(2)},
        {"b": np.zeros((2, 1))},
        {"b": np.zeros(2, "f4")},
        {"b": np.array([0, -0.0])},
    ]
    assert len({digest_of_arrays(each) for each in others}) == 4


def test_every_image_has_its_own_rows() -> None:
    latents = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    embeds: dict[str, Any] = {
        "a": np.arange(4.0).reshape(2, 2),
        "b": np.ones((2, 1)),
        "fewer": np.ones(1),
        "none": np.float64(1),
    }
    given = digests_of_given(4, initial_latents=latents, prompt_embeds=embeds)
    alone = [
        digests_of_given(
            1, initial_latents=latents[j : j + 1], prompt_embeds={k: embeds[k][j // 2 : j // 2 + 1] for k in "ab"}
        )
        for j in range(4)
    ]
    assert [given[j] for j in range(4)] == [each for (each,) in alone]
    assert len({each["initial_latents"] for each in given}) == 4
    assert [each["prompt_embeds"] for each in given] == [given[0]["prompt_embeds"]] * 2 + [
        given[2]["prompt_embeds"]
    ] * 2
    np.testing.assert_array_equal(rows_with(given[2]["initial_latents"], {"": latents})[""], latents[2:3])
    assert rows_with(given[2]["prompt_embeds"], embeds)["a"].tolist() == [[2, 3]]
    assert rows_with("0" * 64, embeds) is embeds


def test_an_image_counts_by_its_pixels() -> None:
    image = Image.new("L", (2, 1), 9)
    (one, other) = digests_of_given(2, image=image)
    assert one == other == digests_of_given(1, image=image.convert("RGB"))[0]
    assert one != digests_of_given(1, image=Image.new("RGB", (1, 2), (9, 9, 9)))[0]
    assert digests_of_given(1) == [{}]
