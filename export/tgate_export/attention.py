"""Which modules of a network are attention, and what each attends to: seen in a call, not named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    image, 1 but for videos, whose frames (or places) are rows. ``projects``: whether its output is projected within it,
    and not by the block around it, which then takes the projection from it."""

    module: str
    kind: Kind
    rows: int = 1
    projects: bool = True


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
            # Newer classes have none of what they do not do. In those, keys and values that are added without queries
            # are of a picture that conditions the network as its text does; in the old one, its own are added to.
            both = getattr(module, "added_kv_proj_dim", None) is not None
            if not isinstance(module, Attention):
                both = both and getattr(module, "add_q_proj", None) is not None
            odd = getattr(module, "residual_connection", False) or getattr(module, "spatial_norm", None) is not None
            if odd or (both and not joint):
                raise ExportError(
                    f"attention module {name!r} is none of a transformer block (it adds its own residual, attends to "
                    "text and picture at once, or normalises by place), and cannot be gated; its block type is that "
                    "of another architecture"
                )
            hidden = args[0] if args else kwargs["hidden_states"]
            attended = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            own = attended is None or attended is hidden
            kind: Kind = "joint" if both else "self" if own else "cross"
            sites[name] = AttentionSite(name, kind, int(hidden.shape[0]) // images)

        return look

    def leave(name: str) -> Callable[..., None]:
        return lambda *_: left.add(name)

    def projecting(name: str) -> Callable[..., None]:
        def look(*_: object) -> None:
            if name in left:
                sites[name] = replace(sites[name], projects=False)

        return look

    left: set[str] = set()
    hooks = []
    for name, module in denoiser.named_modules():
        if isinstance(module, (Attention, AttentionModuleMixin)):
            hooks.append(module.register_forward_pre_hook(watch(name, module), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave(name)))
            projection = getattr(module, "to_out", None)
            if isinstance(projection, nn.ModuleList):
                hooks.append(projection[0].register_forward_pre_hook(projecting(name)))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(sites.values())
