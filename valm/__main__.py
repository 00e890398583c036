"""python -m valm is the valm command."""

import sys

from valm.cli import main

sys.exit(main())
