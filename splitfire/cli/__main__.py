"""`splitfire`: one command for users and operators; `--help` lists what it can do. router, prefill and decode start one service each."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console

from splitfire.cli.accounts import trace, usage
from splitfire.cli.advise import advise
from splitfire.cli.ask import chat, generate
from splitfire.cli.batch import batch
from splitfire.cli.bench.command import app as bench_app
from splitfire.cli.client import ServerError
from splitfire.cli.credentials import certs, key
from splitfire.cli.doctor import doctor
from splitfire.cli.fleet import fleet, role
from splitfire.cli.top import top
from splitfire.cli.up import demo, up
from splitfire.core.errors import ConfigError, one_line
from splitfire.core.flags import exit_with
from splitfire.core.process import end_now

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Disaggregated LLM inference: prefill here, decode there.",
)
err = Console(stderr=True, highlight=False, soft_wrap=True)
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

for command in (up, generate, chat, fleet, role, trace, usage, top, batch, advise, doctor, key, certs, demo):
    app.command()(command)
app.add_typer(bench_app, name="bench")


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def router(context: typer.Context) -> None:
    """One router process; --help lists its flags."""
    _become("router", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def prefill(context: typer.Context) -> None:
    """One prefill worker; --help lists its flags."""
    _become("splitfire.worker", ["--role=prefill", *context.args])


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def decode(context: typer.Context) -> None:
    """One decode worker; --help lists its flags."""
    _become("splitfire.worker", ["--role=decode", *context.args])


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def simulate(context: typer.Context) -> None:
    """Serves a trace with the router's own rules over workers that are formulas; --help lists its flags."""
    _become("router.simulation", ["simulate", *context.args])


def _become(module: str, arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606


def main() -> NoReturn:
    end_now(_run())


def _run() -> int:
    """The exit code."""
    try:
        return app(standalone_mode=False) or 0  # a typer.Exit comes back as its code
    except ConfigError as exc:
        return exit_with(exc)
    except ServerError as exc:
        err.print(f"splitfire: {one_line(str(exc))}", markup=False)
        return 1
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer._click.exceptions.ClickException as exc:
        exc.show()
        return exc.exit_code


if __name__ == "__main__":
    main()
