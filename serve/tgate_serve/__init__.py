"""The server of tgate-engine: images of many requests, at different steps of different plans, share calls."""
