"""What can be known of GPUs without one: a pretended CUDA device, several processes, wheels of another CUDA."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, python
from test_train import flags, log_of

import data
import evaluate
import fusion as fusions
import train

PRETEND = ROOT.parent / "shared/pretend_cuda"
# the scripts' real command lines; blocking copies to the device make the host wait too, and are counted here
PRETENDED = """
import json, os, sys
import pretend, torch, data, evaluate, scst, train
from transformers import ClapModel, LlavaForConditionalGeneration
pretend.STRICT = False
execute, read_split, sample_tree = pretend.execute, data.read_split, scst.sample_tree
blocking = tokens = waits = 0

def watched(func, args, kwargs):
    global blocking
    copy = func is torch.ops.aten._to_copy.default and pretend.is_cuda_device(kwargs.get("device"))
    if copy and not isinstance(args[0], pretend.Pretend) and args[0].numel() and not kwargs.get("non_blocking"):
        blocking += 1
    return execute(func, args, kwargs)

def fewer_clips(*args):
    split = read_split(*args)
    split.clips = split.clips[:6]
    return split

def counted(decoder, *args, **kwargs):
    global tokens, waits
    before = sum(pretend.SYNCS.values()) + blocking
    tree = sample_tree(decoder, *args, **kwargs)
    tokens += tree.mask.shape[1]
    waits += sum(pretend.SYNCS.values()) + blocking - before
    return tree

pretend.execute, data.read_split, scst.sample_tree = watched, fewer_clips, counted
pretend.install()
resets = []
torch._C._cuda_resetPeakMemoryStats = resets.append  # it counts no memory
run, qa, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
train.main(flags)
evaluate.main(["caption", run, "--device", "cuda", "--beams", "2", "--rerank", "--samples", "2"])
evaluate.main(["retention", run, "--device", "cuda", "--qa", qa, "--limit-questions", "3"])
print(json.dumps({"problems": list(map(str, pretend.PROBLEMS)), "tokens": tokens, "waits": waits, "resets": resets}))
"""


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """Environment of a Python whose torch believes in a CUDA device."""
    if not PRETEND.is_dir():
        pytest.skip("no ../shared/pretend_cuda beside the repository")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the pretended device")
    build = tmp_path_factory.mktemp("pretended")
    subprocess.run(["bash", PRETEND / "build.sh", sys.executable, build], check=True, capture_output=True)
    path = os.pathsep.join([str(PRETEND), str(ROOT)])
    return {**os.environ, "PRETEND_BUILD": str(build), "REPO": str(ROOT), "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1"}


def test_a_run_on_a_pretended_cuda_device(world, pretended, tmp_path):
    """XE with the contrastive term, SCST, reranked captions and retention: nothing that CUDA would refuse."""
    out = tmp_path / "run"
    more = ["--device", "cuda", "--steps", "2", "--eval-every", "2", "--batch-size", "4", "--micro-batch", "2",
            "--tokens", "4", "--scst", "auto", "--scst-steps", "2", "--scst-samples", "3", "--scst-temperature", "0.5",
            "--cache", tmp_path / "cache", "--null-slot", "--keep", "1", "--keep-qa", world / "data/qa/train.json"]
    done = python("-c", PRETENDED, out, world / "data/qa/test.json", *flags(world, out, *more), env=pretended)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == [] and report["resets"] == [0]  # one run is captioned, on device 0
    # the host waits for the device once for each token that is drawn
    assert 0 < report["waits"] <= report["tokens"]
    assert json.loads((out / "run_card.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "run_card.json").read_text())["peak_memory"] >= 0
    report = json.loads((out / "retention.json").read_text())
    assert report["exact"] == {"gates_closed": True, "no_clip": True, "nothing_attached": True} and report["exact_n"] == 3
    assert {line["stage"] for line in log_of(out, "step")} == {"xe", "scst"}


SECONDS = 15  # of the processes' patience with each other
TWO = f"""
import json, os, sys, time
from datetime import timedelta
from pathlib import Path
import data, evaluate, train
train.GROUP_TIMEOUT, train.TRUNK_IN_MEMORY = timedelta(seconds={SECONDS}), 0
out, build, make_items = Path(sys.argv[1]), data._build_features, evaluate.make_items
start = train.start_or_resume

def slow(path, *args):
    '''Process 0 comes first and takes longer than the others would wait for it.'''
    if path.name.startswith("audio_train"):
        deadline = time.time() + 200
        while train.RANK and not path.with_suffix(".lock").exists() and time.time() < deadline:
            time.sleep(0.1)
    return build(path, *args)

