"""benchmarks/gpu on the CPU: what it saves, what it leaves out, and what it goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import sections
from benchmarks.gpu.aims import aims
from benchmarks.gpu.run import main, table
from benchmarks.gpu.setting import Setting, engine_of
from benchmarks.loops import plans_of, request
from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_runtime.engines.aoti import Aoti
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.engines.ort_cuda import OrtCuda
from tgate_runtime.runner import run
from tgate_runtime.session import Session
from tgate_runtime.state import State


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle and a reference that were brought to a machine without diffusers. The toy stands in for a model."""
    absent = tmp_path / "absent" / "diffusers.py"
    absent.parent.mkdir()
    absent.write_text("raise ModuleNotFoundError(name='diffusers')")
    monkeypatch.setenv("PYTHONPATH", str(absent.parent))
    opened = Bundle.open(build(tmp_path / "bundles" / "mini-sdxl", Toy()))
    plan = plans_of(opened.manifest)["gated"]
    start, rows = request(opened.manifest, seed=1)
    with Session.open(opened, threads=1) as session:
        state = State(session, plan)
        steps = run(state, latents=start, conditioning=rows, guidance_scale=plan.guidance_scale)
        latents = [start * np.float32(plan.sampler.initial_scale), *(state.latents() for _ in steps)]
    tensors = {f"latents.{i}": x for i, x in enumerate(latents)}
    tensors |= {f"conditioning.{name}": row for name, row in rows.items()}
    setting = Setting(model="mini-sdxl", device="cpu", bundles=str(tmp_path / "bundles"))
    np.savez(setting.reference_file, plan=np.array(json.dumps(plan.to_json())), **tensors)  # type: ignore[arg-type]
    return tmp_path / "bundles"


