"""What an IP-Adapter's file says, and which files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_ip_adapter import save_ip_adapter
from tgate_engine.errors import ExportError
from tgate_export.ip_adapter_file import read_ip_adapter

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def adapters(family_bundle: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain one and a Plus one, for the U-Net of a small SD 1.5. Read only."""
    checkpoint = family_bundle("sd15_a")[0]
    folder = tmp_path_factory.mktemp("adapters")
    return [save_ip_adapter(checkpoint, folder / str(plus), plus=plus) for plus in (False, True)]


def test_what_the_two_kinds_say(adapters: list[Path]) -> None:
    plain, plus = map(read_ip_adapter, adapters)
    assert (plain.kind, plain.tokens, plain.width, plain.embedding) == ("plain", 4, 24, 20)
    assert (plus.kind, plus.tokens, plus.width, plus.embedding) == ("plus", 6, 24, 24)
    for own, path in zip((plain, plus), adapters, strict=True):
        stored = load_file(path)
        assert [*own.pairs] == list(range(1, 2 * len(own.pairs), 2))
        torch.testing.assert_close(own.read(3, "v"), stored["ip_adapter.3.to_v_ip.weight"])
        assert {*own.projection} == {name for name, _ in own.build().named_parameters()}
        assert not any(tensor.is_meta for tensor in own.projection.values())
    stored = load_file(adapters[1])
    keys, values = stored["image_proj.layers.2.0.to_kv.weight"].chunk(2)
    torch.testing.assert_close(plus.projection["layers.2.attn.to_k.weight"], keys)
    torch.testing.assert_close(plus.projection["layers.2.attn.to_v.weight"], values)


def test_half_precision_is_read_in_float32(adapters: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(adapters[0]).items()}, path)
    own = read_ip_adapter(path)
    assert {tensor.dtype for tensor in own.projection.values()} == {torch.float32}
    assert own.read(1, "k").dtype == torch.float16


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def _with(**more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("plus", "change", "says"),
    [
        (
            0,
            lambda _: {"unet.x": ONE},
            "has a tensor 'unet.x'; the names in one begin with image_proj. and",
        ),
        (0, lambda _: {}, "holds no IP-Adapter of a kind that is known (it is empty)"),
        (0, lambda _: {"image_proj.x": ONE}, "of a kind that is known (its first tensor is 'x')"),
        (0, _with(**{"image_proj__proj__3__weight": ONE}), "has 5 tensors of image_proj for 4"),
        (1, _with(**{"image_proj__proj__3__weight": ONE}), "is of the kind Full, which gives cross-attention every"),
        (1, _with(**{"image_proj__norm__weight": ONE}), "is of the kind FaceID, which takes a face's embedding"),
        (1, _with(**{"image_proj__perceiver_resampler__proj_in__weight": ONE}), "is of the kind FaceID"),
        (0, _with(**{"ip_adapter__0__to_k_lora__down__weight": ONE}), "is of the kind FaceID"),
        (0, _with(**{"ip_adapter__x": ONE}), "has a tensor 'ip_adapter.x'; to_k_ip and to_v_ip of layers that are"),
        (0, _without("ip_adapter.1.to_k_ip.weight"), "has half of layer 1 (to_v_ip alone); download it again"),
        (0, _without("image_proj.norm.bias"), "lacks norm.bias; an adapter of the plain kind is damaged so"),
        (1, _without("image_proj.layers.3.1.3.weight"), "lacks layers.3.ff.1.net.2.weight; an adapter of the plus"),
        (0, _with(**{"image_proj__norm__bias": torch.zeros(5)}), "has no image_proj of the plain kind (ValueError"),
        (1, _with(**{"image_proj__latents": torch.zeros(1, 2, 3)}), "has no image_proj of the plus kind (ValueError"),
        (1, _with(**{"image_proj__latents": torch.zeros(6)}), "has no image_proj of the plus kind (IndexError"),
        (0, _with(**{"image_proj__norm__bias": torch.zeros(24, dtype=torch.int8)}), "is stored as I8; floating point"),
        (0, _with(**{"image_proj__norm__bias": torch.full((24,), torch.nan)}), "'image_proj.norm.bias' holds NaN or"),
        (0, _with(**{"ip_adapter__1__to_k_ip__weight": torch.full((2, 2), torch.inf)}), "to_k_ip.weight' holds NaN or"),
    ],
)
def test_refused(
    adapters: list[Path], tmp_path: Path, plus: int, change: Callable[[Tensors], Tensors], says: str
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(adapters[plus])).items()}, path)
    with pytest.raises(ExportError) as caught:
        read_ip_adapter(path)
    assert str(caught.value).startswith(f"IP-Adapter {path}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"IP-Adapter .* does not exist; --ip-adapter wants a \.safetensors file"):
        read_ip_adapter(tmp_path / "none.safetensors")
    (tmp_path / "a.bin").touch()
    with pytest.raises(ExportError, match="is a pickle by its name, which is never read"):
        read_ip_adapter(tmp_path / "a.bin")
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(ExportError, match="is not a whole safetensors file"):
        read_ip_adapter(tmp_path / "short.safetensors")


def test_shapes_beyond_memory_take_none(adapters: list[Path], tmp_path: Path) -> None:
    """A resampler as wide as one tensor says that it were would take terabytes."""
    path = tmp_path / "wide.safetensors"
    save_file(load_file(adapters[1]) | {"image_proj.latents": torch.zeros(1, 6, 1_000_000)}, path)
    with pytest.raises(ExportError, match="has no image_proj of the plus kind"):
        read_ip_adapter(path)
