"""`python -m bitwright` is the `bitwright` command."""

from bitwright.cli import main

main()
