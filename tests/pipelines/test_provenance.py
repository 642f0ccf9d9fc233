"""A synthetic file says so: to people, in its container, and, where it can be signed, in a C2PA manifest that verifies."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from models import bundle
from pipelines import provenance, storage
from pipelines.output import ConfigError
from pipelines.video import probe
from tests import clips
from tests.swaps import toy_bundles

BUNDLES = {"aligner": {"sha256": "a" * 64}, "blender": {"sha256": "b" * 64}}


def test_the_statement_names_what_was_done_and_by_what() -> None:
    told = provenance.statement("the head in this video was replaced", BUNDLES)
    assert told.startswith(
        "Synthetic media: the head in this video was replaced by neural networks"
    )
    assert "aligner aaaaaaaaaaaaaaaa, blender bbbbbbbbbbbbbbbb" in told
    metadata = provenance.container_metadata("x", BUNDLES)
    assert metadata["digital_source_type"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert metadata["bundle_blender_sha256"] == "b" * 64


def test_a_bundle_is_described_by_its_tensors(tmp_path: Path) -> None:
    aligner, _ = toy_bundles(tmp_path)
    first = provenance.describe_bundle(aligner)
    assert (first["class"], first["git_commit"]) == ("aligner", "0000000")
    network = bundle.load(aligner)
    sha256 = bundle.save(network, str(tmp_path / "again"), {}, clips.index_picture(1))
    assert sha256 == first["sha256"]


def test_where_a_bundle_is_is_told_without_its_password(tmp_path: Path) -> None:
    aligner, _ = toy_bundles(tmp_path)
    uri = "memory://me:hunter2@store/aligner"
    for path in Path(aligner).iterdir():
        storage.put_file(path, storage.join(uri, path.name))
    told = provenance.describe_bundle(uri)
    assert told == provenance.describe_bundle(aligner) | {"uri": "memory://store/aligner"}


def test_why_there_is_no_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (provenance.CERTIFICATE, provenance.KEY):
        monkeypatch.delenv(name, raising=False)
    assert provenance.can_sign() in (
        "the package c2pa-python is not installed",
        "HEADRAY_C2PA_CERTIFICATE and HEADRAY_C2PA_KEY not set",
    )


def write_chain(folder: Path) -> tuple[Path, Path]:
    """A certificate that may sign manifests, with its issuer's; and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    issuer_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def certificate(name: str, own: ec.EllipticCurvePrivateKey, *, is_issuer: bool) -> bytes:
        def called(text: str) -> x509.Name:
            return x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "HeadRay tests"),
                    x509.NameAttribute(NameOID.COMMON_NAME, text),
                ]
            )

        usage = x509.KeyUsage(
            digital_signature=not is_issuer, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=is_issuer,
            crl_sign=is_issuer, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        made = (
            x509.CertificateBuilder()
            .subject_name(called(name))
            .issuer_name(called("issuer"))
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_issuer, None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
            )
        )
        if not is_issuer:
            usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            made = made.add_extension(usages, critical=False)
        return made.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(
        certificate("signer", key, is_issuer=False)
        + certificate("issuer", issuer_key, is_issuer=True)
    )
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return chain, secret


def test_a_manifest_verifies_and_notices_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    chain, key = write_chain(tmp_path)
    monkeypatch.setenv(provenance.CERTIFICATE, str(chain))
    monkeypatch.setenv(provenance.KEY, str(key))
    assert provenance.can_sign() == ""
    path = clips.encode(tmp_path / "clip.mp4", clips.indexed(5))
    provenance.sign(path, provenance.statement("the head was replaced", BUNDLES), BUNDLES)
    assert probe(path).frames == 5

    def problems() -> set[str]:
        told = json.loads(c2pa.Reader(str(path)).json())
        active = told["manifests"][told["active_manifest"]]
        (action,) = active["assertions"][1]["data"]["actions"]
        assert action["digitalSourceType"] == provenance.COMPOSITE
        assert action["parameters"]["bundle_blender"] == "b" * 64
        return {each["code"] for each in told.get("validation_status", [])}

    assert problems() <= {"signingCredential.untrusted"}  # nobody trusts the issuer made above
    content = bytearray(path.read_bytes())
    at = content.index(b"mdat") + 40
    content[at] ^= 1
    path.write_bytes(bytes(content))
    assert "assertion.bmffHash.mismatch" in problems()


def test_a_key_that_is_none_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    path = clips.encode(tmp_path / "clip.mp4", clips.indexed(5))
    before = path.read_bytes()
    for name in (provenance.CERTIFICATE, provenance.KEY):
        monkeypatch.setenv(name, str(path))
    with pytest.raises(ConfigError, match="no manifest could be signed") as caught:
        provenance.sign(path, "x", BUNDLES)
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == before
