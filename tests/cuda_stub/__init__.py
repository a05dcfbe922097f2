"""``ort-cuda`` on ONNX Runtime's own CUDA provider, over a stub of the CUDA libraries that computes nothing.

It shows what the provider does: which nodes it takes, what is captured, allocated, copied and waited for, and how many
kernels are launched. It cannot show that a number is right, or how long anything takes. ``make cuda-stub`` makes an
environment of its own for it, since ``onnxruntime-gpu`` takes the place of ``onnxruntime``.
"""
