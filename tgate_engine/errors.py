"""One error class per layer, so that a caller can tell what failed without reading the text."""


class TgateError(Exception):
    """One clear line for the user: what was got, what was wanted, what to do next."""


class MethodError(TgateError):
    """The settings of a method (n, m, k, warm-up, fidelity interval) do not make a trajectory."""


class SamplerError(TgateError):
    """A sampler's coefficients are incomplete, not finite, or not in the expected form."""


class PlanError(TgateError):
    """A plan names a graph that is missing, or reads a carry that no earlier step writes."""


class BundleError(TgateError):
    """A bundle is missing files, damaged, or written for another version."""


class ExportError(TgateError):
    """A model or a sampler cannot be compiled into a bundle."""


class EngineError(TgateError):
    """An engine could not open or run a graph."""


class RequestError(TgateError):
    """A request (prompt, seed, guidance scale, initial latents) cannot be served as asked."""
