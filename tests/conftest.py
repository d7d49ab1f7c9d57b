"""The smoke-sized stand-in world, built once a session, and a few things that all tests use."""
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU, here and in the scripts that they start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a folder that is not there would be looked up as a hub name
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402,F401  first: it makes torchaudio importable
import pytest  # noqa: E402


def python(*args, cwd=ROOT, check=True, **kwargs):
    """Run a script of the repository, as a person would."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kwargs)
    if check:
        assert done.returncode == 0, f"{args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def copy_of_repository(folder, world):
    """A folder of links to the repository's files and to a stand-in world of smoke size."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh", ".txt"):
            (folder / path.name).symlink_to(path)
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "smoke").symlink_to(world)
    return folder


WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None: pytest runs in one process


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder that the workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if WORKER else base


@pytest.fixture(scope="session")
def world(common):
    """Folder with data/ and models/ of the stand-in world at smoke size; WORLD=folder takes one that is there."""
    folder = Path(os.environ.get("WORLD", common / "world/smoke"))
    python(ROOT / "tests/standin.py", "--out", folder, "--smoke")  # of several workers one builds it
    return folder


PRELOADED = """#!/bin/sh
case $1 in
train.py | evaluate.py) exec {python} -S {root}/tests/preloaded.py run {socket} "$@" ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    """A VENV for run_all.sh: its Python runs train.py and evaluate.py in forks that need not import torch again."""
    venv = tmp_path_factory.mktemp("venv")
    (venv / "bin").mkdir()
    script = PRELOADED.format(python=sys.executable, root=ROOT, socket=venv / "socket")
    (venv / "bin/python").write_text(script)
    (venv / "bin/python").chmod(0o755)
    server = subprocess.Popen([sys.executable, ROOT / "tests/preloaded.py", "serve", venv / "socket"],
                              stdin=subprocess.PIPE)
    yield venv
    server.stdin.close()  # ends it
    server.wait()


@pytest.fixture(scope="session")
def smoke_started(request, common):
    """Every phase of `SMOKE=1 bash run_all.sh` in a copy of the repository, two jobs at a time: the copy's folder."""
    # a name that breaks what is not quoted, or takes all text for ASCII
    copy = common / "clone with späce"
    if WORKER not in (None, "gw0"):
        yield copy  # the first worker starts it
        return
    copy_of_repository(copy, request.getfixturevalue("world"))
    with open(copy / "output.txt", "w") as out:
        process = subprocess.Popen(
            ["bash", "run_all.sh"], cwd=copy, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: os.umask(0o077), env={
                **os.environ, "SMOKE": "1", "SEEDS": "0", "PHASES": "0 1 2 3 4 5", "JOBS": "2", "THREADS": "1",
                "HOME": "/nowhere", "LC_ALL": "C", "VENV": str(request.getfixturevalue("preloaded"))})
    yield copy
    if WORKER and not (request.session.shouldstop or request.session.shouldfail):
        process.wait()  # another worker's tests may be waiting for it
    process.terminate()
    process.wait()


def pytest_collection_modifyitems(items):
    """Modules that look at the smoke run come last: it takes minutes, beside the others."""
    late = {item.module for item in items if "smoke" in item.fixturenames}
    items.sort(key=lambda item: (item.module in late, "smoke" in item.fixturenames))


@pytest.fixture(scope="session", autouse=True)
def smoke_early(request):
    """The smoke run is started before the first test."""
    if any("smoke" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("smoke_started")


@pytest.fixture(scope="session")
def shared():
    """Real recordings and caption files beside the repository; a machine without them skips."""
    folder = ROOT.parent / "shared"
    if not (folder / "audiocaps").is_dir():
        pytest.skip("no ../shared with real data beside the repository")
    return folder


def fused(backbone, system, rows):
    """(backbone, a small fusion with its gates open, prompt ids (rows, P), slots (rows, 4) or None)."""
    import fusion as fusions
    import torch
    torch.manual_seed(0)
    fusion = fusions.build(system, backbone.decoder, encoder_width=8, layers=[3, 6], tokens=4, hidden=16)
    if fusion.has_gate:
        fusion.set_gates(0.3)
    ids, _, slots = backbone.encode(data.SOUND_PROMPT, placeholders=4 * (system == "concat"))
    return backbone, fusion, torch.tensor([ids] * rows), slots and torch.tensor([slots] * rows)


@pytest.fixture
def prompted(world):
    """prompted(system, rows): as `fused`, around the stand-in LLaVA."""
    return lambda system, rows: fused(data.load_backbone(str(world / "models/llava"), "cpu"), system, rows)
