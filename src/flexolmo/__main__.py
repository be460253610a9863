"""`python -m flexolmo` is the same as `flexolmo`."""

from flexolmo.cli import main

main()
