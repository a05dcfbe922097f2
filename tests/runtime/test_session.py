"""A session: what it loads, what it lends, and what it does not let through."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.pictures import planned
from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, EngineError, PlanError, RequestError
from tgate_engine.graph import DECODE, IMAGE, TEXT, GraphSpec
from tgate_export.methods.base import Settings
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.ort import OrtCpu, OrtExecutable
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session, graphs_of, plan_of, shapes_of

SIZES = Toy(
    sizes=((4, 4), (8, 2)),
    batches=((1, 1), (3, 4)),
    settings={"default": Settings(steps=8, gate=5, self_interval=2), "fast": Settings(steps=3, gate=2)},
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two sizes, two ranges of batches, two plans with their baselines."""
    return Bundle.open(build(tmp_path_factory.mktemp("session") / "toy", SIZES))


@pytest.fixture
def own(toy_path: Path) -> Iterator[Session]:
    with Session.open(toy_path, plans=["ungated"], threads=1) as opened:
        yield opened


@pytest.fixture
def damaged(toy_path: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(toy_path, tmp_path / "toy"))


def files(specs: Sequence[GraphSpec]) -> list[str]:
    return [spec.file for spec in specs]


# --- what is loaded -----------------------------------------------------------------------------


def test_everything_is_loaded_where_nothing_is_named(bundle: Bundle) -> None:
    graphs = graphs_of(bundle)
    assert len(files(graphs)) == len(set(files(graphs)))
    used = {"full", "reuse_self", "reuse_cross", "unguided"}
    batches = ("-batch-1-1", "-batch-3-4")
    denoisers = {f"{name}{size}{batch}.onnx" for name in used for size in ("", "-8x2") for batch in batches}
    assert set(files(graphs)) == denoisers | {"text.onnx", "decoder.onnx", "decoder-8x2.onnx"}


def test_a_plan_brings_its_graphs_and_those_around_it(bundle: Bundle) -> None:
    assert files(graphs_of(bundle, ["ungated"], ["8x2"])) == [
        "full-8x2-batch-1-1.onnx",
        "text.onnx",
        "decoder-8x2.onnx",
        "full-8x2-batch-3-4.onnx",
    ]
    assert files(graphs_of(bundle, [], ["4x4"])) == ["text.onnx", "decoder.onnx"]
    plan = bundle.manifest.plan("guidance_stopped")
    assert files(graphs_of(bundle, [plan], ["4x4"])) == files(graphs_of(bundle, ["guidance_stopped"], ["4x4"]))


def test_a_session_has_the_sizes_that_it_was_opened_for(bundle: Bundle) -> None:
    with Session.open(bundle, plans=["ungated"], threads=1) as both:
        assert both.sizes == ("4x4", "8x2")
        assert [shape.batch for shape in both.shapes()] == [(1, 1), (3, 4)]
        assert both.shapes("8x2")[0].latents == (2, 2, 8)
        decoder = both.graph(DECODE, "8x2")
        assert decoder is not None
        assert decoder.file == "decoder-8x2.onnx"
        assert both.graph(IMAGE) is None
    with Session.open(bundle, plans=["ungated"], sizes=["8x2"], threads=1) as one:
        assert one.sizes == ("8x2",)
        assert {shape.size for shape in one.shapes()} == {"8x2"}, "the only one is the default"
        with pytest.raises(RequestError) as error:
            one.shapes("4x4")
        assert str(error.value) == (
            "size '4x4' is not loaded; there is 8x2 (the bundle has 4x4, 8x2; export it with --size for more)"
        )
    with Session.open(bundle, plans=["ungated"], sizes=["8x2", "4x4", "8x2"], threads=1) as other:
        assert other.sizes == ("8x2", "4x4"), "in the order that they are named in"


def test_a_size_that_the_bundle_does_not_have(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="the bundle has no size 2x8; it has 4x4, 8x2"):
        shapes_of(bundle, ["4x4", "2x8"])
    with pytest.raises(BundleError, match="the bundle has no size 2x8"):
        Session.open(bundle, sizes=["2x8"])


