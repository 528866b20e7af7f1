#!/usr/bin/env bash
# What only a GPU can tell, in slices: benchmarks/gpu.sh 1, ..., 7, or all. See benchmarks/gpu.py.
# GPU_SIZE=tiny takes tiny models, with which it also runs on a CPU. OUT is where the results go, INPUTS where teachers
# and images are written (30 GB; /dev/shm is quick).
set -u
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
slices=${1:?pass 1 to 7, or all}
limit=(--minutes 8) # the last run may take two more; what is done is kept, and the same command goes on
if [ "$slices" = all ]; then slices="1 2 3 4 5 6 7" limit=(); fi
status=0
for slice in $slices; do
    echo "slice $slice"
    "$python" benchmarks/gpu.py --slice "$slice" --size "${GPU_SIZE:-full}" "${limit[@]}" \
        --output "${OUT:-benchmarks/results/gpu}" --inputs "${INPUTS:-runs/gpu}" || { status=$?; echo "slice $slice ended with exit code $status"; }
done
exit $status
