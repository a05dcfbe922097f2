"""A checkpoint in diffusers layout: its configs and its tensors, read one at a time and never unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Stored
from tgate_export.checkpoints.files import check_inside, kind_of, plain, present, quoted, read_bytes, read_json
from tgate_export.checkpoints.headers import read_header
from tgate_export.places import local

_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_HUB_FILES = (
    "model_index.json",
    "README.md",
    "LICENSE*",
    "scheduler/*.json",
    "*/config.json",
    "*/tokenizer_config.json",
)
_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_PATH = 1024
"""Characters of a path in a message."""

_CARD_BYTES = 1 << 20
_INDEX_BYTES = 16 << 20
_ADAPTER = "adapter_config.json"
"""With it, transformers loads another model than that of the directory."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")

# T5 shares one table of embeddings under two names; files hold either.
_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

# Where the parts of a model of pictures and text lay before transformers 5, which still writes them there.
_OLD_PLACES = {"model.language_model.": "model.", "model.visual.": "visual."}

# Names that older checkpoints use for the autoencoder's attention.
_OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


class DirectoryCheckpoint(Checkpoint):
    """A directory with ``model_index.json`` and one sub-directory a component.

    ``elsewhere``: directories of components that lie in a repository of their own, such as LCM-SDXL's U-Net.
    """

    def __init__(self, root: Path, *, prefer_half: bool = False, elsewhere: Mapping[str, Path] | None = None) -> None:
        """``prefer_half``: where a component has both, read its fp16 file rather than its full one."""
        if not present(root / "model_index.json"):
            raise ExportError(f"{root} has no model_index.json; --checkpoint wants a directory in diffusers layout")
        self.root = root
        self.where = str(root)
        self._prefer_half = prefer_half
        self._elsewhere = dict(elsewhere or {})
        self.model_index: Mapping[str, Any] = self._read(root / "model_index.json")
        self._configs: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, TensorFiles] = {}

    def config(self, component: str) -> dict[str, Any]:
        if component not in self._configs:
            path = self.directory(component) / "config.json"
            if not present(path):
                raise ExportError(f"{path} is missing; the checkpoint is incomplete")
            if present(path.with_name(_ADAPTER)):
                raise ExportError(
                    f"{path.with_name(_ADAPTER)} makes the {component} an adapter of another model; merge it into its "
                    "model, or give it with --lora"
                )
            self._configs[component] = self._read(path)
        return self._configs[component]

    def scheduler_config(self) -> dict[str, Any]:
        path = self.root / "scheduler" / "scheduler_config.json"
        if not present(path):
            raise ExportError(f"{path} is missing; the checkpoint is incomplete")
        # How diffusers writes that nothing is clipped.
        return self._read(path, infinite=("lambda_min_clipped",))

    def tensors(self, component: str) -> TensorFiles:
        if component not in self._tensors:
            directory = self.directory(component)
            self._tensors[component] = TensorFiles.open(directory, self._prefer_half, self._root_of(directory))
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        directory = self.root / name
        for file in sorted(directory.glob("*")):
            check_inside(self.root, file)
        return directory

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
        return self._read(path) if present(path) else None

    def directory(self, component: str) -> Path:
        return self._elsewhere.get(component, self.root / component)

    def licence(self) -> str:
        """The licence that the model card's front matter names, or "unknown"."""
        card = self.root / "README.md"
        if card.is_file():
            check_inside(self.root, card)
            lines = read_bytes(card, _CARD_BYTES).decode("utf-8", "replace").splitlines()
            if lines and lines[0].strip() == "---":
                for line in lines[1:]:
                    if line.strip() == "---":
                        break
                    key, _, value = line.partition(":")
                    if key.strip() == "license":
                        return value.strip().strip("\"'") or "unknown"
        return "unknown"

    def _root_of(self, path: Path) -> Path:
        """The directory out of which a path may not lead."""
        return next((root for root in self._elsewhere.values() if path.is_relative_to(root)), self.root)

    def _read(self, path: Path, infinite: tuple[str, ...] = ()) -> dict[str, Any]:
        check_inside(self._root_of(path), path)
        return read_json(path, infinite=infinite)


@dataclass
class TensorFiles:
    """The safetensors files of one component, opened lazily; a tensor is read when asked for and not kept."""

    directory: Path
    files: Mapping[str, Path]
    held: Mapping[str, Stored]
    _open: dict[Path, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path, prefer_half: bool, root: Path | None = None) -> TensorFiles:
        """``root``: the checkpoint, out of which no file may lead; the directory itself where it is not given."""
        keys: dict[str, Path] = {}
        held: dict[str, Stored] = {}
        for path in _weight_files(directory, prefer_half):
            check_inside(root or directory, path)
            for key, stored in read_header(path).tensors.items():
                if key in keys:
                    raise ExportError(
                        f"{directory} has tensor {key!r} in {keys[key].name} and in {path.name}; "
                        "download the checkpoint again"
                    )
                keys[key], held[key] = path, stored
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
            raise ExportError(f"{path}: tensor {name!r} cannot be read ({error!s:.200}); download it again") from None
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
    for new, old in _OLD_PLACES.items():
        if key.startswith(new):
            yield old + key.removeprefix(new)
    for new, old in _OLD_NAMES.items():
        if new in key:
            yield key.replace(new, old)


def locate(location: str, components: Iterable[str], *, prefer_half: bool = False) -> Path:
    """A local directory, or the hub's cache of a hub id, which is filled with those components where it is not.

    A component ``""`` stands for files that lie in no folder.
    """
    path = local(location)
    if path is not None and path.is_dir():
        return path
    there = path is not None and path.exists()
    if there or not _HUB_ID.fullmatch(location):
        what = "is neither a directory nor a .safetensors file" if there else "does not exist"
        raise ExportError(
            f"checkpoint {plain(location, _PATH)} {what}; --checkpoint wants a diffusers directory, a single "
            ".safetensors file or a hub id"
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
                    return _shards(directory / index)
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    hint = f" (it has {pickles[0]}, which is a pickle and is not read)" if pickles else ""
    raise ExportError(f"{directory} has no safetensors weights{hint}; the checkpoint is incomplete")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them beside it."""
    places = read_json(index, limit=_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ExportError(
            f"{index} has weight_map = {quoted(places)} ({kind_of(places)}), and an object from tensors to files is "
            "wanted; the checkpoint is damaged"
        )
    names = sorted(set(places.values()))
    odd = [name for name in names if os.path.basename(name) != name or not name.endswith(".safetensors")]
    if odd:
        raise ExportError(
            f"{index} names {plain(odd[0], _PATH)}; a .safetensors file beside it is wanted, and nothing else is read"
        )
    missing = [name for name in names if not present(index.with_name(name))]
    if missing or not names:
        raise ExportError(f"{index} names {plain(missing[0], _PATH) if names else 'no files'}, not in that directory")
    return [index.with_name(name) for name in names]


def _follow(path: Path) -> None:
    """Raises :class:`ExportError` for a link to nothing, which is no sign that another file is meant."""
    if path.is_symlink() and not path.exists():
        raise ExportError(f"{path} is a link to {os.readlink(path)}, which is not there; download the checkpoint again")
