"""``python -m tgate_cli``: ``tgate``."""

import sys

from tgate_cli.entry import tgate

sys.exit(tgate())
