"""The commands that run without export, on the toy bundle: what they print and leave behind, and how they fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import PROMPT, Run, beside, fails
from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.manifest import MANIFEST_FILE
from tgate_runtime.engines import ENGINES, EngineEntry
from tgate_runtime.stamps import read_stamp

# --- what they print ---------------------------------------------------------------------------------


def test_inspect_as_data(run: Run, good: Path) -> None:
    status, out, err = run("inspect", good, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)["plans"]["default"]
    assert plan["macs"] == {"paper": 12000, "all": 15400}
    assert set(plan["steps"][0]) == {"index", "phase", "graph", "timestep", "reads", "writes", "macs"}


def test_inspect_for_people(run: Run, good: Path) -> None:
    status, out, err = run("inspect", good)
    assert (status, err) == (0, "")
    assert "fidelity-improving  reuse_cross" in out


def test_inspect_at_a_size(run: Run, sizes: Path) -> None:
    status, out, _ = run("inspect", sizes, "--json", "--size", "8x2")
    assert (status, json.loads(out)["size"]) == (0, "8x2")


def test_verify_prints_the_worst_errors(run: Run, good: Path) -> None:
    status, out, _ = run("verify", good)
    assert status == 0
    assert "digests: 13 files and the manifest match" in out
    assert out.count("worst relative error") == 2


def test_verify_fails_beyond_tolerance(run: Run, toy: Path) -> None:
    edit_manifest(toy, lambda d: d["goldens"]["trajectory"].update(tolerance=1e-12))
    status, out, err = run("verify", toy)
    assert status == 1
    assert "golden trajectory: worst relative error" in out
    assert err.splitlines()[-1].startswith("tgate: error: ")
    assert "trajectory not reproduced within tolerance" in err


def test_bench_as_data(run: Run, good: Path) -> None:
    status, out, _ = run("bench", good, "--json", "--repeats", 1, "--threads", 1, "--quiet")
    assert status == 0
    data = json.loads(out)
    assert list(data["plans"]) == ["default", "ungated", "guidance_stopped"]
    assert data["speedup"] > 0
    assert data["mac_ratio"] > 1


def test_bench_for_people(run: Run, good: Path) -> None:
    status, out, _ = run("bench", good, "--repeats", 1, "--threads", 1)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["default", "ungated", "guidance_stopped"]


def test_bench_against_plans_by_name(run: Run, sizes: Path) -> None:
    named = ("--plan", "early", "--against", "default", "--against", "ungated", "--size", "8x2")
    status, out, _ = run("bench", sizes, "--json", *named, "--repeats", 1, "--threads", 1, "--quiet")
    assert status == 0
    data = json.loads(out)
    assert list(data["plans"]) == ["early", "default", "ungated"]
    assert data["settings"]["size"] == "8x2"
    assert "unguided" not in data["graphs"]
    # 5 steps of 2600, one of 1700 among them, 3 of 1100; against 2 of 2600 and 6 of 1100
    assert data["mac_ratio"] == pytest.approx(15400 / 11800)


def test_build_compiles_the_graphs_of_a_plan_and_a_size(
    run: Run, sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgate_runtime.engines import ort

    asked: list[list[str]] = []

    def build(self: object, bundle: Bundle, graphs: Any, on_build: Any = None) -> dict[str, Path]:
        asked.append([graph.file for graph in graphs])
        return {"full.onnx": Path("there")} if len(asked) == 1 else {}

    monkeypatch.setattr(ort.OrtCpu, "build", build)
    (tmp_path / "p.json").write_text(json.dumps(Bundle.open(sizes).manifest.plan("ungated").to_json()))
    assert run("build", sizes, "--quiet") == (0, "full.onnx: there\n", "")
    says = "ort-cpu compiles nothing ahead of time: the bundle is ready\n"
    for plan in ("ungated", tmp_path / "p.json"):
        assert run("build", sizes, "--quiet", "--plan", plan, "--size", "8x2") == (0, says, "")
    each = ("full", "reuse_self", "reuse_cross", "unguided", "decoder")
    assert sorted(asked[0]) == sorted(["text.onnx", *(f"{name}{of}.onnx" for name in each for of in ("", "-8x2"))])
    assert [sorted(files) for files in asked[1:]] == [["decoder-8x2.onnx", "full-8x2.onnx", "text.onnx"]] * 2


def test_engines_as_data(run: Run) -> None:
    status, out, err = run("engines", "--json")
    assert (status, err) == (0, "")
    engines = {entry.pop("name"): entry for entry in json.loads(out)}
    assert engines["ort-cpu"]["says"] == "ready"
    assert all(set(entry) == {"runs_on", "version", "says"} for entry in engines.values())


def test_a_bundle_without_guidance(run: Run, tmp_path: Path) -> None:
    bundle = build(tmp_path / "toy", Toy(guided=False))
    picture = ("--output", tmp_path / "x.png")
    assert run("generate", bundle, PROMPT, *picture)[0] == 0
    fails(run("generate", bundle, PROMPT, "--guidance-scale", 5, *picture), "exported without guidance")
    assert (bundle / MANIFEST_FILE).is_file()


def test_what_is_not_installed_is_named(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("tgate_runtime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = run("generate", good, PROMPT, "--output", tmp_path / "x.png")
    fails(result, "drawing needs tokenizers", "pip install 'tgate-engine[cpu]'")


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_installed_comes_with_the_extra_of_the_engine(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [module for module in sys.modules if module.startswith("tgate_runtime")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fails(
        run("bench", good, "--engine", name), "measuring needs ", f"pip install 'tgate-engine[{ENGINES[name].extra}]'"
    )


def test_every_command_takes_mini_and_a_path_of_that_name_is_a_path(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    commands: list[tuple[object, ...]] = [
        ("plan", "mini", "--name", "short", "--m", 3, "--steps", 4),
        ("generate", "mini", "a red circle", "--plan", "short", "--seed", 0),
        ("bench", "mini", "--plan", "short", "--against", "short", "--repeats", 1, "--warm-ups", 0, "--json"),
        ("build", "mini"),
        ("inspect", "mini", "--json"),
    ]
    for command in commands:
        status, out, err = run(*command, "--quiet")
        assert (status, err) == (0, "")
    assert "short" in json.loads(out)["plans"]
    assert Path("mini-0001.png").is_file()
    for command in commands:
        fails(run(command[0], "./mini", *command[2:], "--quiet"), "mini is not a bundle", "no such directory")


# --- engines ------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[object, ...]] = {
    "generate": (PROMPT, "--seed", 1),
    "inspect": ("--json",),
    "verify": (),
    "bench": ("--repeats", 1, "--json"),
    "build": (),
}
ON_ENGINES = ("generate", "verify", "bench", "build")


def command(name: str, bundle: Path) -> list[object]:
    rest = [*COMMANDS[name], *(["--output", bundle.parent / "x.png"] if name == "generate" else [])]
    return [name, bundle, *rest]


@pytest.mark.parametrize("name", ON_ENGINES)
def test_an_engine_is_made_once_with_its_options(
    run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made: list[Any] = []
    make = EngineEntry.open

    def making(entry: EngineEntry, options: Any) -> Any:
        made.append((entry.name, options.threads, options.memory))
        return make(entry, options)

    monkeypatch.setattr(EngineEntry, "open", making)
    assert run(*command(name, toy), "--threads", 1, "--memory", "shared")[0] == 0
    assert made == [("ort-cpu", 1, "shared")]


@pytest.mark.parametrize("name", ON_ENGINES)
def test_an_engine_that_is_not_there_is_told_before_the_bundle_is_read(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Bundle, "checked", lambda *_: pytest.fail("the bundle was read"))
    asked = command(name, good)
    fails(run(*asked, "--engine", "other"), "there is no engine 'other'; the engines are ort-cpu, ")
    fails(run(*asked, "--device", 1), "engine ort-cpu runs on the CPU; leave out --device")


# --- bundles that are bad -----------------------------------------------------------------------

FILES = ("full.onnx", "weights.safetensors", "samplers.safetensors", "tokenizer/0.json", MANIFEST_FILE)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit(run: Run, toy: Path, name: str, file: str) -> None:
    raw = bytearray((toy / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (toy / file).write_bytes(raw)
    fails(run(*command(name, toy)), file, "damaged")
    assert beside(toy) == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(run: Run, toy: Path, name: str, file: str) -> None:
    (toy / file).unlink()
    fails(run(*command(name, toy)), file)
    assert beside(toy) == []


MISCHIEF: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an older schema": (lambda d: d.update(schema_version=2), "export it again with tgate-export, from the same"),
    "a file outside": (lambda d: d.update(weights="/etc/passwd"), "'/etc/passwd' is not a plain name"),
    "a carry that nothing writes": (
        lambda d: d["plans"]["default"]["steps"][4].update(writes=[]),
        "step 5 reads cross.0, which no earlier step writes",
    ),
    "a baseline that is not there": (
        lambda d: d["plans"]["default"].update(baselines=["other"]),
        "names baseline 'other', which is not there",
    ),
}


@pytest.mark.parametrize("what", MISCHIEF)
def test_a_manifest_with(run: Run, toy: Path, what: str) -> None:
    edit, says = MISCHIEF[what]
    edit_manifest(toy, edit)
    for name in COMMANDS:
        fails(run(*command(name, toy)), says)
    assert beside(toy) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_no_bundle(run: Run, tmp_path: Path, name: str) -> None:
    fails(run(*command(name, tmp_path / "nothing")), "there is no such directory")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "verify"])
def test_a_size_that_is_not_there(run: Run, sizes: Path, name: str) -> None:
    fails(run(*command(name, sizes), "--size", "4x8"), "the bundle has no size 4x8; it has 4x4, 8x2")
    assert beside(sizes) == []


@pytest.mark.parametrize("options", [["--plan", "other"], ["--against", "ungated", "--against", "other"]])
def test_bench_of_a_plan_that_is_not_there(run: Run, good: Path, options: list[str]) -> None:
    fails(run("bench", good, *options), "no plan 'other'; it has default, guidance_stopped, ungated")


# --- as data, and as text -----------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07\x9b2J"
"""Renames a terminal's window, and clears it."""


