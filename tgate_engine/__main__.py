"""``python -m tgate_engine``: the program of the distribution's name, ``tgate``."""

import sys

from tgate_cli.entry import tgate

sys.exit(tgate())
