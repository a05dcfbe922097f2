"""``python -m tgate_cli``: ``tgate``."""

import sys

from tgate_cli.main import main

sys.exit(main())