def test_an_engine_may_be_opened_before(bundle: Bundle) -> None:
    engine = open_engine("ort-cpu", threads=1, memory="shared")
    with Session.open(bundle, engine=engine, plans=[]) as session:
        assert session.engine is engine
    with Session.open(bundle, threads=1, memory="fast", plans=[]) as session:
        assert session.engine.name == "ort-cpu"
        assert (session.engine.options.threads, session.engine.options.memory) == (1, "fast")
    with pytest.raises(EngineError, match="there is no engine 'magic'"):
        Session.open(bundle, engine="magic")


def test_a_plan_that_the_bundle_does_not_list(own: Session) -> None:
    plan = planned(own, steps=4, gate=2)
    with Session.open(own.bundle, plans=[plan], threads=1) as session:
        session.executable(session.shapes()[0].graphs["reuse_cross"])
    broken = replace(plan, steps=tuple(replace(step, writes=()) for step in plan.steps))
    with pytest.raises(PlanError, match="which no earlier step writes"):
        Session.open(own.bundle, plans=[broken])
    with pytest.raises(BundleError, match="has no plan 'slow'"):
        Session.open(own.bundle, plans=["slow"])


def test_a_plan_by_its_name_itself_or_a_file(own: Session, tmp_path: Path) -> None:
    manifest, plan = own.manifest, planned(own, name="own", steps=4, gate=2)
    file = tmp_path / "own.json"
    file.write_text(json.dumps(plan.to_json()))
    assert plan_of(manifest, plan) is plan
    assert plan_of(manifest, file) == plan_of(manifest, str(file)) == plan
    assert plan_of(manifest, "ungated") is manifest.plan("ungated")
    named = replace(manifest, plans={**manifest.plans, "x.json": plan})
    assert plan_of(named, "x.json") is plan, "a plan's name comes first"
    with pytest.raises(BundleError, match="has no plan 'own'"):
        plan_of(manifest, "own")
    with pytest.raises(PlanError, match=r"x\.json: there is no such plan file"):
        plan_of(manifest, str(tmp_path / "x.json"))
    assert files(graphs_of(own.bundle, [file])) == files(graphs_of(own.bundle, [plan]))


def test_what_is_not_loaded_says_how_to(own: Session) -> None:
    graphs = own.shapes()[0].graphs
    text = own.graph(TEXT)
    assert text is not None
    assert isinstance(own.executable(text), OrtExecutable)
    with pytest.raises(EngineError) as error:
        own.executable(graphs["reuse_cross"])
    assert str(error.value) == (
        "graph reuse_cross.onnx is not loaded (loaded: full.onnx, text.onnx, decoder.onnx); name its plan in "
        "Session.open(plans=...)"
    )


def test_a_closed_session_stays_closed(toy_path: Path) -> None:
    session = Session.open(toy_path, plans=[], threads=1)
    text = session.graph(TEXT)
    assert text is not None
    session.close()
    session.close()
    with pytest.raises(EngineError, match=r"the session of .* is closed; open another one"):
        session.executable(text)


# --- what waits for the next request ------------------------------------------------------------


