"""The cluster's own certificate authority, by openssl."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = "3650"


@dataclass(frozen=True)
class Authority:
    """Keys and certificates in `folder/certs`, each made once. server: the API server's address."""

    folder: Path
    server: str

    @property
    def certs(self) -> Path:
        return self.folder / "certs"

    @property
    def ca(self) -> Path:
        return self.certs / "ca.crt"

    def make(self) -> None:
        """The authority itself, and the key that service accounts' tokens are signed with."""
        if self.ca.exists():
            return
        self.certs.mkdir(mode=0o700, exist_ok=True)
        self._key("ca")
        self._openssl("req", "-x509", "-new", "-key", "ca.key", "-subj", "/CN=dev-ca", "-days", DAYS, "-out", "ca.crt")
        self._openssl("genrsa", "-out", "sa.key", "2048")
        self._openssl("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")

    def issue(self, name: str, subject: str, names: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        """Certificate and key of `name`. names: as a server, as openssl writes them (IP:..., DNS:...)."""
        certificate, key = self.certs / f"{name}.crt", self.certs / f"{name}.key"
        if not certificate.exists():
            self._key(name)
            self._openssl("req", "-new", "-key", key.name, "-subj", subject, "-out", f"{name}.csr")
            extensions = self.certs / f"{name}.ext"
            extensions.write_text(f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName={names}\n")
            self._openssl(
                "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", DAYS, "-extfile", extensions.name, "-out", certificate.name,
            )  # fmt: skip
        return certificate, key

    def kubeconfig(self, name: str, subject: str) -> Path:
        """A kubeconfig with which `name` is what the subject says: O= its groups, CN= its user name."""
        certificate, key = self.issue(name, subject)
        file = self.folder / f"{name}.kubeconfig"
        if not file.exists():
            cluster = {"server": self.server, "certificate-authority-data": _base64(self.ca)}
            user = {"client-certificate-data": _base64(certificate), "client-key-data": _base64(key)}
            file.touch(mode=0o600)
            file.write_text(
                json.dumps({
                    "apiVersion": "v1", "kind": "Config", "current-context": "dev",
                    "clusters": [{"name": "dev", "cluster": cluster}],
                    "users": [{"name": name, "user": user}],
                    "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": name}}],
                }, indent=1)
            )  # fmt: skip
        return file

    def _key(self, name: str) -> None:
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.certs, check=True, capture_output=True)


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
