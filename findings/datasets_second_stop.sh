#!/usr/bin/env bash
# datasets 5.0.0: a streaming IterableDataset that goes on from a state reads the right rows, but its own `state_dict`
# stays at row 0. Whoever stops a second time and loads that state reads everything from the beginning, without a word.
# Seen: 60 rows read in three parts of 20: 0-19, 20-39, then 0-19 again; .parquet and .jsonl alike. 5.0.1 gives 40-59
# (huggingface/datasets issue 8308).
# Ends with 0 while that is so, else with 1. $PYTHON makes the environments.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
cd "$folder"
cat > three_parts.py <<'PY'
import json, sys
import datasets, pyarrow, pyarrow.parquet

rows = [{"row": number} for number in range(60)]
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet", row_group_size=13)
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
right = []
for kind in ("parquet", "jsonl"):
    state, parts = None, []
    for _ in range(3):
        builder = {"jsonl": "json"}.get(kind, kind)
        stream = datasets.load_dataset(builder, data_files=f"rows.{kind}", split="train", streaming=True)
        if state is not None:
            stream.load_state_dict(state)
        part = [row["row"] for _, row in zip(range(20), stream)]
        state = json.loads(json.dumps(stream.state_dict()))
        parts.append(f"{part[0]}-{part[-1]}")
    print("datasets", datasets.__version__, kind, *parts)
    right.append(parts)
expected = {"anew": "0-19", "on": "40-59"}[sys.argv[1]]
sys.exit(0 if all(parts == ["0-19", "20-39", expected] for parts in right) else 1)
PY
"$folder/venv/bin/pip" install --quiet datasets==5.0.0
HF_HOME=$folder HF_HUB_OFFLINE=1 "$folder/venv/bin/python" three_parts.py anew
"$folder/venv/bin/pip" install --quiet datasets==5.0.1
HF_HOME=$folder HF_HUB_OFFLINE=1 "$folder/venv/bin/python" three_parts.py on
