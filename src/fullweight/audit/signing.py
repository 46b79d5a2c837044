"""Who sealed a bundle: a signature over the whole folder by the library `model-signing` (OpenSSF Model Signing).

`bundle.sig` is a Sigstore bundle around an in-toto statement that lists every file with its SHA-256. An elliptic
key (P-256, made offline), a certificate, or Sigstore's keyless identity makes it. Before the library sees a
signature its outline is checked here, and afterwards that it covers every file: a signature may leave files out.

Left out: PKCS #11 (sign with the library's own command line; the result verifies here).
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing, verifying
from OpenSSL import crypto
from sigstore.errors import Error as SigstoreError

from fullweight.core.errors import FullweightError
from fullweight.core.strict_json import parse_strict
from fullweight.evidence.bundle import LIST, SIGNATURE, Bundle, RefusedError, open_plain

_MOST_BYTES = 64 * 2**20
_NOTHING = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, InvalidSignature),
    *(crypto.X509StoreContextError, crypto.Error, SigstoreError),
)
"""How the libraries say no, or stumble over a signature that is none."""
_ONLINE = (
    "Sigstore's services have to be reached, and a signer proves its identity in a browser or by a token of CI; "
    "offline, use a key or a certificate"
)


@dataclass(frozen=True)
class Signer:
    """With what to sign: a private key, alone or with its certificate and chain, or else Sigstore."""

    key: Path | None = None
    certificate: Path | None = None
    chain: Sequence[Path] = ()
    sigstore: bool = False


@dataclass(frozen=True)
class Trust:
    """Whose signature is accepted: of a public key, of certificates under a chain, or of a Sigstore identity."""

    public_key: Path | None = None
    chain: Sequence[Path] = ()
    identity: str | None = None
    issuer: str | None = None

    @property
    def given(self) -> bool:
        return self.public_key is not None or bool(self.chain) or self.identity is not None


def new_key(path: Path) -> Path:
    """Write a new P-256 key to `path`, readable by its owner alone, and its public half beside it (`.pub`)."""
    public = path.with_name(f"{path.name}.pub")
    for one in (path, public):
        if one.exists():
            raise FullweightError(f"{one} is there already, and a key is never overwritten; name another file")
    key = ec.generate_private_key(ec.SECP256R1())
    private_text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_text = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(private_text)
    public.write_bytes(public_text)
    return public


def sign(root: Path, signer: Signer) -> None:
    """Write `bundle.sig` into a bundle that is otherwise complete. Raises FullweightError when it cannot."""
    config = signing.Config().set_hashing_config(_hashing())
    try:
        if signer.certificate is not None and signer.key is not None:
            config.use_certificate_signer(
                private_key=signer.key,
                signing_certificate=signer.certificate,
                certificate_chain=signer.chain or (signer.certificate,),  # the library refuses none
            )
        elif signer.key is not None:
            config.use_elliptic_key_signer(private_key=signer.key)
        else:
            _sign_online(config, root)
            return
        config.sign(root, root / SIGNATURE)
    except OSError as error:
        raise FullweightError(
            f"{error.filename or signer.key}: {error.strerror}; give the file of a key"
        ) from None
    except (ValueError, TypeError) as error:
        with_what = signer.key if signer.certificate is None else f"{signer.key} and {signer.certificate}"
        raise FullweightError(
            f"cannot sign with {with_what}: {error}; give an elliptic key (P-256, P-384 or P-521) without a "
            "password in PEM form, such as `fullweight seal --new-key` writes, and a certificate of that key"
        ) from None


def _sign_online(config: signing.Config, root: Path) -> None:
    try:
        config.use_sigstore_signer()
        config.sign(root, root / SIGNATURE)
    except (SigstoreError, OSError, ValueError) as error:  # OSError: also what `requests` raises
        raise FullweightError(f"cannot sign with Sigstore: {_first_line(error)}; {_ONLINE}") from None


def signed(bundle: Bundle) -> bool:
    """Whether there is a signature, whoever made it."""
    return (bundle.root / SIGNATURE).is_file()


def require_signature(bundle: Bundle) -> None:
    """Raise RefusedError on a signature file that is none, which takes no key to see."""
    _covered(bundle.root)


def signature_problem(bundle: Bundle, trust: Trust) -> str | None:
    """Why the signature is not one of the trusted over this folder as it is, or None when it is.

    Raises RefusedError on a file that is no signature, FullweightError when the trusted key cannot be read.
    """
    covered = _covered(bundle.root)
    config = verifying.Config().set_hashing_config(_hashing())
    try:
        if trust.public_key is not None:
            config.use_elliptic_key_verifier(public_key=trust.public_key)
        elif trust.identity is not None:
            _trust_online(config, trust.identity, trust.issuer or "")
        else:
            config.use_certificate_verifier(certificate_chain=trust.chain)
    except OSError as error:
        raise FullweightError(f"{error.filename}: {error.strerror}; give the file of a public key") from None
    except (ValueError, TypeError) as error:
        raise FullweightError(f"{trust.public_key or trust.chain} is no public key in PEM form: {error}") from None
    try:
        config.verify(bundle.root, bundle.root / SIGNATURE)
    except _NOTHING as error:
        return _changed(error) or _first_line(error) or "it was not made by that key"
    if missing := sorted({*bundle.listed, LIST} - covered):
        return f"it does not cover {missing[0]}"
    return None


def _trust_online(config: verifying.Config, identity: str, issuer: str) -> None:
    try:
        config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    except (SigstoreError, OSError) as error:
        raise FullweightError(
            f"cannot look for {identity} with Sigstore: {_first_line(error)}; {_ONLINE}"
        ) from None


def _changed(error: BaseException) -> str | None:
    """Which files are not those that were signed, where the library says so; it prints their digests as bytes."""
    names = re.findall(r"Hash mismatch for \\?'([^'\\]*)", str(error))
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"not as signed: {', '.join(names[:3])}{more}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def _hashing() -> hashing.Config:
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _covered(root: Path) -> set[str]:
    """Names of the files that the signed statement lists. Raises RefusedError on what is no signature."""
    with open_plain(root / SIGNATURE) as stream:
        text = stream.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise RefusedError("bundle.size", f"{SIGNATURE} has more than {_MOST_BYTES:,} bytes")
    try:
        envelope = parse_strict(text)["dsseEnvelope"]
        statement = parse_strict(base64.b64decode(envelope["payload"], validate=True))
        resources: list[dict[str, Any]] = statement["predicate"]["resources"]
        return {str(resource["name"]) for resource in resources if envelope["signatures"]}
    except (ValueError, TypeError, KeyError) as error:
        raise RefusedError("bundle.signature", f"{SIGNATURE} is no signature of a folder: {error!r}") from None
