"""Settings of the daemons: defaults < one TOML file < environment < command line; frozen, typed, strict.

A TOML file has one table for each service, `[expert]`, `[router]`, `[trainer]`; a service reads its own.
Environment variables are the names in upper case behind the service's prefix. Anything unknown or out of
limits stops the start.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self, TypeVar

import click
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from fusionroute.telemetry import LogFormat, LogLevel, configure_logs, quiet_native_logs

CONFIG_VARIABLE = "FUSIONROUTE_CONFIG"
TABLES = ("expert", "router", "trainer")
SHARED_VARIABLES: Mapping[str, str] = {
    "FUSIONROUTE_TLS_CERT": "tls_cert",
    "FUSIONROUTE_TLS_KEY": "tls_key",
    "FUSIONROUTE_TLS_CA": "tls_ca",
    "FUSIONROUTE_TLS_REQUIRE_CLIENT": "tls_require_client",
    "FUSIONROUTE_API_KEYS_FILE": "api_keys_file",
    "FUSIONROUTE_API_KEY_FILE": "api_key_file",
}
"""What every daemon reads, and the commands too: environment variable -> field."""

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ExitCode(IntEnum):
    """What a daemon's exit says."""

    STOPPED = 0
    FAILED = 1
    BAD_SETTINGS = 2
    MODEL_REJECTED = 3
    PORT_TAKEN = 4
    REDIS_UNREACHABLE = 5
    PEER_LOST = 6
    """Another of the processes that share a model is gone, so this one has ended too."""


class SettingsError(ValueError):
    """Settings that cannot be; the text names each field, its value, where it came from and the limit."""


class ServiceSettings(BaseSettings):
    """Base of a service's settings.

    Constructed directly it takes only its arguments (as tests want it); `load` adds file and environment.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    table: ClassVar[str]
    """Table in the TOML file, and the service's part of the environment prefix."""
    other_variables: ClassVar[Mapping[str, str]] = {}
    """Further environment variables: variable -> field."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @classmethod
    def prefix(cls) -> str:
        """Of the environment variables, for example FUSIONROUTE_EXPERT_."""
        return f"FUSIONROUTE_{cls.table.upper()}_"

    @classmethod
    def load(cls, options: Mapping[str, Any] | None = None, config: Path | str | None = None) -> Self:
        """Reads file and environment under the given options.

        Args:
            options: from the command line; None values count as not given.
            config: TOML file; absent = the one that FUSIONROUTE_CONFIG names, if any.

        Raises:
            SettingsError: naming each bad field.
        """
        path = config or os.environ.get(CONFIG_VARIABLE) or None
        given = {name: value for name, value in (options or {}).items() if value is not None}
        from_file = _read_table(Path(path), cls.table) if path else {}
        from_environment = cls._read_environment()
        origins = dict.fromkeys(from_file, f"in table [{cls.table}] of {path}")
        origins |= {name: f"from the environment variable {cls._variable(name)}" for name in from_environment}
        origins |= {name: f"from {option_name(name)}" for name in given}
        try:
            return cls(**{**from_file, **from_environment, **given})
        except ValidationError as error:
            lines = [cls._explain(detail, origins) for detail in error.errors(include_url=False)]
            raise SettingsError("\n".join(lines)) from None

    @classmethod
    def _read_environment(cls) -> dict[str, Any]:
        prefix = cls.prefix()
        for variable in os.environ:
            name = variable.removeprefix(prefix).lower()
            if variable.startswith(prefix) and name not in cls.model_fields:
                raise SettingsError(
                    f"the environment variable {variable} is not a setting{_suggest(name, cls.model_fields)}"
                )
        values = {
            field: os.environ[variable]
            for variable, field in cls._shared_variables().items()
            if os.environ.get(variable)
        }
        return values | EnvSettingsSource(cls, env_prefix=prefix)()

    @classmethod
    def _variable(cls, field: str) -> str:
        own = cls.prefix() + field.upper()
        return next(
            (v for v, name in cls._shared_variables().items() if name == field and own not in os.environ), own
        )

    @classmethod
    def _shared_variables(cls) -> Mapping[str, str]:
        """`other_variables` of the class and of those that it is made from."""
        return {
            variable: field
            for each in reversed(cls.__mro__)
            for variable, field in vars(each).get("other_variables", {}).items()
        }

    @classmethod
    def _explain(cls, detail: Any, origins: Mapping[str, str]) -> str:
        """One line for one of pydantic's errors."""
        field = ".".join(str(part) for part in detail["loc"]) or "settings"
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if detail["type"] == "missing":
            return (
                f"{field} is missing: give {option_name(field)}, {cls.prefix()}{field.upper()} "
                f"or `{field}` in table [{cls.table}]"
            )
        origin = origins.get(name, "given")
        if detail["type"] == "extra_forbidden":
            return f"{field} ({origin}) is not a setting{_suggest(field, cls.model_fields)}"
        limit = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        if name not in cls.model_fields:
            return limit  # it names its fields; what was given is all settings together, passwords among them
        shown = "***" if cls._is_secret(name) else repr(detail["input"])
        return f"{field} = {shown} ({origin}) is not allowed: {limit}"

    @classmethod
    def _is_secret(cls, name: str) -> bool:
        return "SecretStr" in str(cls.model_fields[name].annotation)


