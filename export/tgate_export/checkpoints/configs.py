"""Values of configurations: of the type that their class declares, and of a size that a model can have.

The types are those of the classes of diffusers and transformers themselves, so that a key which a new release brings is
checked as well. The bounds are ours: an order of magnitude above the largest models there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.files import kind_of, quoted

MOST_ITEMS = 1024
"""Of a list; a list of betas has one for each timestep, and a bound of its own."""

MOST_CHARACTERS = 256

LARGEST_NUMBER = 1e12

_WIDTH = (1, 1 << 16)
"""Channels, heads and the like. As many as T5 11B has in a layer, the widest network; two of them make a tensor that
memory need not hold."""

_BOUNDS: Mapping[str, tuple[int, int]] = {
    # Layers, and what may be 0 of them.
    **dict.fromkeys(("layers_per_block", "num_layers", "num_decoder_layers", "num_hidden_layers"), (0, 256)),
    **dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block", "dual_attention_layers"), (0, 256)),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (0, 256)),
    **dict.fromkeys(("depth", "fullatt_block_indexes", "max_window_layers"), (0, 256)),
    **dict.fromkeys(("transformer_layers_per_block", "reverse_transformer_layers_per_block"), (0, 256)),
    # Sides of pictures, in pixels or latent pixels, of which tables of places are made.
    **dict.fromkeys(("sample_size", "image_size"), (1, 4096)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (1, 64)),
    "patch_size": (1, 1024),
    **dict.fromkeys(("video_length", "num_frames"), (1, 1024)),
    "max_position_embeddings": (1, 1 << 17),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), (1, 1 << 20)),
    "seq_length": (1, 1 << 16),
    "quantization_bit": (0, 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), (-1, 1 << 20)),
    **dict.fromkeys(("image_token_id", "video_token_id"), (-1, 1 << 20)),
    **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), (-1, 1 << 20)),
    **dict.fromkeys(("freq_shift", "downsample_padding", "chunk_size_feed_forward"), (0, 64)),
    "num_labels": (0, MOST_ITEMS),
    # Of schedulers.
    "num_train_timesteps": (1, 10_000),
    "original_inference_steps": (1, 10_000),
    "steps_offset": (0, 10_000),
    "solver_order": (1, 16),
    "predictor_order": (1, 16),
    "corrector_order": (1, 16),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len", "disable_corrector"), (0, 1 << 20)),
    "id2label": (0, MOST_ITEMS),
    "label2id": (0, MOST_ITEMS),
}

_LISTS_OF_LISTS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")
"""Which annotations describe wrongly."""

MOST_PARAMETERS = 1 << 13
"""Tensors of a module; SDXL's U-Net has 1680."""

MOST_PLACES = 1 << 25
"""Numbers of a table of places, which is made whatever the weights are; the largest published has 19 million."""

_PLACES = {"sample_size": 0, "patch_size": 1, "num_attention_heads": 1, "attention_head_dim": 1}
"""What a diffusion transformer's table of places is made of, and what stands for null."""

_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Keys by which transformers chooses, and may download, an implementation of attention."""

_IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_DTYPES = (None, "float32", "float16", "bfloat16", "float64")
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
"""Keys that name code of the checkpoint's own."""


@dataclass(frozen=True)
class Wanted:
    """``kinds``: what a value may be: bool, int, float, str, dict and NoneType.

    ``items``: what the values of a list may be; None where it may be no list.
    """

    kinds: frozenset[type] = frozenset()
    items: Wanted | None = None

    def __or__(self, other: Wanted) -> Wanted:
        items = self.items | other.items if self.items and other.items else self.items or other.items
        return Wanted(self.kinds | other.kinds, items)


def check_code(where: str, config: Mapping[str, Any]) -> None:
    """Raises :class:`ExportError` for a configuration that names code to be run: nothing of it is."""
    for key in _CODE:
        if config.get(key):
            raise ExportError(
                f"{where} has {key} = {quoted(config[key])}: code of the checkpoint's own, which is never run; give a "
                "checkpoint of a class that diffusers or transformers bring"
            )