class Made:
    """What a borrower gets: each with a number."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def borrowed(session: Session, make: Made, key: str = "key") -> int:
    with session.borrow(key, make) as item:
        return item


def test_what_is_given_back_is_given_out_again(own: Session) -> None:
    make = Made()
    assert [borrowed(own, make) for _ in range(3)] == [1, 1, 1]
    assert borrowed(own, make, "other key") == 2
    assert borrowed(own, make) == 1


def test_as_many_as_there_were_at_once(own: Session) -> None:
    make = Made()
    with own.borrow("key", make) as first, own.borrow("key", make) as second:
        assert {first, second} == {1, 2}
    with own.borrow("key", make) as first, own.borrow("key", make) as second:
        assert {first, second} == {1, 2}
    assert make.count == 2


@pytest.mark.parametrize("error", [RequestError("no"), KeyboardInterrupt(), ValueError(), GeneratorExit()])
def test_whatever_stops_a_request_gives_it_back(own: Session, error: BaseException) -> None:
    make = Made()
    with pytest.raises(type(error)), own.borrow("key", make):
        raise error
    assert borrowed(own, make) == 1


def test_after_an_engines_failure_it_is_dropped(own: Session) -> None:
    make = Made()
    with pytest.raises(EngineError), own.borrow("key", make):
        raise EngineError("out of memory")
    assert borrowed(own, make) == 2


def test_what_cannot_be_made_leaves_nothing(own: Session) -> None:
    def fail() -> int:
        raise EngineError("out of memory")

    with pytest.raises(EngineError), own.borrow("key", fail):
        pytest.fail("the block must not run")
    assert borrowed(own, Made()) == 1


def test_trimming_and_closing_free_what_waits(own: Session) -> None:
    make = Made()
    assert borrowed(own, make) == 1
    own.trim()
    assert borrowed(own, make) == 2
    with own.borrow("key", make) as item:
        assert item == 2
        own.close()
    assert borrowed(own, make) == 3, "nothing is kept by a closed session"
    assert borrowed(own, make) == 4


def test_threads_never_share_what_they_borrow(own: Session) -> None:
    in_use: set[int] = set()
    lock, make = threading.Lock(), Made()
    making = threading.Lock()

    def made() -> int:
        with making:
            return make()

    def request(_: int) -> None:
        for _ in range(50):
            with own.borrow("key", made) as item:
                with lock:
                    assert item not in in_use
                    in_use.add(item)
                with lock:
                    in_use.remove(item)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(request, range(8)))
    assert make.count <= 8


# --- bundles that are not what they say ---------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["tokenizers"][0].update(input="words"), r"'text' takes ids\.0, which nothing feeds"),
        (
            lambda d: d["conditioning"][0].update(name="words"),
            "takes text.negative, text.positive, which nothing feeds",
        ),
        (lambda d: graphs(d)["text"].update(role="decode"), r"'text' takes ids\.0, ids\.1, which nothing feeds"),
        (lambda d: d.update(weights=""), "exported with --weights none: it can be inspected, not run"),
    ],
)
def test_a_bundle_that_is_not_what_it_says_fails_when_opened(
    damaged: Path, edit: Callable[[Any], Any], says: str
) -> None:
    def plain(data: dict[str, Any]) -> None:
        data["plans"] = {"ungated": data["plans"]["ungated"]}
        data["goldens"] = {}
        edit(data)

    edit_manifest(damaged, plain)
    with pytest.raises(BundleError, match=says) as error:
        Session.open(damaged)
    assert "\n" not in str(error.value)


def graphs(data: dict[str, Any]) -> Any:
    return data["shapes"][0]["graphs"]


def test_a_damaged_graph_fails_when_opened(damaged: Path) -> None:
    (damaged / "full.onnx").write_bytes(b"x" * (damaged / "full.onnx").stat().st_size)
    with pytest.raises(BundleError, match=r"full\.onnx has SHA-256"):
        Session.open(damaged)
    with pytest.raises(BundleError, match=r"full\.onnx has SHA-256"):
        Session.open(damaged, check_digests=False)  # graphs are small, and always are what the manifest says


def test_an_open_bundle_is_not_read_again(own: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: pytest.fail("read again"))
    with Session.open(own.bundle, plans=[], threads=1) as session:
        assert session.bundle is own.bundle
        assert session.manifest is own.bundle.manifest


def test_an_engine_loads_what_is_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = OrtCpu.load

    def watched(self: OrtCpu, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: Any = None) -> Any:
        loaded.extend(spec.file for spec in graphs)
        return load(self, bundle, graphs, on_build)

    monkeypatch.setattr(OrtCpu, "load", watched)
    Session.open(bundle, plans=["ungated"], sizes=["4x4"], threads=1).close()
    assert loaded == ["full-batch-1-1.onnx", "text.onnx", "decoder.onnx", "full-batch-3-4.onnx"]


# --- plans of one name --------------------------------------------------------------------------


def test_a_name_means_the_plan_that_the_session_was_opened_with(bundle: Bundle) -> None:
    """Not the bundle's of that name, which is another one."""
    own = replace(bundle.manifest.plan("fast"), name="default")
    with Session.open(bundle, plans=[own], threads=1) as session:
        assert session.plan("default") is own
        assert session.plan(bundle.manifest.plan("default")) == bundle.manifest.plan("default")
        assert session.plan("fast") == bundle.manifest.plan("fast")
    with Session.open(bundle, threads=1, plans=[]) as session:
        assert session.plan("default") == bundle.manifest.plan("default")


