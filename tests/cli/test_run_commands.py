"""The commands that run without export, on the toy bundle: what they print and leave behind, and how they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import PROMPT, Run, fails
from tests.test_bundle import FILES, MISCHIEF, left_behind
from tests.toy_bundle import Toy, build, edit_manifest
from tests.toy_model import LATENTS
from tgate_engine.manifest import MANIFEST_FILE
from tgate_runtime.noise import noise
from tgate_runtime.pipeline import Pipeline


def test_generate_equals_the_pipeline(run: Run, good: Path, tmp_path: Path) -> None:
    picture, latents = tmp_path / "out.png", tmp_path / "y.npy"
    status, out, err = run(
        *("generate", good, PROMPT, "--seed", 0, "--negative-prompt", "blue", "--guidance-scale", 4.5),
        *("--save-latents", latents, "--output", picture, "--threads", 1, "--quiet"),
    )
    assert (status, out, err) == (0, f"{picture}\n", "")
    with Pipeline.open(good, threads=1) as pipe:
        drawn = pipe(PROMPT, seed=0, negative_prompt="blue", guidance_scale=4.5)
    np.testing.assert_array_equal(np.load(latents), drawn.latents)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn.images[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "y.npy"]


def test_a_drawn_seed_is_reported_and_draws_the_same_again(run: Run, good: Path, tmp_path: Path) -> None:
    _, _, err = run("generate", good, PROMPT, "--output", tmp_path / "a.png")
    seed = next(line.split()[1] for line in err.splitlines() if line.startswith("seed "))
    run("generate", good, PROMPT, "--output", tmp_path / "b.png", "--seed", seed)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_several_pictures_and_given_latents(run: Run, good: Path, tmp_path: Path) -> None:
    start = np.stack([noise(9, j, LATENTS) for j in range(2)])
    np.save(tmp_path / "x.npy", start)
    start_at = ("--initial-latents", tmp_path / "x.npy")
    status, out, _ = run("generate", good, PROMPT, "--num-images", 2, *start_at, "--output", tmp_path / "a.png")
    assert status == 0
    assert out.splitlines() == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    run("generate", good, PROMPT, "--num-images", 2, "--seed", 9, "--output", tmp_path / "b.png")
    for j in range(2):
        assert (tmp_path / f"a-{j}.png").read_bytes() == (tmp_path / f"b-{j}.png").read_bytes()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP")])
def test_the_suffix_chooses_the_format(run: Run, good: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    assert run("generate", good, PROMPT, "--output", tmp_path / f"x.{suffix}")[0] == 0
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.format == kind


def test_an_empty_prompt_works(run: Run, good: Path, tmp_path: Path) -> None:
    assert run("generate", good, "", "--output", tmp_path / "x.png")[0] == 0


def test_a_long_prompt_warns_even_when_quiet(run: Run, good: Path, tmp_path: Path) -> None:
    prompt = "a large red circle above a Small  blue square"
    status, _, err = run("generate", good, prompt, "--seed", 1, "--output", tmp_path / "x.png", "--quiet")
    assert status == 0
    (line,) = err.splitlines()
    assert line.startswith("tgate: warning: ")
    assert line.endswith('left out: "Small blue square"')


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


def test_verify_prints_the_worst_errors(run: Run, good: Path) -> None:
    status, out, _ = run("verify", good)
    assert status == 0
    assert "digests: 12 files and the manifest match" in out
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
    assert set(data["plans"]) == {"gated", "guidance_stopped", "ungated"}
    assert data["speedup"] > 0
    assert data["mac_ratio"] > 1


def test_bench_for_people(run: Run, good: Path) -> None:
    status, out, _ = run("bench", good, "--repeats", 1, "--threads", 1)
    assert status == 0
    assert "guidance_stopped" in out


def test_bench_leaves_out_the_plan_between_when_asked(run: Run, good: Path) -> None:
    status, out, _ = run("bench", good, "--json", "--without-stopped", "--repeats", 1, "--threads", 1, "--quiet")
    assert status == 0
    data = json.loads(out)
    assert data["plans"]["guidance_stopped"] == {"ms": None}
    assert "unguided" not in data["graphs"]


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


# --- bundles that are bad -----------------------------------------------------------------------

COMMANDS: dict[str, tuple[object, ...]] = {
    "generate": (PROMPT, "--seed", 1),
    "inspect": ("--json",),
    "verify": (),
    "bench": ("--repeats", 1, "--json"),
}


def command(name: str, bundle: Path) -> list[object]:
    rest = [*COMMANDS[name], *(["--output", bundle.parent / "x.png"] if name == "generate" else [])]
    return [name, bundle, *rest]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit(run: Run, toy: Path, name: str, file: str) -> None:
    raw = bytearray((toy / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (toy / file).write_bytes(raw)
    fails(run(*command(name, toy)), file, "damaged")
    assert left_behind(toy.parent, "toy") == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(run: Run, toy: Path, name: str, file: str) -> None:
    (toy / file).unlink()
    fails(run(*command(name, toy)), file)
    assert left_behind(toy.parent, "toy") == []


@pytest.mark.parametrize("what", MISCHIEF)
def test_a_manifest_with(run: Run, toy: Path, what: str) -> None:
    edit, says = MISCHIEF[what]
    edit_manifest(toy, edit)
    for name in ("generate", "verify"):
        fails(run(*command(name, toy)), says)
    assert left_behind(toy.parent, "toy") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_no_bundle(run: Run, tmp_path: Path, name: str) -> None:
    fails(run(*command(name, tmp_path / "nothing")), "there is no such directory")


# --- requests that are bad ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "x.xyz"], "the suffix '.xyz' is no picture format; use one of .png"),
        (["--output", "noext"], "the suffix '' is no picture format"),
        (["--output", "deep/x.png"], "there is no directory deep"),
        (["--output", "is.png"], "is.png is a directory"),
        (["--output", "/proc/x.png"], "/proc/x.png cannot be written ("),
        (["--output", "x.png", "--save-latents", "/proc/y.npy"], "/proc/y.npy cannot be written ("),
        (["--output", "x.png", "--save-latents", "deep/y.npy"], "there is no directory deep"),
        (["--output", "x.png", "--plan", "other"], "has no plan 'other'; it has default"),
        (["--output", "x.png", "--seed", "-1"], "a seed is a whole number"),
        (["--output", "x.png", "--seed", str(2**63)], "a seed is a whole number"),
        (["--output", "x.png", "--guidance-scale", "1"], "export with --guidance-scale 1"),
        (["--output", "x.png", "--guidance-scale", "nan"], "must be finite, got nan"),
        (["--output", "x.png", "--guidance-scale", "inf"], "must be finite, got inf"),
        (["--output", "x.png", "--initial-latents", "none.npy"], "none.npy: there is no such file"),
        (["--output", "x.png", "--initial-latents", "text.npy"], "text.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "empty.npy"], "empty.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "pickle.npy"], "pickle.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "many.npz"], "many.npz holds several arrays"),
        (["--output", "x.png", "--initial-latents", "shape.npy"], "float32 of shape [2, 2, 4]"),
        (["--output", "x.png", "--initial-latents", "double.npy"], "got float64"),
        (["--output", "x.png", "--initial-latents", "nan.npy"], "not finite"),
    ],
)
def test_a_request_that_cannot_be_served(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("is.png").mkdir()
    Path("text.npy").write_text("not an array")
    Path("empty.npy").write_bytes(b"")
    np.save("pickle.npy", np.array([{}], object), allow_pickle=True)
    np.savez("many.npz", a=np.zeros(1), b=np.zeros(1))
    np.save("shape.npy", np.zeros((2, 2, 4), np.float32))
    np.save("double.npy", np.zeros((1, *LATENTS)))
    np.save("nan.npy", np.full((1, *LATENTS), np.nan, np.float32))
    before = sorted(p.name for p in tmp_path.iterdir())
    fails(run("generate", good, PROMPT, *arguments), says)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
