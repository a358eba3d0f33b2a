"""The certificates between services: replaced in their Secrets as an operator does it, and tried from a pod."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tests.cluster.harness.commands import until
from tests.cluster.harness.kubectl import Object
from tests.cluster.harness.release import SERVICES, Release
from tests.fixtures.certificates import Authority

COMPONENTS = (*SERVICES, "engine")
ARRIVED_S = 120.0
# Opens gRPC's own handshake with the given files and waits for the server's first bytes: in TLS 1.3 a server refuses a
# client's certificate only after the handshake.
TRY = """
import json, os, socket, ssl, sys, tempfile

given = json.load(sys.stdin)
context = ssl.create_default_context(cadata=given["ca"])
context.set_alpn_protocols(["h2"])
with tempfile.NamedTemporaryFile("w", suffix=".pem") as own:
    own.write(given["cert"] + given["key"])
    own.flush()
    context.load_cert_chain(own.name)
try:
    raw = socket.create_connection((given["host"], 7460), timeout=10)
    with context.wrap_socket(raw, server_hostname=given["name"]) as connection:
        connection.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(3) + b"\\x04" + bytes(5))
        print("accepted" if connection.recv(9) else "closed")
except OSError as error:
    print(f"refused: {error}")
"""


@dataclass(frozen=True, slots=True)
class Certificates:
    """Of one component, as PEM. ca: the bundle that it believes."""

    ca: str
    cert: str
    key: str

    @property
    def data(self) -> dict[str, str]:
        """As a Secret holds them."""
        return {"ca.crt": self.ca, "tls.crt": self.cert, "tls.key": self.key}


All = Mapping[str, Certificates]


def current(release: Release) -> dict[str, Certificates]:
    """What the Secrets of a release hold, by component."""
    return {
        component: Certificates(
            *(release.secret(f"{component}-tls", name) for name in ("ca.crt", "tls.crt", "tls.key"))
        )
        for component in COMPONENTS
    }


def issued_anew(release: Release, name: str) -> dict[str, Certificates]:
    """By a new authority. name: no authority before it may have had it, for that is how it is found."""
    authority = Authority(name)
    bundle = authority.pem.decode()
    made = {}
    for component in COMPONENTS:
        certificate, key = authority.issue(_names(release, component))
        made[component] = Certificates(bundle, certificate.decode(), key.decode())
    return made


def replaced(release: Release, old: All, new: All) -> None:
    """From old to new in three steps, none of which leaves somebody who believes nobody.

    Everybody believes both authorities; everybody shows the new certificates; nobody believes the old authority.
    """
    both = {name: replace(one, ca=one.ca + new[name].ca) for name, one in old.items()}
    for step in (both, {name: replace(one, ca=both[name].ca) for name, one in new.items()}, new):
        put(release, step)


def put(release: Release, wanted: All) -> None:
    """Write the Secrets, and wait until every pod that runs has the files."""
    for component, one in wanted.items():
        patch = json.dumps({"stringData": one.data})
        release.kubectl.run("patch", "secret", f"{release.full_name}-{component}-tls", "--patch", patch)
    digests = {
        name: hashlib.sha256(one.ca.encode() + one.cert.encode()).hexdigest() for name, one in wanted.items()
    }
    pods = [(component, pod) for component in wanted for pod in release.ready_pods(component)]
    # kubelet looks after a pod's volumes when the pod changes, or else within a minute or two.
    names = [pod["metadata"]["name"] for _, pod in pods]
    release.kubectl.run(
        "annotate", "pods", *names, "--overwrite", f"lathe.test/certificates={digests['jobs'][:12]}"
    )
    for component, pod in pods:
        until(
            lambda component=component, pod=pod: _mounted(release, component, pod) == digests[component],
            ARRIVED_S,
            f"the new certificates in {pod['metadata']['name']}",
        )


def refusals(
    release: Release, shown: Certificates, believed: str, components: Iterable[str]
) -> dict[str, str]:
    """What each component answers the gateway's pod that shows these certificates and believes that authority."""
    answers = {}
    for component in components:
        pod = release.pod(component)
        given = {
            **{"ca": believed, "cert": shown.cert, "key": shown.key},
            **{"host": pod["status"]["podIP"], "name": _names(release, component)[0]},
        }
        target = f"deploy/{release.full_name}-gateway"
        said = release.kubectl.exec(target, "python", "-c", TRY, stdin=json.dumps(given))
        answers[component] = said.strip()
    return answers


def _names(release: Release, component: str) -> list[str]:
    if component == "engine":
        return ["engine.lathe.internal"]
    name = f"{release.full_name}-{component}"
    return [name, f"{name}.{release.namespace}", f"{name}.{release.namespace}.svc"]


def _mounted(release: Release, component: str, pod: Object) -> str:
    container = "engine" if component == "engine" else ""
    folder = "/etc/lathe/tls"
    files = (f"{folder}/ca.crt", f"{folder}/tls.crt")
    text = release.kubectl.exec(pod["metadata"]["name"], "cat", *files, container=container)
    return hashlib.sha256(text.encode()).hexdigest()
