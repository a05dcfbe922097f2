"""Run time: walks a plan over the graphs of a bundle."""
