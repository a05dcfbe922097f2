"""What kind of work a GPU's kernel does, by names that an H200 ran."""

from __future__ import annotations

import pytest

from benchmarks.gpu.kernels import kind_of


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void onnxruntime::flash::flash_fwd_kernel<onnxruntime::flash::Flash_fwd_kernel_traits<64>>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize256x64x32", "convolution"),
        ("nvjet_sm90_hsh_320x128_64x3_1x2_h_bz_coopB_NNT", "product"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void onnxruntime::contrib::cuda::SkipLayerNormKernelSmall<__half, 160u, 8, false>", "norm"),
        ("void onnxruntime::contrib::cuda::GroupNormNHWCScaleKernel<__half, 2>", "norm"),
        ("void onnxruntime::contrib::cuda::biasSplitGeluKernel<__half, 5120, 256>", "elementwise"),
    ],
)
def test_a_kernel_is_of_a_kind(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
