"""Build time: turns a diffusion checkpoint and a method's settings into a bundle."""
