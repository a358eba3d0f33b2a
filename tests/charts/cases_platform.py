"""What each value does that is about the platform: names, database and store, trust, services, routes, the try-out."""

from __future__ import annotations

from typing import Any

from tests.charts.chart import EXTERNAL, SERVICES, Rendered, merged
from tests.charts.looks import (
    DIGEST,
    RESOURCES,
    TOLERATION,
    UNSCRAPED,
    Case,
    at,
    env,
    images,
    last_toleration,
    main,
    pod,
    secret_of,
    spec,
    storage,
)


def of_service(name: str) -> dict[str, Case]:
    """What every service has alike."""
    variable = "LATHE_LOG__LEVEL"
    return {
        f"{name}.replicas": (at(f"{name}.replicas", 3), spec("Deployment", name, "spec", "replicas"), 3),
        f"{name}.replicas: budget": (
            at(f"{name}.replicas", 2),
            spec("PodDisruptionBudget", name, "spec", "maxUnavailable"),
            1,
        ),
        f"{name}.resources": (
            at(f"{name}.resources", RESOURCES),
            lambda r: main(name)(r)["resources"],
            RESOURCES,
        ),
        f"{name}.resources: init": (
            at(f"{name}.resources", RESOURCES),
            pod(name, "initContainers", 0, "resources"),
            RESOURCES,
        ),
        f"{name}.nodeSelector": (
            at(f"{name}.nodeSelector", {"a": "b"}),
            pod(name, "nodeSelector"),
            {"a": "b"},
        ),
        f"{name}.tolerations": (at(f"{name}.tolerations", [TOLERATION]), last_toleration(name), TOLERATION),
        f"{name}.podAnnotations": (
            at(f"{name}.podAnnotations", {"team": "ml"}),
            lambda r: r.pod(name)["metadata"]["annotations"]["team"],
            "ml",
        ),
        f"{name}.podAnnotations: instead of ours": (
            at(f"{name}.podAnnotations", UNSCRAPED),
            lambda r: r.pod(name)["metadata"]["annotations"].items() >= UNSCRAPED.items(),
            True,
        ),
        f"{name}.settings": (at(f"{name}.settings", {variable: "DEBUG"}), env(name, variable), "DEBUG"),
        f"database.existingSecrets.{name}": (
            EXTERNAL,
            env(name, f"LATHE_{name.upper()}_DB__URL"),
            f"db-{name}/url",
        ),
        f"database.poolSize: {name}": (
            at("database.poolSize", 9),
            env(name, f"LATHE_{name.upper()}_DB__POOL_SIZE"),
            "9",
        ),
    }


def of_tryout(name: str) -> dict[str, Case]:
    return {
        f"tryout.{name}.storage": (
            at(f"tryout.{name}.storage", "3Gi"),
            lambda r: storage(name)(r)["resources"]["requests"]["storage"],
            "3Gi",
        ),
        f"tryout.{name}.resources": (
            at(f"tryout.{name}.resources", RESOURCES),
            lambda r: main(name)(r)["resources"],
            RESOURCES,
        ),
        f"tryout.storageClass: {name}": (
            at("tryout.storageClass", "fast"),
            lambda r: storage(name)(r)["storageClassName"],
            "fast",
        ),
        f"tryout.nodeSelector: {name}": (
            at("tryout.nodeSelector", {"a": "b"}),
            pod(name, "nodeSelector"),
            {"a": "b"},
        ),
        f"tryout.tolerations: {name}": (
            at("tryout.tolerations", [TOLERATION]),
            last_toleration(name),
            TOLERATION,
        ),
    }


