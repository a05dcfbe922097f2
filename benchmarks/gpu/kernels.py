"""Where the time of one call goes, by kind of kernel: PyTorch's profiler sees whatever runs on the GPU, ours or not."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from benchmarks.gpu.setting import Setting, session_of
from benchmarks.loops import plans_of, request
from tgate_runtime.state import State

KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|attention|mha_|softmax"),
    ("convolution", r"fprop|conv|implicit|wgrad|dgrad"),
    ("product", r"gemm|nvjet|cutlass|xmma|matmul|triton_tem|_mm_|splitK|cublas"),
    ("copy", r"memcpy|memset|copy"),
    ("norm", r"norm|triton_red|triton_per"),
    ("layout", r"transpose|nchw|nhwc"),
)
"""Of a kernel's name, the first that fits; what fits none is arithmetic by element."""
_NAMES = 25
"""How many kernels are told one by one."""


def kind_of(kernel: str) -> str:
    """One of :data:`KINDS`, or "elementwise"."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "elementwise")


def kernels(setting: Setting) -> dict[str, Any]:
    """For each graph of the gated plan, the second of two calls: milliseconds and launches by kind, and of the kernels
    that took longest; ``span_ms`` is from the first to the last, with what lies between them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    opened = setting.open()
    plan = plans_of(opened.manifest)["gated"]
    start, rows = request(opened.manifest, setting.seed)
    found: dict[str, Any] = {}
    with session_of(setting, opened, {"gated": plan}) as session:
        state, image = State(session, plan), range(1)
        conditioning = {name: row[0] for name, row in rows.items()}
        for turn in range(2):
            state.begin(0, start[0], conditioning, guidance_scale=plan.guidance_scale, step_noise=lambda _: start[0])
            done: set[str] = set()
            while state.step(0) is not None:
                call, (step,) = state.take(image)
                if turn == 0 or step.graph in done:
                    call()
                else:
                    done.add(step.graph)
                    with profile(activities=[ProfilerActivity.CUDA]) as seen:
                        call()
                        torch.cuda.synchronize()
                    found[step.graph] = _summed(seen)
                state.turn(image)
    return {"graphs": found}


def _summed(seen: Any) -> dict[str, Any]:
    from torch.autograd import DeviceType

    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    begin, end = float("inf"), 0.0
    for event in seen.events():
        if event.device_type != DeviceType.CUDA:
            continue  # what the processor did meanwhile
        us = event.time_range.elapsed_us()
        times[event.name] += us
        counts[event.name] += 1
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    kinds: dict[str, dict[str, float]] = {}
    for name, us in times.items():
        of_kind = kinds.setdefault(kind_of(name), {"ms": 0.0, "launches": 0})
        of_kind["ms"] += us / 1e3
        of_kind["launches"] += counts[name]
    longest = [{"kernel": n[:160], "ms": us / 1e3, "launches": counts[n]} for n, us in times.most_common(_NAMES)]
    return {"ms": sum(times.values()) / 1e3, "span_ms": (end - begin) / 1e3, "kinds": kinds, "longest": longest}