def test_a_name_that_two_plans_of_a_session_have_means_neither(bundle: Bundle) -> None:
    default, other = bundle.manifest.plan("default"), replace(bundle.manifest.plan("fast"), name="default")
    with Session.open(bundle, plans=[default, other, default], threads=1) as session:
        with pytest.raises(RequestError, match="opened with 2 plans called 'default'; give the plan itself"):
            session.plan("default")
        assert session.plan(other) == other
    with Session.open(bundle, plans=[default, "default"], threads=1) as session:
        assert session.plan("default") == default


def test_a_picture_is_drawn_with_the_plan_that_was_opened(toy_path: Path) -> None:
    opened = Bundle.open(toy_path)
    own = replace(opened.manifest.plan("ungated"), name="default")
    with Pipeline.open(opened, plans=[own], threads=1) as named:
        got = named("a red cat", seed=3, plan="default").latents
    with Pipeline.open(opened, threads=1) as given:
        want = given("a red cat", seed=3, plan="ungated").latents
        other = given("a red cat", seed=3, plan="default").latents
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(want, other)


# --- a bundle that changes ----------------------------------------------------------------------


def test_weights_that_change_under_a_session_are_told(damaged: Path) -> None:
    """At the next request; a picture of other weights would be wrong, and pages that are gone would kill."""
    with Pipeline.open(damaged, threads=1, memory="shared") as pipe:
        pipe("a red cat", seed=3)
        weights = damaged / pipe.session.manifest.weights
        content = bytearray(weights.read_bytes())
        with weights.open("r+b") as file:
            file.seek(len(content) - 1)
            file.write(bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"weights\.safetensors was changed while it was in use"):
            pipe("a red cat", seed=3)


def test_a_bundle_that_is_replaced_leaves_its_sessions_alone(damaged: Path, toy_path: Path) -> None:
    with Pipeline.open(damaged, threads=1, memory="shared") as pipe:
        want = pipe("a red cat", seed=3).latents
        damaged.rename(damaged.with_name("old"))
        shutil.copytree(toy_path, damaged)
        shutil.rmtree(damaged.with_name("old"))
        np.testing.assert_array_equal(pipe("a red cat", seed=3).latents, want)


@pytest.mark.parametrize("name", ["full.onnx", "weights.safetensors"])
def test_a_file_that_is_exchanged_while_it_is_loaded_is_seen(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And put back before the engine is done."""
    load, path, away = OrtCpu.load, damaged / name, damaged.parent / "away"

    def exchanged(*args: Any) -> Any:
        loaded = load(*args)
        path.rename(away)
        shutil.copy(away, path)
        path.unlink()
        away.rename(path)
        return loaded

    monkeypatch.setattr(OrtCpu, "load", exchanged)
    with pytest.raises(BundleError, match=f"{name} was changed after it was checked; open the bundle again"):
        Session.open(damaged, threads=1)


def test_asking_whether_weights_changed_takes_microseconds(own: Session) -> None:
    begin_s = time.process_time()
    for _ in range(1000):
        own.check_unchanged()
    assert time.process_time() - begin_s < 0.1
