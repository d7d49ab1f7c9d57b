"""plots.py from files alone: complete, half-finished, and none."""
import json
import shutil

from conftest import ROOT, python


def fake_run(folder, system, seed, finished=True):
    run = folder / f"core/{system}_s{seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"fusion": system, "seed": seed, "llava": "x"}))
    (run / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (
        {"event": "step", "stage": "xe", "step": 0, "xe": 3.0, "gate_3": 0.05},
        {"event": "step", "stage": "xe", "step": 10, "xe": 1.0, "gate_3": 0.1},
        {"event": "validation", "stage": "xe", "step": 10, "val_spider_lite": 0.3 + seed / 10})) + '{"torn')
    if finished:
        metrics = dict(cider_d=1.0 + seed, spice=None, spider=None, spice_lite=0.4, spider_lite=0.5 + seed, meteor=0.2,
                       rouge_l=0.3, bleu_4=0.1)
        (run / "result.json").write_text(json.dumps({**metrics, "n": 320, "mean_words": 9.0, "train_seconds": 60.0,
                                                     "trainable_parameters": 1000 + seed}))


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "plots.py", tmp_path)
    fake_run(tmp_path / "exp", "additive", 0)
    fake_run(tmp_path / "exp", "additive", 1)
    fake_run(tmp_path / "exp", "concat", 0, finished=False)
    python("plots.py", "exp", cwd=tmp_path)
    report = (tmp_path / "exp/REPORT.md").read_text()
    assert "| additive | 2 | 320 | 1.500 ± 0.707 |" in report
    assert "**Not finished** (1 of 3 runs): core/concat_s0" in report
    assert (tmp_path / "exp/figures/pareto.pdf").exists() and "spice " not in report.split("## Where")[0].lower()


def test_no_runs_is_one_line(tmp_path):
    done = python(ROOT / "plots.py", tmp_path, check=False)
    assert done.returncode == 2 and "no runs there" in done.stderr and "Traceback" not in done.stderr