class DaemonSettings(ServiceSettings):
    """What every daemon has."""

    other_variables: ClassVar[Mapping[str, str]] = SHARED_VARIABLES

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: Port = Field(default=0, description="Port to listen on; 0 = any free one.")
    ready_file: Path | None = Field(
        default=None, description="File that receives HOST:PORT once the daemon serves."
    )
    max_message_bytes: Annotated[int, Field(ge=65536, le=2**31 - 1)] = Field(
        default=64 * 2**20, description="Largest gRPC message, bytes; the same on both ends."
    )
    drain_seconds: Seconds = Field(default=20.0, description="Time for running work to finish after SIGTERM.")
    frozen_after_seconds: Seconds = Field(
        default=120.0, description="Health turns NOT_SERVING when pending work has not moved for so long."
    )
    tls_cert: Path | None = Field(
        default=None,
        description="PEM file with the certificate to serve with, which peers are shown too; absent = not encrypted.",
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the key of tls_cert.")
    tls_ca: Path | None = Field(
        default=None,
        description="PEM file of the authority that vouches for peers; clients must show a certificate of it.",
    )
    tls_require_client: bool = Field(
        default=True, description="With tls_ca: whether clients must show a certificate."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File with the keys that are accepted, one a line; absent = none is asked for.",
    )
    api_key_file: Path | None = Field(
        default=None, description="File with the key that is shown to other services."
    )
    log_format: LogFormat = Field(
        default="auto", description="json, console, or auto = console on a terminal."
    )
    log_level: LogLevel = Field(default="info", description="debug, info, warning or error.")
    watch_port: Port | None = Field(
        default=None,
        description="Port for /livez, /readyz, /progressz and /metrics over HTTP; 0 = any free one; absent = none.",
    )
    watch_host: str = Field(
        default="127.0.0.1", min_length=1, description="Address on which watch_port listens."
    )
    otel_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+/?$",
        description="OTLP gRPC collector for traces, http://HOST:PORT; also OTEL_EXPORTER_OTLP_ENDPOINT. "
        "Absent = none; needs the extra otel.",
    )


    def listening_hosts(self) -> tuple[str, ...]:
        """Addresses on which every method can be called."""
        return (self.host,)


S = TypeVar("S", bound=DaemonSettings)


def option_name(field: str) -> str:
    """The command-line option of a field: kv_tokens -> --kv-tokens."""
    return "--" + field.replace("_", "-")


def settings_options(settings_class: type[ServiceSettings]) -> list[click.Parameter]:
    """One click option for each field, without types: all checking is done in one place, by the settings."""
    options: list[click.Parameter] = []
    for name, field in settings_class.model_fields.items():
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        required = "  [required]" if field.is_required() else ""
        text = f"{field.description or ''}{default}{required}"
        if field.annotation is bool:
            flag = f"{option_name(name)}/--no-{name.replace('_', '-')}"
            options.append(click.Option([flag], default=None, help=text))
        else:
            options.append(click.Option([option_name(name)], type=str, metavar="VALUE", help=text))
    return options


def daemon_command(
    name: str, help_text: str, settings_class: type[S], run: Callable[[S], int]
) -> click.Command:
    """The command line of a daemon: options from its settings, logs configured, then `run`.

    Args:
        name: of the program.
        help_text: with an example.
        settings_class: gives the options.
        run: does the work and returns the exit code; should import what is slow inside.
    """

    def callback(config: str | None, **options: Any) -> NoReturn:
        try:
            settings = settings_class.load(options, config)
        except SettingsError as error:
            for line in str(error).splitlines():
                click.echo(f"{name}: {line}", err=True)
            raise SystemExit(int(ExitCode.BAD_SETTINGS)) from None
        quiet_native_logs()
        configure_logs(name, log_format=settings.log_format, log_level=settings.log_level)
        _check_access(name, settings)
        raise SystemExit(int(run(settings)))

    config_help = f"TOML file with a table [{settings_class.table}]; also {CONFIG_VARIABLE}."
    config_option = click.Option(["--config"], metavar="PATH", help=config_help)
    epilog = f"Each option is also an environment variable: {settings_class.prefix()}PORT for --port."
    parameters: list[click.Parameter] = [config_option, *settings_options(settings_class)]
    return click.Command(name, callback=callback, params=parameters, help=help_text, epilog=epilog)


def _check_access(name: str, settings: DaemonSettings) -> None:
    """Ends the start when certificates or keys cannot be; says so when anybody may call from anywhere."""
    from fusionroute.access import ClientAccess, ServerAccess, warn_if_open
    from fusionroute.errors import FusionRouteError

    try:
        ServerAccess.of(settings)
        ClientAccess.of(settings)
    except FusionRouteError as error:
        click.echo(f"{name}: {error.message}", err=True)
        raise SystemExit(int(ExitCode.BAD_SETTINGS)) from None
    warn_if_open(settings)


def _read_table(path: Path, table: str) -> dict[str, Any]:
    """A service's table of the file; tables of other services are left to them."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config = '{path}' cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config = '{path}' is not valid TOML: {error}") from None
    for key, value in content.items():
        if key not in TABLES:
            hint = _suggest(key, TABLES)
            raise SettingsError(
                f"{key} in {path} is not a table of settings{hint}; known: {', '.join(TABLES)}"
            )
        if not isinstance(value, dict):
            raise SettingsError(f"{key} in {path} must be a table: [{key}]")
    return dict(content.get(table, {}))


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
