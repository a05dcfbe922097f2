"""Bundles: read distrustfully, written atomically."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import Toy, build, edit_manifest, make_plan
from tgate_engine import bundle as bundle_module
from tgate_engine.bundle import Bundle, digests_of, staging, write_atomically
from tgate_engine.errors import BundleError, PlanError
from tgate_engine.manifest import MANIFEST_FILE, check_name, dump_manifest, parse_manifest, resolve
from tgate_engine.schedule import Schedule


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture
def toy(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "toy"))


def left_behind(parent: Path, target: str) -> list[str]:
    """Everything in ``parent`` but the target."""
    return sorted(p.name for p in parent.iterdir() if p.name != target)


# --- reading ------------------------------------------------------------------------------------


def test_a_manifest_survives_the_round_trip(good: Path) -> None:
    manifest = Bundle.open(good).manifest
    again = parse_manifest(dump_manifest(manifest))
    assert again == manifest
    assert dump_manifest(again) == dump_manifest(manifest)


def test_every_file_is_listed_and_checked(good: Path) -> None:
    bundle = Bundle.open(good)
    assert dict(bundle.manifest.files) == digests_of(good)
    assert bundle.size_bytes() == sum(p.stat().st_size for p in good.rglob("*") if p.is_file())


FILES = (
    "full.onnx",
    "text.onnx",
    "decoder.onnx",
    "weights.safetensors",
    "tokenizer/0.json",
    "golden/image.safetensors",
    MANIFEST_FILE,
)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_seen(toy: Path, name: str) -> None:
    raw = bytearray((toy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (toy / name).write_bytes(raw)
    with pytest.raises(BundleError) as error:
        Bundle.open(toy)
    assert "damaged" in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(toy: Path, name: str) -> None:
    (toy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(toy, check_digests=False)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_seen_without_digests(toy: Path, name: str) -> None:
    os.truncate(toy / name, (toy / name).stat().st_size - 1)
    if name == MANIFEST_FILE:  # its last byte is a line break, which means nothing
        os.truncate(toy / name, (toy / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=name):
        Bundle.open(toy, check_digests=False)


def test_a_file_that_is_a_link_is_refused(toy: Path, good: Path) -> None:
    (toy / "full.onnx").unlink()
    (toy / "full.onnx").symlink_to(good / "full.onnx")
    with pytest.raises(BundleError, match=r"full\.onnx is missing or not a plain file"):
        Bundle.open(toy)


def rename_file(data: dict[str, Any], old: str, new: str) -> None:
    data["files"][new] = data["files"].pop(old)


MISCHIEF: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer schema": (lambda d: d.update(schema_version=99), "schema version 99, this tgate-engine reads version 2"),
    "an older schema": (lambda d: d.update(schema_version=0), "export the bundle again"),
    "no schema": (lambda d: d.pop("schema_version"), "this is not a tgate bundle"),
    "a file outside, listed": (lambda d: rename_file(d, "full.onnx", "../../x"), "'../../x' is not a plain name"),
    "a graph outside": (lambda d: d["graphs"]["full"].update(file="../../x"), "'../../x' is not a plain name"),
    "an absolute name": (lambda d: d.update(weights="/etc/passwd"), "'/etc/passwd' is not a plain name"),
    "a hidden name": (lambda d: d.update(weights=".hidden"), "'.hidden' is not a plain name"),
    "a name with a line break": (lambda d: d.update(weights="a\nb"), "is not a plain name"),
    "an empty name": (lambda d: d["graphs"]["full"].update(file=""), "is not a plain name"),
    "an unknown kind of guidance": (lambda d: d.update(guidance="some"), "expected one of classifier-free, embedded"),
    "an unknown negative": (lambda d: d["conditioning"][0].update(negative="?"), "expected one of own, same, zeros"),
    "no frames": (lambda d: d.update(frames=0), "expected at least 1, got 0"),
    "an image graph that is not there": (lambda d: d.update(image="none"), "names graph 'none' but does not describe"),
    "a graph without its file": (lambda d: d["graphs"]["full"].update(file="other"), "lists no file 'other'"),
    "a decoder without a graph": (lambda d: d.update(decoder="other"), "names graph 'other'"),
    "a plan that reads an unwritten carry": (
        lambda d: d["plans"]["default"]["steps"][4].update(writes=[]),
        "step 5 reads cross.0, which no earlier step writes",
    ),
    "a golden plan that reads an unwritten carry": (
        lambda d: d["goldens"]["trajectory"]["plan"]["steps"][4].update(writes=[]),
        "step 5 reads cross.0, which no earlier step writes",
    ),
    "an unknown dtype": (lambda d: d.update(dtype="float8"), "manifest.json.dtype"),
    "a number that is a text": (lambda d: d.update(height="4"), "manifest.json.height: expected int, got '4'"),
    "a number that is none": (lambda d: d.update(guidance_scale=float("nan")), "expected a finite number, got nan"),
    "a number beyond floats": (lambda d: d.update(guidance_scale=10**400), "expected a finite number"),
    "a field too few": (lambda d: d.pop("latents"), "'latents' is missing"),
    "an odd shape": (lambda d: d["carries"][0].update(shape=["0*batch"]), "neither a size, 'batch' nor a multiple"),
    "a batch upside down": (lambda d: d.update(batch=[4, 1]), "expected [least, most], got [4, 1]"),
    "a schedule that is none": (
        lambda d: d["plans"]["default"]["schedule"].update(gate=99),
        "between 1 and the number of steps",
    ),
}


@pytest.mark.parametrize("what", MISCHIEF)
def test_a_manifest_with(toy: Path, what: str) -> None:
    edit, says = MISCHIEF[what]
    edit_manifest(toy, edit)
    with pytest.raises((BundleError, PlanError)) as error:
        Bundle.open(toy)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\x00", '{"schema_version": true}'])
def test_a_manifest_that_is_none(toy: Path, text: str) -> None:
    (toy / MANIFEST_FILE).write_text(text, "utf-8")
    with pytest.raises(BundleError):
        Bundle.open(toy)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST_FILE).mkdir()
    with pytest.raises(BundleError, match="is a directory"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/x", "a//b", ".x", "a/", "", "a b", "a\\b", "ä", "a\n", "..", "a/.b"]
)
def test_names_that_are_not_plain(name: str) -> None:
    with pytest.raises(BundleError):
        check_name(name)


@pytest.mark.parametrize("name", ["x", "a/b.json", "weights.safetensors", "_a-b.c", "0"])
def test_plain_names(name: str) -> None:
    assert check_name(name) == name


def test_shapes_for_a_batch() -> None:
    assert resolve(("batch", 4, "2*batch", "50*batch"), 3) == (3, 4, 6, 150)


# --- writing ------------------------------------------------------------------------------------


def test_a_plan_is_added_in_place(toy: Path) -> None:
    bundle = Bundle.open(toy)
    plan = make_plan("fast", Schedule(steps=4, gate=2), Toy(), bundle.manifest.graphs)
    bundle.with_plan(plan)
    assert Bundle.open(toy).manifest.plan("fast") == plan
    with pytest.raises(BundleError, match="already has a plan 'fast'"):
        Bundle.open(toy).with_plan(plan)
    shorter = make_plan("fast", Schedule(steps=3, gate=2), Toy(), bundle.manifest.graphs)
    Bundle.open(toy).with_plan(shorter, force=True)
    assert Bundle.open(toy).manifest.plan("fast") == shorter
    assert left_behind(toy.parent, "toy") == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cannot rename"):
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert left_behind(tmp_path, "x") == []


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, "cannot rename")


def test_staging_gives_the_target_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staging(target) as stage:
        (stage / "x").write_text("x")
        assert stage.parent == target.parent
        assert not target.exists()
    assert (target / "x").read_text() == "x"
    assert left_behind(target.parent, "bundle") == []


class Failed(Exception):
    """What an export may raise."""


def fail_in_the_block(target: Path, beside: int = 1) -> None:
    """An export that fails half way; meanwhile ``beside`` other entries lie beside the target."""
    with staging(target, force=True) as stage:
        (stage / "x").write_text("x")
        assert stage.name in left_behind(target.parent, target.name)
        assert len(left_behind(target.parent, target.name)) == beside
        raise Failed


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Failed):
        fail_in_the_block(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_bundle(toy: Path) -> None:
    before = digests_of(toy)
    with pytest.raises(Failed):
        fail_in_the_block(toy)
    assert digests_of(toy) == before
    Bundle.open(toy)
    assert left_behind(toy.parent, "toy") == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(BundleError, match="there is no space left in") as told, staging(tmp_path / "bundle"):
        raise error
    assert str(tmp_path) in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_a_bundle(toy: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(bundle_module, "_exchange", lambda a, b: False)
    with staging(toy, force=True) as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert [p.name for p in toy.iterdir()] == [MANIFEST_FILE]
    assert left_behind(toy.parent, "toy") == []


def test_without_force_nothing_is_replaced(toy: Path) -> None:
    with pytest.raises(BundleError, match="exists already"), staging(toy):
        pytest.fail("the block must not run")
    Bundle.open(toy)


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"), staging(tmp_path / "bundle"):
        (tmp_path / "bundle").mkdir()
    assert left_behind(tmp_path, "bundle") == []


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, force: bool) -> None:
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "x.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(precious)
    for name in ("photos", "file", "link"):
        with pytest.raises(BundleError), staging(tmp_path / name, force=force):
            pytest.fail("the block must not run")
    assert (precious / "x.jpg").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "photos"]


KILLED = """
import sys, time
from tgate_engine import bundle
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
if sys.argv[2] == "between renames":
    bundle._exchange = lambda a, b: False
    rename, calls = bundle.os.rename, []
    def watched(a, b):
        rename(a, b)
        wait()
    bundle.os.rename = watched
