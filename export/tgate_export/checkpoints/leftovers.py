"""Tensors of a single file that are no weights of the model: harmless ones, and those that must not be dropped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Stored

FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""dtypes of weights, as safetensors writes them. Eight bits without a scale beside them are plain numbers."""

_MARK_SIZE = 1 << 16
"""Numbers that a mark may hold; a noise schedule has a thousand."""

_PLAIN = "give the checkpoint in float32, float16 or bfloat16"

# What ComfyUI, torchao, bitsandbytes, GPTQ and AWQ write beside weights that are no plain numbers.
_QUANTISED = re.compile(
    r"(^|.*\.)(scaled_fp8|scale_weight|weight_scale(_inv|_2)?|scale_input|input_scale|comfy_quant|SCB|weight_format"
    r"|(nested_)?absmax|(nested_)?quant_map|quant_state\..+|qweight|qzeros|scales|g_idx|(weight_)?zero_point)"
)

# Of no component: training leaves them, and every engine passes over them. The noise schedule itself is a mark.
_TOP = re.compile(
    r"model_ema\..+|embedding_manager\..+|epoch|logvar|lvlb_weights|alphas_cumprod_prev"
    r"|(sqrt|sqrt_one_minus|log_one_minus|sqrt_recip|sqrt_recipm1)_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)

# Of no component either, and known: by how a name begins.
_STRANGERS = {
    "control_model.": "a ControlNet",
    "depth_model.": "a depth-to-image model's depth estimator",
    "embedder.": "an unCLIP model's image encoder",
    "noise_augmentor.": "an unCLIP model's noise augmentor",
    "low_scale_model.": "an upscaler's noise augmentor",
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "lora_": "a LoRA",
}

# Of a component, read by nothing: places of tokens, a temperature, projections and pictures' half of CLIP, and losses.
_CLIP = re.compile(
    r".*\.(position_ids|logit_scale|attn_mask|text_projection(\.weight)?|visual_projection\.weight"
    r"|vision_model\..+|visual\..+)"
    # SD 2 takes the last layer but one, so its published encoder has no last one.
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..+"
)
_HARMLESS: Mapping[str, re.Pattern[str]] = {
    "vae": re.compile(r"(first_stage_model|vae)\.(loss\..+|model_ema\..+)"),
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
}


def check_marks(where: str, held: Mapping[str, Stored]) -> None:
    """Raises :class:`ExportError` for marks that are not as small as marks are: they are read whole."""
    for key, stored in held.items():
        if math.prod(stored.shape) > _MARK_SIZE or stored.dtype not in (*FLOATING, "I64", "I32", "U8", "BOOL"):
            raise ExportError(
                f"{where}: tensor {key!r} is {stored.dtype} {list(stored.shape)}, and a mark is at most {_MARK_SIZE} "
                "numbers; correct the file"
            )


def check_storage(where: str, component: str, held: Mapping[str, Stored]) -> None:
    """Raises :class:`ExportError` unless the tensors of a component are plain floating-point numbers."""
    for key in sorted(held):
        if _QUANTISED.fullmatch(key):
            raise ExportError(
                f"{where}: its {component} is quantised: tensor {key!r} ({held[key].dtype}) says how to read its "
                f"weights, which are no plain numbers; {_PLAIN}"
            )
    for key in sorted(held):
        if held[key].dtype not in FLOATING and not is_harmless(component, key):
            raise ExportError(
                f"{where}: tensor {key!r} of its {component} is {held[key].dtype}, and weights must be one of "
                f"{', '.join(FLOATING)}; {_PLAIN}"
            )


def check_read(where: str, component: str, unread: Iterable[str]) -> None:
    """Raises :class:`ExportError` for tensors of a component that no parameter of its module takes its values from."""
    strange = sorted(key for key in unread if not is_harmless(component, key))
    if strange:
        raise ExportError(
            f"{where}: nothing in the model's {component} reads tensor {strange[0]!r}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; the file is of another model, or has "
            "an adapter merged into it beside its weights: give the model it was made from, or a diffusers directory"
        )


def check_rest(where: str, keys: Iterable[str]) -> None:
    """Raises :class:`ExportError` for tensors of no component, ``keys``, that change what a model draws."""
    for key in sorted(keys):
        if _TOP.fullmatch(key):
            continue
        if _QUANTISED.fullmatch(key):
            raise ExportError(f"{where} is quantised: it has tensor {key!r}; {_PLAIN}")
        known = next((what for prefix, what in _STRANGERS.items() if key.startswith(prefix)), None)
        if known is not None:
            raise ExportError(
                f"{where} holds {known} beside its model (tensor {key!r}), and the exporter would leave it out; give "
                "the model without it"
            )
        raise ExportError(
            f"{where} has tensor {key!r}, which belongs to no component of the model and is no mark that is known; "
            "remove it if it changes nothing, or give a diffusers directory"
        )


def is_harmless(component: str, key: str) -> bool:
    """Whether a tensor of that component may be left out."""
    pattern = _HARMLESS.get(component)
    return pattern is not None and pattern.fullmatch(key) is not None
