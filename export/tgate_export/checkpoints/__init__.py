"""Where a model's configurations and weights come from: a directory or hub id, one file, or nowhere.

Whatever the source, the exporter reads configurations by component and tensors one at a time, and never unpickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from tgate_export.checkpoints.base import Checkpoint, Holder, Stored, Tensors
from tgate_export.checkpoints.directory import DirectoryCheckpoint, locate
from tgate_export.checkpoints.published import PublishedCheckpoint
from tgate_export.checkpoints.single_file import SingleFileCheckpoint
from tgate_export.places import local

__all__ = ["Checkpoint", "Holder", "Stored", "Tensors", "open_checkpoint"]


def open_checkpoint(
    model: str,
    location: str,
    *,
    weights: str,
    components: Iterable[str],
    build: Callable[[Checkpoint, str], nn.Module],
    elsewhere: Mapping[str, str],
    prefer_half: bool,
) -> Checkpoint:
    """The checkpoint of ``model``.

    ``location``: a diffusers directory, a single ``.safetensors`` file or a hub id; unused unless ``weights`` is
    ``checkpoint``. ``components``: what will be read of it. ``elsewhere``: components that lie in repositories of
    their own. ``build``: a component's module from its configuration. Raises :class:`ExportError`.
    """
    if weights != "checkpoint":
        return PublishedCheckpoint(model, build)
    path = local(location)
    if path is not None and path.suffix == ".safetensors" and not path.is_dir():
        return SingleFileCheckpoint(path, model, build)
    names = tuple(components)
    root = locate(location, [name for name in names if name not in elsewhere], prefer_half=prefer_half)
    parts = {name: locate(part, [""], prefer_half=prefer_half) for name, part in elsewhere.items() if name in names}
    return DirectoryCheckpoint(root, prefer_half=prefer_half, elsewhere=parts)
