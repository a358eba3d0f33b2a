#!/bin/sh
# pip install "$@" into /usr/local/lathe, with pip from outside the image, then remove what no process reads.
set -eu
[ ! -f /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
[ ! -f /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CACHE_DIR=/var/cache/pip
# pip compiles what it installs itself; PYTHONDONTWRITEBYTECODE would not stop it.
/tools/bin/python -m pip --python /usr/local/lathe/bin/python install -q --only-binary :all: "$@"
sh "$(dirname "$0")/strip.sh" /usr/local/lathe/lib/python3.11/site-packages