def of_route(kind: str, port: int) -> dict[str, Case]:
    on = {"enabled": True, "host": "x.example.com"}
    name = f"gateway-{kind}"
    ingress, route = f"ingress.{kind}", f"gatewayApi.{kind}"
    routed = {"enabled": True, "parentRefs": [{"name": "door"}]}
    resource = f"{kind.upper()}Route"
    backend = spec("Ingress", name, "spec", "rules", 0, "http", "paths", 0, "backend", "service")
    return {
        f"{ingress}.enabled": (at(ingress, on), backend, {"name": "lathe-gateway", "port": {"number": port}}),
        f"{ingress}.enabled: off": ({}, lambda r: r.of("Ingress"), []),
        f"{ingress}.host": (
            at(ingress, on),
            spec("Ingress", name, "spec", "rules", 0, "host"),
            "x.example.com",
        ),
        f"{ingress}.className": (
            at(ingress, {**on, "className": "nginx"}),
            spec("Ingress", name, "spec", "ingressClassName"),
            "nginx",
        ),
        f"{ingress}.tlsSecret": (
            at(ingress, {**on, "tlsSecret": "cert"}),
            spec("Ingress", name, "spec", "tls"),
            [{"hosts": ["x.example.com"], "secretName": "cert"}],
        ),
        f"{ingress}.annotations": (
            at(ingress, {**on, "annotations": {"a": "b"}}),
            spec("Ingress", name, "metadata", "annotations"),
            {"a": "b"},
        ),
        f"{route}.enabled": (
            at(route, routed),
            spec(resource, "gateway", "spec", "rules", 0, "backendRefs"),
            [{"name": "lathe-gateway", "port": port}],
        ),
        f"{route}.enabled: off": ({}, lambda r: r.of(resource), []),
        f"{route}.parentRefs": (
            at(route, routed),
            spec(resource, "gateway", "spec", "parentRefs"),
            [{"name": "door"}],
        ),
        f"{route}.hostnames": (
            at(route, {**routed, "hostnames": ["y.example.com"]}),
            spec(resource, "gateway", "spec", "hostnames"),
            ["y.example.com"],
        ),
    }


NAMES: dict[str, Case] = {
    "nameOverride": (
        at("nameOverride", "tuner"),
        lambda r: "lathe-tuner-jobs" in r.names("Deployment"),
        True,
    ),
    "fullnameOverride": (at("fullnameOverride", "x"), lambda r: "x-jobs" in r.names("Deployment"), True),
    "global.imageRegistry": (
        at("global.imageRegistry", "r.example.com/team/"),
        images,
        {f"r.example.com/team/lathe/{name}:0.1.0" for name in ("control", "engine", "tryout")},
    ),
    "global.imagePullSecrets": (
        at("global.imagePullSecrets", ["pull"]),
        lambda r: [template["spec"]["imagePullSecrets"] for _, template in r.pods()],
        [[{"name": "pull"}]] * 9,
    ),
    "images.pullPolicy": (
        at("images.pullPolicy", "Never"),
        lambda r: {main(name)(r)["imagePullPolicy"] for name, _ in r.pods()},
        {"Never"},
    ),
    "images: as they come": ({}, images, {f"lathe/{name}:0.1.0" for name in ("control", "engine", "tryout")}),
}
for _image, _users in {
    "control": ("jobs", "migrate"),
    "engine": ("engine:cpu",),
    "tryout": ("postgres", "seaweedfs"),
}.items():
    for _user in _users:
        _path = f"images.{_image}"
        NAMES |= {
            f"{_path}.repository: {_user}": (
                at(f"{_path}.repository", "mine"),
                lambda r, user=_user: main(user)(r)["image"],
                "mine:0.1.0",
            ),
            f"{_path}.tag: {_user}": (
                at(f"{_path}.tag", "dev"),
                lambda r, user=_user: main(user)(r)["image"],
                f"lathe/{_image}:dev",
            ),
            f"{_path}.digest: {_user}": (
                at(_path, {"digest": DIGEST, "tag": "dev"}),
                lambda r, user=_user: main(user)(r)["image"],
                f"lathe/{_image}@{DIGEST}",
            ),
        }

