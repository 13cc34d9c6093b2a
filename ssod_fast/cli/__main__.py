"""`python -m ssod_fast.cli`: the command `ssod-fast`, also for launchers of several processes."""

import sys

from . import main

sys.exit(main())
