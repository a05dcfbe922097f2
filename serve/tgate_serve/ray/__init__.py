"""The server on several devices and machines, as an application of Ray Serve: ``serve run tgate_serve.ray:build``."""

from tgate_serve.ray.application import build

__all__ = ["build"]
