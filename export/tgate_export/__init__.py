"""Build time: turns a diffusion checkpoint and a gating schedule into a bundle."""
