"""The environment twins of the command line's flags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from splitfire.cli.__main__ import app
from splitfire.core.flags import known_variables


def twins_of(command: Any, name: str) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        variables = parameter.envvar or ()
        for variable in (variables,) if isinstance(variables, str) else variables:
            yield f"{name} {parameter.name}", variable
    for sub in getattr(command, "commands", {}).values():
        yield from twins_of(sub, f"{name} {sub.name}")


TWINS = dict(twins_of(typer.main.get_command(app), "splitfire"))


def test_all_commands_are_seen() -> None:
    assert len(TWINS) > 80
    assert "splitfire bench serve rates" in TWINS


@pytest.mark.parametrize("flag", TWINS)
def test_the_services_know_the_twin_of_every_flag(flag: str) -> None:
    """Or a fleet that a command starts would refuse to, where one of them is set."""
    assert TWINS[flag] in known_variables()
