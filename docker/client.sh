# Sourced by the scripts beside it: which images, and a docker client that can work on them.
# shellcheck shell=bash
#
# A machine may have several clients, and a newer one without its buildx component cannot build: each is tried.

export DOCKER_BUILDKIT=1
# An image with attestations is an index of manifests, which `kind load` and older daemons do not take.
export BUILDX_NO_DEFAULT_ATTESTATIONS=1

refuse() {
    echo "$*" >&2
    exit 1
}

# The clients to try, one a line: the one that DOCKER names, or all that are on PATH.
docker_clients() {
    type -aP "${DOCKER:-docker}" || refuse "There is no docker client ${DOCKER:-on PATH}: install Docker 20.10 or later, or name one with DOCKER=/path/to/docker."
}

find_docker() {
    local clients candidate said=""
    clients=$(docker_clients) || exit 1
    for candidate in $clients; do
        "$candidate" version >/dev/null 2>&1 || { said=daemon; continue; }
        # Only BuildKit writes what it built to a file.
        if printf 'FROM scratch\nLABEL probe=1\n' | "$candidate" build -q --output type=tar,dest=/dev/null - >/dev/null 2>&1; then
            DOCKER=$candidate
            return
        fi
        said=buildkit
    done
    if [ "$said" = daemon ]; then
        refuse "Docker's daemon does not answer: start it (systemctl start docker, or dockerd), and see that this user may talk to it."
    fi
    refuse "No docker client here can build with BuildKit: install its buildx component (docker-buildx-plugin), or name another client with DOCKER=…."
}

# What a client needs that does not build.
find_docker_without_build() {
    local clients candidate
    clients=$(docker_clients) || exit 1
    for candidate in $clients; do
        if "$candidate" version >/dev/null 2>&1; then
            DOCKER=$candidate
            return
        fi
    done
    refuse "Docker's daemon does not answer: start it (systemctl start docker, or dockerd), and see that this user may talk to it."
}

# The version that is in pyproject.toml, which is the chart's appVersion and the images' tag.
project_version() {
    sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml | head -n 1
}

# What the scripts work on: <PREFIX>/<image>:<TAG> for each of IMAGES.
IMAGES=${IMAGES:-control engine tryout}
PREFIX=${PREFIX:-lathe}
TAG=${TAG:-$(project_version)}
