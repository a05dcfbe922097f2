"""Trains and scores `mini-sdxl`, the small SDXL-shaped model that ships inside tgate_export."""
