#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call of less than ten minutes (docs/benchmarks.md, "On a GPU for ten minutes").
#
#   benchmarks/gpu_campaign.sh --prepare [--python PYTHON]              # beforehand, with a network: fills build/campaign
#   benchmarks/gpu_campaign.sh --out DIR                                # on the GPU's machine, which needs no network
#   benchmarks/gpu_campaign.sh --out DIR --device cpu --quick           # the same parts in small, without a GPU
#   benchmarks/gpu_campaign.sh --out DIR --only smoke,steps-base        # some of the parts
#   benchmarks/gpu_campaign.sh --out DIR --only accelerate              # fastmae.accelerate, where transformers is
#
# Each part has a limit of time and none stops the rest, but where not even a plain step runs. After every part DIR has
# all results until then, in at most 8 files; summary.txt says how each part ended.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Seconds: of the whole, and of each part; the difference is for what lies between them.
TOTAL=585
PARTS="
set-up        35
smoke         30
tests        105
attention     50
kernels       40
steps-base    80
steps-large   70
steps-huge    50
batches       30
profile       20
ncu           20
end-to-end    40
"
# Only with --only: what needs packages that --prepare does not bring, here transformers.
EXTRA="
accelerate    90
"
GRACE=5  # seconds between asking a part to end and killing it

out='' device=cuda quick='' python=${PYTHON:-python3} only='' prepare='' part=''
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out DIR}; shift ;;
    --device) device=${2:?--device cpu or cuda}; shift ;;
    --python) python=${2:?--python PYTHON}; shift ;;
    --only) only=,${2:?--only PART,PART}, ; shift ;;
    --part) part=${2:?--part PART}; shift ;;  # one part in this process, as the whole calls it
    --quick) quick=1 ;;
    --prepare) prepare=1 ;;
    *) echo "gpu_campaign.sh: $1 is unknown; see the first lines of this file" >&2; exit 2 ;;
  esac
  shift
done
ready=build/campaign  # what --prepare leaves, and nothing else is needed there but this repository

