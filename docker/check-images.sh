#!/usr/bin/env bash
# Look into the images that `make images` built: sizes, user, nothing needless, and that each starts on a read-only root with no
# network. Says every finding, then ends with 1 if there was one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=docker/client.sh
. docker/client.sh

failures=0

wrong() {
    echo "$*" >&2
    failures=$((failures + 1))
}

inspect() { "$DOCKER" image inspect --format "$2" "$1"; }

# run IMAGE COMMAND…: as a cluster runs it; what it printed when it fails.
run() {
    local image=$1 said
    shift
    said=$("$DOCKER" run --rm --read-only --user 10001:10001 --cap-drop ALL --security-opt no-new-privileges --network none \
        --tmpfs /tmp --entrypoint "$1" "$image" "${@:2}" 2>&1) || wrong "$image: $* failed on a read-only root: $said"
}

# Megabytes of 10^6 bytes, as docker shows them.
limit() { case $1 in control) echo 700 ;; engine) echo "${ENGINE_LIMIT_MB:-2500}" ;; *) echo 700 ;; esac; }

check() {
    local name=$1 image="$PREFIX/$1:$TAG" size needless label
    size=$(($(inspect "$image" '{{.Size}}') / 1000000))
    echo "$image: $size MB"
    [ "$size" -le "$(limit "$name")" ] || wrong "$image has $size MB; $(limit "$name") are allowed."
    [ "$(inspect "$image" '{{.Config.User}}')" = 10001:10001 ] || wrong "$image does not run as 10001:10001."
    [ "$(inspect "$image" '{{.Config.StopSignal}}')" = SIGTERM ] || wrong "$image has no STOPSIGNAL."
    for label in title version revision licenses; do
        [ -n "$(inspect "$image" "{{index .Config.Labels \"org.opencontainers.image.$label\"}}")" ] || wrong "$image has no label $label."
    done
    # shellcheck disable=SC2016 # for the shell inside
    needless=$("$DOCKER" run --rm --read-only --network none --user 0:0 --entrypoint sh "$image" -c '
        for program in cc gcc g++ c++ clang ld make pip pip3; do command -v $program; done
        ls -d /var/lib/apt/lists/*_* /var/cache/apt/*.bin /run/secrets/* 2>/dev/null
        find /mnt /tools /var/cache/pip -type f 2>/dev/null
        find / -xdev -type d \( -name pip -path "*-packages/*" -o -name setuptools -path "*-packages/*" \) 2>/dev/null
        find / -xdev -perm -0002 -type f 2>/dev/null
        true') || true
    [ -z "$needless" ] || wrong "$image holds what it does not need: $needless"
    "check_$name" "$image"
}

check_control() {
    run "$1" lathe version
    run "$1" lathe serve --help
    # Each module that a control process can load, so that nothing needed was left out.
    run "$1" python -c '
import importlib, pkgutil, lathe
for found in pkgutil.walk_packages(lathe.__path__, "lathe.", onerror=None):
    # Alembic loads the migrations, with a connection at hand.
    if not found.name.startswith("lathe.engine") and ".migrations." not in found.name:
        importlib.import_module(found.name)
try:
    import torch
except ImportError:
    raise SystemExit(0)
raise SystemExit("torch is in it")'
}

check_engine() {
    run "$1" lathe version
    run "$1" ray --version
    run "$1" python -c '
import torch, transformers.models.llama.modeling_llama, gguf, safetensors.torch, ray.dashboard.modules.job.job_agent
import lathe.engine.main
weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
(weight @ weight).sum().backward()
torch.optim.AdamW([weight]).step()'
}

check_tryout() {
    run "$1" postgres --version
    run "$1" weed version
    if "$DOCKER" run --rm --read-only --tmpfs /tmp --network none "$1" tryout-postgres >/dev/null 2>&1; then
        wrong "$1: tryout-postgres starts without a password."
    fi
}

find_docker_without_build
for name in $IMAGES; do
    "$DOCKER" image inspect "$PREFIX/$name:$TAG" >/dev/null 2>&1 || refuse "There is no image $PREFIX/$name:$TAG: run 'make images' first."
    check "$name"
done
[ "$failures" = 0 ] || refuse "$failures findings."
