#!/usr/bin/env bash
# Everything that needs a GPU, in stages, each with a time limit; see README.md beside this file.
# Called again it goes on where it was: a stage that is done is skipped, a grid keeps the cells that it has.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

stages="${*:-tests calibrate core prefill decode train adapters skip}"
out="${OUT:-benchmarks/gpu/results}"
device="${MEO_DEVICE:-cuda}"
python="${PYTHON:-python3}"
kept=benchmarks/gpu/results
mkdir -p "$out"
out="$(cd "$out" && pwd)"
if [ -d "$kept" ] && [ "$(cd "$kept" && pwd)" != "$out" ]; then
    cp -n "$kept"/* "$out"/ 2>/dev/null # what an earlier call brought home
fi

if [ "$device" = cpu ]; then # a dry run: tiny shapes, to see that the script itself works
    dtype=float32 shapes="16x24x4x2 32x48x6x3xgated" batch=1,2 tokens=1,8 rounds=1
    train_shapes=16x24x4x2 train_batch=2 train_tokens=8
    prefill="--config bert-tiny --batch 2 --tokens 16 --top-k 2,4" decode="--prompt-tokens 8 --new-tokens 4 --num-experts 2 --top-k 2"
    adapters="--prompt-tokens 16 --new-tokens 3 --train-tokens 16 --batch 2 --num-experts 3 --rank 2"
    skip="--batch 1 --tokens 8 --steps 2 --top-k 2 --experts eager"
    calibrate="--dtype float32 --no-keep" tests="(merged_linear and float32 and product) or (contracts and bert)"
else
    dtype=bfloat16 shapes="bert-base olmoe qwen3-30b-a3b gpt-oss-20b mixtral" batch=1,8,32 tokens=1,128 rounds=5
    train_shapes=bert-base,olmoe train_batch=8 train_tokens=128
    prefill="--config bert-base --batch 32 --tokens 128 --top-k 4" decode=""
    skip="" calibrate="" tests="" adapters="--prompt-tokens 128 --new-tokens 64 --train-tokens 512"
fi

# The package as it is here, without installing it.
shim="$(mktemp -d)"
trap 'rm -rf "$shim"' EXIT
mkdir "$shim/meo_hf"
ln -s "$PWD"/src/meo_hf/* "$shim/meo_hf/"
ln -s "$PWD/modeling" "$shim/meo_hf/modeling"
export PYTHONPATH="$shim${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MEO_HF_RATES="$out/rates.json" MEO_TEST_DEVICE="$device" PYTHONDONTWRITEBYTECODE=1

say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" | tee -a "$out/run.log"; }

# limited SECONDS COMMAND...: run with a time limit, keep what it says, say how it ended.
limited() {
    local limit="$1"
    shift
    say "begin (at most $limit s): $*"
    timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee -a "$out/run.log"
    local status="${PIPESTATUS[0]}"
    say "end, status $status"
    return "$status"
}

bench() {
    local limit="$1"
    shift
    limited "$limit" "$python" -c 'from meo_hf.cli import main; main()' bench "$@"
}

# once FILE SECONDS ARGUMENTS...: a benchmark that writes FILE, unless it is there already.
once() {
    local file="$out/$1" limit="$2"
    shift 2
    if [ -s "$file" ]; then
        say "$file is there already"
        return 0
    fi
    bench "$limit" "$@" --json "$file.part" && mv "$file.part" "$file"
}

# part FILE SECONDS: the tests of a file that need a GPU, unless all of them have passed before.
part() {
    local workers=()
    if grep -qs "^all passed: $1$" "$out/tests.log"; then
        say "all passed before: $1"
        return 0
    fi
    if [ "$device" != cpu ] && "$python" -c "import xdist" 2>/dev/null; then
        workers=(-n "${TESTS_WORKERS:-8}") # most of the time goes into compiling
    fi
    limited "$2" "$python" -m pytest -m gpu -q -p no:cacheprovider -rfE --tb=short "${workers[@]}" \
        ${tests:+-k "$tests"} "$1" >>"$out/tests.log" 2>&1
    local status=$?
    tail -n 15 "$out/tests.log"
    [ "$status" -ne 5 ] || status=0 # no test of this file was asked for
    [ "$status" -ne 0 ] || echo "all passed: $1" >>"$out/tests.log"
    return "$status"
}

tests() {
    local deadline=$((SECONDS + ${TESTS_SECONDS:-540})) status=0
    if [ "$device" != cpu ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        say "no CUDA device: every test would be skipped"
        return 1
    fi
    part tests/test_gpu.py "$((deadline - SECONDS))" || status=1
    [ "$((deadline - SECONDS))" -gt 20 ] || { say "tests: no time left for the kernels; call again"; return 1; }
    part tests/test_kernels.py "$((deadline - SECONDS))" || status=1
    return "$status"
}

calibrate() { once calibrate.json "${CALIBRATE_SECONDS:-180}" calibrate --device "$device" $calibrate; }

# Shape by shape, so that one that fails leaves the others alone; its cells are then tried one by one.
core() {
    local deadline=$((SECONDS + ${CORE_SECONDS:-480})) shape b t left
    local common=(--dtype "$dtype" --device "$device" --rounds "$rounds" --json "$out/layer.json")
    for shape in $shapes; do
        left=$((deadline - SECONDS))
        [ "$left" -gt 20 ] || { say "core: no time left for $shape; call again"; return 1; }
        bench "$left" layer --shape "$shape" --batch "$batch" --tokens "$tokens" "${common[@]}" && continue
        for b in ${batch//,/ }; do
            for t in ${tokens//,/ }; do
                left=$((deadline - SECONDS))
                [ "$left" -gt 20 ] || { say "core: no time left for $shape; call again"; return 1; }
                bench "$left" layer --shape "$shape" --batch "$b" --tokens "$t" "${common[@]}"
            done
        done
    done
}

prefill() {
    once prefill.json "${PREFILL_SECONDS:-240}" prefill $prefill --dtype "$dtype" --device "$device" --rounds "$rounds"
}

decode() {
    if [ -z "${MEO_MODEL:-}" ]; then
        say "decode: no MEO_MODEL, a decoder's folder or .gguf file, is given"
        return 0
    fi
    once decode.json "${DECODE_SECONDS:-240}" decode "$MEO_MODEL" $decode --dtype "$dtype" --device "$device" \
        --rounds "$rounds"
}

train() {
    bench "${TRAIN_SECONDS:-240}" train-step --shape "$train_shapes" --batch "$train_batch" --tokens "$train_tokens" \
        --dtype "$dtype" --device "$device" --rounds "$rounds" --json "$out/train-step.json"
}

adapters() {
    local file="$out/adapters.json"
    if [ -z "${MEO_MODEL:-}" ]; then
        say "adapters: no MEO_MODEL, a decoder's folder or .gguf file, is given"
        return 0
    fi
    if [ -s "$file" ]; then
        say "$file is there already"
        return 0
    fi
    limited "${ADAPTERS_SECONDS:-240}" "$python" benchmarks/adapters/run.py "$MEO_MODEL" --dtype "$dtype" \
        --device "$device" --rounds "$rounds" $adapters --json "$file.part" && mv "$file.part" "$file"
}

skip() {
    local file="$out/skip.json"
    if [ -s "$file" ]; then
        say "$file is there already"
        return 0
    fi
    limited "${SKIP_SECONDS:-180}" "$python" benchmarks/reduction/skip_time.py --device "$device" --rounds "$rounds" \
        $skip --json "$file.part" && mv "$file.part" "$file"
}

failed=0
for stage in $stages; do
    case "$stage" in
        tests | calibrate | core | prefill | decode | train | adapters | skip)
            say "stage $stage"
            "$stage" || { say "stage $stage is not complete"; failed=1; }
            ;;
        *)
            echo "unknown stage $stage: give some of tests calibrate core prefill decode train adapters skip" >&2
            exit 2
            ;;
    esac
done
exit "$failed"
