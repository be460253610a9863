"""The command line, built once in a process."""

from functools import cache

import typer.main
import typer.testing


def build_commands_once() -> None:
    """Keep what typer builds of an app; it builds all verbs anew for each call of one."""
    build = cache(typer.main.get_command)
    typer.main.get_command = typer.testing._get_command = build