STORE: dict[str, Case] = {
    "tryout.enabled": ({}, lambda r: r.names("StatefulSet"), {"lathe-postgres", "lathe-seaweedfs"}),
    "tryout.enabled: off": (EXTERNAL, lambda r: r.names("StatefulSet"), set()),
    "tryout: with a database of one's own": (
        {"database": EXTERNAL["database"]},
        lambda r: r.names("StatefulSet"),
        {"lathe-seaweedfs"},
    ),
    "tryout: with a store of one's own": (
        {"store": EXTERNAL["store"]},
        lambda r: r.names("StatefulSet"),
        {"lathe-postgres"},
    ),
    "store: the try-out's": ({}, env("models", "LATHE_STORE__ENDPOINT"), "lathe-seaweedfs:8333"),
    "store.endpoint": (EXTERNAL, env("models", "LATHE_STORE__ENDPOINT"), "s3.example.com:443"),
    "store.endpoint: engines": (EXTERNAL, env("engine:cpu", "LATHE_STORE__ENDPOINT"), "s3.example.com:443"),
    "store.bucket": (EXTERNAL, env("gateway", "LATHE_STORE__BUCKET"), "lathe"),
    "store.bucket: the try-out makes it": (at("store.bucket", "own"), env("seaweedfs", "S3_BUCKET"), "own"),
    "store.existingSecret": (EXTERNAL, env("datasets", "LATHE_STORE__SECRET_KEY"), "s3-keys/secret-key"),
    "store.existingSecret: engines": (
        EXTERNAL,
        env("engine:cpu", "LATHE_STORE__ACCESS_KEY"),
        "s3-keys/access-key",
    ),
    "store.region": (at("store.region", "eu-1"), env("models", "LATHE_STORE__REGION"), "eu-1"),
    "imports.enabled": (
        at("imports.enabled", True),
        env("datasets", "LATHE_DATASETS_IMPORTS__ENABLED"),
        "true",
    ),
    "imports.existingSecret": (
        at("imports", {"enabled": True, "existingSecret": "mine"}),
        env("datasets", "LATHE_DATASETS_IMPORTS__HUB_TOKEN"),
        "mine/hub-token",
    ),
    "store.publicEndpoint": (
        merged(EXTERNAL, at("store.publicEndpoint", "https://files.example.com")),
        env("datasets", "LATHE_DATASETS_STORE__PUBLIC_ENDPOINT"),
        "https://files.example.com",
    ),
    "store.secure": (EXTERNAL, env("models", "LATHE_STORE__SECURE"), "true"),
    "store.secure: off": (
        merged(EXTERNAL, at("store.secure", False)),
        env("engine:cpu", "LATHE_STORE__SECURE"),
        "false",
    ),
}

TLS = at("tls.existingSecrets", {name: f"tls-{name}" for name in (*SERVICES, "engine")})
TRUST: dict[str, Case] = {
    "bootstrapKey.existingSecret": (
        at("bootstrapKey.existingSecret", "mine"),
        env("accounts", "LATHE_ACCOUNTS_BOOTSTRAP_KEY"),
        "mine/api-key",
    ),
    "bootstrapKey.existingSecret: none made": (
        at("bootstrapKey.existingSecret", "mine"),
        lambda r: "lathe-bootstrap" in r.names("Secret"),
        False,
    ),
    "serviceToken.existingSecret": (
        at("serviceToken.existingSecret", "mine"),
        lambda r: {secret_of(name, "service-token")(r) for name in (*SERVICES, "engine:cpu")},
        {"mine"},
    ),
    "engineToken.existingSecret": (
        at("engineToken.existingSecret", "mine"),
        lambda r: [secret_of(name, "engine-token")(r) for name in ("jobs", "engine:cpu", "gateway")],
        ["mine", "mine", None],
    ),
    **{
        f"tls.existingSecrets.{name}": (
            TLS,
            secret_of("engine:cpu" if name == "engine" else name, "tls"),
            f"tls-{name}",
        )
        for name in (*SERVICES, "engine")
    },
    "tls.existingSecrets: none made": (
        TLS,
        lambda r: [name for name in r.names("Secret") if "tls" in name],
        [],
    ),
    "gateway.tls.existingSecret": (
        at("gateway.tls.existingSecret", "public"),
        lambda r: (
            secret_of("gateway", "public-tls")(r),
            env("gateway", "LATHE_GATEWAY_RPC__TLS_CERT_FILE")(r),
        ),
        ("public", "/etc/lathe/public-tls/tls.crt"),
    ),
    "gateway.tls.existingSecret: HTTP": (
        at("gateway.tls.existingSecret", "public"),
        env("gateway", "LATHE_GATEWAY_HTTP_TLS_KEY_FILE"),
        "/etc/lathe/public-tls/tls.key",
    ),
    "gateway.tls.existingSecret: plain": (
        {},
        lambda r: [name for name in r.env("gateway") if "TLS_CERT" in name or "TLS_KEY" in name],
        [],
    ),
}

