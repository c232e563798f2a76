#!/usr/bin/env bash
# The tests as other processors would run them: `bash scripts/quality/processors.sh [pytest arguments]`,
# by default `tests/numbers tests/evidence`. Instruction sets and numbers of threads add floats in other
# orders; a test that compares sums must allow for it. The kernels of torch, oneDNN, MKL and OpenBLAS are
# held to each instruction set that this processor has, with one thread and with two.
# MOFQ_ISA="default avx2" and MOFQ_THREADS=1 choose some. Exit code 1 where a run fails.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev
[ $# -gt 0 ] || set -- tests/numbers tests/evidence
# torch's name: oneDNN's, MKL's, OpenBLAS's, and the flag of the processor that it needs.
declare -A names=(
    [default]="SSE41 SSE4_2 Nehalem sse4_2"
    [avx2]="AVX2 AVX2 Haswell avx2"
    [avx512]="AVX512_CORE AVX512 SkylakeX avx512bw"
)
failed=()
for isa in ${MOFQ_ISA:-default avx2 avx512}; do
    read -r onednn mkl openblas flag <<<"${names[$isa]}"
    if ! grep -qw "$flag" /proc/cpuinfo; then
        echo "$isa: this processor has no $flag; left out"
        continue
    fi
    for threads in ${MOFQ_THREADS:-1 2}; do
        echo "== $isa, threads: $threads"
        env HF_HUB_OFFLINE=1 OMP_NUM_THREADS="$threads" ATEN_CPU_CAPABILITY="$isa" \
            ONEDNN_MAX_CPU_ISA="$onednn" MKL_ENABLE_INSTRUCTIONS="$mkl" OPENBLAS_CORETYPE="$openblas" \
            python -m pytest -q "$@" || failed+=("$isa with $threads")
    done
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'Failed: %s\n' "${failed[@]}"
    exit 1
fi
