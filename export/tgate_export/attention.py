"""Which modules of a network are attention, and what each attends to: seen in a call, not named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from tgate_engine.errors import ExportError

Kind = Literal["self", "cross", "joint"]
"""What a module attends to: its own, the text, or both at once."""


@dataclass(frozen=True)
class AttentionSite:
    """An attention module: its qualified name in the denoiser, its kind, and the rows of its output for one half of one
    image, 1 but for videos, whose frames (or places) are rows."""

    module: str
    kind: Kind
    rows: int = 1


def observe(
    denoiser: nn.Module, call: Callable[[], object], images: int = 1, *, joint: bool = False
) -> tuple[AttentionSite, ...]:
    """The attention modules that ``call`` runs, in their order, each by what it attends to.

    ``call`` runs the denoiser once, for ``images`` rows; parameters and inputs may be fake. Names tell nothing: with
    diffusers' ``only_cross_attention`` the module called attn1 attends to the text as well. ``joint``: whether the
    architecture has modules that attend to text and picture at once. Raises
    :class:`ExportError` for modules whose output is no attention output that a step could reuse.
    """
    sites: dict[str, AttentionSite] = {}

    def watch(name: str, module: nn.Module) -> Callable[..., None]:
        def look(_module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if name in sites:
                raise ExportError(f"attention module {name!r} runs more than once in a step, and cannot be reused")
            # Newer classes have none of what they do not do.
            both = getattr(module, "added_kv_proj_dim", None) is not None
            odd = getattr(module, "residual_connection", False) or getattr(module, "spatial_norm", None) is not None
            if odd or (both and not joint):
                raise ExportError(
                    f"attention module {name!r} is none of a transformer block (it adds its own residual, attends to "
                    "text and picture at once, or normalises by place), and cannot be gated; its block type is that "
                    "of another architecture"
                )
            hidden = args[0] if args else kwargs["hidden_states"]
            attended = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            kind: Kind = "joint" if both else "self" if attended is None else "cross"
            sites[name] = AttentionSite(name, kind, int(hidden.shape[0]) // images)

        return look

    hooks = [
        module.register_forward_pre_hook(watch(name, module), with_kwargs=True)
        for name, module in denoiser.named_modules()
        if isinstance(module, (Attention, AttentionModuleMixin))
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(sites.values())
