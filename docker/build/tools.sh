#!/bin/sh
# pip and setuptools at /tools, for the stages that install: the images themselves get neither.
set -eu
[ ! -f /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
[ ! -f /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

if ! python3.11 -c 'import ensurepip' 2>/dev/null; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3.11-venv >/dev/null
fi
python3.11 -m venv /tools
/tools/bin/python -m pip install -q --no-deps --require-hashes -r /mnt/build.txt
