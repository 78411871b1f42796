"""The table of steps: rows from files, ratios from the file in which both took turns."""

import json

from fastmae.benchmarks import step_table


def result(batch=8, precision="fp32", model="mae_vit_tiny_patch16", flops=4e9, date="2026-01-01", **seconds):
    baselines = [name for name in ("strong", "transformers") if name in seconds]
    return {
        "date": date,
        "hardware": {"gpus": [], "cores": 2, "processor": "Xeon model 207", "machine": "x86_64"},
        "settings": {
            "model": model,
            "input_size": None,
            "batch_size": batch,
            "precision": precision,
            "baselines": baselines,
            "switches": [name.replace("_", "-") for name in seconds if name not in ("fastmae", *baselines)],
        },
        "precisions": dict.fromkeys(seconds, precision),
        "ceilings": {"copy_bytes": 1e9, "matmul_flops": {"float32": 8e9, "bfloat16": 4e9}},
        "useful_flops": dict.fromkeys(seconds, flops * batch / 8),
        "peak_bytes": {name: 90.0 if name == "fastmae" else 100.0 for name in seconds},
        "seconds": {name.replace("_", "-"): samples for name, samples in seconds.items()},
    }


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_files_with_one_baseline_each_become_one_row(tmp_path, capsys):
    files = []
    for index, one in enumerate(
        (result(fastmae=[1.0, 1.0], strong=[1.2, 1.2]), result(fastmae=[2.0, 2.0], transformers=[3.0, 3.0]))
    ):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(one))
    assert step_table.main(list(map(str, files))) == 0
    head, _, row = cells(capsys.readouterr().out)
    shown = dict(zip(head, row, strict=True))
    assert shown["processor"] == "2 × Xeon model 207"
    assert (shown["images/s"], shown["times strong"], shown["times transformers"]) == ("8", "1.20", "1.50")
    assert shown["share of the measured rate"] == "50% of 0.008 TFLOP/s"
    assert shown["memory beside strong"] == "90%"


def test_rows_are_in_order_and_what_was_not_measured_is_a_dash():
    large = result(batch=32, precision="bf16", model="mae_vit_base_patch16", flops=4e10, fastmae=[1.0], triton=[0.5])
    old = result(fastmae=[1.0], strong=[0.5])
    del old["ceilings"], old["precisions"]
    head, _, *rows = cells(step_table.step_table([large, result(batch=32, fastmae=[1.0]), old]))
    assert [row[1:4] for row in rows] == [
        ["mae_vit_tiny_patch16", "8", "fp32"], ["mae_vit_tiny_patch16", "32", "fp32"],
        ["mae_vit_base_patch16", "32", "bf16"],
    ]  # fmt: skip
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["times strong"] for row in shown] == ["0.50", "–", "–"]
    assert shown[0]["share of the measured rate"] == "–"
    assert shown[2]["triton, times fastmae"] == "2.00"


def test_without_files_the_usage_is_shown(capsys):
    assert step_table.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_predictions_stand_beside_what_was_measured(tmp_path, capsys):
    measured = result(batch=256, precision="bf16", model="mae_vit_base_patch16", fastmae=[0.05], strong=[0.1])
    file = tmp_path / "step.json"
    file.write_text(json.dumps(measured))
    assert step_table.main(["--predicted", str(file)]) == 0
    _, _, *rows = cells(capsys.readouterr().out.split("\n\n")[1])
    predictions = json.loads(step_table.PREDICTIONS.read_text())["steps"]
    assert len(rows) == len(predictions) > 10
    (found,) = [row for row in rows if row[5] != "–"]
    (expected,) = [
        one["images_per_second"]
        for one in predictions
        if [one["model"], str(one["batch_size"]), one["step"]] == [found[0], found[1], found[3]]
    ]
    assert found[:4] == ["mae_vit_base_patch16", "256", "bf16", "fastmae"]
    assert found[5:] == ["5120", f"{5120 / expected:.2f}"]


def test_predictions_are_of_steps_that_the_campaign_takes():
    script = (step_table.PREDICTIONS.parent / "gpu_campaign.sh").read_text()
    for one in json.loads(step_table.PREDICTIONS.read_text())["steps"]:
        assert one["step"] == "fastmae" or one["step"] in script
        assert one["model"] in script
        assert one["images_per_second"] > 0
        assert one["source"]
