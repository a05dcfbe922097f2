"""Tables of samplers: what export compiled, number for number, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.toy_bundle import sampler
from tgate_engine.errors import BundleError
from tgate_engine.sampler import Sampler
from tgate_engine.sampler_tables import dump_tables, load_tables
from tgate_engine.step import step_row
from tgate_export.sampling import SAMPLERS, compile_sampler

SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore:__array:DeprecationWarning")


def written(path: Path, *samplers: Sampler) -> Path:
    path.write_bytes(dump_tables(samplers))
    return path


def test_rows_are_those_of_the_compiled_samplers(tmp_path: Path) -> None:
    """Bit for bit as step rows, which is all that a graph sees; of every kind of sampler there is."""
    names = [name for name in SAMPLERS if name not in ("lms", "scm")]  # LMS's coefficients take diffusers seconds
    compiled = [compile_sampler(name, SDXL, steps) for name in names for steps in (1, 4, 10)]
    compiled += [compile_sampler("scm", {"_class_name": "SCMScheduler"}, steps) for steps in (1, 4, 10)]
    tables = load_tables(written(tmp_path / "samplers", *compiled))
    assert list(tables) == [(each.name, each.steps) for each in compiled]
    for each in compiled:
        again = tables[each.name, each.steps]
        assert (again.steps, again.lead_in, again.prediction_type) == (each.steps, each.lead_in, each.prediction_type)
        assert again.initial_scale == each.initial_scale
        assert again.options == each.options
        assert (again.reach, again.stochastic) == (each.reach, each.stochastic)
        for mine, theirs in zip(again.calls, each.calls, strict=True):
            row, other = step_row(mine, 7.5), step_row(theirs, 7.5)
            assert row.tobytes() == other.tobytes()


def test_one_float32_tensor_for_each_sampler(tmp_path: Path) -> None:
    path = written(tmp_path / "samplers", sampler(2), sampler(3, lead_in=1), compile_sampler("euler", SDXL, 4))
    with safe_open(path, "np") as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entries = json.loads(file.metadata()["samplers"])
    assert {name: values.shape for name, values in rows.items()} == {"toy": (6, 12), "euler": (4, 12)}
    assert {values.dtype for values in rows.values()} == {np.dtype(np.float32)}
    assert [(entry["name"], entry["steps"], entry["first"], entry["count"]) for entry in entries] == [
        ("toy", 2, 0, 2),
        ("toy", 3, 2, 4),
        ("euler", 4, 0, 4),
    ]
    np.testing.assert_array_equal(rows["toy"][2], step_row(sampler(3, lead_in=1).calls[0], 0.0))


DEEP = {"samplers": "[" * 5000}
Change = Callable[[dict[str, NDArray[Any]], list[Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows, entries: rows.update(other=rows.pop("toy")),
        lambda rows, entries: rows.update(toy=rows["toy"][:4]),
        lambda rows, entries: rows.update(toy=rows["toy"][:, :11].copy()),
        lambda rows, entries: rows.update(toy=rows["toy"][:, :2].copy()),
        lambda rows, entries: rows.update(toy=rows["toy"][:, 0].copy()),
        lambda rows, entries: rows.update(toy=np.array(3, np.float32)),
        lambda rows, entries: rows.update(toy=rows["toy"] * np.float32(np.nan)),
        lambda rows, entries: entries[0].pop("name"),
        lambda rows, entries: entries[0].pop("lead_in"),
        lambda rows, entries: entries[0].update(surprise=1),
        lambda rows, entries: entries[0].update(first="0"),
        lambda rows, entries: entries[0].update(first=99),
        lambda rows, entries: entries[0].update(count=1),
        lambda rows, entries: entries[0].update(steps=3),
        lambda rows, entries: entries[0].update(initial_scale=0),
        lambda rows, entries: entries[0].update(options={"a": [1]}),
        lambda rows, entries: entries.append(3),
        lambda rows, entries: entries.append({}),
        lambda rows, entries: entries.append(entries[0]),
        lambda rows, entries: entries[0].update(first=-3),
        lambda rows, entries: entries[0].update(first=True),
        lambda rows, entries: entries[0].update(count=2**63 - 1),
        lambda rows, entries: entries[0].update(steps=10**400),
        lambda rows, entries: entries[0].update(initial_scale=float("nan")),
        lambda rows, entries: entries[0].update(options={"a": 10**400}),
        lambda rows, entries: entries[0].update(name=["toy"]),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, change: Change) -> None:
    path = written(tmp_path / "samplers", sampler(2), sampler(3))
    with safe_open(path, "np") as file:
        rows = {"toy": file.get_tensor("toy")}
        entries = json.loads(file.metadata()["samplers"])
    change(rows, entries)
    save_file(rows, path, {"samplers": json.dumps(entries)})
    with pytest.raises(BundleError, match=r"holds no tables of samplers \(.*\); export the bundle again") as error:
        load_tables(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", [None, {}, {"other": "x"}, {"samplers": "{"}, {"samplers": "3"}, DEEP])
def test_files_that_hold_no_tables(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"toy": np.zeros((1, 12), np.float32)}, tmp_path / "samplers", metadata)
    with pytest.raises(BundleError, match="holds no tables of samplers"):
        load_tables(tmp_path / "samplers")


@pytest.mark.parametrize("content", [b"", b"x" * 100, None])
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "samplers").write_bytes(content)
    with pytest.raises(BundleError, match="holds no tables of samplers"):
        load_tables(tmp_path / "samplers")