def measured(bundles: Path, *more: str) -> dict[str, Any]:
    output = bundles / "found.json"
    what = ["--models", "mini-sdxl", "--engines", "ort-cpu,openvino+f32,ort-cuda", "--repeats", "1"]
    main(["--device", "cpu", "--tiny", *what, "--bundles", str(bundles), "--output", str(output), *more])
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_part_is_saved_and_resumed(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = measured(bundles, "--sections", "check,loops,memory")
    done = first["sections"]
    assert done["mini-sdxl/bundle"]["brought"]
    assert done["mini-sdxl/reference"]["brought"]
    for engine in ("ort-cpu", "openvino+f32"):
        assert done[f"mini-sdxl/{engine}/check"]["agrees"]
        loops = done[f"mini-sdxl/{engine}/loops"]
        assert loops["plans"].keys() == {"gated", "guidance_stopped", "ungated"}
        assert loops["plans"]["gated"]["step_ms"]["p99"] >= loops["plans"]["gated"]["step_ms"]["p50"] > 0
        assert loops["graphs"].keys() >= {"full", "reuse_cross"}
        assert loops["finite"]
        assert done[f"mini-sdxl/{engine}/memory/one"]["graphs"] == ["full"]
        assert len(done[f"mini-sdxl/{engine}/memory/all"]["graphs"]) > 1
    assert done["mini-sdxl/ort-cuda/loops"]["status"] == "missing"
    assert "CUDAExecutionProvider" in done["mini-sdxl/ort-cuda/loops"]["error"]
    assert first["settings"]["packages"]["onnxruntime"]
    capsys.readouterr()

    second = measured(bundles, "--resume", "--sections", "open,check,loops,memory")
    printed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    made = [name for name in printed if name in second["sections"]]
    assert made == [f"mini-sdxl/{name}/open/{way}" for name in first["engines"] for way in ("first", "second")]
    assert {name: second["sections"][name] for name in done} == done
    assert second["sections"]["mini-sdxl/ort-cpu/open/first"]["open_s"] > 0
    assert "missing: the onnxruntime" in table(second)
    assert {aim["verdict"] for aim in second["aims"]} == {"open"}


@pytest.mark.slow
def test_without_diffusers_there_is_a_reason_and_no_crash(bundles: Path) -> None:
    (bundles / "mini-sdxl.reference.npz").unlink()
    done = measured(bundles, "--engines", "ort-cpu", "--sections", "check,peers")["sections"]
    assert done["mini-sdxl/reference"] | {"at": "", "took_s": 0} == {
        **{"status": "skipped", "error": "diffusers is not installed", "at": "", "took_s": 0}
    }
    assert done["mini-sdxl/ort-cpu/check"]["status"] == "skipped"
    peers = done["mini-sdxl/peers"]
    assert (peers["status"], peers["error"]) == ("skipped", "diffusers is not installed")


def test_a_spent_budget_leaves_the_rest_to_resume(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = bundles / "found.json"
    what = ("--models", "mini-sdxl", "--engines", "ort-cpu", "--bundles", str(bundles), "--output", str(output))
    main(["--device", "cpu", "--tiny", *what, "--budget-s", "0"])
    assert "--resume goes on from here" in capsys.readouterr().out
    assert not output.exists()


def test_aims_are_judged_by_the_fastest_engine_on_a_gpu() -> None:
    def loops(ms: float) -> dict[str, Any]:
        return {"status": "ok", "plans": {"gated": {"ms": ms}}}

    sections = {
        "sdxl/ort-cuda/loops": loops(700),
        "sdxl/aoti/loops": loops(500),
        "sdxl/aoti/memory/one": {"status": "ok", "bytes": 100},
        "sdxl/aoti/memory/all": {"status": "ok", "bytes": 120},
        "sdxl/peers": {"status": "ok", "ms": {"aoti ungated": 900.0, "torch.compile": 900.0}},
    }
    found = {"settings": {"device": "cuda"}, "engines": {"ort-cuda": {}, "aoti": {}}, "sections": sections}
    judged = [(aim["verdict"], aim["got"]) for aim in aims(found) if aim["verdict"] != "open"]
    assert judged == [("met", 500), ("met", 900.0), ("missed", 1.2)]
    found["settings"] = {"device": "cpu"}
    assert {aim["verdict"] for aim in aims(found)} == {"open"}


def test_an_engine_is_refused_ways_that_it_has_not() -> None:
    assert engine_of("openvino+f32", "cpu").options.precision == "f32"
    with pytest.raises(EngineError, match="no way 'no-graphs'"):
        engine_of("ort-cpu+no-graphs", "cpu")
    with pytest.raises(EngineError, match="would run on the CPU"):
        engine_of("aoti", "cuda")


def test_cuda_graphs_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of the GPU, as in tests/runtime/engines/test_ort_cuda.py."""
    monkeypatch.setattr(OrtCuda, "provider", "CPUExecutionProvider")
    monkeypatch.setattr(OrtCuda, "kind", "cpu")
    for name, captured in (("ort-cuda", True), ("ort-cuda+no-graphs", False)):
        engine = engine_of(name, "cuda")
        assert isinstance(engine, OrtCuda)
        assert ("denoise" in engine.captured) == captured
    for name, captured in (("aoti", True), ("aoti+no-graphs", False)):
        found = engine_of(name, "cpu")
        assert isinstance(found, Aoti)
        assert ("denoise" in found.captured) == captured


def test_what_an_empty_engine_takes_is_no_weights(monkeypatch: pytest.MonkeyPatch, bundles: Path) -> None:
    """A GPU's context comes with the first buffer: one is allocated before what is held is read."""
    order: list[str] = []
    allocate = OrtCpu.allocate

    def heard(self: OrtCpu, shape: tuple[int, ...], dtype: str) -> Any:
        order.append("allocate")
        return allocate(self, shape, dtype)

    def held(_device: str) -> int:
        order.append("held")
        return 0

    monkeypatch.setattr(OrtCpu, "allocate", heard)
    monkeypatch.setattr(sections, "held_bytes", held)
    sections.memory(Setting(model="mini-sdxl", device="cpu", bundles=str(bundles), engine="ort-cpu", graphs="one"))
    assert order[:3] == ["held", "allocate", "held"]


def test_a_gpu_without_engines_is_recorded(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = bundles / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho 'NVIDIA Test, 580.1, 1000'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:{os.environ['PATH']}")
    found = measured(bundles, "--device", "cuda", "--engines", "ort-cuda+no-graphs,aoti", "--sections", "loops,peers")
    assert found["settings"]["gpu"] == "NVIDIA Test"
    assert "sees no GPU" in found["engines"]["aoti"]["says"]
    assert found["sections"]["mini-sdxl/ort-cuda+no-graphs/loops"]["status"] == "missing"
    assert found["sections"]["mini-sdxl/peers"]["status"] == "skipped"


@pytest.mark.slow
def test_all_of_it_on_the_embedded_models(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    main(["--device", "cpu", "--tiny", "--bundles", str(tmp_path / "bundles"), "--output", str(output)])
    done = json.loads(output.read_text())["sections"]
    assert {name: data for name, data in done.items() if data["status"] != "ok"} == {}
    for model in ("mini-sdxl", "mini-pixart"):
        assert done[f"{model}/ort-cpu/check"]["worst"] < 1e-4
        assert done[f"{model}/openvino/check"]["agrees"]
        assert done[f"{model}/peers"]["failed"] == {}
        assert len(done[f"{model}/peers"]["ms"]) == 5
        # The fastest engine may compute in bfloat16; the peers agree with each other all the same.
        assert len(done[f"{model}/peers"]["differs"]) == 3
