"""`fullweight seal`: make the evidence bundle of a run, signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.files import writing


def seal_command(
    run: Annotated[Path | None, typer.Argument(help="folder of the run")] = None,
    *,
    out: Annotated[Path | None, typer.Option(help="new folder for the bundle; RUN/evidence when absent")] = None,
    key: Annotated[Path | None, typer.Option(help="private elliptic key in PEM form, to sign with")] = None,
    certificate: Annotated[Path | None, typer.Option(help="certificate of --key, to be named in it")] = None,
    chain: Annotated[list[Path] | None, typer.Option(help="certificate above --certificate; repeatable")] = None,
    sigstore: Annotated[bool, typer.Option("--sigstore", help="sign with a Sigstore identity (online)")] = False,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="do not sign: nobody can tell whose it is")] = False,
    new_key: Annotated[Path | None, typer.Option(help="make a key here, its public half beside it")] = None,
    with_checkpoints: Annotated[bool, typer.Option(help="put the weights and optimiser states in too")] = False,
    ro_crate: Annotated[bool, typer.Option("--ro-crate", help="describe it for archives (RO-Crate 1.1)")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="SPDX licence of the bundle, for --ro-crate: CC-BY-4.0, ...")
    ] = None,
    packed: Annotated[
        Path | None, typer.Option("--zip", help="pack the RO-Crate into this new file too (with --ro-crate)")
    ] = None,
) -> None:
    """Gather what a run recorded into a bundle that `fullweight verify` can check, and sign it."""
    from fullweight.audit.crate import packed as pack
    from fullweight.audit.seal import seal
    from fullweight.audit.signing import Signer
    from fullweight.audit.signing import new_key as make_key
    from fullweight.core.errors import ConfigError

    if new_key is not None:
        with writing(new_key):
            public = make_key(new_key)
        typer.echo(f"key: {new_key} (keep it to yourself); public key, to be published: {public}")
        key = key or new_key
    if run is None:
        if new_key is not None:
            return
        raise ConfigError("give the folder of a run, or --new-key PATH to make a key")
    ways = sum((key is not None, sigstore, unsigned))
    if ways != 1:
        raise ConfigError(
            f"give exactly one of --key, --sigstore and --unsigned, found {ways}; `fullweight seal --new-key "
            "PATH` makes a key"
        )
    if certificate is not None and key is None:
        raise ConfigError("--certificate needs the private key that belongs to it: give --key")
    if not ro_crate and (licence is not None or packed is not None):
        raise ConfigError("--license and --zip are about the RO-Crate: add --ro-crate")
    if packed is not None and (packed.exists() or not packed.absolute().parent.is_dir()):
        raise ConfigError(f"--zip takes a new file in a folder that is there, found {packed}")
    signer = None if unsigned else Signer(key, certificate, tuple(chain or ()), sigstore)
    made = seal(
        run,
        out or run / "evidence",
        signer=signer,
        with_checkpoints=with_checkpoints,
        ro_crate=ro_crate,
        licence=licence,
    )
    _tell(made)
    if packed is not None:
        typer.echo(f"packed: {pack(made.root, packed)} (unpack it to verify)")


def _tell(made: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from fullweight.audit.seal import SealedBundle
    from fullweight.cli.verify import plain, shown

    assert isinstance(made, SealedBundle)
    table = Table(box=None)
    for title in ("claim", "value", "status when sealed"):
        table.add_column(title, overflow="fold")
    for claim in made.claims:
        table.add_row(plain(claim.name), shown(claim.value, claim.unit), plain(claim.status))
    Console(soft_wrap=True).print(table)
    for finding in made.findings:
        if finding.status.value == "refuted":
            typer.secho(f"does not hold: {finding.rule}: {plain(finding.told).plain}", fg="red", err=True)
    typer.echo(f"sealed: {made.root}{'' if made.signed else ' (not signed)'}")
    typer.echo(f"check it with: fullweight verify {made.root}")
