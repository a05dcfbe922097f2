"""The contract between export and run time: schedules, plans and bundles."""

__version__ = "0.1.0"
