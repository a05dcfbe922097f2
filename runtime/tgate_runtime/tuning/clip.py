"""How well pictures show what their prompts say, by a CLIP model of yours. It alone here needs PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tgate_engine.errors import RequestError, shown
from tgate_runtime.tuning.quality import Metric, Pixels, psnr

_BATCH = 16
_SCALE = 100
"""CLIP scores are cosines times that."""


def clip(folder: Path) -> Metric:
    """The metric "clip": of each picture a hundred times the cosine between CLIP's embeddings of it and of its prompt,
    less that of the ungated one; of a video, its frames' mean. "psnr" is told beside it.

    ``folder``: a CLIPModel and its processor, as transformers saves them; nothing is fetched, and no code in it is run.
    Raises :class:`RequestError` in one line where it holds none, and ModuleNotFoundError where PyTorch or transformers
    are not installed.
    """
    import torch
    import transformers

    if not folder.is_dir():
        raise RequestError(f"there is no directory {folder} with a CLIP model; give --clip-model one")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise RequestError(f"{folder} holds no CLIP model: it has no file of weights, .safetensors; name another")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        images = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever ails the files, one line says so
        raise RequestError(f"{folder} holds no CLIP model that can be read ({shown(error, 200)})") from None
    if lacking := sorted(loaded["missing_keys"]):
        raise RequestError(f"{folder} holds no whole CLIP model: its weights lack {shown(lacking[0], 80)}")
    model.eval()
    limit = model.config.text_config.max_position_embeddings

    def embedded(features: Any) -> Any:
        vectors = getattr(features, "pooler_output", features)
        return vectors / vectors.norm(dim=-1, keepdim=True)

    def scores(pictures: Sequence[Pixels], prompts: Sequence[str]) -> list[float]:
        values: list[float] = []
        words = tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            texts = embedded(model.get_text_features(**words))
            for picture, text in zip(pictures, texts, strict=True):
                frames = [Image.fromarray(each) for each in picture.reshape(-1, *picture.shape[-3:])]
                cosines: list[float] = []
                for first in range(0, len(frames), _BATCH):
                    pixels = images(frames[first : first + _BATCH], return_tensors="pt")
                    cosines += (embedded(model.get_image_features(**pixels)) @ text).tolist()
                values.append(_SCALE * sum(cosines) / len(cosines))
        return values

    def compare(
        pictures: Sequence[Pixels], references: Sequence[Pixels], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        ours, theirs = scores(pictures, prompts), scores(references, prompts)
        pairs = list(zip(pictures, references, strict=True))
        return {
            "clip": [own - other for own, other in zip(ours, theirs, strict=True)],
            "psnr": [psnr(*pair) for pair in pairs],
        }

    return Metric(name="clip", compare=compare, beside=("psnr",), judge=_digest(weights))


def _digest(files: Sequence[Path]) -> str:
    """The SHA-256 of files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while content := file.read(1 << 20):
                digest.update(content)
    return digest.hexdigest()
