"""`python -m valm` runs the valm command."""

import sys

from valm.cli import main

sys.exit(main())
