#!/bin/sh
# What every image has: Python 3.11 (its own, or Debian's), certificates, the user, an empty environment.
set -eu

packages=
command -v python3.11 >/dev/null || packages="$packages python3.11"
[ -e /etc/ssl/certs/ca-certificates.crt ] || packages="$packages ca-certificates"
if [ -n "$packages" ]; then
    [ ! -f /run/secrets/ca ] || printf 'Acquire::https::CAInfo "/run/secrets/ca";\n' >/etc/apt/apt.conf.d/zz-build
    apt-get -qq update
    # shellcheck disable=SC2086 # a list
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages >/dev/null
    rm -f /etc/apt/apt.conf.d/zz-build
fi

python3.11 -m venv --without-pip /usr/local/lathe
python3.11 - <<'PYTHON'
"""Remove what only a developer uses, and compile the rest: the images' file systems are read-only, and some Pythons come uncompiled."""
import compileall
import shutil
import sys
import sysconfig
from pathlib import Path

library = Path(sysconfig.get_path("stdlib"))
for name in ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo"):
    shutil.rmtree(library / name, ignore_errors=True)
for found in library.glob("config-3.11-*"):
    shutil.rmtree(found)
for pattern in ("pip", "pip-*", "setuptools*", "wheel*", "pkg_resources", "_distutils_hack"):
    for found in Path(sysconfig.get_path("purelib")).glob(pattern):
        shutil.rmtree(found)
for name in ("pip", "pip3", "pip3.11", "wheel"):
    Path(sysconfig.get_path("scripts"), name).unlink(missing_ok=True)
sys.exit(not compileall.compile_dir(library, quiet=2, maxlevels=10))
PYTHON

# A name for the number: Ray and getpass look it up. No home: /tmp is the only folder that is always writable.
grep -q '^lathe:' /etc/passwd || echo 'lathe:x:10001:10001:Lathe:/tmp:/usr/sbin/nologin' >>/etc/passwd
grep -q '^lathe:' /etc/group || echo 'lathe:x:10001:' >>/etc/group
# A named volume that is mounted here takes its owner from the folder.
install -d -o 10001 -g 10001 /var/cache/lathe

rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/*.log /usr/share/doc/* \
    /usr/share/man/* /usr/share/locale/*
