#!/usr/bin/env bash
# A DataLad dataset in which raylab prepares and trains: `datalad rerun` and a clone end with the same weights.
# Needs raylab, datalad, git and git-annex on PATH. Synthetic data; everything is in a directory that is removed.
set -euo pipefail

for tool in raylab datalad git-annex; do
  command -v "$tool" >/dev/null || {
    echo "raylab: there is no $tool on PATH: pip install raylab[datalad], and git-annex from your distribution" >&2
    exit 2
  }
done

scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
export RAYLAB_HOME="$scratch/home" GIT_CONFIG_GLOBAL="$scratch/gitconfig" DATALAD_UI_PROGRESSBAR=none
git config --file "$GIT_CONFIG_GLOBAL" user.name "DataLad demo"
git config --file "$GIT_CONFIG_GLOBAL" user.email demo@example.org

say() { printf '\n== %s\n' "$*"; }

say "a dataset"
datalad -f disabled create "$scratch/study"
cd "$scratch/study"
cat >train.sh <<'SCRIPT'
set -euo pipefail
raylab train ards --data prepared --smoke --workers 0 --set loop.epochs=1 --quiet >"$RAYLAB_HOME/last.json"
python -c 'import json, sys; print(json.load(open(sys.argv[1]))["weights_sha256"])' "$RAYLAB_HOME/last.json" >weights.sha256
SCRIPT
datalad -f disabled save -m "Add the script that trains"
mkdir -p "$RAYLAB_HOME"

say "prepare, under datalad run"
datalad -f disabled run -m "Prepare" --output prepared \
  "raylab prepare ards --source synthetic --patients 120 --seed 0 --out prepared --replace"
say "train, under datalad run"
datalad -f disabled run -m "Train" --input prepared --output weights.sha256 "bash train.sh"
first=$(cat weights.sha256)
run=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["directory"])' "$RAYLAB_HOME/last.json")
python - "$run" <<'PYTHON'
import json, sys
record = json.load(open(f"{sys.argv[1]}/run.json"))
state = record["datalad"]
print(f"the run has recorded: dataset {state['id']}, commit {state['commit'][:12]}, "
      f"{'dirty' if state['is_dirty'] else 'clean'}, {len(record['annex_keys'])} annex keys")
assert not state["is_dirty"] and record["annex_keys"]
PYTHON

say "datalad rerun of both commands"
before=$(git rev-parse HEAD^{tree})
datalad -f disabled rerun --since ''
after=$(git rev-parse HEAD^{tree})
again=$(cat weights.sha256)

say "a clone: content that is not there is refused, then fetched"
datalad -f disabled clone "$scratch/study" "$scratch/clone"
export RAYLAB_HOME="$scratch/home-of-the-clone"
cd "$scratch/clone"
code=0
raylab train ards --data prepared --smoke --workers 0 2>"$scratch/refused" || code=$?
cat "$scratch/refused"
[ "$code" = 2 ] && grep -q "datalad get" "$scratch/refused"
datalad -f disabled get prepared
figure=$(ls "$run"/plots/*.png | head -1)
raylab rerun "$figure" --data prepared --json "$scratch/rerun.json"
third=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["weights_sha256"])' "$scratch/rerun.json")

say "weights_sha256"
printf 'datalad run      %s\ndatalad rerun    %s\nraylab rerun     %s  (from a figure, in the clone)\n' "$first" "$again" "$third"
[ "$first" = "$again" ] && [ "$first" = "$third" ] && [ "$before" = "$after" ]
echo "all the same"
