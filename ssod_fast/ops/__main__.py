"""`python -m ssod_fast.ops`: what each op runs on here; paste it into bug reports."""

from ._report import main

main()
