"""`python -m subquad` is the command `subquad`."""

from subquad.cli import main

main()
