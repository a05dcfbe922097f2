"""Arguments of another kind than they should be end in one line of ours, wherever they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy_bundle import Toy, build
from tests.toy_model import LATENTS
from tgate_engine.errors import TgateError
from tgate_runtime.conditioning import conditioning_of
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.runner import run
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_runtime.text import TextEncoder

ODD: list[Any] = [5, -1, 10**400, 1.5, 1j, True, b"default", "other", "", "\udcff", Path("no\0"), Path("/nope"), None]
ODD += [[], ["default"], [[1]], [[1], [1, 2]], {}, {"a": 1}, {5: [1]}, object(), np.zeros(3), np.zeros((2, 2)), range]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("kinds") / "toy", Toy())


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as opened:
        yield opened


def leaks(call: Callable[[Any], object]) -> list[str]:
    """What comes out for odd values that is no line of ours."""
    found = []
    for value in ODD:
        try:
            call(value)
        except TgateError as error:
            line = str(error)
            if not line.isprintable() or len(line) > 1500:
                found.append(f"{value!r:.40}: {line:.100}")
        except Exception as error:
            found.append(f"{value!r:.40}: {type(error).__name__}: {error!s:.100}")
    return found


DRAWN = ("prompt", "image", "prompt_embeds", "seed", "negative_prompt", "guidance_scale", "plan", "size", "num_images")
DRAWN_WITH = (*DRAWN, "initial_latents", "generator", "decoder")


@pytest.mark.parametrize("name", DRAWN_WITH)
def test_of_a_pipeline(pipe: Pipeline, name: str) -> None:
    usual = {} if name in ("image", "prompt_embeds") else {"prompt": "a", "seed": 1}
    assert leaks(lambda value: pipe(**{**usual, name: value})) == []


def test_what_hears_of_steps_is_asked_before_the_first(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "_denoise", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(TgateError, match="on_step must be a function, got int 5"):
        pipe("a", on_step=5)  # type: ignore[arg-type]


OPENED = ("source", "engine", "plans", "sizes", "on_build", "check_digests")
OPTIONS = ("threads", "device", "architecture", "precision", "memory", "build")


@pytest.mark.parametrize("name", OPENED + OPTIONS)
def test_of_a_session_that_is_opened(bundle: Path, name: str) -> None:
    assert leaks(lambda value: Session.open(**{"source": bundle, "threads": 1, name: value}).close()) == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("plans", "default", r"plans must be a list, got str default; write plans=\[…\]"),
        ("sizes", "4x4", r"sizes must be a list, got str 4x4; write sizes=\[…\]"),
        ("sizes", [4], 'a size is a text such as "832x1216", got int 4'),
        ("plans", [5], "a plan is a name, a Plan or a plan file, got int 5"),
        ("engine", 5, "an engine is a name, or what open_engine gave, got int 5"),
        ("source", 5, "a bundle is a directory, got int 5"),
        ("on_build", 5, "on_build must be a function, got int 5"),
        ("check_digests", "no", "check_digests must be True or False, got no"),
    ],
)
def test_what_is_said_of_it(bundle: Path, name: str, value: Any, says: str) -> None:
    with pytest.raises(TgateError, match=says):
        Session.open(**{"source": bundle, name: value})


def test_of_a_session(pipe: Pipeline) -> None:
    with pytest.raises(TgateError, match="a plan is a name, a Plan or a plan file, got int 5"):
        pipe("a", plan=5)  # type: ignore[arg-type]
    for call in (pipe.session.plan, pipe.session.shapes):
        assert leaks(call) == []
    assert leaks(lambda value: pipe.session.graph("text", value)) == []


def state_of(pipe: Pipeline, rows: int = 2) -> State:
    return State(pipe.session, pipe.session.plan("default"), rows)


def conditioning(pipe: Pipeline) -> dict[str, Any]:
    text = TextEncoder(pipe.session)
    return conditioning_of(pipe.session, text.encode("a").tensors, text.encode("").tensors)


@pytest.mark.parametrize("name", ["plans", "rows", "size"])
def test_of_a_state(pipe: Pipeline, name: str) -> None:
    usual = {"session": pipe.session, "plans": pipe.session.plan("default")}
    assert leaks(lambda value: State(**{**usual, name: value})) == []


@pytest.mark.parametrize("name", ["row", "noise", "conditioning", "guidance_scale", "plan", "step_noise"])
def test_of_an_image_that_begins(pipe: Pipeline, name: str) -> None:
    state, rows = state_of(pipe), {name: values[0] for name, values in conditioning(pipe).items()}
    usual: dict[str, Any] = {
        "row": 0,
        "noise": np.zeros(LATENTS, np.float32),
        "conditioning": rows,
        "guidance_scale": 3.0,
    }
    state.begin(**usual)
    assert leaks(lambda value: state.begin(**{**usual, name: value})) == []


@pytest.mark.parametrize("name", ["step", "latents", "history", "take", "turn"])
def test_of_rows(pipe: Pipeline, name: str) -> None:
    assert leaks(getattr(state_of(pipe), name)) == []


def test_of_latents_in_place_of_others(pipe: Pipeline) -> None:
    state = state_of(pipe)
    assert leaks(lambda value: state.replace_latents(value, np.zeros(LATENTS, np.float32))) == []
    assert leaks(lambda value: state.replace_latents(0, value)) == []


@pytest.mark.parametrize("name", ["latents", "conditioning", "guidance_scale", "step_noise", "plan"])
def test_of_a_run(pipe: Pipeline, name: str) -> None:
    start = np.zeros((1, *LATENTS), np.float32)
    usual: dict[str, Any] = {"latents": start, "conditioning": conditioning(pipe), "guidance_scale": 3.0}
    assert leaks(lambda value: list(run(state_of(pipe, 1), **{**usual, name: value}))) == []
