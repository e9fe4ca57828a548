"""Who may call and how it is shown: certificates (TLS, also of clients) and keys, for servers and for clients.

All of it is off unless a setting says otherwise, and all of it comes from files that may be replaced while the
process runs: a server takes a new certificate with the next handshake, a client with its next call.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from fusionroute.api_keys import ApiKeys, ShownKey, refused
from fusionroute.errors import invalid
from fusionroute.settings import SHARED_VARIABLES
from fusionroute.watched_files import WatchedFiles, read_small

if TYPE_CHECKING:
    import grpc

    from fusionroute.settings import DaemonSettings

API_KEY_VARIABLE = "FUSIONROUTE_API_KEY"

log = structlog.get_logger(__name__)


class Pem(NamedTuple):
    """What certificate files say; empty where there is none."""

    certificate: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files of one end of a connection; `names` is what errors call certificate, key and ca."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    names: tuple[str, str, str] = ("tls_cert", "tls_key", "tls_ca")

    def __post_init__(self) -> None:
        certificate, key, _ = self.names
        if self.certificate is not None and self.key is None:
            raise invalid(key, None, f"{certificate} = '{self.certificate}' needs its key beside it")
        if self.key is not None and self.certificate is None:
            raise invalid(certificate, None, f"{key} = '{self.key}' needs its certificate beside it")

    @property
    def is_given(self) -> bool:
        """Whether there is any."""
        return self.certificate is not None or self.ca is not None

    def watched(self, clock: Callable[[], float] = time.monotonic) -> WatchedFiles[Pem]:
        """The files, read again when they change. Raises InvalidRequest: they cannot be read or do not fit."""
        paths = [path for path in (self.certificate, self.key, self.ca) if path is not None]
        return WatchedFiles(paths, self.read, clock=clock)

    def read(self) -> Pem:
        """All files. Raises InvalidRequest, naming the field: unreadable, no PEM, or a key of another certificate."""
        found = Pem(
            *(
                _read(name, path)
                for name, path in zip(self.names, (self.certificate, self.key, self.ca), strict=True)
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.certificate is not None and self.key is not None:
            try:
                context.load_cert_chain(self.certificate, self.key, password=_no_password)
            except (ssl.SSLError, ValueError):
                why = f"is not the unencrypted PEM key of the certificate {self.names[0]} = '{self.certificate}'"
                raise refused(self.names[1], self.key, why) from None
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError:
                raise refused(self.names[2], self.ca, "has no PEM certificate in it") from None
        return found


class ServerAccess:
    """What a server demands: its certificate, whose certificates it trusts, which keys it takes.

    Args:
        tls: its certificate and key; `ca` = clients must show a certificate of it (if `require_client`).
        keys: accepted keys; None = no key is asked for.
        require_client: False = `ca` serves our own calls only, and any client may connect.

    Raises:
        InvalidRequest: naming the field that is missing or does not fit.
    """

    def __init__(
        self, tls: TlsFiles | None = None, keys: ApiKeys | None = None, *, require_client: bool = True
    ) -> None:
        self.keys = keys
        self._files: WatchedFiles[Pem] | None = None
        self._tls = tls if tls is not None and tls.is_given else None
        self.require_client = False
        if tls is not None and tls.is_given:
            if tls.certificate is None:
                raise invalid("tls_cert", None, f"tls_ca = '{tls.ca}' needs tls_cert and tls_key beside it")
            self._files = tls.watched()
            self.require_client = require_client and tls.ca is not None

    @classmethod
    def of(cls, settings: DaemonSettings) -> ServerAccess:
        """What a daemon's settings say. Raises InvalidRequest, naming the field."""
        keys = ApiKeys(settings.api_keys_file) if settings.api_keys_file is not None else None
        return cls(_tls_of(settings), keys, require_client=settings.tls_require_client)

    @property
    def is_encrypted(self) -> bool:
        """Whether connections are encrypted."""
        return self._files is not None

    def credentials(self) -> grpc.ServerCredentials | None:
        """For a server's port: TLS that takes up new files at the next handshake. None = not encrypted."""
        import grpc

        if self._files is None:
            return None
        files, lock, taken = self._files, threading.Lock(), self._files.generation

        def configuration() -> grpc.ServerCertificateConfiguration:
            pem = files.current()
            pairs = [(pem.key, pem.certificate)]
            return grpc.ssl_server_certificate_configuration(pairs, pem.ca or None)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal taken
            with lock:
                files.current()
                if files.generation == taken:
                    return None
                taken = files.generation
                return configuration()

        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            renewed,  # type: ignore[arg-type]  # None is documented: nothing has changed
            require_client_authentication=self.require_client,
        )

    def ssl_context(self) -> ssl.SSLContext | None:
        """For a port without gRPC: as `credentials`, also for clients' certificates. None = not encrypted."""
        if self._files is None or self._tls is None:
            return None
        tls, files, taken = self._tls, self._files, self._files.generation
        newest = _context_of(tls, require_client=self.require_client)

        def renew(
            connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext
        ) -> None:
            """At each handshake; one that fails to read the new files goes on with what there was."""
            nonlocal newest, taken
            files.current()
            if files.generation != taken:
                with suppress(OSError, ValueError):
                    newest = _context_of(tls, require_client=self.require_client)
                    taken = files.generation
            connection.context = newest

        newest.sni_callback = renew
        return newest


