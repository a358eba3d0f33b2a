#!/usr/bin/env bash
# Build the images named in IMAGES as lathe/<name>:<tag>. `make images` calls it; docker/README.md says what each variable is for.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=docker/client.sh
. docker/client.sh

BASE_IMAGE=${BASE_IMAGE:-python:3.11-slim-bookworm}
TORCH=${TORCH:-torch==2.13.0}
TORCH_BUILD=${TORCH_BUILD-cpu}
TORCH_FROM=${TORCH_FROM:-}
PYTHON=${PYTHON:-python3.11}
CA_BUNDLE=${CA_BUNDLE:-${PIP_CERT:-${SSL_CERT_FILE:-}}}
PIP_CONF=${PIP_CONF:-}
torch="$TORCH${TORCH_BUILD:++$TORCH_BUILD}"

revision() {
    local commit
    commit=$(git rev-parse HEAD 2>/dev/null) || { echo unknown; return; }
    # What other people's work changes does not count: only what goes into an image.
    if [ -n "$(git status --porcelain -- services docker requirements pyproject.toml)" ]; then commit="$commit-dirty"; fi
    echo "$commit"
}

need_base() {
    "$DOCKER" image inspect "$BASE_IMAGE" >/dev/null 2>&1 && return
    "$DOCKER" pull -q "$BASE_IMAGE" >/dev/null 2>&1 && return
    refuse "The base image $BASE_IMAGE is not here and cannot be pulled: name another with BASE_IMAGE=… (any Debian with Python 3.11), or make one: docker/debian-base.sh lathe-base:bookworm"
}

# torch's wheel, into docker/wheels: from a folder, or from wherever this machine's pip looks. An index is asked during the build.
need_torch() {
    local version=${torch#torch==} from=() wheel
    case $TORCH_FROM in *://*) return ;; esac
    for wheel in docker/wheels/torch-"$version"-*.whl; do
        if [ -e "$wheel" ]; then return; fi
    done
    [ -z "$TORCH_FROM" ] || from=(--no-index --find-links "$TORCH_FROM")
    command -v "$PYTHON" >/dev/null || refuse "Fetching torch's wheel needs Python 3.11 as '$PYTHON': set PYTHON=/path/to/python3.11."
    echo "Fetching $torch into docker/wheels from ${TORCH_FROM:-where pip is set to look}"
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
        --python-version 3.11 --implementation cp --platform "manylinux_2_28_$(uname -m)" --dest docker/wheels "${from[@]}" "$torch" \
        || refuse "There is no wheel of $torch in ${TORCH_FROM:-the places where pip looks}: give a folder of wheels or an index that has it, make images TORCH_FROM=…"
}

build() {
    local name=$1
    echo "Building $PREFIX/$name:$TAG"
    "$DOCKER" build -q -f docker/Dockerfile --target "$name" -t "$PREFIX/$name:$TAG" "${arguments[@]}" . >/dev/null \
        || refuse "$PREFIX/$name could not be built: what docker printed above says which step failed. If it was an index that could not be reached, PIP_CONF=… and CA_BUNDLE=… give the build pip's settings and the certificates of this machine."
    "$DOCKER" image inspect --format "$PREFIX/$name:$TAG is {{.Size}} bytes" "$PREFIX/$name:$TAG"
}

case $TORCH_FROM in
    *://*@*) refuse "TORCH_FROM has a user's name in it, which the image's history would show: put that index into a pip.conf, and give it to this machine's pip and to the build, make images PIP_CONFIG_FILE=… PIP_CONF=…" ;;
esac
find_docker
need_base
case " $IMAGES " in *" engine "*) need_torch ;; esac

arguments=(--build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "TORCH=$torch"
    --build-arg "VERSION=$(project_version)" --build-arg "REVISION=$(revision)")
case $TORCH_FROM in *://*) arguments+=(--build-arg "TORCH_INDEX=$TORCH_FROM") ;; esac
if [ -n "$CA_BUNDLE" ]; then
    [ -f "$CA_BUNDLE" ] || refuse "CA_BUNDLE names $CA_BUNDLE, which is no file."
    arguments+=(--secret "id=ca,src=$CA_BUNDLE")
fi
if [ -n "$PIP_CONF" ]; then
    [ -f "$PIP_CONF" ] || refuse "PIP_CONF names $PIP_CONF, which is no file."
    arguments+=(--secret "id=pip_conf,src=$PIP_CONF")
fi
for image in $IMAGES; do build "$image"; done