with bundle.staging(sys.argv[1], force=True) as stage:
    (stage / "manifest.json").write_text("new")
    if sys.argv[2] == "in the block":
        wait()
"""


def killed(target: Path, when: str) -> None:
    """Runs an export in another process and kills it with SIGKILL."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target), when], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_kill_leaves_the_old_bundle_and_the_next_run_cleans_up(toy: Path) -> None:
    before = digests_of(toy)
    killed(toy, "in the block")
    assert digests_of(toy) == before
    Bundle.open(toy)
    assert len(left_behind(toy.parent, "toy")) == 1
    with pytest.raises(Failed):
        fail_in_the_block(toy)
    assert left_behind(toy.parent, "toy") == []


def test_a_kill_leaves_no_bundle_where_none_was(tmp_path: Path) -> None:
    killed(tmp_path / "bundle", "in the block")
    assert not (tmp_path / "bundle").exists()
    with staging(tmp_path / "bundle") as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_kill_between_two_renames_is_undone_by_the_next_run(toy: Path) -> None:
    before = digests_of(toy)
    killed(toy, "between renames")
    assert not toy.exists()
    with pytest.raises(BundleError, match="exists already"), staging(toy):
        pytest.fail("the block must not run")
    assert digests_of(toy) == before
    Bundle.open(toy)


def test_two_exports_at_once_do_not_remove_each_others_work(tmp_path: Path) -> None:
    with staging(tmp_path / "bundle") as first:
        (first / "x").write_text("1")
        with staging(tmp_path / "other"):
            pass
        with pytest.raises(Failed):
            fail_in_the_block(tmp_path / "bundle", beside=3)
        assert (first / "x").read_text() == "1"
    assert (tmp_path / "bundle" / "x").read_text() == "1"


def test_a_manifest_is_json_that_others_can_read(good: Path) -> None:
    data = json.loads((good / MANIFEST_FILE).read_text("utf-8"))
    assert data["schema_version"] == 2
    assert data["graphs"]["reuse_cross"]["file"] == "reuse_cross.onnx"
    assert len(data["digest"]) == 64
