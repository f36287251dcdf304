#!/usr/bin/env bash
# Runs everything that a GPU can answer, and never hangs: see README.md.
#
#   ./run.sh [quick|full] OUT_DIR
#
# Each part has its own time limit, one that fails does not stop the next, and what the machine lacks is skipped.
# OUT_DIR gets a log per part, summary.txt, summary.json, and what the parts write.
# Exit code: 0 if no part failed; 1 if one did; 2 if it could not start.
set -uo pipefail

case ${1:-} in
    -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0"; exit 0 ;;
    quick | full) mode=$1; shift ;;
    *) mode=quick ;;
esac
(($# == 1)) || { echo 'usage: ./run.sh [quick|full] OUT_DIR' >&2; exit 2; }
mkdir -p "$1/programs" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")" || exit 2
here=$PWD
rm -rf "$out"/{summary.*,versions.txt,bench.json,peers.jsonl,table.md,roofline-*,train-*,criterion,logs}
mkdir "$out/logs"

# Seconds that all parts have.
total=$([[ $mode == quick ]] && echo 470 || echo 5400)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

for pieces in programs/*; do
    program=$out/$pieces
    while IFS= read -r piece; do
        gzip --decompress --stdout "pieces/$piece.gz" || exit 2
    done < "$pieces" > "$program"
    chmod +x "$program" || exit 2
done
dtmem=$out/programs/dtmem

# The GPU, or why there is none.
gpus=()
if command -v nvidia-smi > "$out/logs/card.log"; then
    mapfile -t gpus < <(timeout --kill-after 2 20 nvidia-smi --query-gpu=name --format=csv,noheader 2>> "$out/logs/card.log")
    no_gpu='nvidia-smi finds no GPU'
else
    no_gpu='no nvidia-smi, so no NVIDIA driver'
fi
[[ ${gpus[0]:-} == 'No devices'* ]] && gpus=()
gpu=${gpus[0]:-}

# A Python with PyTorch.
python=
for candidate in ${PYTHON:-python3 python /opt/conda/bin/python /opt/venv/bin/python /opt/torch/bin/python}; do
    if timeout 60 "$candidate" -c 'import torch' 2> /dev/null; then
        python=$candidate
        break
    fi
done

# Libraries that the system may lack, and the caller not have named, and that a Python's packages hold.
IFS=: read -ra named <<< "${LD_LIBRARY_PATH:-}"
for library in libcublasLt libnccl; do
    if grep -q "$library\.so" <(ldconfig -p 2> /dev/null); then continue; fi
    for folder in "${named[@]}"; do
        if compgen -G "$folder/$library.so*" > /dev/null; then continue 2; fi
    done
    if compgen -G "/usr/local/cuda/lib64/$library.so*" > /dev/null; then
        export LD_LIBRARY_PATH=/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        continue
    fi
    packages=$("${python:-python3}" -c 'import site, sys; print(*sys.path, *site.getsitepackages(), sep="\n")' 2> /dev/null)
    while IFS= read -r folder; do
        [[ -d $folder ]] || continue
        found=$(compgen -G "$folder/nvidia/*/lib/$library.so*" || compgen -G "$folder/nvidia/*/lib/*/$library.so*" ||
            compgen -G "$folder/torch/lib/$library.so*") || continue
        export LD_LIBRARY_PATH=$(dirname "${found%%$'\n'*}")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        echo "$library: ${found%%$'\n'*}" >> "$out/logs/card.log"
        break
    done <<< "$packages"
done

# A part ends with 0, with `skip REASON`, or it has failed.
skip() {
    echo "SKIPPED: $*"
    exit 77
}
need_gpu() { [[ -n $gpu ]] || skip "no GPU: $no_gpu"; }
need_python() { [[ -n $python ]] || skip 'no Python with PyTorch: set PYTHON'; }

part_card() {
    "$dtmem" info
    need_gpu
    nvidia-smi
    nvidia-smi --query
}

# gpu_tests PROGRAM FILTER: tests that say that they were skipped on a machine with a GPU have not run.
gpu_tests() {
    need_gpu
    local log=$out/logs/$1.tests
    "$out/programs/$1" "$2" --nocapture 2>&1 | tee "$log"
    local code=${PIPESTATUS[0]}
    if grep -iE 'GPU checks? skipped|SKIPPED: a GPU check|^skipped:' "$log"; then
        echo 'tests were skipped although there is a GPU'
        return 1
    fi
    # Versions for Hopper that this GPU cannot run: on an H100 or H200 a thing to look into.
    grep '^not run:' "$log" | sort | uniq --count
    return "$code"
}
part_tests-ops() { gpu_tests ops gpu; }
part_tests-backend() { gpu_tests gpu_backend gpu; }
# The losses of the first steps at full size, on GPU and CPU.
part_tests-train() { gpu_tests gpu_train gpu; }
part_tests-cust() { gpu_tests cust cust; }

part_verify-cuda() {
    need_gpu
    "$dtmem" verify --backend cuda --dtype all fixtures/*.safetensors
}

part_verify-host() { "$dtmem" verify --backend host --dtype all fixtures/*.safetensors; }

part_sanitize() {
    need_gpu
    local options=(--binary "$out/programs/ops" --logs "$out/logs/sanitize")
    # As far as it comes in its time.
    [[ $mode == quick ]] && options+=(--seconds "$((limit - 10))")
    scripts/sanitize "${options[@]}" on_a_gpu
    local code=$?
    ((code == 2)) && skip 'compute-sanitizer could not run: see the line above'
    return "$code"
}

part_bench() { "$dtmem" bench --json "$out/bench.json"; }

# The same table under criterion, with few samples.
part_criterion() {
    CRITERION_HOME=$out/criterion "$out/programs/operations" --bench --noplot --warm-up-time 0.1 --measurement-time 0.3
}

part_peers() {
    need_gpu
    need_python
    local options=(--json "$out/peers.jsonl") code=0
    [[ $mode == quick ]] && options+=(--quick)
    # First the one that a goal is set by: its share of the time is sure.
    for peer in peers/{train_step,attention,content_memory,lora,adamw}.py; do
        echo "== $peer"
        timeout --kill-after 5 "$([[ $mode == quick ]] && echo 60 || echo 300)" \
            "$python" "$peer" "${options[@]}" || { echo "$peer failed: $?"; code=1; }
    done
    return "$code"
}

part_train-cpu() {
    "$dtmem" train configs/hallway-quick.toml --device cpu --out "$out/train-cpu" --overwrite \
        --set data.episodes=200 --set train.steps=20 --set evaluation.episodes=20
}
part_train-quick() {
    need_gpu
    "$dtmem" train configs/hallway-quick.toml --device cuda:0 --out "$out/train-quick" --overwrite
}
# DT-Mem: segments, and a memory.
part_train-recall() {
    need_gpu
    "$dtmem" train configs/recall-quick.toml --device cuda:0 --out "$out/train-recall" --overwrite
}
# The memory loss on the memory.
part_train-memory() {
    need_gpu
    "$dtmem" train configs/hallway-memory-quick.toml --device cuda:0 --out "$out/train-memory" --overwrite
}
# Data parallel, through NCCL.
part_train-ranks() {
    need_gpu
    local ranks=${#gpus[@]} code=0 jobs=()
    ((ranks > 1)) || skip 'one GPU'
    export WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=29517
    for ((rank = 0; rank < ranks; ++rank)); do
        RANK=$rank LOCAL_RANK=$rank "$dtmem" train configs/hallway-quick.toml --out "$out/train-ranks" --overwrite \
            --set train.steps=300 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || code=$?; done
    return "$code"
}
part_train-paper() {
    need_gpu
    "$dtmem" train configs/hallway-paper.toml --device cuda:0 --out "$out/train-paper" --overwrite \
        --set evaluation.episodes=1000
}

if [[ -n ${DTMEM_BUNDLE_FAIL:-} ]]; then # for whoever tests this script: `false` or `sleep 1000` for instance
    part_deliberate() { eval "$DTMEM_BUNDLE_FAIL"; }
fi

set -m # each job is a process group
names=() results=() seconds=() notes=()

# run NAME LIMIT: one part, at most so many seconds, and of all parts' time not more than is left.
run() {
    local name=$1 limit=$2 log=$out/logs/$1.log start=$SECONDS code result note=
    ((limit > total - SECONDS)) && limit=$((total - SECONDS))
    names+=("$name")
    printf '%-16s' "$name"
    if ((limit < 5)); then
        result=SKIPPED note='no time left' # as if it had said so
    else
        "part_$name" >> "$log" 2>&1 < /dev/null &
        local job=$!
        while kill -0 "$job" 2> /dev/null && ((SECONDS - start < limit)); do sleep 0.2; done
        if kill -0 "$job" 2> /dev/null; then
            disown "$job" 2> /dev/null # a process that a driver holds on to is not waited for
            kill -TERM -- -"$job"
            sleep 2
            kill -KILL -- -"$job" 2> /dev/null
            result=FAILED note="above its limit of $limit s"
        else
            wait "$job"
            code=$?
            case $code in
                0) result=ok ;;
                77) result=SKIPPED note=$(sed -n 's/^SKIPPED: //p' "$log" | tail -n 1) ;;
                *) result=FAILED note="exit code $code: $(grep . "$log" | tail -n 1 | cut -c 1-120)" ;;
            esac
        fi
    fi
    results+=("$result") notes+=("$note") seconds+=($((SECONDS - start)))
    echo "$result${note:+ ($note)}"
}

quick_or() { [[ $mode == quick ]] && echo "$1" || echo "$2"; }

run card 30
run tests-ops "$(quick_or 90 600)"
run tests-backend "$(quick_or 60 600)"
run tests-train "$(quick_or 60 300)"
run tests-cust 30
run verify-cuda "$(quick_or 60 300)"
run verify-host 60
run bench 180
run train-cpu 40
run train-quick "$(quick_or 90 300)"
run train-recall "$(quick_or 60 300)"
run train-ranks 60
run peers "$(quick_or 120 1500)"
if [[ $mode == full ]]; then
    run train-memory 600
    run train-paper 1200
    run criterion 900
fi
run sanitize "$(quick_or 60 1500)"
declare -F part_deliberate > /dev/null && run deliberate 6

# The two summaries.
escaped() { sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g' <<< "$1" | tr -d '\000-\037'; }
{
    printf '%-16s %-8s %7s  %s\n' part result seconds ''
    for index in "${!names[@]}"; do
        printf '%-16s %-8s %7d  %s\n' "${names[index]}" "${results[index]}" "${seconds[index]}" "${notes[index]}"
    done
} > "$out/summary.txt"
{
    printf '{"mode":"%s","commit":"%s","gpu":"%s","date":"%s","parts":[' \
        "$mode" "$(< "$here/commit")" "$(escaped "$gpu")" "$(date --utc +%FT%TZ)"
    for index in "${!names[@]}"; do
        ((index)) && printf ','
        printf '{"part":"%s","result":"%s","seconds":%d,"note":"%s"}' \
            "${names[index]}" "${results[index]}" "${seconds[index]}" "$(escaped "${notes[index]}")"
    done
    printf ']'
    first=
    printf ',"trainings":['
    for summary in "$out"/train-*/summary.json; do
        [[ -s $summary ]] || continue
        printf '%s{"part":"%s","summary":%s}' "$first" "$(basename "$(dirname "$summary")")" "$(< "$summary")"
        first=,
    done
    printf ']'
    [[ -s $out/bench.json ]] && printf ',"bench":%s' "$(< "$out/bench.json")"
    [[ -s $out/peers.jsonl ]] && printf ',"peers":[%s]' "$(paste --serial --delimiters , "$out/peers.jsonl")"
    printf '}\n'
} > "$out/summary.json"

echo
grep '^both versions: ' "$out/logs/bench.log" | sed 's/^both versions: //' > "$out/versions.txt"
if [[ -s $out/versions.txt ]]; then
    { echo; cat "$out/versions.txt"; } >> "$out/summary.txt"
fi
if [[ -n $gpu && -s $out/bench.json ]]; then
    # What it must reach; table.md and pictures beside the summary.
    "${python:-python3}" scripts/bench-report "$out/summary.json" > "$out/logs/report.log" 2>&1 &&
        { echo; grep '^|' "$out/logs/report.log"; } >> "$out/summary.txt"
fi
cat "$out/summary.txt"
echo
echo "logs: $out/logs; $out/summary.json"
[[ " ${results[*]} " != *' FAILED '* ]]
