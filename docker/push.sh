#!/usr/bin/env bash
# Publish the images that `make images` built: REGISTRY=registry.example.com/team docker/push.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=docker/client.sh
. docker/client.sh

REGISTRY=${REGISTRY:-}
case $REGISTRY in *://*) refuse "REGISTRY is $REGISTRY: name the host and perhaps a path, without ${REGISTRY%%://*}://" ;; esac
[ -n "$REGISTRY" ] || refuse "Say where to publish: make images-push REGISTRY=registry.example.com/team"

find_docker_without_build
for image in $IMAGES; do
    "$DOCKER" image inspect "$PREFIX/$image:$TAG" >/dev/null 2>&1 || refuse "There is no image $PREFIX/$image:$TAG: run 'make images' first."
done
for image in $IMAGES; do
    there="${REGISTRY%/}/$PREFIX/$image:$TAG"
    "$DOCKER" tag "$PREFIX/$image:$TAG" "$there"
    "$DOCKER" push -q "$there" || refuse "$there could not be pushed: what docker printed above says why. 'docker login ${REGISTRY%%/*}' if the registry asks for credentials."
done

values="--set global.imageRegistry=${REGISTRY%/}"
for image in $IMAGES; do
    # What the chart takes for granted.
    [ "$PREFIX" = lathe ] || values+=" --set images.$image.repository=$PREFIX/$image"
    [ "$TAG" = "$(project_version)" ] || values+=" --set images.$image.tag=$TAG"
done
echo "Published. Install with: $values"
