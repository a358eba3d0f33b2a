#!/usr/bin/env bash
# Make a base image for Lathe's images from Debian's packages, where no registry can be reached:
#
#   docker/debian-base.sh lathe-base:bookworm && make images BASE_IMAGE=lathe-base:bookworm
#
# Needs root and debootstrap; takes a minute. An image of that name that is already there is kept (--again makes it anew).
# MIRROR names another mirror than Debian's own.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=docker/client.sh
. docker/client.sh

SUITE=bookworm
again=no
if [ "${1:-}" = --again ]; then
    again=yes
    shift
fi
name=${1:-}
[ -n "$name" ] || refuse "Say what to call the image: docker/debian-base.sh lathe-base:bookworm"

find_docker_without_build
if [ "$again" = no ] && "$DOCKER" image inspect "$name" >/dev/null 2>&1; then
    echo "$name is there already."
    exit 0
fi
command -v debootstrap >/dev/null || refuse "debootstrap is missing: apt-get install debootstrap"
[ "$(id -u)" = 0 ] || refuse "debootstrap needs root: sudo docker/debian-base.sh $name"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "Making $name with debootstrap"
debootstrap --variant=minbase "$SUITE" "$folder/tree" ${MIRROR:+"$MIRROR"} >"$folder/log" 2>&1 || {
    tail -n 5 "$folder/log" >&2
    refuse "debootstrap could not make Debian $SUITE: is a mirror reachable? MIRROR=… names another."
}

# Security updates lie beside the archive on Debian's own mirror, and on most others.
archive=$(sed -n "s/^deb \([^ ]*\) $SUITE main\$/\1/p" "$folder/tree/etc/apt/sources.list")
updates=$folder/tree/etc/apt/sources.list.d/security.list
echo "deb ${archive%/}-security $SUITE-security main" >"$updates"
# An image is made anew rather than repaired: nothing needs to reach the disk package by package.
echo force-unsafe-io >"$folder/tree/etc/dpkg/dpkg.cfg.d/unsafe-io"
inside() { DEBIAN_FRONTEND=noninteractive chroot "$folder/tree" "$@" >"$folder/log" 2>&1; }
if ! inside apt-get -qq update -o APT::Update::Error-Mode=any; then
    echo "Without security updates: there are none beside $archive." >&2
    rm "$updates"
    inside apt-get -qq update || refuse "The mirror $archive could not be reached a second time: try again."
fi
inside apt-get -qq upgrade -y || refuse "Debian's packages could not be brought up to date: $(tail -n 1 "$folder/log")"
inside apt-get -qq install -y --no-install-recommends ca-certificates python3.11 python3.11-venv \
    || refuse "Python 3.11 could not be installed: $(tail -n 1 "$folder/log")"
inside apt-get -qq clean
rm "$folder/tree/etc/dpkg/dpkg.cfg.d/unsafe-io"

rm -rf "$folder"/tree/var/cache/apt/* "$folder"/tree/var/lib/apt/lists/* "$folder"/tree/var/log/* \
    "$folder"/tree/usr/share/{doc,info,locale,man}/* "$folder"/tree/tmp/* "$folder"/tree/dev/*
# The machine's own, which debootstrap copied in.
rm -f "$folder/tree/etc/hostname" "$folder/tree/etc/resolv.conf"
tar -C "$folder/tree" -c . | "$DOCKER" import --change 'CMD ["bash"]' - "$name" >/dev/null
"$DOCKER" image inspect --format "$name is {{.Size}} bytes" "$name"