def test_pictures_verification_and_compilation_as_data(run: Run, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    options = ["--seed", 7, "--num-images", 2, "--save-latents", tmp_path / "y.npy", "--quiet", "--json"]
    status, told, err = run("generate", good, PROMPT, "--output", out, *options)
    assert (status, err) == (0, "")
    facts = json.loads(told)
    assert [read_stamp(path.read_bytes(), "").to_json() for path in map(Path, facts["outputs"])] == facts.pop("records")
    assert facts == {
        "outputs": [str(tmp_path / "x-0.png"), str(tmp_path / "x-1.png")],
        "seeds": [7, 8],
        "plan": "default",
        "size": "4x4",
        "latents": str(tmp_path / "y.npy"),
    }
    status, told, _ = run("verify", good, "--quiet", "--json")
    checked, manifest = json.loads(told), Bundle.open(good).manifest
    assert (status, checked["ok"], checked["files"]) == (0, True, len(manifest.files))
    assert checked["goldens"].keys() == manifest.goldens.keys()
    assert all(golden["ok"] and golden["error"] <= golden["tolerance"] for golden in checked["goldens"].values())
    status, told, _ = run("build", good, "--quiet", "--json")
    assert (status, json.loads(told)["entries"]) == (0, {})


def test_what_a_stranger_wrote_is_shown_and_not_sent(run: Run, toy: Path) -> None:
    """The model, the licence, a plan: everywhere a bundle's texts come out, in tables, in data and in errors."""

    def edit(data: dict[str, Any]) -> None:
        data["model"] = f"model{ESCAPE}"
        data["licence"] = f"[bold]licence{ESCAPE}\n\u202e"

    edit_manifest(toy, edit)
    seen = ""
    for arguments in (
        ["inspect", toy],
        ["inspect", toy, "--json"],
        ["bench", toy, "--repeats", 1, "--warm-ups", 0],
        ["verify", toy, "--json"],
        ["generate", toy, PROMPT, "--output", "x.png", "--image", f"no{ESCAPE}.png"],
        ["generate", toy, PROMPT, "--output", "x.png", "--plan", f"no{ESCAPE}"],
        ["generate", toy, PROMPT, f"--output=no{ESCAPE}/x.png"],
        ["generate", toy, PROMPT, "--output", "x.png", f"--what{ESCAPE}"],
        ["inspect", f"no{ESCAPE}"],
        ["plan", toy, "--name", f"p{ESCAPE}", "--m", 3],
    ):
        _, out, err = run(*arguments)
        assert not [c for c in out + err if not c.isprintable() and c != "\n"], arguments
        seen += out + err
    assert r"model\x1b]0;owned" in seen
    assert r"licence\x1b]0;owned" in seen
    assert r"model\u001b]0;owned" in seen
