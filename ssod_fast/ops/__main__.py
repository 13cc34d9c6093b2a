"""`python -m ssod_fast.ops`: what each op runs on here; paste it into bug reports."""

import sys

from ._report import main

sys.exit(main())
