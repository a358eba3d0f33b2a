#!/bin/sh
# Remove from a site-packages folder what no process of Lathe's reads: tests, headers, static libraries, type stubs, and
# parts of big packages that nothing here imports. docker/check-images.sh runs what is left.
set -eu
cd "$1"

# Compiling at run time needs a compiler, which the images have not.
find . \( -name '*.a' -o -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.h' -o -name '*.hpp' -o -name '*.cuh' \) \
    -type f -delete
find . -mindepth 2 -type d \( -name tests -o -path ./torch/test -o -path '*/include' \) -prune -exec rm -rf {} +

# pyarrow: tables in memory, IPC and Parquet stay; network protocols and foreign file systems go.
rm -rf pyarrow/libarrow_flight.so* pyarrow/_flight.* pyarrow/_substrait.* pyarrow/_orc.* \
    pyarrow/src pyarrow/libarrow_python.so pyarrow/libarrow_python.so.*.*.*

# torch: programs for building and for tests. torch_shm_manager is asked for at every import.
if [ -d torch/bin ]; then find torch/bin -type f ! -name torch_shm_manager -delete; fi
rm -f torch/lib/*_test.so torch/lib/libaoti_custom_ops.so torch/lib/libbackend_with_compiler.so
# torchgen, its code generator, is imported by torch itself.
rm -rf torch/share

# Ray: engines use its core, its job server and nothing of its libraries.
rm -rf ray/jars ray/rllib ray/cpp

find . -type d -empty -delete
