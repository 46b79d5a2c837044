"""Who sealed a bundle: keys, certificates under a chain that is made here, and Sigstore without a network."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tests.processes import fullweight
from tests.unit.audit.conftest import Honest
from tests.unit.audit.forging import Forgery, refuted

from fullweight.audit.rule import Status
from fullweight.audit.signing import Signer, Trust, new_key, sign
from fullweight.audit.verify import verify
from fullweight.core.errors import FullweightError

BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
END = datetime.datetime(2126, 1, 1, tzinfo=datetime.UTC)
Usage = tuple[bool, bool]


@dataclass(frozen=True)
class Authority:
    """A certificate, its key and who is above it."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    certificate: Path

    def certify(self, name: str, folder: Path, key: ec.EllipticCurvePrivateKey, signs_others: bool) -> Authority:
        """A certificate under this one."""
        return _certificate(name, folder, key, signs_others, self)


def _certificate(
    name: str, folder: Path, key: ec.EllipticCurvePrivateKey, signs_others: bool, above: Authority | None
) -> Authority:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if above is None else above.name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGIN)
        .not_valid_after(END)
        .add_extension(x509.BasicConstraints(ca=signs_others, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not signs_others,
                key_cert_sign=signs_others,
                encipher_only=False,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
    )
    if not signs_others:
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    signed = built.sign(key if above is None else above.key, hashes.SHA256())
    path = folder / f"{name}.crt"
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return Authority(subject, key, path)


@dataclass(frozen=True)
class Chain:
    """A root, one authority under it, and the certificate of somebody who seals."""

    root: Authority
    middle: Authority
    leaf: Authority
    key: Path

    @property
    def signer(self) -> Signer:
        return Signer(self.key, self.leaf.certificate, (self.middle.certificate,))


def chain(folder: Path, name: str) -> Chain:
    """A new chain of three certificates."""
    root = _certificate(f"{name}-root", folder, ec.generate_private_key(ec.SECP256R1()), True, None)
    middle = root.certify(f"{name}-middle", folder, ec.generate_private_key(ec.SECP256R1()), True)
    key = folder / f"{name}.pem"
    new_key(key)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return Chain(root, middle, middle.certify(f"{name}-leaf", folder, private, False), key)


def unsigned(honest: Honest, folder: Path) -> Path:
    """The honest bundle without its signature."""
    folder.mkdir(exist_ok=True)
    root = Forgery(honest.bundle, folder).root
    (root / "bundle.sig").unlink()
    return root


def test_a_certificate_is_verified_by_its_root_alone(honest: Honest, tmp_path: Path) -> None:
    """By the command line: sealed with key, certificate and what is above it, verified with the root."""
    mine, other = chain(tmp_path, "mine"), chain(tmp_path, "other")
    ended = fullweight(
        *("seal", honest.run, "--out", tmp_path / "bundle", "--key", mine.key),
        *("--certificate", mine.leaf.certificate, "--chain", mine.middle.certificate),
    )
    assert ended.ok, ended.output
    ended = fullweight("verify", tmp_path / "bundle", "--chain", mine.root.certificate)
    assert ended.ok, ended.output
    assert "bundle.signature" not in ended.output
    ended = fullweight("verify", tmp_path / "bundle", "--chain", other.root.certificate)
    assert ended.statuses == (1,), ended.output
    assert "refuted: bundle.signature" in ended.output
    assert "Traceback" not in ended.output


def test_what_a_certificate_does_not_cover_is_refuted(honest: Honest, tmp_path: Path) -> None:
    """A changed file; a root of others; a signature by a key where a certificate is trusted, and the reverse."""
    mine, other = chain(tmp_path, "mine"), chain(tmp_path, "other")
    root = unsigned(honest, tmp_path / "one")
    sign(root, mine.signer)
    trust = Trust(chain=(mine.root.certificate,))
    held = {f.rule: f.status for f in verify(root, trust=trust).findings}
    assert held["bundle.signature"] is Status.holds
    assert (
        "unable to get" in refuted(verify(root, trust=Trust(chain=(other.root.certificate,))))["bundle.signature"]
    )
    public = mine.key.with_name("mine.pem.pub")
    assert "bundle.signature" in refuted(verify(root, trust=Trust(public_key=honest.public_key)))
    assert "bundle.signature" in refuted(verify(honest.bundle, trust=trust)), (
        "signed by a key, without certificate"
    )
    assert public.is_file()
    text = (root / "evaluation.json").read_text()
    (root / "evaluation.json").write_text(text.replace("1", "2", 1))
    assert "evaluation.json" in refuted(verify(root, trust=trust))["bundle.signature"]


def test_a_certificate_that_may_not_sign_is_refuted(honest: Honest, tmp_path: Path) -> None:
    """An authority's own certificate, which is there to sign certificates, is none for bundles."""
    mine = chain(tmp_path, "mine")
    key = tmp_path / "middle.pem"
    key.write_bytes(
        mine.middle.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    root = unsigned(honest, tmp_path / "one")
    sign(root, Signer(key, mine.middle.certificate))
    found = refuted(verify(root, trust=Trust(chain=(mine.root.certificate,))))
    assert "bundle.signature" in found


def test_a_certificate_of_another_key_is_told(honest: Honest, tmp_path: Path) -> None:
    """One message, and no signature is left behind."""
    mine, other = chain(tmp_path, "mine"), chain(tmp_path, "other")
    root = unsigned(honest, tmp_path / "one")
    with pytest.raises(FullweightError, match="does not match"):
        sign(root, Signer(mine.key, other.leaf.certificate))
    with pytest.raises(FullweightError, match=r"nowhere\.crt.*give the file"):
        sign(root, Signer(mine.key, tmp_path / "nowhere.crt"))
    assert not (root / "bundle.sig").exists()
    with pytest.raises(FullweightError, match="PEM form"):
        verify(honest.bundle, trust=Trust(chain=(mine.key,)))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address can be resolved or connected to."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


SIGSTORE: list[Callable[[Path], object]] = [
    lambda root: sign(root, Signer(sigstore=True)),
    lambda root: verify(root, trust=Trust(identity="somebody@example.org", issuer="https://example.org")),
]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("act", SIGSTORE, ids=["sign", "verify"])
def test_sigstore_without_a_network_is_one_message(
    act: Callable[[Path], object], honest: Honest, tmp_path: Path
) -> None:
    """What was tried, why it failed, and what works without a network; the bundle is as it was."""
    root = Forgery(honest.bundle, tmp_path).root
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(FullweightError, match=r"with Sigstore: .*offline, use a key or a certificate"):
        act(root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_forgery_that_fits_in_all_else_is_not_signed_by_the_owner(honest: Honest, tmp_path: Path) -> None:
    """Somebody else's signature, or none, is not the one that was asked for."""
    root = unsigned(honest, tmp_path)
    trust = Trust(public_key=honest.public_key)
    assert "has none" in refuted(verify(root, trust=trust))["bundle.signature"]
    new_key(tmp_path / "mine.pem")
    sign(root, Signer(key=tmp_path / "mine.pem"))
    assert "does not match" in refuted(verify(root, trust=trust))["bundle.signature"]


def test_what_was_changed_after_the_signature_is_named(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("claims.json", lambda claims: claims[0].update(value=7))
    told = refuted(verify(forgery.root, trust=Trust(public_key=honest.public_key)))["bundle.signature"]
    assert told == "not as signed: claims.json"


def test_a_signature_that_leaves_files_out_is_none(honest: Honest, tmp_path: Path) -> None:
    """The library lets a signer ignore files; here every file has to be under the signature."""
    from model_signing import hashing, signing

    root = unsigned(honest, tmp_path)
    public = new_key(tmp_path / "key.pem")
    config = hashing.Config().set_ignored_paths(paths=["bundle.sig", "ledger.jsonl"], ignore_git_paths=False)
    signing.Config().set_hashing_config(config).use_elliptic_key_signer(private_key=tmp_path / "key.pem").sign(
        root, root / "bundle.sig"
    )
    assert "ledger.jsonl" in refuted(verify(root, trust=Trust(public_key=public)))["bundle.signature"]
