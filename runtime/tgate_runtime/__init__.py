"""Run time: walks a plan over the graphs of a bundle.

``Pipeline`` draws from prompts. One level below, a ``Session`` is an opened bundle, a ``State`` holds the buffers of
images, ``run`` and ``advance`` take their steps.
"""

from tgate_runtime.conditioning import conditioning_of
from tgate_runtime.noise import noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.runner import advance, run
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_runtime.text import TextEncoder

__all__ = ["Pipeline", "Session", "State", "TextEncoder", "advance", "conditioning_of", "noise", "run"]
