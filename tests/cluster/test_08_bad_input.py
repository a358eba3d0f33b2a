"""Bad input: something names the thing and what to do, nothing ends again and again without a word, nothing is changed.

One release works. A second one beside it, with its databases, has a fault in each service, all at once; the
first one is then given what it must refuse.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lathe.common.log import last_line
from tests.cluster.conftest import START_S
from tests.cluster.harness.commands import ROOT, CommandFailed, until
from tests.cluster.harness.helm import Helm, merged
from tests.cluster.harness.inventory import inventory, versions
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl, Object
from tests.cluster.harness.release import Release, installed
from tests.e2e.survival import upload_long
from tests.fixtures.tiny_chat import write_tiny_chat

NAMESPACE = "lathe-bad"
CACHE = "small-cache"
# Less than the tiny model has.
CACHE_SIZE = "256k"
SAID_S = 90.0
PULLED_S = 25.0
NO_IMAGE = "no-such-version"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
# Engines, and what they do to a release's objects: they come and go meanwhile.
LIVELY = ("pod", "podmetrics", "rayjob", "raycluster", "lease")


# --- two releases -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(kind: Kind, kubectl: Kubectl, values: dict[str, Any]) -> Iterator[Release]:
    """A release that works, except that its engines' cache has no room; any pod reaches its database and store."""
    own = {"networkPolicy": {"enabled": False}, "engines": {"cache": {"existingClaim": CACHE}}}
    release = Release(kind, Helm(kind.kubeconfig), kubectl.within(NAMESPACE), "lathe")
    release.make_namespace()
    with full_cache(release), installed(release, merged(values, own)):
        yield release


@contextmanager
def full_cache(release: Release) -> Iterator[None]:
    """The claim CACHE, on a disk that is smaller than any model."""
    kubectl, node = release.kubectl, release.kind.workers()[0]
    volume = f"{NAMESPACE}-{CACHE}"
    with release.kind.small_disk(node, CACHE_SIZE) as path:
        kubectl.apply(*volume_and_claim(volume, node, path))
        try:
            yield
        finally:
            kubectl.run("delete", "pv", volume, "--wait=false")


def volume_and_claim(volume: str, node: str, path: str) -> list[Object]:
    on_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    shared = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    claim = {**shared, "volumeName": volume, "resources": {"requests": {"storage": "1Mi"}}}
    spec = {
        **shared,
        "capacity": {"storage": "1Mi"},
        "persistentVolumeReclaimPolicy": "Retain",
        "local": {"path": path},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [on_node]}]}},
    }
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume}, "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CACHE, "namespace": NAMESPACE},
            "spec": claim,
        },
    ]


@contextmanager
def no_default_storage_class(kubectl: Kubectl) -> Iterator[None]:
    classes = [
        one["metadata"]["name"]
        for one in kubectl.items("storageclasses")
        if (one["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"
    ]
    for name in classes:
        kubectl.run("annotate", "--overwrite", "storageclass", name, f"{DEFAULT_CLASS}=false")
    try:
        yield
    finally:
        for name in classes:
            kubectl.run("annotate", "--overwrite", "storageclass", name, f"{DEFAULT_CLASS}=true")


@pytest.fixture(scope="module")
def faulty(good: Release, values: dict[str, Any]) -> Iterator[Release]:
    """A release beside it, each service of which has its own fault, while the cluster has no default storage class."""
    release = Release(good.kind, good.helm, good.kubectl, "bad")
    urls = {name: good.secret(f"{name}-db", "url") for name in ("accounts", "datasets", "models", "jobs")}
    wrong = {
        "accounts": urls["accounts"].replace("://accounts:", "://accounts:wrong-"),
        "datasets": urls["datasets"],
        "models": urls["models"].removesuffix("/models") + "/no_such_database",
        "jobs": urls["jobs"].replace("@lathe-postgres:", "@nowhere:"),
    }
    good.kubectl.apply(
        *(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": f"bad-{name}"},
                "stringData": {"url": url},
            }
            for name, url in wrong.items()
        )
    )
    given = {
        "networkPolicy": {"enabled": False},
        "migrations": {"timeoutSeconds": 5},
        "database": {
            "existingSecrets": {**{name: f"bad-{name}" for name in wrong}, "gateway": "no-such-secret"}
        },
        "store": {"existingSecret": f"{good.full_name}-store"},
        # The try-out's store has no volume; datasets has one that works, and asks it for a bucket that is not there.
        "datasets": {
            "settings": {
                "LATHE_STORE__ENDPOINT": f"{good.full_name}-seaweedfs:8333",
                "LATHE_STORE__BUCKET": "no-such-bucket",
            }
        },
    }
    with no_default_storage_class(good.kubectl):
        release.helm.install_without_waiting(release.name, release.namespace, merged(values, given))
        yield release
    release.helm.uninstall(release.name, release.namespace)


def doctor(release: Release) -> dict[str, str]:
    """What `lathe doctor --kubernetes` finds wrong or worth a word, by the object's name: message and advice."""
    place = f"{release.namespace}/{release.name}"
    argv = [sys.executable, "-m", "lathe.cli.main", "doctor", "--kubernetes", place, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    findings = json.loads(done.stdout)["findings"]
    return {one["name"]: f"{one['message']} {one['advice']}" for one in findings}


def says(release: Release, name: str, *words: str) -> str:
    """Until the doctor's finding on a object whose name begins so has all these words; the finding."""

    def found() -> str:
        return next(
            (
                text
                for who, text in doctor(release).items()
                if who.startswith(name) and all(word in text for word in words)
            ),
            "",
        )

    try:
        return until(found, SAID_S, f"the doctor on {name}: {words}")
    except AssertionError as error:
        raise AssertionError(f"{error}; it says {doctor(release)}") from None


# --- refused before anything is made ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"gatway": {"replicas": 2}}, "gatway"),
        ({"gateway": {"replica": 2}}, "replica"),
        ({"gateway": {"replicas": "two"}}, "replicas"),
        ({"engines": {"defaultClass": "huge"}}, 'engines.defaultClass is "huge"'),
        ({"tryout": {"enabled": False}}, "set database.existingSecrets."),
    ],
)
def test_wrong_values_are_refused_before_anything_is_made(
    good: Release, values: dict[str, Any], given: dict[str, Any], named: str
) -> None:
    before = versions(inventory(good.kubectl), *LIVELY)
    with pytest.raises(CommandFailed) as refused:
        good.helm.install_without_waiting("wrong", good.namespace, merged(values, given))
    assert named in refused.value.output
    assert versions(inventory(good.kubectl), *LIVELY) == before


