"""The root of the command line: commands found by name when needed, errors shown without tracebacks."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

import click

from fusionroute.errors import AccessDenied, FusionRouteError, InternalFault, OutOfRoom, Unavailable

EXIT_FAILED = 1
EXIT_NOBODY_THERE = 3
EXIT_REFUSED = 4
EXIT_INTERRUPTED = 130
TLS_SIGNS = ("Socket closed", "handshake failed", "CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")
TLS_HINT = "is only one end encrypted? see FUSIONROUTE_TLS_CA, _CERT and _KEY (docs/security.md)"
KEY_HINT = "put a key into a file and its path into FUSIONROUTE_API_KEY_FILE (docs/security.md)"
# as `telemetry.quiet_native_logs`, which takes too long to import for `--help`
QUIET = {"GRPC_VERBOSITY": "ERROR", "GLOG_minloglevel": "2", "TOKENIZERS_PARALLELISM": "false"}


class Failure(click.ClickException):
    """Something a person can understand and mend; shown as one message, without a traceback."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED, details: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # a class variable in click, meant to be set
        self.details = details

    def show(self, file: Any = None) -> None:
        """Writes details first, so that the message is what stands last."""
        if self.details:
            click.echo(self.details, err=True)
        click.echo(f"error: {self.format_message()}", err=True)


class CommandGroup(click.Group):
    """A group whose commands live in modules that are imported when they are called for."""

    def __init__(self, *, commands_at: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(context_settings={"help_option_names": ["-h", "--help"]}, **attributes)
        self._commands_at = dict(commands_at)
        self.params.append(
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_version,
                help="Show the version and exit.",
            )
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer meets them."""
        return list(self._commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        place = self._commands_at.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; errors of ours become failures, SIGTERM and SIGHUP end it as Ctrl-C does."""
        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        try:
            return super().invoke(ctx)
        except FusionRouteError as error:
            raise as_failure(error) from error
        except ExceptionGroup as several:
            ours = several.subgroup(FusionRouteError)
            if ours is None:
                raise
            raise as_failure(_first(ours)) from several
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def as_failure(error: FusionRouteError) -> Failure:
    """How an error of a service looks to a person at the terminal."""
    if isinstance(error, Unavailable | OutOfRoom):
        code = EXIT_NOBODY_THERE
    elif isinstance(error, InternalFault):
        code = EXIT_FAILED
    else:
        code = EXIT_REFUSED
    hint = f"; {KEY_HINT}" if isinstance(error, AccessDenied) else ""
    if isinstance(error, Unavailable) and any(sign in error.message for sign in TLS_SIGNS):
        hint = f"; {TLS_HINT}"
    return Failure(f"{error.message} ({error.reason.value}){hint}", code)


def _first(several: ExceptionGroup[FusionRouteError]) -> FusionRouteError:
    first = several.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from fusionroute import __version__

        click.echo(f"fusionroute {__version__}")
        ctx.exit()
