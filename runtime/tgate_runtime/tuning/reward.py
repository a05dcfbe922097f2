"""How well people would like pictures for their prompts, by ImageReward (arXiv 2304.05977) with weights of yours.

Its authors' package does not run beside today's transformers; the network is BLIP, which transformers has, and a head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.errors import BundleError, RequestError, shown
from tgate_engine.reader import Reader, parse_json
from tgate_runtime.tuning.quality import Metric, Pixels, psnr
from tgate_runtime.tuning.weights import digest_of, tensors_of

FILES = ("ImageReward.pt", "ImageReward.safetensors")
CONFIG = "med_config.json"
_VOCABULARIES = ("vocab.txt", "tokenizer.json")
MOST_TOKENS = 35
"""Of a prompt, its ends included; what is longer is cut off."""
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""What the head's output has over its authors' pictures: a reward is in these deviations from it."""
_HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Its linear layers' widths by their places; between them there was dropout, and nothing else."""
_HEAD_WIDTH = 64
"""Of the heads of BLIP's vision, at each of its sizes; weights do not tell."""
_SEES, _READS = "blip.visual_encoder.", "blip.text_encoder."
_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn": "attn",
    "projection": "proj",
    "post_layernorm": "norm",
}
"""What transformers calls a part of BLIP's vision, and its authors do."""
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_NOTHING = {
    *("architectures", "model_type", "type_vocab_size"),  # of BERT, which BLIP's text makes no use of
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range"),  # of training
    "encoder_width",  # the vision's own
}
"""What med_config.json has and no reward hangs on."""
_MOST = 1 << 20
_COLOUR_MEAN, _COLOUR_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ADVICE = "give --reward-model its authors' files and the tokenizer of bert-base-uncased"
_BATCH = 8


