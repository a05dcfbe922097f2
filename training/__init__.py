"""Trains and scores the small models that ship inside tgate_engine: `mini-sdxl` and `mini-pixart`."""