class ClientAccess:
    """What a client shows and whom it trusts. Without arguments: nothing, over a plain connection.

    Args:
        tls: `ca` = who vouches for servers (absent: the public authorities gRPC knows); certificate and key are
            shown to servers that ask. Any of them makes connections encrypted.
        key: shown with each call.
    """

    def __init__(self, tls: TlsFiles | None = None, key: ShownKey | None = None) -> None:
        self._tls = tls if tls is not None and tls.is_given else None
        self._files = self._tls.watched() if self._tls is not None else None
        self._key = key

    @classmethod
    def of(cls, settings: DaemonSettings) -> ClientAccess:
        """What a daemon shows to its peers. Raises InvalidRequest, naming the field."""
        key = ShownKey(settings.api_key_file) if settings.api_key_file is not None else None
        return cls(_tls_of(settings), key)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, *, with_key: bool = True
    ) -> ClientAccess:
        """What commands show: FUSIONROUTE_API_KEY or _API_KEY_FILE, and FUSIONROUTE_TLS_CA, _CERT and _KEY.

        Args:
            environment: where to look.
            with_key: False = certificates only.

        Raises:
            InvalidRequest: naming the variable.
        """
        names = ("FUSIONROUTE_TLS_CERT", "FUSIONROUTE_TLS_KEY", "FUSIONROUTE_TLS_CA")
        certificate, private_key, ca = (
            Path(value) if (value := environment.get(name)) else None for name in names
        )
        key: ShownKey | None = None
        if not with_key:
            pass
        elif value := environment.get(API_KEY_VARIABLE):
            key = ShownKey(value, API_KEY_VARIABLE)
        elif path := environment.get("FUSIONROUTE_API_KEY_FILE"):
            key = ShownKey(Path(path), "FUSIONROUTE_API_KEY_FILE")
        return cls(TlsFiles(certificate, private_key, ca, names), key)

    @property
    def is_encrypted(self) -> bool:
        """Whether connections are encrypted."""
        return self._files is not None

    @property
    def shows_key(self) -> bool:
        """Whether a key goes with each call."""
        return self._key is not None

    def generation(self) -> int:
        """Grows when the certificate files have changed, so that connections must be made anew."""
        if self._files is None:
            return 0
        self._files.current()
        return self._files.generation

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call; never to be printed."""
        return (("authorization", f"Bearer {self._key.current()}"),) if self._key is not None else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a channel, from the files as they are now. None = not encrypted."""
        import grpc

        if self._files is None:
            return None
        pem = self._files.current()
        return grpc.ssl_channel_credentials(pem.ca or None, pem.key or None, pem.certificate or None)


def child_environment(settings: DaemonSettings) -> dict[str, str]:
    """The variables by which a daemon's child processes show what the daemon shows; paths, no secrets."""
    fields = ("tls_cert", "tls_key", "tls_ca", "api_key_file")
    paths = {name: getattr(settings, field) for name, field in SHARED_VARIABLES.items() if field in fields}
    return {name: str(path.absolute()) for name, path in paths.items() if path is not None}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def warn_if_open(settings: DaemonSettings) -> None:
    """Says in the log what anybody who reaches the address may do, where that is not this machine only."""
    open_hosts = [host for host in settings.listening_hosts() if not is_loopback(host)]
    if not open_hosts:
        return
    missing = [
        what
        for what, setting in (
            ("encryption (tls_cert, tls_key)", settings.tls_cert),
            (
                "keys or client certificates (api_keys_file, tls_ca)",
                settings.api_keys_file or settings.tls_ca,
            ),
        )
        if setting is None
    ]
    if missing:
        log.warning(
            "open_to_the_network",
            host=open_hosts[0],
            without=missing,
            note="whoever reaches this address may call every method; see docs/security.md",
        )


def _context_of(files: TlsFiles, *, require_client: bool) -> ssl.SSLContext:
    """A server's, from files that have been read before. Raises OSError or ValueError: they are others now."""
    assert files.certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(files.certificate, files.key, password=_no_password)
    if require_client:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _tls_of(settings: DaemonSettings) -> TlsFiles:
    return TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_ca)


def _read(name: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return read_small(path).encode()
    except OSError as error:
        raise refused(name, path, f"cannot be read: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError("encrypted keys are not taken: a daemon cannot ask for the password")