def reward(folder: Path) -> Metric:
    """The metric "reward": ImageReward's score of each picture and its prompt, less that of the ungated picture; of a
    video, its frames' mean. Scores have no unit: over their authors' pictures the mean is 0 and the deviation 1. The
    ungated pictures' own, "ungated_reward", and "psnr" are told beside it.

    ``folder``: the authors' ImageReward.pt, or the same as .safetensors, their med_config.json, and the tokenizer of
    bert-base-uncased, vocab.txt or tokenizer.json. Nothing is fetched, and no code in a file is run. Raises
    :class:`RequestError` in one line where that is not what is there, and ModuleNotFoundError where PyTorch or
    transformers are not installed.
    """
    import torch
    import transformers
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    if not folder.is_dir():
        raise RequestError(f"there is no directory {folder} with ImageReward; give --reward-model one")
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise RequestError(f"{folder} holds no ImageReward: it has no {' or '.join(FILES)}; {_ADVICE}")
    transformers.utils.logging.set_verbosity_error()
    config = _config(folder / CONFIG)
    tokenizer = _tokenizer(folder, config["vocab_size"])
    weights = {name: tensor.float() for name, tensor in tensors_of(file).items()}

    def held(name: str, wanted: Sequence[int | None]) -> Any:
        """A tensor of the file; None stands for any length."""
        if name not in weights:
            raise RequestError(f"{file} holds no ImageReward: it lacks {name}; {_ADVICE}")
        got = tuple(weights[name].shape)
        if len(got) != len(wanted) or any(length not in (None, own) for own, length in zip(got, wanted, strict=True)):
            said = ", ".join("any" if length is None else str(length) for length in wanted)
            raise RequestError(
                f"{file} holds another network than ImageReward: its {name} is {got}, not ({said}); {_ADVICE}"
            )
        return weights[name]

    def filled(model: Any, named: Callable[[str], str]) -> Any:
        own = {name: held(named(name), tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(own, assign=True)
        return model.eval()

    vision, side = _vision(held, weights)
    eye = filled(transformers.BlipVisionModel(vision), lambda name: _SEES + _theirs(name))
    text = transformers.BlipTextConfig(**config, encoder_hidden_size=vision.hidden_size)
    reader = filled(BlipTextModel(text, add_pooling_layer=False), lambda name: _READS + name)
    head, before = [], text.hidden_size
    for place, after in _HEAD.items():
        head.append((held(f"mlp.layers.{place}.weight", (after, before)), held(f"mlp.layers.{place}.bias", (after,))))
        before = after

    def scores(pictures: Sequence[Pixels], prompts: Sequence[str]) -> list[float]:
        words = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        values: list[float] = []
        with torch.inference_mode():
            for at, picture in enumerate(pictures):
                found: list[float] = []
                frames = picture.reshape(-1, *picture.shape[-3:])
                for first in range(0, len(frames), _BATCH):
                    pixels = np.stack([seen(frame, side) for frame in frames[first : first + _BATCH]])
                    looked = eye(torch.from_numpy(pixels)).last_hidden_state
                    read = reader(
                        input_ids=words.input_ids[at].expand(len(pixels), -1),
                        attention_mask=words.attention_mask[at].expand(len(pixels), -1),
                        encoder_hidden_states=looked,
                    )
                    value = read.last_hidden_state[:, 0]
                    for weight, bias in head:
                        value = torch.nn.functional.linear(value, weight, bias)
                    found += ((value[:, 0] - MEAN) / DEVIATION).tolist()
                values.append(float(np.mean(found)))
        return values

    def compare(
        pictures: Sequence[Pixels], references: Sequence[Pixels], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        ours, theirs = scores(pictures, prompts), scores(references, prompts)
        return {
            "reward": [own - other for own, other in zip(ours, theirs, strict=True)],
            "ungated_reward": theirs,
            "psnr": [psnr(*pair) for pair in zip(pictures, references, strict=True)],
        }

    told = json.dumps([config, tokenizer.get_vocab()], sort_keys=True)
    return Metric(name="reward", compare=compare, beside=("ungated_reward", "psnr"), judge=digest_of(weights, told))


def seen(picture: Pixels, side: int) -> NDArray[np.float32]:
    """[H, W, 3] of 0 to 255 as the network takes it, [3, side, side]: the shorter side is brought to that length by
    bicubic interpolation, and the middle cut out."""
    height, width = picture.shape[:2]
    shorter = min(height, width)
    wide, high = side * width // shorter, side * height // shorter
    left, top = round((wide - side) / 2), round((high - side) / 2)
    resized = Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC)
    cut = np.asarray(resized, np.float32)[top : top + side, left : left + side] / 255
    mean, deviation = (np.array(each, np.float32) for each in (_COLOUR_MEAN, _COLOUR_DEVIATION))
    return np.ascontiguousarray(((cut - mean) / deviation).transpose(2, 0, 1))


def _theirs(name: str) -> str:
    """What the authors call a tensor of BLIP's vision."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _vision(held: Callable[[str, Sequence[int | None]], Any], weights: Mapping[str, Any]) -> tuple[Any, int]:
    """The configuration of BLIP's vision, whose sizes the weights tell, and the side of what it looks at, in pixels."""
    import transformers

    width, _, _, patch = held(f"{_SEES}patch_embed.proj.weight", (None, 3, None, None)).shape
    if width % _HEAD_WIDTH or not width * patch:
        raise RequestError(
            f"the weights are not ImageReward's: its vision is {width} wide, no multiple of {_HEAD_WIDTH}, in patches "
            f"of {patch}; {_ADVICE}"
        )
    side = math.isqrt(held(f"{_SEES}pos_embed", (1, None, width)).shape[1] - 1) * patch
    vision = transformers.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=held(f"{_SEES}blocks.0.mlp.fc1.weight", (None, width)).shape[0],
        num_hidden_layers=len([name for name in weights if name.startswith(_SEES) and name.endswith(".norm1.weight")]),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=side,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return vision, side


def _config(file: Path) -> dict[str, Any]:
    """What the authors' file says of the text's side, by transformers' names."""
    try:
        return Reader(parse_json(file.read_bytes()), str(file), _ADVICE).all_of(_sizes)
    except BundleError as error:
        raise RequestError(str(error)) from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} holds no configuration ({shown(error, 200)}); {_ADVICE}") from None


def _sizes(r: Reader) -> dict[str, Any]:
    for name in _NOTHING & r.data.keys():
        r.get(name, object)
    if not r.flag("add_cross_attention"):
        raise BundleError(f"{r.where}.add_cross_attention: expected true, got false; {r.advice}")
    sizes = {name: r.whole(name, 1, _MOST) for name in _SIZES}
    sizes["max_position_embeddings"] = r.whole("max_position_embeddings", MOST_TOKENS, _MOST)
    pad = r.whole("pad_token_id", 0, sizes["vocab_size"] - 1)
    act, epsilon = r.choice("hidden_act", ("gelu",)), r.number("layer_norm_eps", 0)
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise BundleError(
            f"{r.where}: hidden_size is {sizes['hidden_size']}, no multiple of num_attention_heads, "
            f"{sizes['num_attention_heads']}; {r.advice}"
        )
    return {**sizes, "hidden_act": act, "layer_norm_eps": epsilon, "pad_token_id": pad}


def _tokenizer(folder: Path, words: int) -> Any:
    """That of bert-base-uncased, with what BLIP adds."""
    import transformers

    if not any((folder / name).is_file() for name in _VOCABULARIES):  # with none transformers makes an empty one
        raise RequestError(f"{folder} holds no tokenizer: it has no {' or '.join(_VOCABULARIES)}; {_ADVICE}")
    try:
        tokenizer = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever ails the files, one line says so
        raise RequestError(f"{folder} holds no tokenizer that can be read ({shown(error, 200)}); {_ADVICE}") from None
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != words:
        raise RequestError(
            f"{folder} holds another tokenizer than ImageReward's: with [DEC] and [ENC] it has {len(tokenizer)} words, "
            f"its network {words}; {_ADVICE}"
        )
    return tokenizer
