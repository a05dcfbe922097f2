"""A checkpoint in diffusers layout: its configs and its tensors, read one at a time and never unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Stored

_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_HUB_FILES = (
    "model_index.json",
    "README.md",
    "LICENSE*",
    "scheduler/*.json",
    "*/config.json",
    "*/tokenizer_config.json",
)
_HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")

# T5 shares one table of embeddings under two names; files hold either.
_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

# Names that older checkpoints use for the autoencoder's attention.
_OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


class DirectoryCheckpoint(Checkpoint):
    """A directory with ``model_index.json`` and one sub-directory a component.

    ``elsewhere``: directories of components that lie in a repository of their own, such as LCM-SDXL's U-Net.
    """

    def __init__(self, root: Path, *, prefer_half: bool = False, elsewhere: Mapping[str, Path] | None = None) -> None:
        """``prefer_half``: where a component has both, read its fp16 file rather than its full one."""
        if not (root / "model_index.json").is_file():
            raise ExportError(f"{root} has no model_index.json; --checkpoint wants a directory in diffusers layout")
        self.root = root
        self.where = str(root)
        self.model_index: Mapping[str, Any] = _read_json(root / "model_index.json")
        self._prefer_half = prefer_half
        self._elsewhere = dict(elsewhere or {})
        self._configs: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, TensorFiles] = {}

    def config(self, component: str) -> dict[str, Any]:
        if component not in self._configs:
            path = self.directory(component) / "config.json"
            if not path.is_file():
                raise ExportError(f"{path} is missing; the checkpoint is incomplete")
            self._configs[component] = _read_json(path)
        return self._configs[component]

    def scheduler_config(self) -> dict[str, Any]:
        path = self.root / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            raise ExportError(f"{path} is missing; the checkpoint is incomplete")
        return _read_json(path)

    def tensors(self, component: str) -> TensorFiles:
        if component not in self._tensors:
            self._tensors[component] = TensorFiles.open(self.directory(component), self._prefer_half)
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        return self.root / name

    def token_limit(self, name: str) -> int | None:
        limit = (self.further(f"{name}/tokenizer_config.json") or {}).get("model_max_length")
        if limit is None:
            return None
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit < 2 or limit % 1 != 0:
            raise ExportError(
                f"{self.root / name}/tokenizer_config.json has model_max_length = {limit!r}; a whole number of at "
                "least 2, for start and end, is wanted"
            )
        return int(limit)

    def further(self, file: str) -> dict[str, Any] | None:
        path = self.root / file
        return _read_json(path) if path.is_file() else None

    def directory(self, component: str) -> Path:
        return self._elsewhere.get(component, self.root / component)

    def licence(self) -> str:
        """The licence that the model card's front matter names, or "unknown"."""
        card = self.root / "README.md"
        if card.is_file():
            lines = card.read_text("utf-8", "replace").splitlines()
            if lines and lines[0].strip() == "---":
                for line in lines[1:]:
                    if line.strip() == "---":
                        break
                    key, _, value = line.partition(":")
                    if key.strip() == "license":
                        return value.strip().strip("\"'") or "unknown"
        return "unknown"


@dataclass
class TensorFiles:
    """The safetensors files of one component, opened lazily; a tensor is read when asked for and not kept."""

    directory: Path
    files: Mapping[str, Path]
    held: Mapping[str, Stored]
    _open: dict[Path, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path, prefer_half: bool) -> TensorFiles:
        paths = _weight_files(directory, prefer_half)
        keys: dict[str, Path] = {}
        held: dict[str, Stored] = {}
        for path in paths:
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118  a safe_open is no mapping
                        if key in keys:
                            raise ExportError(
                                f"{directory} has tensor {key!r} in {keys[key].name} and in {path.name}; "
                                "download the checkpoint again"
                            )
                        part = file.get_slice(key)
                        keys[key], held[key] = path, Stored(part.get_dtype(), tuple(part.get_shape()))
            except (OSError, safetensors.SafetensorError) as error:
                raise ExportError(
                    f"{path} is not a whole safetensors file ({error}); download the checkpoint again"
                ) from None
        return TensorFiles(directory, keys, held)

    def stored(self) -> Mapping[str, Stored]:
        return self.held

    def find(self, key: str) -> str:
        """The name that ``key`` of today's modules has in these files."""
        for candidate in spellings(key):
            if candidate in self.files:
                return candidate
        raise ExportError(
            f"{self.directory} has no tensor {key!r} (it has {len(self.files)} others); "
            "the checkpoint is of another architecture than its config.json says, or incomplete"
        )

    def read(self, key: str) -> Tensor:
        """The tensor of that key, on the CPU, in the checkpoint's dtype. The caller owns it."""
        name = self.find(key)
        path = self.files[name]
        try:
            if path not in self._open:
                self._open[path] = safetensors.safe_open(path, framework="pt")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ExportError(f"{path}: tensor {name!r} cannot be read ({error}); download it again") from None
        return tensor

    def close(self) -> None:
        """Let go of the files' memory maps."""
        self._open.clear()


