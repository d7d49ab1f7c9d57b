"""The smoke-sized stand-in world, built once a session, and a few things that all tests use."""
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with data/ and models/ of the stand-in world at smoke size; WORLD=folder takes one that is there."""
    folder = Path(os.environ["WORLD"]) if "WORLD" in os.environ else tmp_path_factory.mktemp("world") / "smoke"
    python(ROOT / "tests/standin.py", "--out", folder, "--smoke")
    return folder


@pytest.fixture(scope="session")
def shared():
    """Real recordings and caption files beside the repository; a machine without them skips."""
    folder = ROOT.parent / "shared"
    if not (folder / "audiocaps").is_dir():
        pytest.skip("no ../shared with real data beside the repository")
    return folder