def without_code(config: Mapping[str, Any], brought: Collection[str]) -> dict[str, Any]:
    """A configuration without the code it names, where that is none but modules that diffusers brings itself."""
    named = config.get("auto_map")
    classes = named.values() if isinstance(named, dict) else ()
    files = [file for value in classes for file in (value if isinstance(value, list) else [value]) if file is not None]
    known = bool(files) and all(isinstance(file, str) and file.partition(".")[0] in brought for file in files)
    return {key: value for key, value in config.items() if key != "auto_map" or not known}


def class_name(where: str, config: Mapping[str, Any]) -> str | None:
    """The class that a configuration is said to be of; None where it names none. Raises :class:`ExportError`."""
    name = config.get("_class_name")
    if name is None or (isinstance(name, str) and name.isidentifier() and len(name) <= MOST_CHARACTERS):
        return name
    raise ExportError(f"{where} has _class_name = {quoted(name)} ({kind_of(name)}); the name of a class is wanted")


def check_config(where: str, cls: type, config: Mapping[str, Any]) -> None:
    """Check the values of a configuration against what a class takes, before it is made of them.

    ``where``: the file. ``cls``: a module of diffusers or a configuration of transformers. Keys that it does not list
    are left alone. Raises :class:`ExportError` naming key, value and what is wanted.
    """
    check_code(where, config)
    known = declared(cls)
    for key, value in config.items():
        if key in known:
            check_value(where, key, value, known[key])
    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if name is not None and not (isinstance(name, str) and name.removeprefix("torch.") in _DTYPES):
            raise ExportError(f"{where} has {key} = {quoted(name)}; one of {', '.join(_DTYPES[1:])} is wanted")
    for key in _ATTENTION:
        if config.get(key) not in _IMPLEMENTATIONS:
            raise ExportError(
                f"{where} has {key} = {quoted(config[key])}: code from elsewhere, which is never run; leave it out"
            )
    if config.get("num_labels") is not None:
        check_value(where, "num_labels", config["num_labels"], Wanted(frozenset({int})))
    if set(_PLACES) <= set(known):
        _check_places(where, cls, config)


def check_value(where: str, key: str, value: Any, wanted: Wanted) -> None:
    """Check one value. Raises :class:`ExportError`."""
    wrong = _wrong(key, value, wanted)
    if wrong is not None:
        raise ExportError(f"{where} has {key} = {quoted(value)} ({kind_of(value)}); {wrong} is wanted")


