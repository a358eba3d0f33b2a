"""What each value does that is about engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.charts.chart import merged
from tests.charts.looks import (
    DIGEST,
    RESOURCES,
    TOLERATION,
    UNSCRAPED,
    Case,
    at,
    env,
    last_toleration,
    main,
    pod,
)


def of_class(given: Mapping[str, Any]) -> dict[str, Any]:
    return at("engines.classes", {"big": {"resources": RESOURCES, **given}})


ENGINES: dict[str, Case] = {
    **{
        f"engines.{name}": (at(f"engines.{name}", value), env("jobs", f"LATHE_JOBS_{variable}"), str(value))
        for name, value, variable in (
            ("kind", "rayjob", "LAUNCHER__KUBERNETES__ENGINES"),
            ("min", 1, "MIN_ENGINES"),
            ("maxPerBase", 3, "MAX_ENGINES_PER_BASE"),
            ("max", 7, "MAX_ENGINES"),
            ("maxWorkers", 3, "MAX_WORKERS"),
            ("idleTimeoutSeconds", 77, "ENGINE_IDLE_TIMEOUT_S"),
        )
    },
    "engines.kind: auto": ({}, env("jobs", "LATHE_JOBS_LAUNCHER__KUBERNETES__ENGINES"), "auto"),
    "engines.readNodes": (at("engines.readNodes", False), lambda r: r.of("ClusterRoleBinding"), []),
    "engines.defaultClass": (
        merged(of_class({}), at("engines.defaultClass", "big")),
        env("jobs", "LATHE_JOBS_DEFAULT_ENGINE_CLASS"),
        "big",
    ),
    "engines.drainGraceSeconds": (
        at("engines.drainGraceSeconds", 44),
        lambda r: (
            env("engine:cpu", "LATHE_ENGINE_DRAIN_GRACE_S")(r),
            r.pod("engine:cpu")["spec"]["terminationGracePeriodSeconds"] > 44,
            main("engine:cpu")(r)["lifecycle"]["preStop"]["exec"]["command"],
        ),
        ("44", True, ["lathe", "engine", "drain", "--grace", "44"]),
    ),
    "engines.podAnnotations": (
        at("engines.podAnnotations", {"a": "b"}),
        lambda r: r.pod("engine:cpu")["metadata"]["annotations"]["a"],
        "b",
    ),
    "engines.podAnnotations: instead of ours": (
        at("engines.podAnnotations", UNSCRAPED),
        lambda r: r.pod("engine:cpu")["metadata"]["annotations"],
        {**UNSCRAPED, "prometheus.io/port": "9090"},
    ),
    "engines.settings": (
        at("engines.settings", {"LATHE_ENGINE_MAX_ATTEMPTS": "2"}),
        env("engine:cpu", "LATHE_ENGINE_MAX_ATTEMPTS"),
        "2",
    ),
    "engines.cache.sizeLimit": (
        at("engines.cache.sizeLimit", "5Gi"),
        lambda r: [one for one in r.pod("engine:cpu")["spec"]["volumes"] if one["name"] == "cache"],
        [{"name": "cache", "emptyDir": {"sizeLimit": "5Gi"}}],
    ),
    "engines.cache.existingClaim": (
        at("engines.cache.existingClaim", "weights"),
        lambda r: [one for one in r.pod("engine:cpu")["spec"]["volumes"] if one["name"] == "cache"],
        [{"name": "cache", "persistentVolumeClaim": {"claimName": "weights"}}],
    ),
    "engines.classes": (of_class({}), env("jobs", "LATHE_JOBS_ENGINE_CLASSES"), '["big","cpu"]'),
    "engines.classes.*.image": (
        of_class({"image": {"tag": "cuda"}}),
        lambda r: (main("engine:big")(r)["image"], main("engine:cpu")(r)["image"]),
        ("lathe/engine:cuda", "lathe/engine:0.1.0"),
    ),
    "engines.classes.*.image: another than the pinned one": (
        merged(of_class({"image": {"tag": "cuda"}}), at("images.engine.digest", DIGEST)),
        lambda r: (main("engine:big")(r)["image"], main("engine:cpu")(r)["image"]),
        ("lathe/engine:cuda", f"lathe/engine@{DIGEST}"),
    ),
    "engines.classes.*.image: pinned itself": (
        of_class({"image": {"tag": "cuda", "digest": DIGEST}}),
        lambda r: (main("engine:big")(r)["image"], main("engine:cpu")(r)["image"]),
        (f"lathe/engine@{DIGEST}", "lathe/engine:0.1.0"),
    ),
    "engines.classes.*.device": (
        of_class({"device": "cuda"}),
        env("engine:big", "LATHE_ENGINE_DEVICE"),
        "cuda",
    ),
    "engines.classes.*.gpus": (
        of_class({"gpus": 2, "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "8Gi"}}}),
        lambda r: main("engine:big")(r)["resources"],
        {
            "limits": {"memory": "8Gi", "nvidia.com/gpu": "2"},
            "requests": {"cpu": "1", "nvidia.com/gpu": "2"},
        },
    ),
    "engines.classes.*.gpuResource": (
        of_class({"gpus": 1, "gpuResource": "amd.com/gpu"}),
        lambda r: main("engine:big")(r)["resources"]["limits"],
        {**RESOURCES["limits"], "amd.com/gpu": "1"},
    ),
    "engines.classes.*.resources": (
        of_class({"resources": RESOURCES}),
        lambda r: main("engine:big")(r)["resources"],
        RESOURCES,
    ),
    "engines.classes.*.nodeSelector": (
        of_class({"nodeSelector": {"gpu": "a100"}}),
        pod("engine:big", "nodeSelector"),
        {"gpu": "a100"},
    ),
    "engines.classes.*.tolerations": (
        of_class({"tolerations": [TOLERATION]}),
        last_toleration("engine:big"),
        TOLERATION,
    ),
    "engines.classes.*.settings": (
        merged(
            at("engines.settings", {"LATHE_LOG__LEVEL": "ERROR"}),
            of_class({"settings": {"LATHE_LOG__LEVEL": "DEBUG"}}),
        ),
        lambda r: (env("engine:big", "LATHE_LOG__LEVEL")(r), env("engine:cpu", "LATHE_LOG__LEVEL")(r)),
        ("DEBUG", "ERROR"),
    ),
}
