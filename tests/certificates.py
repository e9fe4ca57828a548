"""Certificates for tests: an authority and what it vouches for, as PEM files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import trustme

from fusionroute.access import ClientAccess, ServerAccess, TlsFiles
from fusionroute.api_keys import ApiKeys, ShownKey


@dataclass
class Authority:
    """A certificate authority with its certificate in a file."""

    folder: Path
    _ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.ca = self.folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str = "service", *hosts: str) -> TlsFiles:
        """A certificate for 127.0.0.1 (or other hosts) and the authority's own, in files named after `name`."""
        issued = self._ca.issue_cert(*(hosts or ("127.0.0.1", "localhost")))
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        issued.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return TlsFiles(certificate, key, self.ca)

    def server(self, keys: ApiKeys | None = None) -> ServerAccess:
        """A server that asks for certificates of this authority."""
        return ServerAccess(self.issue("server"), keys)

    def client(self, key: ShownKey | None = None) -> ClientAccess:
        """A client with a certificate of this authority."""
        return ClientAccess(self.issue("client"), key)

    def variables(self) -> dict[str, str]:
        """What daemons and commands of one deployment have in their environment."""
        files = self.issue("everybody")
        return {
            "FUSIONROUTE_TLS_CERT": str(files.certificate),
            "FUSIONROUTE_TLS_KEY": str(files.key),
            "FUSIONROUTE_TLS_CA": str(files.ca),
        }
