"""Tensors by name out of files, and what they are called by."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tgate_engine.errors import RequestError
from tgate_runtime.tuning.weights import digest_of, tensors_of


class Harm:
    """What an unpickler that runs code would run."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.place,)


def test_tensors_by_name_whatever_holds_them(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    torch.save(OrderedDict(tensors, epoch=3), tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        held = tensors_of(tmp_path / name)
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[each], tensors[each]) for each in tensors)
        assert digest_of(held) == digest_of(tensors)


def test_a_digest_is_of_names_values_and_what_goes_with_them() -> None:
    digests = [
        digest_of({"a": torch.ones(2)}),
        digest_of({"b": torch.ones(2)}),
        digest_of({"a": torch.zeros(2)}),
        digest_of({"a": torch.ones(2)}, "more"),
    ]
    assert len(set(digests)) == 4
    assert digest_of({"a": torch.ones(2), "b": torch.ones(2)}) == digest_of({"b": torch.ones(2), "a": torch.ones(2)})


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": Harm(tmp_path / "harm")}))
    with pytest.raises(RequestError, match="holds no weights that can be read") as error:
        tensors_of(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()
    torch.save({"a": Harm(tmp_path / "harm")}, tmp_path / "x.pt")
    with pytest.raises(RequestError, match="holds no weights that can be read"):
        tensors_of(tmp_path / "x.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="holds no weights that can be read"):
        tensors_of(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(RequestError, match="holds no weights that can be read"):
        tensors_of(tmp_path / name)


def test_tensors_without_names_are_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(RequestError, match="holds no weights by their names"):
        tensors_of(tmp_path / "x.pt")
