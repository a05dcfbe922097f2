"""The contract between export and run time: the step's interface, plans and bundles."""

__version__ = "0.1.0"