def spellings(key: str) -> Iterable[str]:
    """The names that a parameter of today's modules has had in checkpoints, today's first."""
    yield key
    yield f"text_model.{key}"
    yield key.removeprefix("text_model.")
    if key in _T5_EMBEDDINGS:
        yield from _T5_EMBEDDINGS
    for new, old in _OLD_NAMES.items():
        if new in key:
            yield key.replace(new, old)


def locate(location: str, components: Iterable[str], *, prefer_half: bool = False) -> Path:
    """A local directory, or the hub's cache of a hub id, which is filled with those components where it is not.

    A component ``""`` stands for files that lie in no folder.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    looks_local = location.startswith((".", "/", "~")) or location.count("/") != 1 or path.exists()
    if looks_local:
        what = "is neither a directory nor a .safetensors file" if path.exists() else "does not exist"
        raise ExportError(
            f"checkpoint {location} {what}; --checkpoint wants a diffusers directory, a single .safetensors file or "
            "a hub id"
        )
    import huggingface_hub

    folders = [f"{component}/" if component else "" for component in components]
    patterns = [*_HUB_FILES, *(f"{folder}{pattern}" for folder in folders for pattern in _HUB_PATTERNS)]
    ignored = [] if prefer_half else ["*.fp16*.safetensors"]
    try:
        snapshot = huggingface_hub.snapshot_download(
            location, allow_patterns=patterns, ignore_patterns=[*ignored, "*.non_ema.safetensors"]
        )
    except Exception as error:  # the hub's client raises many kinds: no network, no such repository, no permission
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"checkpoint {location!r} is no local directory and could not be fetched from the hub ({first}); "
            "give a local diffusers directory with --checkpoint"
        ) from None
    return Path(snapshot)


def _weight_files(directory: Path, prefer_half: bool) -> list[Path]:
    """One file, or the shards that an index names."""
    if not directory.is_dir():
        raise ExportError(f"{directory} is missing; the checkpoint is incomplete")
    variants = (".fp16", "") if prefer_half else ("", ".fp16")
    for variant in variants:
        for stem in _WEIGHT_NAMES:
            single = directory / f"{stem}{variant}.safetensors"
            _follow(single)
            indices = (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json")
            if single.is_file() and (left := next((i for i in indices if (directory / i).is_file()), None)):
                raise ExportError(
                    f"{directory} has weights in {single.name} and, by {left}, in shards; remove what is left over"
                )
            if single.is_file():
                return [single]
            for index in indices:
                _follow(directory / index)
                if (directory / index).is_file():
                    places = _read_json(directory / index).get("weight_map")
                    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
                        raise ExportError(
                            f"{directory / index} has no weight_map from tensors to files; the checkpoint is damaged"
                        )
                    names = sorted(set(places.values()))
                    missing = [n for n in names if os.path.basename(n) != n or not (directory / n).is_file()]
                    if missing or not names:
                        raise ExportError(f"{directory / index} names {missing or 'no files'}, not in that directory")
                    return [directory / n for n in names]
    pickles = sorted(p.name for p in directory.glob("*.bin"))
    hint = f" (it has {pickles[0]}, which is a pickle and is not read)" if pickles else ""
    raise ExportError(f"{directory} has no safetensors weights{hint}; the checkpoint is incomplete")


def _follow(path: Path) -> None:
    """Raises :class:`ExportError` for a link to nothing, which is no sign that another file is meant."""
    if path.is_symlink() and not path.exists():
        raise ExportError(f"{path} is a link to {os.readlink(path)}, which is not there; download the checkpoint again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is not readable JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds {type(data).__name__}, not an object; the checkpoint is damaged")
    return data