# --- a fault in each service ----------------------------------------------------------------------------------------


def test_a_missing_secret_is_named(faulty: Release) -> None:
    assert "existingSecret" in says(faulty, "bad-lathe-gateway", 'secret "no-such-secret" not found')


def test_a_wrong_database_password_is_named(faulty: Release) -> None:
    says(faulty, "bad-lathe-accounts", 'refuses the password of user "accounts"', "LATHE_ACCOUNTS_DB__URL")


def test_a_database_that_does_not_exist_is_named(faulty: Release) -> None:
    says(faulty, "bad-lathe-models", "no_such_database", "LATHE_MODELS_DB__URL")


def test_a_database_whose_host_is_unknown_is_named(faulty: Release) -> None:
    says(faulty, "bad-lathe-jobs", '"nowhere"', "LATHE_JOBS_DB__URL")


def test_a_bucket_that_does_not_exist_is_named(faulty: Release) -> None:
    """Its service answers, for what needs no store; its log says what is missing, and what to do."""
    until(lambda: faulty.ready_pods("datasets"), SAID_S, "datasets to be ready")
    pod = faulty.pod("datasets")["metadata"]["name"]
    said = "The store has no bucket 'no-such-bucket'; create it."
    until(lambda: said in faulty.kubectl.run("logs", pod), SAID_S, said)


def test_no_default_storage_class_is_named(faulty: Release) -> None:
    says(faulty, "data-bad-lathe-seaweedfs-0", "tryout.storageClass", "no default one")


def test_nothing_ends_again_and_again_without_a_reason(faulty: Release) -> None:
    """Those that wait for a database give up after a while: by now each has, and its last line says why."""
    selector = f"app.kubernetes.io/instance={faulty.name}"
    waiting = ("accounts", "models", "jobs")
    until(
        lambda: all(restarts(pod) for component in waiting for pod in faulty.pods(component)),
        SAID_S,
        f"each of {waiting} to have given up once",
    )
    for pod in faulty.kubectl.items("pods", selector):
        for container in restarts(pod):
            name = pod["metadata"]["name"]
            line = last_line(faulty.kubectl.run("logs", name, "-c", container, "--previous"))
            assert line.startswith("The database of lathe.") and "LATHE_" in line, (container, line)


def restarts(pod: Object) -> list[str]:
    """The containers that ended and were started again."""
    status = pod["status"]
    each = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return [one["name"] for one in each if one["restartCount"]]


# --- a release that works, and what it is given then ----------------------------------------------------------------


def test_an_image_that_cannot_be_pulled_is_named_and_what_runs_goes_on(
    good: Release, values: dict[str, Any]
) -> None:
    """The upgrade stops at its first step, the migration."""
    own = {"networkPolicy": {"enabled": False}, "images": {"control": {"tag": NO_IMAGE}}}
    before = what_it_is(good)
    with pytest.raises(CommandFailed, match="pre-upgrade"):
        good.helm.upgrade(good.name, good.namespace, merged(values, own), PULLED_S)
    image = f"lathe/control:{NO_IMAGE}"
    assert "values images" in says(good, f"{good.full_name}-migrate", image, "cannot be pulled")
    assert what_it_is(good) == before
    with good.client() as client:
        assert list(client.jobs.list()) == []


def what_it_is(release: Release) -> dict[str, str]:
    """The versions of a release's objects, without those of its migration and of what helm notes."""
    found = versions(inventory(release.kubectl), *LIVELY, "job", "secret")
    mine = (name for name in found if f"/{release.full_name}-" in name and "-migrate" not in name)
    return {name: found[name] for name in mine}


def test_a_cache_without_room_is_named_by_the_job(
    good: Release, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with good.client(timeout=120) as client:
        folder = write_tiny_chat(tmp_path_factory.mktemp("tiny"))
        model = client.models.import_folder(folder, "tiny", license="Apache-2.0", source="made by a test")
        job = client.jobs.create(model.name.removeprefix("baseModels/"), upload_long(client).name)

        def reason() -> str:
            return client.jobs.get(job.name).state_reason

        until(lambda: "is full" in reason(), START_S, "the job to say that the cache is full")
        assert "engines.cache" in reason() and "{" not in reason(), reason()
        client.jobs.cancel(job.name)
