"""Trains and scores the small models that ship inside tgate_export: `mini-sdxl` and `mini-pixart`."""
