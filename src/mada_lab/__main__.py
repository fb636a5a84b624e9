"""``python -m mada_lab``: the command ``mada``."""

import sys

from mada_lab.cli.main import main

sys.exit(main())
