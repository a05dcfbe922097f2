"""Adapters of a request: copies of the weights that LoRAs change, with their changes added.

All numbers are float32 until the end: ``W + sum of scale * factor * up @ down``, in the order of the adapters' names.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from tgate_engine.adapter import BIAS, DOWN, FACTOR, MOST_BYTES, MOST_SCALE, TURNED, UP
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import decode, encode
from tgate_engine.errors import BundleError, RequestError, shown
from tgate_engine.manifest import Manifest
from tgate_runtime.weights import Weight, map_weights

Scales = tuple[tuple[str, float], ...]
"""Adapters with their scales, in the order of their names."""


def scales_of_adapters(loras: object, manifest: Manifest) -> Scales:
    """What a request's ``loras`` ask for; empty for None.

    Raises :class:`RequestError` for an adapter that the bundle has not, and a scale that is none or changes nothing.
    """
    if loras is None:
        return ()
    if not isinstance(loras, Mapping):
        raise RequestError(
            f'loras are scales by the names of adapters, such as {{"style": 0.8}}, got {type(loras).__name__} '
            f"{shown(loras)}"
        )
    for name, scale in loras.items():
        if name not in manifest.adapters:
            have = ", ".join(sorted(manifest.adapters)) or "none; `tgate adapt` adds one"
            raise RequestError(f"the bundle has no adapter '{shown(name)}'; it has {have}")
        number = isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool)
        if not number or not 0 < abs(scale) <= MOST_SCALE:
            raise RequestError(
                f"the scale of adapter {name!r} is {shown(scale)}; a number other than 0, which would change nothing, "
                f"and of at most {MOST_SCALE:.0f} is wanted"
            )
    return tuple((name, float(loras[name])) for name in sorted(loras))


def weights_with(bundle: Bundle, scales: Scales) -> dict[str, Weight]:
    """The weights that those adapters change, changed, by their names: copies, in the dtype of the bundle's.

    Raises :class:`BundleError` for an adapter's file that does not fit the weights, and :class:`RequestError` where a
    changed weight is beyond its dtype, or none of them changes in it.
    """
    mapped = map_weights(bundle.file(bundle.manifest.weights))
    added: dict[str, list[tuple[str, float, dict[str, NDArray[Any]]]]] = defaultdict(list)
    for name, scale in scales:
        for weight, parts in _read(bundle, name).items():
            if weight not in mapped:
                raise _unfit(bundle, name, f"weight {weight!r:.80} is not there")
            added[weight].append((name, scale, parts))
    changed = {weight: _changed(bundle, weight, mapped[weight], changes) for weight, changes in added.items()}
    if all(np.array_equal(weight.array, mapped[name].array) for name, weight in changed.items()):
        raise RequestError(
            f"with {', '.join(f'{name}:{scale:g}' for name, scale in scales)}, no weight changes in "
            f"{bundle.manifest.dtype}; take larger scales"
        )
    return changed


def _read(bundle: Bundle, name: str) -> dict[str, dict[str, NDArray[Any]]]:
    """An adapter's file: by the weights' names, the parts of each change by their marks."""
    file = bundle.manifest.adapters[name].file
    try:
        tensors = load(bundle.read(file, MOST_BYTES))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unfit(bundle, name, f"{file} is not a whole safetensors file ({error!s:.200})") from None
    weights: dict[str, dict[str, NDArray[Any]]] = defaultdict(dict)
    for key, values in tensors.items():
        weight, mark, rest = key.rpartition("#")
        weights[weight][mark + rest] = values
    for weight, parts in weights.items():
        if not weight or set(parts) not in ({UP, DOWN, FACTOR}, {BIAS}):
            raise _unfit(bundle, name, f"it has {', '.join(sorted(parts))} of {weight!r:.80}")
        if odd := [p for p in parts.values() if p.dtype not in (np.float16, np.float32) or not np.isfinite(p).all()]:
            raise _unfit(bundle, name, f"{weight!r:.80} has {odd[0].dtype} or numbers that are not finite")
    return weights


def _changed(
    bundle: Bundle, name: str, weight: Weight, changes: list[tuple[str, float, dict[str, NDArray[Any]]]]
) -> Weight:
    """One weight with its changes."""
    values = decode(weight.array, weight.dtype)
    lora = values.T if name.endswith(TURNED) else values  # a view, as the LoRA has it
    with np.errstate(over="ignore", invalid="ignore"):  # looked for in the end
        for adapter, scale, parts in changes:
            change = _change(parts)
            if change.shape != (lora.shape[0], math.prod(lora.shape[1:]))[: change.ndim]:
                raise _unfit(bundle, adapter, f"{name!r:.80} is {list(lora.shape)}, its change {list(change.shape)}")
            lora += np.float32(scale) * change.reshape(lora.shape)
        held = encode(np.ascontiguousarray(values), weight.dtype)
    if not np.isfinite(decode(held, weight.dtype)).all():
        raise RequestError(
            f"with {', '.join(f'{adapter}:{scale:g}' for adapter, scale, _ in changes)}, weight {name!r:.80} does not "
            f"fit into {weight.dtype}; take smaller scales"
        )
    return Weight(weight.dtype, held)


def _change(parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """[outputs, inputs * kernel] of a weight, [outputs] of a bias."""
    if BIAS in parts:
        return parts[BIAS].astype(np.float32)
    up, down, factor = (parts[mark].astype(np.float32) for mark in (UP, DOWN, FACTOR))
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or factor.shape != (1,):
        return np.empty((0, 0), np.float32)  # of no weight's shape
    return np.asarray(factor * (up @ down), np.float32)


def _unfit(bundle: Bundle, name: str, why: str) -> BundleError:
    return BundleError(
        f"{bundle.path}: adapter {name!r} does not fit the bundle's weights: {why}; add it again with `tgate adapt "
        "--force`"
    )