def slow_encode(encoder, *args, encode=data.AudioEncoder.encode_prepared):
    global asleep
    if train.RANK == 0 and not asleep:
        asleep = True
        time.sleep({SECONDS + 1})
        (out.parent / "slept").write_text("")
    return encode(encoder, *args)

def kept(clips, captions):
    (out / "captions.json").write_text(json.dumps([c["text"] for c in captions]))
    return make_items(clips, captions)

def started(*args):
    if train.RANK == 0:
        files = sorted(path.name for path in (out / "state").iterdir())
        (out / "state.json").write_text(json.dumps(files))
    return start(*args)

asleep = False
data._build_features, data.AudioEncoder.encode_prepared, evaluate.make_items = slow, slow_encode, kept
train.start_or_resume = started
train.main(sys.argv[2:])
"""


def test_two_processes_are_one_and_wait_for_features(world, tmp_path, monkeypatch):
    """The same losses and validation captions, with features that take longer than the process group's timeout."""
    one, two, captions = tmp_path / "one", tmp_path / "two", []
    more = ["--steps", "20", "--eval-every", "20", "--keep", "1", "--keep-qa", world / "data/qa/train.json"]
    make_items = evaluate.make_items
    monkeypatch.setattr(evaluate, "make_items", lambda clips, chosen: (captions.extend(c["text"] for c in chosen),
                                                                       make_items(clips, chosen))[1])
    train.main([*map(str, flags(world, one, *more))])
    script = tmp_path / "two.py"
    script.write_text(TWO)
    python("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, two,
           *flags(world, two, *more, "--cache", tmp_path / "cache"),
           env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    for a, b in zip(log_of(one, "step"), log_of(two, "step"), strict=True):
        for term in ("xe", "contrastive", "keep", "gradient_norm"):
            assert a[term] == pytest.approx(b[term], abs=1e-5, rel=1e-5), (a["step"], term)
    assert json.loads((two / "captions.json").read_text()) == captions and len(set(captions)) > 1
    (a,), (b,) = log_of(one, "validation"), log_of(two, "validation")
    for values in (a, b):
        del values["val_seconds"], values["seconds"]
    assert a == b
    assert json.loads((two / "state.json").read_text()) == ["lock", "trunk0.bin"]
    assert (two / "training.json").exists() and not (two / "state").exists()
    assert (tmp_path / "slept").exists()


def test_a_process_without_a_gpu_of_its_own_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(data, "usable_device", str)
    with pytest.raises(data.InputError, match="process 1 of torchrun has no GPU, 1 are visible"):
        train.main(["--data", "nowhere", "--out", str(tmp_path / "run"), "--device", "cuda",
                    "--batch-size", "4", "--micro-batch", "4"])


OTHER_CUDA = """
import sys, torch
torch.ops.load_library = lambda path: None
library = torch.library.Library("_torchaudio", "DEF")
library.define("cuda_version() -> int")
library.impl("cuda_version", lambda: 13000, "CompositeImplicitAutograd")
torch.version.cuda = sys.argv[1]
try:
    import torchaudio
except RuntimeError as error:
    assert "different CUDA versions" in str(error)
else:
    sys.exit("torchaudio did not mind")
"""


RESAMPLE = "torchaudio.functional.resample(torch.linspace(-1, 1, 480), 48000, 16000).tolist()"


def test_a_torchaudio_of_another_cuda_version():
    """Its compiled half is for CUDA 13.0, torch's for another version: everything starts, and resampling works."""
    script = f"import data\nfrom transformers import LlavaForConditionalGeneration\nprint(data.{RESAMPLE})"
    done = python("-c", OTHER_CUDA + script, "12.8")
    wanted = data.torchaudio.functional.resample(torch.linspace(-1, 1, 480), 48000, 16000)
    assert json.loads(done.stdout.splitlines()[-1]) == wanted.tolist() and len(wanted) == 160


def test_fusion_alone_in_an_empty_folder_beside_a_torchaudio_of_another_cuda_version(tmp_path):
    shutil.copy(ROOT / "fusion.py", tmp_path)
    out = python("-c", OTHER_CUDA + "import runpy\nrunpy.run_path('fusion.py', run_name='__main__')", "13.2",
                 cwd=tmp_path).stdout
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1] and
            line.split()[0] in fusions.SYSTEMS}
    assert rows.keys() == fusions.SYSTEMS.keys()
    for system in rows.keys() - {"concat"}:
        assert rows[system][2] == "0", out
    assert all("0 hooks" in " ".join(r) for r in rows.values())
    assert float(rows["additive"][3]) > 0 and rows["cross_attention"][3] == "0"
