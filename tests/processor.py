"""What this machine's processor can do."""

from __future__ import annotations

import openvino as ov
import pytest

needs_bfloat16 = pytest.mark.skipif(
    "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="OpenVINO refuses bfloat16 on a processor that does not multiply it",
)