RUNNING: dict[str, Case] = {
    "log.level": (at("log.level", "DEBUG"), env("datasets", "LATHE_LOG__LEVEL"), "DEBUG"),
    "log.level: engines": (at("log.level", "DEBUG"), env("engine:cpu", "LATHE_LOG__LEVEL"), "DEBUG"),
    "log.format": (at("log.format", "console"), env("models", "LATHE_LOG__FORMAT"), "console"),
    "migrations.timeoutSeconds": (
        at("migrations.timeoutSeconds", 11),
        lambda r: (main("migrate")(r)["args"][-1], r.pod("jobs")["spec"]["initContainers"][0]["args"][-1]),
        ("11", "11"),
    ),
    "migrations.resources": (
        at("migrations.resources", RESOURCES),
        lambda r: main("migrate")(r)["resources"],
        RESOURCES,
    ),
    "drain.delaySeconds": (at("drain.delaySeconds", 9), env("gateway", "LATHE_RPC__DRAIN_DELAY_S"), "9"),
    "drain.graceSeconds": (at("drain.graceSeconds", 9), env("jobs", "LATHE_RPC__GRACE_S"), "9"),
    "drain.streamGraceSeconds": (
        at("drain.streamGraceSeconds", 9),
        env("gateway", "LATHE_RPC__GRACE_S"),
        "9",
    ),
    "gateway.service.type": (
        at("gateway.service.type", "LoadBalancer"),
        lambda r: [r.one("Service", name)["spec"]["type"] for name in ("gateway", "jobs")],
        ["LoadBalancer", "ClusterIP"],
    ),
    "gateway.service.annotations": (
        at("gateway.service.annotations", {"a": "b"}),
        spec("Service", "gateway", "metadata", "annotations"),
        {"a": "b"},
    ),
    "gateway.autoscaling": (
        at(
            "gateway.autoscaling",
            {"enabled": True, "minReplicas": 3, "maxReplicas": 5, "targetCPUUtilizationPercentage": 40},
        ),
        lambda r: [
            *(
                r.one("HorizontalPodAutoscaler", "gateway")["spec"][name]
                for name in ("minReplicas", "maxReplicas")
            ),
            r.one("HorizontalPodAutoscaler", "gateway")["spec"]["metrics"][0]["resource"]["target"],
            "replicas" in r.one("Deployment", "gateway")["spec"],
            r.names("PodDisruptionBudget"),
        ],
        [3, 5, {"type": "Utilization", "averageUtilization": 40}, False, {"lathe-gateway"}],
    ),
    "gateway.autoscaling: off": ({}, lambda r: r.of("HorizontalPodAutoscaler"), []),
    "replicas: no budget for one": ({}, lambda r: r.of("PodDisruptionBudget"), []),
    "podMonitor.enabled": (
        at("podMonitor.enabled", True),
        lambda r: [
            (one["port"], one["interval"])
            for one in r.one("PodMonitor", "lathe")["spec"]["podMetricsEndpoints"]
        ],
        [("metrics", "30s")],
    ),
    "podMonitor.enabled: off": ({}, lambda r: r.of("PodMonitor"), []),
    "podMonitor.interval": (
        at("podMonitor", {"enabled": True, "interval": "5s"}),
        spec("PodMonitor", "lathe", "spec", "podMetricsEndpoints", 0, "interval"),
        "5s",
    ),
    "podMonitor.labels: instead of ours": (
        at("podMonitor", {"enabled": True, "labels": {"app.kubernetes.io/component": "watched"}}),
        spec("PodMonitor", "lathe", "metadata", "labels", "app.kubernetes.io/component"),
        "watched",
    ),
    "podMonitor.labels": (
        at("podMonitor", {"enabled": True, "labels": {"team": "ml"}}),
        spec("PodMonitor", "lathe", "metadata", "labels", "team"),
        "ml",
    ),
    "pods are found by Prometheus": (
        {},
        lambda r: {
            name
            for name, template in r.pods()
            if template["metadata"].get("annotations", {}).get("prometheus.io/scrape") == "true"
            and template["metadata"]["annotations"]["prometheus.io/port"] == "9090"
        },
        {*SERVICES, "engine:cpu"},
    ),
}


def caches(r: Rendered) -> dict[str, Any]:
    volumes = {name: r.pod(name)["spec"]["volumes"] for name in SERVICES}
    return {
        name: one["emptyDir"] for name, found in volumes.items() for one in found if one["name"] == "cache"
    }


CACHES: dict[str, Case] = {
    "datasets.cache.sizeLimit": (
        at("datasets.cache.sizeLimit", "5Gi"),
        lambda r: caches(r)["datasets"],
        {"sizeLimit": "5Gi"},
    ),
    "datasets.cache.sizeLimit: unless set, and of no other": (
        {},
        caches,
        {name: {"sizeLimit": "64Gi"} if name == "datasets" else {} for name in SERVICES},
    ),
    "datasets.resources: some of the disk": (
        {},
        lambda r: main("datasets")(r)["resources"]["requests"]["ephemeral-storage"],
        "2Gi",
    ),
}


PLATFORM: dict[str, Case] = {
    **NAMES,
    **STORE,
    **TRUST,
    **RUNNING,
    **CACHES,
    **of_tryout("postgres"),
    **of_tryout("seaweedfs"),
    **of_route("http", 8080),
    **of_route("grpc", 7460),
    **{name: case for service in SERVICES for name, case in of_service(service).items()},
}
