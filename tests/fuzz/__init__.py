"""Inputs as a stranger might write them, made up without end: see docs/security-fuzz.md."""
