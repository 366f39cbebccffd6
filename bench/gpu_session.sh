#!/usr/bin/env bash
# Measure on a GPU all that needs one, in parts of a few minutes: bench/gpu_session.sh [PART ...], by default all in order.
# Run it in the root of the repository.
#
#   tests     the GPU-marked tests; failures with their tracebacks are in the log
#   kernels   ceilings, every op and attention beside their peers
#   tune      attention's launch configurations, written to kernels/attention/configurations.json; then attention again
#   training  training steps of five models in six variants; generation; the loop's overhead
#   memory    peak memory against the accounting, up to the largest batches that it expects to fit
#   run       tinystories-17m to the 327.68 M tokens of CS336
#   report    bench/RESULTS.md and the tables of README.md and docs/bench.md, with the model's predictions; needs no GPU
#
# The parts that need the GPU take about 26 minutes, 28 at most. Where a command may take ten minutes only, these pairs fit:
# tests kernels, tune run, training memory. Exit status 124 of a part means that its time was over.
#
# Every row is on disk as soon as it is measured, in bench/results/DEVICE/; logs are in build/gpu_session/. A part that fails
# does not end the others. The variable TILEWRIGHT names another command than `tilewright`, for a rehearsal.
set -uo pipefail
export PYTHONUNBUFFERED=1
read -r -a tilewright <<< "${TILEWRIGHT:-tilewright}"
logs=build/gpu_session
failed=()

# Give a command a time limit, with SIGINT first: the bench then ends its workers. In the foreground, Ctrl+C reaches it too.
limited() { timeout --foreground --signal INT --kill-after 30 "$1" "${tilewright[@]}" "${@:2}"; }

tests() { limited 255 bench tests --minutes 4; }
kernels() { limited 320 bench kernels attention --minutes 5; }
tune() {
    local status=0
    limited 280 bench tune attention --head-dims 128 64 --kernels forward backward_q backward_kv backward_fused || status=$?
    git --no-pager diff --stat -- kernels/attention/configurations.json
    limited 70 bench attention --minutes 1 || status=$?
    return "$status"
}
training() { limited 380 bench training generation overhead --minutes 6; }
memory() { limited 140 bench memory --minutes 2; }
run() { limited 245 bench run; }
report() { "${tilewright[@]}" bench inspect --model && "${tilewright[@]}" bench report; }

mkdir -p "$logs"
all=(tests kernels tune training memory run report)
parts=("${@:-${all[@]}}")
for part in "${parts[@]}"; do
    if [[ " ${all[*]} " != *" $part "* ]]; then
        echo "unknown part $part: expected ${all[*]}" >&2
        exit 2
    fi
done
# An interruption ends the session, not only a part. The log keeps the last words of the part.
trap 'exit 130' INT
for part in "${parts[@]}"; do
    start=$SECONDS
    { trap 'exit 130' INT; "$part"; } 2>&1 | tee -i "$logs/$part.log"
    status=$?
    echo "== $part: exit status $status after $((SECONDS - start)) s"
    ((status == 0)) || failed+=("$part")
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
