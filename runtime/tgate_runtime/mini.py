"""``mini``, the bundle that ships with the package, by its name.

All of it ships but the numbers of its weights: in float32 they are twice what ``mini-pixart``, the checkpoint beside
it, holds in float16. Of their file only the head ships, a safetensors header whose every name says which tensor of the
checkpoint it is: ``<component>.<key>``, with ``^T`` where it is laid out transposed. Whoever asks first has the bundle
made whole in the cache directory, and every digest of its manifest checked there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

import tgate_engine
from tgate_engine.atomic import staging
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, shown
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.manifest_json import parse_manifest
from tgate_engine.plan_report import REPORTS
from tgate_runtime.cache import cache_directory, own_directory

log = logging.getLogger("tgate")

MINI = "mini"
MODELS = Path(tgate_engine.__file__).parent / "models"
CHECKPOINT = MODELS / "mini-pixart"
HEAD_FILE = "weights.head"
"""What ships of the weights' file: its first bytes, up to the end of the header."""

_HELD_AS = {"text_encoder.encoder.embed_tokens.weight": "text_encoder.shared.weight"}
"""T5's embedding has two names, and the checkpoint holds it by the other one."""


def is_embedded(model: str) -> bool:
    """Whether a manifest's ``model`` is one of those that ship with the package."""
    return any(path.is_dir() and path.name == model for path in MODELS.iterdir())


def place_of(source: str | os.PathLike[str]) -> Path:
    """The directory of a bundle: ``source`` itself, or where ``mini`` is, which is made if nobody has yet.

    Only the text ``"mini"`` is that name; ``"./mini"`` and a ``Path`` are directories. A bundle of that name in the
    working directory comes first, with a warning in the log ``tgate``. The bundle in the cache is the user's own: plans
    may be added to it. Safe where several processes and threads ask at once. Raises :class:`BundleError` where it
    cannot be made, and :class:`~tgate_engine.errors.EngineError` where somebody else can write to the cache.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise BundleError(f"a bundle is a directory, got {type(source).__name__} {shown(source)}")
    if source != MINI:
        return Path(source)
    if Path(MINI, MANIFEST_FILE).is_file():
        log.warning("mini is the bundle ./mini here, not the one that ships with tgate-engine; name it ./mini")
        return Path(source)
    digest = hashlib.sha256((MODELS / MINI / MANIFEST_FILE).read_bytes()).hexdigest()
    try:
        place = own_directory() / f"{MINI}-{digest[:16]}"
    except OSError as error:
        raise _unmade(cache_directory(), error) from error
    if not place.is_dir():
        _make(place)
    return place


def _make(place: Path) -> None:
    """Make the bundle there, unless somebody else is faster."""
    try:
        with staging(place) as stage:
            assemble(MODELS / MINI, stage)
    except BundleError:
        if not place.is_dir():
            raise
    except OSError as error:
        if not place.is_dir():
            raise _unmade(place.parent, error) from error


def _unmade(cache: Path, error: OSError) -> BundleError:
    return BundleError(
        f"the bundle `mini` cannot be made in {cache} ({error}); if it cannot be written there, set TGATE_CACHE to a "
        "directory where it can"
    )


def assemble(shipped: Path, bundle: Path) -> None:
    """Fill an empty directory with the bundle of which ``shipped`` holds all but the weights' numbers.

    Raises :class:`BundleError` where the files do not give what the manifest says.
    """
    manifest = parse_manifest((shipped / MANIFEST_FILE).read_bytes())
    for name in (MANIFEST_FILE, *manifest.files):
        if name != manifest.weights:
            (bundle / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(shipped / name, bundle / name)
    if (shipped / REPORTS).is_dir():
        shutil.copytree(shipped / REPORTS, bundle / REPORTS, copy_function=shutil.copyfile)
    try:
        _write_weights((shipped / HEAD_FILE).read_bytes(), bundle / manifest.weights)
        Bundle.open(bundle)
    except (BundleError, SafetensorError, KeyError, ValueError) as error:
        raise BundleError(
            f"the files of `mini` in {MODELS} are damaged ({error}); install tgate-engine again"
        ) from error


def _write_weights(head: bytes, path: Path) -> None:
    """Write the head, and after it the checkpoint's tensors that it names, as float32."""
    header = json.loads(head[8:])  # after the length of what follows
    with ExitStack() as stack, path.open("wb") as file:
        components = {
            held.parent.name: stack.enter_context(safe_open(held, framework="numpy"))
            for held in CHECKPOINT.glob("*/*.safetensors")
        }
        file.write(head)
        for name in sorted(header, key=lambda name: int(header[name]["data_offsets"][0])):
            key = name.removesuffix("^T")
            component, _, tensor = _HELD_AS.get(key, key).partition(".")
            values = components[component].get_tensor(tensor)
            file.write(np.ascontiguousarray(values if key == name else values.T, np.float32).data)
