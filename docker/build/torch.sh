#!/bin/sh
# Install $TORCH (torch==VERSION+BUILD) from docker/wheels, and if TORCH_INDEX is given from that index.
# It is apart from the lock file: its builds (CPU, CUDA) come from places of their own.
set -eu
here=$(dirname "$0")
set -- --find-links /mnt/wheels "$TORCH"
[ -z "$TORCH_INDEX" ] || set -- --index-url "$TORCH_INDEX" "$@"
case $TORCH in
    # What a CPU build needs is in the lock file already; a CUDA build brings its libraries as packages.
    *+cpu) set -- --no-deps "$@" ;;
esac
sh "$here/install.sh" "$@" || {
    echo "$TORCH is neither in docker/wheels nor at ${TORCH_INDEX:-pip's own index}: give TORCH_FROM, a folder of wheels or an index." >&2
    exit 1
}