@contextlib.contextmanager
def bounded_module(where: str) -> Iterator[None]:
    """While open, a module is made: :class:`ExportError` for one of more than :data:`MOST_PARAMETERS` tensors."""
    count = 0

    def counted(_module: nn.Module, _name: str, _parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_PARAMETERS:
            raise ExportError(
                f"{where} asks for more than {MOST_PARAMETERS} tensors of weights, the most that a model may have: its "
                "numbers of layers are another model's, or damaged"
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _check_places(where: str, cls: type, config: Mapping[str, Any]) -> None:
    parameters = inspect.signature(_constructor(cls)).parameters
    given = {key: config.get(key, parameters[key].default) or least for key, least in _PLACES.items()}
    if isinstance(given["sample_size"], list):
        return  # no such class takes a pair, and says so before it makes a table
    places = (given["sample_size"] // given["patch_size"]) ** 2
    numbers = places * given["num_attention_heads"] * given["attention_head_dim"]
    if numbers > MOST_PLACES:
        raise ExportError(
            f"{where} has {', '.join(f'{key} = {value}' for key, value in given.items())}: a table of {numbers} "
            f"numbers, and {MOST_PLACES} are the most"
        )


def _wrong(key: str, value: Any, wanted: Wanted) -> str | None:
    """What is wanted instead of a value, or of one in a list; None where it will do."""
    if isinstance(value, list):
        if wanted.items is None:
            return _named(key, wanted)
        most = _BOUNDS["num_train_timesteps"][1] if key == "trained_betas" else MOST_ITEMS
        if len(value) > most:
            return f"a list of at most {most}"
        wrong = next((w for item in value if (w := _wrong(key, item, wanted.items)) is not None), None)
        return wrong and f"a list of {wrong}"
    if type(value) is int and int not in wanted.kinds and float in wanted.kinds:
        value = float(value)  # JSON has one kind of number
    elif isinstance(value, float) and float not in wanted.kinds and int in wanted.kinds and value % 1 == 0:
        value = int(value)
    if type(value) not in wanted.kinds:
        return _named(key, wanted)
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        return f"text of at most {MOST_CHARACTERS} characters"
    if isinstance(value, dict) and len(value) > MOST_ITEMS:
        return f"an object of at most {MOST_ITEMS} keys"
    least, most = _bounds(key)
    if type(value) is int and not least <= value <= most:
        return _named(key, wanted)
    if isinstance(value, float):
        if key.endswith(("eps", "epsilon")) and not 0 <= value <= 1:
            return "a number from 0 to 1"
        if not abs(value) <= LARGEST_NUMBER and not (key == "lambda_min_clipped" and value < 0):
            return f"a number of at most {LARGEST_NUMBER:g}"
    return None


def _bounds(key: str) -> tuple[int, int]:
    return _BOUNDS.get(key, _WIDTH)


def _named(key: str, wanted: Wanted) -> str:
    least, most = _bounds(key)
    words = {
        bool: "true or false",
        int: f"a whole number from {least} to {most}",
        float: "a number",
        str: "text",
        dict: "an object",
        types.NoneType: "null",
    }
    names = [word for kind, word in words.items() if kind in wanted.kinds]
    return ", or ".join([*names, *(["a list"] if wanted.items else [])])


@functools.cache
def declared(cls: type) -> Mapping[str, Wanted]:
    """What a class says of the values that it takes, by key."""
    known = {"torch": torch}
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls, localns=known)
        return {field.name: _wanted(hints[field.name], field.name, field.default) for field in dataclasses.fields(cls)}
    function = _constructor(cls)
    hints = typing.get_type_hints(function, localns=known)
    return {
        name: _wanted(hints.get(name, Any), name, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _constructor(cls: Any) -> Any:
    return cls.__init__


_SCALARS: frozenset[type] = frozenset({bool, int, float, str, dict, types.NoneType})
_ANYTHING = Wanted(_SCALARS, Wanted(_SCALARS))
_LAYERS = Wanted(frozenset({int, types.NoneType}), Wanted(frozenset({int}), Wanted(frozenset({int}))))


def _wanted(annotation: Any, key: str, default: Any) -> Wanted:
    """What an annotation allows; and the default, which annotations may forget."""
    if key in _LISTS_OF_LISTS:
        return _LAYERS
    wanted = _annotated(annotation)
    if key == "sample_size":
        wanted |= Wanted(items=Wanted(frozenset({int})))  # height and width; few classes say so
    if bool in wanted.kinds:
        wanted |= Wanted(frozenset({types.NoneType}))  # published configurations say null for false
    return wanted | Wanted(frozenset({type(default)})) if type(default) in _SCALARS else wanted


def _annotated(annotation: Any) -> Wanted:
    if annotation is np.ndarray:
        return Wanted()  # no file holds one
    if annotation is torch.dtype:
        return Wanted(frozenset({str}))
    if annotation in _SCALARS:
        return Wanted(frozenset({annotation}))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(Wanted.__or__, map(_annotated, arguments))
    if origin is typing.Annotated:
        return _annotated(arguments[0])
    if origin is typing.Literal:
        return Wanted(frozenset(type(argument) for argument in arguments))
    if origin in (list, tuple):
        return Wanted(items=functools.reduce(Wanted.__or__, (_annotated(a) for a in arguments if a is not ...)))
    if origin is dict:
        return Wanted(frozenset({dict}))
    return _ANYTHING
