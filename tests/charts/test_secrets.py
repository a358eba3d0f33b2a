"""What the chart generates: keys that are long enough, and certificates that callers will believe."""

from __future__ import annotations

import base64
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.charts.chart import SERVICES, Rendered, render

IN = timedelta(days=30)


def data(rendered: Rendered, name: str, key: str) -> bytes:
    return base64.b64decode(rendered.one("Secret", name)["data"][key])


def test_secrets_are_long_and_differ() -> None:
    rendered = render()
    found = [data(rendered, name, "token") for name in ("service-token", "engine-token")]
    found += [data(rendered, f"{service}-db", "password") for service in SERVICES]
    found += [data(rendered, "postgres", "password"), data(rendered, "store", "secret-key")]
    assert len(set(found)) == len(found) and min(map(len, found)) >= 32
    key = data(rendered, "bootstrap", "api-key").decode()
    assert key.startswith("sk-lathe-") and len(key) >= 41


@pytest.mark.parametrize("service", SERVICES)
def test_a_database_url_is_for_its_own_role(service: str) -> None:
    rendered = render(release="demo")
    url = data(rendered, f"demo-lathe-{service}-db", "url").decode()
    password = data(rendered, f"demo-lathe-{service}-db", "password").decode()
    assert url == f"postgresql+psycopg://{service}:{password}@demo-lathe-postgres:5432/{service}"


@pytest.mark.parametrize("component", [*SERVICES, "engine"])
def test_a_certificate_is_for_the_names_that_callers_use(component: str) -> None:
    rendered = render({"tls": {"validityDays": 30}}, release="demo", namespace="there")
    name = f"demo-lathe-{component}-tls"
    authority = x509.load_pem_x509_certificate(data(rendered, "demo-lathe-ca", "ca.crt"))
    certificate = x509.load_pem_x509_certificate(data(rendered, name, "tls.crt"))
    key = load_pem_private_key(data(rendered, name, "tls.key"), None)
    certificate.verify_directly_issued_by(authority)
    assert data(rendered, name, "ca.crt") == data(rendered, "demo-lathe-ca", "ca.crt")
    assert certificate.public_key() == key.public_key()
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = f"demo-lathe-{component}"
    expected = (
        {host, f"{host}.there", f"{host}.there.svc"} if component != "engine" else {"engine.lathe.internal"}
    )
    assert set(names.get_values_for_type(x509.DNSName)) == expected
    valid = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert abs(valid - IN) < timedelta(days=1)
    # One certificate serves and calls.
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(usage)


def test_what_the_data_needs_is_kept_by_an_uninstall() -> None:
    policy = "helm.sh/resource-policy"
    kept = {
        one["metadata"]["name"]
        for one in render().of("Secret")
        if one["metadata"].get("annotations", {}).get(policy) == "keep"
    }
    databases = {f"lathe-{service}-db" for service in SERVICES}
    assert kept == {"lathe-bootstrap", "lathe-postgres", "lathe-store", *databases}


def test_only_jobs_and_engines_hold_the_engines_token() -> None:
    holders = {
        name
        for name, template in render().pods()
        for volume in template["spec"].get("volumes", [])
        if volume.get("secret", {}).get("secretName") == "lathe-engine-token"
    }
    assert holders == {"jobs", "engine:cpu"}
