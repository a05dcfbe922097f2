"""Measurements: each prints its distance to a limit and saves its settings beside its result."""
