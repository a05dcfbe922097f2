"""Rewrites of a traced graph, one a file: each takes a graph or a model and changes it in place.

Each is told by the shapes that tracing left in the graph; where a shape is not known, it changes nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from tgate_export.passes.heads import merge_heads
from tgate_export.passes.masks import widen_masks
from tgate_export.passes.squeezes import drop_vain_squeezes
from tgate_export.passes.units import drop_units

_FOLDED_ELEMENTS = 1 << 20
"""Constants of up to this many elements are computed now; larger ones would swell the graph's file."""


def simplify(model: ir.Model) -> None:
    """What tracing wrote, made into what engines take best: the same numbers from fewer nodes.

    Weights must have become inputs of the graph before. Folding comes first, since the rewrites read constants;
    what removes doubles and leftovers comes last, since they make some.
    """
    for _ in range(2):  # folding one shape can make another one constant
        with np.errstate(all="ignore"):  # T5 takes the logarithm of zero, and does not use it
            limits = {"input_size_limit": _FOLDED_ELEMENTS, "output_size_limit": _FOLDED_ELEMENTS}
            onnxscript.optimizer.fold_constants(model, **limits)
        RemoveUnusedNodesPass()(model)
    drop_units(model.graph)
    drop_vain_squeezes(model.graph)
    merge_heads(model.graph)
    widen_masks(model.graph)
    IdentityEliminationPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    CommonSubexpressionEliminationPass()(model)  # nodes are doubles if they read the same constants
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass(size_limit=_FOLDED_ELEMENTS)(model)  # large ones, which folding made for each use
    RemoveUnusedOpsetsPass()(model)