csrc_hash() { cat CMakeLists.txt csrc/* | sha256sum | cut -d' ' -f1; }

build_extension() {  # build_extension PYTHON FOLDER
  "$1" -m cmake --version >/dev/null 2>&1 && cmake=("$1" -m cmake) || cmake=(cmake)
  "${cmake[@]}" -S . -B "$2/cmake-build" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$1")" \
    -Dpybind11_DIR="$("$1" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(realpath "$2")" &&
    "${cmake[@]}" --build "$2/cmake-build" --parallel "$(nproc)"
}

if [ -n "$prepare" ]; then
  set -e
  rm -rf "$ready" && mkdir -p "$ready/wheels"
  git describe --always --dirty --abbrev=40 --exclude='*' >"$ready/commit"
  build_extension "$python" "$ready" && rm -rf "$ready/cmake-build" && csrc_hash >"$ready/csrc.sha256"
  platforms=()
  for tag in 2_28 2_27 2_24 2_17 2014 2010; do platforms+=(--platform "manylinux${tag/2_/_2_}_x86_64"); done
  "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp "${platforms[@]}" \
    --python-version "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" -d "$ready/wheels" \
    tyro docstring-parser typeguard simplejpeg xformers==0.0.35 torchao
  du -sh "$ready"
  exit
fi

if [ -z "$out" ]; then echo "gpu_campaign.sh: --out DIR says where the results go" >&2; exit 2; fi
mkdir -p "$out" && out=$(realpath "$out") || exit 2
work=${CAMPAIGN_WORK:-$(mktemp -d "${TMPDIR:-/tmp}/campaign.XXXXXX")}
mkdir -p "$work/logs" "$work/results" "$work/site" "$work/tree"
export CAMPAIGN_WORK=$work
# The sources as a package, as an installation would have them, before any that is installed; caches of this call alone.
export PYTHONPATH=$work/tree:$work/site PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export XDG_CACHE_HOME=$work/cache TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
FASTMAE_COMMIT=${FASTMAE_COMMIT:-$(cat "$ready/commit" 2>/dev/null || git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)}
export FASTMAE_COMMIT
fastmae=("$python" -m fastmae)
json=(--output "$work/results")
# What differs between the whole and a dry run: models, images per batch, samples, processes of the tests.
B=mae_vit_base_patch16 L=mae_vit_large_patch16 H=mae_vit_huge_patch14
n=256 n_huge=128 n_small=64 n_large=1024 rounds=5 op_rounds=7 workers=8 files=2048 window=16 fed=$B ops=("$B" "$H")
if [ -n "$quick" ]; then
  B=mae_vit_tiny_patch16 L=mae_vit_tiny_patch16 H=mae_vit_tiny_patch4
  n=16 n_huge=16 n_small=16 n_large=32 rounds=2 op_rounds=2 workers=1 files=32 window=2 fed=$H ops=("$H")
fi
on_gpu() { [ "$device" != cpu ]; }
steps() { "${fastmae[@]}" bench step --device "$device" "$@"; }
half() { on_gpu && echo bf16 || echo fp32; }

# What compiles B, L and H with the shapes of the steps, so that these find it in the caches; nothing is timed meanwhile.
warm_up() {
  for model_batch in "$B $n" "$L $n" "$H $n_huge"; do
    read -r model batch <<<"$model_batch"
    timeout 33 "${fastmae[@]}" bench step --device "$device" --model "$model" --batch_size "$batch" --baselines strong-compiled \
      --precision bf16 --switches compile-block+bf16-residual --rounds 1 --no-ceilings
  done
}

case $part in
  '') ;;
  set-up)
    cp -r fastmae kernels benchmarks "$work/tree/"
    mv "$work/tree/kernels" "$work/tree/benchmarks" "$work/tree/fastmae/"
    find "$work/tree" -name '_C*.so' -delete
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    mkdir "$work/tree/fastmae-$version.dist-info"
    printf 'Metadata-Version: 2.1\nName: fastmae\nVersion: %s\n' "$version" >"$work/tree/fastmae-$version.dist-info/METADATA"
    for wheel in "$ready"/wheels/*.whl .whl/*.whl; do
      [ -e "$wheel" ] || continue
      "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "$wheel" || echo "left out: $wheel"
    done
    on_gpu && nvidia-smi -q
    if [ "$(csrc_hash)" = "$(cat "$ready/csrc.sha256" 2>/dev/null)" ] && cp "$ready"/_C*.so "$work/tree/fastmae/" &&
      "$python" -c 'import fastmae._C'; then
      echo "the extension was built beforehand"
    else
      rm -f "$work"/tree/fastmae/_C*.so
      build_extension "$python" "$work/tree/fastmae" && echo "the extension was built here"
    fi
    rm -rf "$work/tree/fastmae/cmake-build"
    "${fastmae[@]}" info
    exit ;;
  smoke) "$python" -m fastmae.benchmarks.smoke --device "$device"; exit ;;
  tests)
    if on_gpu; then warm_up >"$work/logs/warm-up.txt" 2>&1 & fi
    OMP_NUM_THREADS=2 "$python" -m pytest -q -n "$workers" --dist worksteal -p no:cacheprovider --timeout 90 \
      tests/gpu/test_kernels.py tests/gpu/test_ops.py tests/gpu/test_training.py \
      -k "not float8 and not (compiling and full)" --junitxml="$work/tests.xml"
    status=$?
    wait  # for what compiles
    exit $status ;;
  attention)
    table=(); on_gpu && table=(--write)
    "${fastmae[@]}" bench attention --device "$device" --models "$B" "$L" "$H" --batch_size "$n" --rounds "$op_rounds" \
      --sample_ms 5 "${table[@]}" "${json[@]}"; exit ;;
  kernels)
    "${fastmae[@]}" bench kernels --device "$device" --models "${ops[@]}" --batch_size "$n" --no-compile \
      --rounds "$op_rounds" --sample_ms 5 "${json[@]}"; exit ;;
  steps-base)
    switches=(compile-off clip-grad); on_gpu && switches=(compile-off compile-block+bf16-residual compile-block+sdpa compile-model+bf16-residual float8)
    baselines=(strong official); on_gpu && baselines=(strong-compiled official strong)
    steps --model "$B" --batch_size "$n" --precision "$(half)" --baselines "${baselines[@]}" --switches "${switches[@]}" \
      --rounds "$rounds" --time_limit 70 "${json[@]}"; exit ;;
  steps-large)
    switches=(clip-grad); on_gpu && switches=(compile-block+bf16-residual compile-block+checkpointing-gelu float8)
    baselines=(strong); on_gpu && baselines=(strong-compiled official)
    steps --model "$L" --batch_size "$n" --precision "$(half)" --baselines "${baselines[@]}" --switches "${switches[@]}" \
      --rounds "$rounds" --time_limit 60 "${json[@]}"; exit ;;
  steps-huge)
    switches=(clip-grad); on_gpu && switches=(compile-block+bf16-residual float8)
    baselines=(strong); on_gpu && baselines=(strong-compiled)
    steps --model "$H" --batch_size "$n_huge" --precision "$(half)" --baselines "${baselines[@]}" \
      --switches "${switches[@]}" --rounds "$rounds" --time_limit 40 "${json[@]}"; exit ;;
  batches)
    small=(); on_gpu && small=(--switches cuda-graph+compile-off cuda-graph+compile-block)
    steps --model "$B" --batch_size "$n_small" --precision "$(half)" --baselines "${small[@]}" --rounds 3 --no-ceilings \
      --time_limit 14 "${json[@]}"
    first=$?
    steps --model "$B" --batch_size "$n_large" --precision "$(half)" --baselines --rounds 3 --no-ceilings \
      --time_limit 12 "${json[@]}" && exit $first ;;
  profile)
    "$python" -m fastmae.benchmarks.profile_step --device "$device" --model "$B" --batch_size "$n" \
      --trace "$work/profile.json.gz" | tee "$work/profile.txt"; exit "${PIPESTATUS[0]}" ;;
  ncu)
    if ! command -v ncu >/dev/null; then echo "there is no ncu here"; exit 0; fi
    on_gpu || { echo "ncu needs a GPU"; exit 0; }
    ncu --clock-control none --set basic -k regex:attention -c 4 "$python" -c \
      'import torch; from fastmae.benchmarks.smoke import attend; attend("triton", torch.device("cuda"))' |
      tee "$work/ncu.txt"; exit "${PIPESTATUS[0]}" ;;
  end-to-end)
    compile=off; on_gpu && compile=block
    "${fastmae[@]}" bench end-to-end --device "$device" --model "$fed" --files "$files" --steps "$window" --rounds 3 \
      --compile "$compile" --batch_size "$n" --num_workers "$((workers * 2))" "${json[@]}"; exit ;;
  accelerate)
    "$python" -m fastmae.benchmarks.accelerate --device "$device" --model "$B" --batch_size "$n" --rounds "$rounds" \
      --precisions "$(half)" "${json[@]}"; exit ;;
  *) echo "gpu_campaign.sh: there is no part $part" >&2; exit 2 ;;
esac
[ -z "$part" ] || exit 1

# Copies what there is so far into $out: at most 8 files.
collect() {
  cp "$work"/results/attention-*.json "$out/attention.json" 2>/dev/null
  cp "$work"/results/kernels-*.json "$out/kernels.json" 2>/dev/null
  cp "$work/tests.xml" "$work/profile.json.gz" "$work/ncu.txt" "$out/" 2>/dev/null
  mkdir -p "$work/results/table" && cp "$work/cache/fastmae/attention.json" "$work/results/table/" 2>/dev/null
  tar -C "$work" -czf "$out/results.tar.gz" results 2>/dev/null
  tar -C "$work" -czf "$out/logs.tar.gz" logs 2>/dev/null
}

summary=$out/summary.txt
{ date -u '+%F %T'; echo "commit $FASTMAE_COMMIT, $device${quick:+, small sizes}"; } >"$summary"
flags=(--out "$out" --device "$device" --python "$python" ${quick:+--quick})
status=0
while read -r name limit; do
  [ -n "$name" ] || continue
  if [ -n "$only" ] && [ "$name" != set-up ] && [[ $only != *,$name,* ]]; then continue; fi
  left=$((TOTAL - SECONDS - GRACE))
  if [ "$left" -lt 5 ]; then echo "$name: no time was left" >>"$summary"; status=1; continue; fi
  begin=$SECONDS
  timeout -k "$GRACE" $((limit < left ? limit : left)) "$BASH" "$0" "${flags[@]}" --part "$name" \
    >"$work/logs/$name.txt" 2>&1 </dev/null
  ended=$?
  word="status $ended"
  case $ended in 0) word=well ;; 124 | 137) word="stopped by its limit" ;; esac
  echo "$name: $word after $((SECONDS - begin)) of $limit s" | tee -a "$summary"
  [ "$ended" = 0 ] || { status=1; tail -n 15 "$work/logs/$name.txt" | sed 's/^/    /' >>"$summary"; }
  collect
  if [ "$name" = smoke ] && [ "$ended" = 2 ]; then
    { echo "not even a step of plain PyTorch runs, so the rest is left out:"; cat "$work/logs/smoke.txt"; } | tee -a "$summary"
    break
  fi
done <<<"$PARTS${only:+$EXTRA}"
{
  tail -n 3 "$work/logs/tests.txt"
  grep -h -A60 'implementation\|useful TFLOP' "$work"/logs/attention.txt "$work"/logs/steps-*.txt "$work"/logs/batches.txt
  timeout 10 "$python" -m fastmae.benchmarks.step_table --predicted "$work"/results/step-*.json
  head -n 50 "$work/profile.txt"
} >>"$summary" 2>/dev/null
collect
echo "all parts took $SECONDS s; results in $out" | tee -a "$summary"
[ -n "${CAMPAIGN_KEEP:-}" ] || rm -rf "$work"
exit $status
