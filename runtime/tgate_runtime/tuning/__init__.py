"""What plans cost in pictures and in time, measured here, and which of them to take.

It is given plans and knows nothing of how they were made: ``search`` is pure, ``quality`` compares pictures,
``measure`` draws and times them, ``kept`` holds what was measured so that a run that was ended goes on.
"""
