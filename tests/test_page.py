"""The page to listen: its file, its links, and what a real browser makes of it. Runs are made up, so values are known."""
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import wave
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from conftest import ROOT, python

sys.path.insert(0, str(ROOT))
import plots  # noqa: E402

MARKUP = "<img src=x onerror=\"alert('caption')\">"
SCRIPT = "</script><script>alert('end')</script><!-- {script} {data} &lt;b&gt; \\u003c"
LINES = "one\u2028two\u2029three\u0000\r\n\ttab"
NAME = "it's \"a\" #1 of 100%, caf\u00e9 <b>&amp;?x=y.wav"
CONDITIONS = ("backbone", "unrelated_clip", "silence", "noise", "conflict")


def sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.zeros(4000, np.int16).tobytes())


def picture(path):
    import matplotlib.image
    path.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.image.imsave(path, np.full((8, 8, 3), 0.5), format="png")


def item(id, caption, score, path=None, **more):
    found = {"id": id, "prediction": caption, "references": [f"reference of {id}", MARKUP],
             "scores": {"spider_lite": score, "cider_d": 2 * score, "spice": None, **more}}
    return {**found, "path": path} if path else found


def asked(id, clip, truth, answers, image=None):
    answers = {c: {"answer": text, "nll": 0.5} for c, text in zip(CONDITIONS, answers)}
    found = {"id": id, "question": f"What is {id}? {MARKUP}", "truth": truth, "clip": clip, **answers}
    return {**found, "image": image} if image else found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(folder of captions.html, content of its data): two systems, four clips, three questions, hostile texts."""
    project = tmp_path_factory.mktemp("a project #1 50% 'x'")
    folder = project / "experiments/tiny"
    folder.mkdir(parents=True)
    sound(project / "data" / NAME)
    sound(project / "elsewhere/b.wav")
    picture(project / "data/a picture #2.png")
    ids = ["clip a", "clip b", SCRIPT, "clip"]
    paths = [f"data/{NAME}", str(project / "elsewhere/b.wav"), "data/gone.wav", None]
    first = [item(i, c, s, p) for i, c, s, p in zip(ids, [MARKUP, SCRIPT, LINES, ""], [0.1, 0.4, 0.3, 0.2], paths)]
    # another order, no caption of d, a score that is no number
    second = [item(i, f"second of {i}", s, p) for i, s, p in zip(ids[2::-1], [float("nan"), 0.1, 0.5], paths[2::-1])]
    one = [asked("q1", "clip a", "Red", ["red", "blue", "red.", "red"], "data/a picture #2.png"),
           asked("q2", "clip a", "two", ["two"] * 5),
           asked("q3", SCRIPT, "yes", ["no", "yes", "no", MARKUP, SCRIPT], "data/gone.png")]
    two = [asked("q1", "clip a", "Red", ["red"] * 5), asked("q2", "clip a", "two", ["two", "three", "two", "two", "two"])]
    runs = [{"label": "first + keep", "folder": str(project), "metric": "spider_lite", "items": first, "retention": one},
            {"label": "second", "folder": str(project), "metric": "spider_lite", "items": second, "retention": two},
            {"label": MARKUP, "folder": str(project), "metric": "spider_lite", "items": first[:1], "retention": None}]
    assert plots.write_page(folder, runs)
    return folder, content(folder)


class Reader(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.texts.append([tag, dict(attributes), ""])

    def handle_data(self, text):
        if self.cdata_elem:  # in a script or a style; a long text comes in pieces
            self.texts[-1][2] += text


def read(folder):
    return Reader((folder / "captions.html").read_bytes().decode("utf-8"))


def content(folder):
    (text,) = [text for _, attributes, text in read(folder).texts if attributes.get("id") == "data"]
    return json.loads(text, parse_constant=pytest.fail)


# ---------------------------------------------------------------- the file

def test_texts_are_data_and_never_markup(page):
    folder, data = page
    names = [name for name, _ in read(folder).elements]
    assert names.count("script") == 2 and names.count("style") == 1
    assert not {"img", "b", "audio", "link", "iframe"} & set(names)
    assert not any(key.startswith("on") for _, attributes in read(folder).elements for key in attributes)
    assert [clip["captions"][0] for clip in data["clips"]] == [MARKUP, SCRIPT, LINES, ""]
    assert data["clips"][2]["id"] == SCRIPT and data["systems"][2] == MARKUP
    assert "innerHTML" not in plots.PAGE_SCRIPT and "outerHTML" not in plots.PAGE_SCRIPT


def test_every_system_is_beside_its_clip(page):
    clips = page[1]["clips"]
    assert [clip["captions"][1] for clip in clips] == ["second of clip a", "second of clip b", f"second of {SCRIPT}", None]
    assert [clip["scores"][0] for clip in clips] == [[0.1, 0.2], [0.4, 0.8], [0.3, 0.6], [0.2, 0.4]]
    assert [clip["scores"][1] for clip in clips] == [[0.5, 1.0], [0.1, 0.2], [None, None], None]
    assert page[1]["metrics"] == [["spider_lite", "spider_lite"], ["cider_d", "CIDEr-D"]]


def test_every_link_finds_its_file(page, tmp_path):
    folder, data = page
    links = [clip["link"] for clip in data["clips"]]
    assert links[2:] == [None, None] and data["questions"][2]["image"] is None
    for link, name in zip([*links[:2], data["questions"][0]["image"]], [NAME, "b.wav", "a picture #2.png"]):
        assert re.fullmatch(r"[\w.~/%-]+", link, re.ASCII)
        file = os.path.join(os.fsencode(folder), unquote_to_bytes(link))
        assert os.path.isfile(file) and os.path.basename(file) == name.encode()
    # a name that is no text in UTF-8, and a study that was moved with its data
    strange = os.fsdecode(b"data/\xff:.wav")
    sound(tmp_path / strange)
    (tmp_path / "experiments").mkdir()
    assert plots.page_link(tmp_path / "experiments", "/gone", strange) == "../data/%FF%3A.wav"
    runs = [{"label": "x", "folder": "/gone", "items": [item(strange, "", 1.0, strange)], "retention": None}]
    assert plots.write_page(tmp_path / "experiments", runs)
    assert content(tmp_path / "experiments")["clips"][0]["link"] == "../data/%FF%3A.wav"


def test_policy_names_this_script_and_this_style_alone(page):
    reader = read(page[0])
    (policy,) = [a["content"] for name, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    for name, attributes, text in reader.texts:
        if attributes.get("id") != "data":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{name}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_answers_are_judged_as_in_evaluate(page):
    import evaluate
    texts = ("Red.", " red ", "red!", "a red", "", "?", "caf\u00e9", "CAFE", "two, 2", "two 2", "\u0130", "x_y", "x y")
    for a in texts:
        for b in texts:
            assert (plots.plain(a) == plots.plain(b)) == bool(evaluate.correct(a, b))
    first = page[1]["questions"][0]
    assert first["texts"] == [["red", 1], ["blue", 0], ["red.", 1]]
    # conflict is asked where some clip names another answer
    assert first["answers"] == [[0, 1, 2, 0, None], [0, 0, 0, 0, 0], None]
    assert page[1]["conditions"] == [[name, name.replace("_", " ")] for name in CONDITIONS]


def test_only_conditions_that_were_asked_are_shown(tmp_path):
    runs = [{"label": "x", "folder": ".", "metric": "spider", "items": [item("a", "x", 0.5)],
             "retention": [asked("q1", "a", "red", ["red", "red", "red", "red"])]}]
    assert plots.write_page(tmp_path, runs)
    assert [name for name, _ in content(tmp_path)["conditions"]] == ["backbone", "unrelated_clip", "silence", "noise"]


def test_fence_is_shown_where_it_is_present(tmp_path):
    items = [item("a", "x", 0.5, fense=0.25)]
    assert plots.write_page(tmp_path, [{"label": "x", "folder": ".", "metric": "spider", "items": items, "retention": None}])
    assert [metric for metric, _ in content(tmp_path)["metrics"]] == ["cider_d", "fense"]
    assert content(tmp_path)["clips"][0]["scores"] == [[1.0, 0.25]]


def big(folder, clips=1000, systems=6):
    """A page as large as AudioCaps's test split, with captions and answers of usual lengths."""
    rng = np.random.default_rng(0)
    words = np.array("a man speaks while the engine of an old vehicle idles and birds chirp in background wind".split())

    def sentence():
        return " ".join(rng.choice(words, rng.integers(8, 14)))

    references = []
    for k in range(clips):
        if k < 2:  # the others' links are as long
            sound(folder / f"data/audiocaps/audio_32000Hz/test/Y{k:011d}_30.wav")
        references.append([sentence() for _ in range(5)])
    runs = []
    for s in range(systems):
        items, retention = [], []
        for k in range(clips):
            score = float(rng.random())
            row = item(f"Y{k:011d}_30", sentence(), score, f"data/audiocaps/audio_32000Hz/test/Y{k % 2:011d}_30.wav",
                       fense=score / 2)
            items.append({**row, "references": references[k]})
            retention.append(asked(f"q{k}", f"Y{k * 7 % clips:011d}_30", sentence(),
                                   rng.choice(["yes", "no", "on the left side", "a red square"], 5)))
        runs.append({"label": f"system {s}", "folder": str(folder), "metric": "spider_lite", "items": items,
                     "retention": retention})
    assert plots.write_page(folder, runs)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return big(tmp_path_factory.mktemp("large"))


def test_a_thousand_clips_stay_below_two_megabytes(large):
    assert len(content(large)["clips"]) == 1000 and len(content(large)["questions"]) == 1000
    assert (large / "captions.html").stat().st_size < 2_000_000


def test_first_seed_of_each_system_is_shown(tmp_path):
    def run(path, system, seed, result=True, **flags):
        home = tmp_path / "tiny" / path
        home.mkdir(parents=True, exist_ok=True)
        config = {"fusion": system, "seed": seed, "layers": [3], "llava": "x", "steps": 1, "folder": "/x", **flags}
        files = {"predictions": [item("a", path, 0.5)]}
        if result:
            files["result"] = {"split": "test", "n": 1, "trainable_parameters": 1, "spider_lite": 0.5}
        if len(path.split("/")) == 2:
            files["config"] = config
        for name, value in files.items():
            (home / f"{name}.json").write_text(json.dumps(value))

    run("core/additive_s10", "additive", 10)
    run("core/additive_s2", "additive", 2)
    run("core/additive_s2/scst", "additive", 2)
    run("core/additive_s2/with_video_s0", "additive", 2)          # something else is attached
    run("core/concat_s2", "concat", 2, result=False)
    run("core/concat_s3", "concat", 3)
    run("core/additive_ast_s2", "additive", 2, encoder="ast")      # another system of the same name
    run("retention/additive_keep_s2", "additive", 2, keep=10.0)
    run("retention/gate_s2", "additive", 2, gate_l2=1.0)
    run("clotho/additive_s2", "additive", 2, dataset="clotho")
    study = plots.Study(tmp_path / "tiny")
    found = {r["label"]: r["items"][0]["prediction"] for r in plots.page_runs(study.runs)}
    assert found["additive"] == "core/additive_s2" and found["additive + SCST"] == "core/additive_s2/scst"
    assert found["concatenation"] == "core/concat_s3"
    assert sorted(found.values()) == ["core/additive_ast_s2", "core/additive_s2", "core/additive_s2/scst", "core/concat_s3",
                                      "retention/additive_keep_s2"]
    assert not plots.write_page(tmp_path, [])


def test_report_of_a_copied_script_has_the_page_beside_it(tmp_path):
    shutil.copy(ROOT / "plots.py", tmp_path)
    sound(tmp_path / "data/a.wav")
    for name, seed in (("additive_s0", 0), ("additive_s1", 1)):
        home = tmp_path / "tiny/core" / name
        home.mkdir(parents=True)
        config = {"fusion": "additive", "seed": seed, "layers": [3], "llava": "x", "steps": 1, "folder": str(tmp_path)}
        result = {"split": "test", "n": 1, "trainable_parameters": 1, "spider_lite": 0.5, "train_seconds": 1}
        files = {"config": config, "result": result, "predictions": [item("a", f"caption {seed}", 0.5, "data/a.wav")],
                 "retention_items": [asked("q1", "clip a", "red", ["red"] * 5)]}
        for file, value in files.items():
            (home / f"{file}.json").write_text(json.dumps(value))
    subprocess.run([sys.executable, "-I", "plots.py", "tiny"], cwd=tmp_path, check=True, capture_output=True)
    data = content(tmp_path / "tiny")
    assert data["systems"] == ["additive"] and data["clips"][0]["captions"] == ["caption 0"]
    assert data["clips"][0]["link"] == "../data/a.wav" and len(data["questions"]) == 1
    assert "(captions.html)" in (tmp_path / "tiny/REPORT.md").read_text()


# ---------------------------------------------------------------- a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required "
         "--remote-debugging-pipe").split()


class Browser:
    """One tab of a headless Chromium, driven through its debugging pipe: JSON that ends in a zero byte."""

    def __init__(self, folder):
        from_us, self.to = os.pipe()
        self.back, from_it = os.pipe()
        flags = [*QUIET, f"--user-data-dir={folder}"]  # bash hands the pipes over as 3 and 4
        self.process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{from_it}', "-", CHROMIUM, *flags],
                                        pass_fds=(from_us, from_it), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(from_it)
        self.count, self.rest, self.events, self.session = 0, b"", [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            part = os.read(self.back, 1 << 16)
            assert part, "the browser has ended"
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def __call__(self, method, **params):
        self.count += 1
        call = {"id": self.count, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.to, json.dumps(call).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, expression):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression, seconds=15):
        stop = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < stop, f"{expression} did not become true"
            time.sleep(0.03)

    def open(self, folder, hash=""):
        self.events.clear()
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=(folder / "captions.html").as_uri() + hash)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def ids(self):
        return self.js("[...document.querySelectorAll('article h2')].map(x => x.textContent)")

    def choose(self, name, value):
        """As a reader does: the control changes and says so."""
        self.js(f"""(() => {{ const field = document.querySelector('[name={name}]'); field.value = {json.dumps(value)};
                field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()""")
        self.wait(f"view.{name} === {json.dumps(value)}")

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def mistakes(self):
        """Exceptions, dialogs, and what the policy had to forbid."""
        bad = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in bad]

    def addresses(self):
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def close(self):
        self.session = None
        self("Browser.close")
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def test_browser_shows_hostile_texts_as_text(browser, page):
    browser.open(page[0])
    assert browser.ids() == ["clip a", "clip b", SCRIPT, "clip"]
    shown = browser.js("[...document.querySelectorAll('tbody tr:first-child .caption')].map(x => x.textContent)")
    assert shown == [MARKUP, SCRIPT, LINES, "(no words)"]
    assert browser.js("document.querySelectorAll('img, article script, article b').length") == 0
    browser.open(page[0], "#part=questions")
    assert browser.js("document.querySelectorAll('article script, article [onerror]').length") == 0
    assert browser.ids()[0] == f"What is q1? {MARKUP}"
    assert browser.js("document.body.textContent").count(MARKUP) > 4
    browser.open(page[0], "#" + MARKUP)
    browser.open(page[0], "#part=x&sort=x&a=x&metric=%&text=&order=constructor")
    assert browser.ids() == ["clip a", "clip b", SCRIPT, "clip"] and not browser.mistakes()


def test_browser_loads_nothing_but_the_page_its_pictures_and_sounds(browser, page):
    browser.open(page[0], "#part=questions")
    browser.wait("document.querySelector('img').naturalWidth === 8")
    kinds = {address.split(":")[0] for address in browser.addresses()}
    assert kinds <= {"file", "about", "data"}  # data: the browser's own buttons of a player
    assert not browser.mistakes()
    assert browser.js("fetch('https://example.org/').then(() => 'sent', error => error.name)") == "TypeError"
    # both handlers of markup and scripts that are put in later are forbidden
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=y onerror=\"window.hit = 1\">')")
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hit = 1'}))")
    time.sleep(0.3)
    assert browser.js("window.hit") is None and browser.mistakes()


def test_browser_plays_a_sound_with_a_hard_name_and_notes_one_that_is_gone(browser, page, tmp_path):
    browser.open(page[0])
    assert browser.js("[...document.querySelectorAll('article')].map(x => x.querySelectorAll('audio').length)") == [1, 1, 0, 0]
    assert browser.js("document.querySelector('audio').preload") == "none"
    assert "gone" in browser.js("document.querySelectorAll('article')[2].querySelector('.note').textContent")
    browser.js("document.querySelector('audio').load(); document.querySelector('audio').play()")
    browser.wait("document.querySelector('audio').duration === 0.5")
    # one sound at a time
    browser.js("const two = document.querySelectorAll('audio'); two[0].loop = true; two[0].play().then(() => two[1].play())")
    browser.wait("document.querySelectorAll('audio')[0].paused")
    # a sound that is gone since the page was written
    shutil.copytree(page[0], tmp_path / "copy")
    browser.open(tmp_path / "copy")
    browser.js("document.querySelector('audio').play().catch(() => 0)")
    browser.wait("document.querySelector('article .note') !== null")


def test_browser_sorts_and_filters(browser, page):
    browser.open(page[0], "#sort=score&a=second&metric=cider_d")
    assert browser.ids() == ["clip a", "clip b", SCRIPT, "clip"]  # clips without a score come last
    browser.choose("order", "up")
    assert browser.ids() == ["clip b", "clip a", SCRIPT, "clip"]
    browser.choose("a", "first + keep")
    browser.choose("order", "down")
    assert browser.ids() == ["clip b", SCRIPT, "clip", "clip a"]
    assert "a=first+%2B+keep" in browser.js("location.hash") and browser.js("view.metric") == "cider_d"
    browser.choose("b", "second")
    browser.choose("sort", "difference")
    assert browser.ids()[:2] == ["clip b", "clip a"]
    # answers are lost by questions, scores are of clips
    hidden = "[...document.querySelectorAll('form [hidden]')].map(x => x.value ?? x.querySelector('select').name)"
    assert browser.js(hidden) == ["under"]
    browser.choose("sort", "loss")  # of answers about images while a clip plays
    assert browser.ids() == ["clip a", SCRIPT, "clip b", "clip"]  # one lost, one won; none was asked beside the others
    number = "(a.textContent.match(/less those won: (-?[0-9]+)/) ?? [])[1] ?? null"
    assert browser.js(f"[...document.querySelectorAll('article')].map(a => {number})") == ["1", "-1", None, None]
    browser.choose("sort", "difference")
    browser.choose("text", "SECOND  of Clip B")
    assert browser.ids() == ["clip b"] and browser.js("document.getElementById('count').textContent") == "1 of 4 clips"
    browser.choose("text", "reference")
    assert len(browser.ids()) == 4 and not browser.mistakes()


def test_browser_shows_the_answers_of_two_runs(browser, page):
    browser.open(page[0])
    browser.js("document.querySelector('nav a:last-child').click()")
    browser.wait("view.part === 'questions'")
    assert browser.js("[...form.elements.sort.options].map(x => x.hidden)") == [False, True, False, False]
    browser.choose("text", "clip a")  # the questions beside this clip
    assert [text[:10] for text in browser.ids()] == ["What is q1", "What is q2"]
    rows = browser.js("[...document.querySelector('.answers').rows].map(r => [...r.cells].map(c => c.textContent))")
    assert rows[0] == ["", "first + keep", "second"]
    assert rows[2] == ["unrelated clip", "\u2717 blue", "\u2713 red"]
    assert rows[3] == ["silence", "\u2713 red.", "\u2713 red"]
    assert rows[5] == ["conflict", "not asked", "\u2713 red"] and len(rows) == 6
    assert "Right answer: Red" in browser.js("document.querySelector('article').textContent")
    browser.choose("text", "")
    browser.choose("sort", "difference")
    assert [text[8:10] for text in browser.ids()] == ["q1", "q2", "q3"]
    browser.choose("order", "up")
    assert [text[8:10] for text in browser.ids()] == ["q2", "q1", "q3"]
    browser.choose("sort", "loss")
    assert [text[8:10] for text in browser.ids()] == ["q3", "q2", "q1"]
    browser.choose("b", MARKUP)  # was not asked
    assert browser.js("document.querySelectorAll('.answers .note').length") == 16
    assert not browser.mistakes()


def test_browser_works_by_keyboard(browser, page):
    browser.open(page[0])
    for _ in range(3):  # two links, then the filter
        browser.press("Tab", 9)
    assert browser.js("document.activeElement.name") == "text"
    browser("Input.insertText", text="second clip b")
    browser.wait("document.querySelectorAll('article').length === 1")
    assert browser.js("document.activeElement.value") == "second clip b"  # a view that changes keeps the focus
    browser("Input.insertText", text="!")
    browser.wait("document.querySelectorAll('article').length === 0")
    browser.press("Tab", 9)
    browser.press("ArrowDown", 40)
    browser.wait("view.a === 'second'")
    browser.press("Enter", 13)
    assert not browser.mistakes()


@pytest.mark.parametrize("part", ["captions", "questions"])
@pytest.mark.parametrize("width", [390, 820, 1100])
def test_browser_fits_a_phone_and_a_dark_room(browser, page, large, part, width):
    browser("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        for folder in (page[0], large):
            browser.open(folder, f"#part={part}")
            assert browser.js("document.documentElement.scrollWidth") <= width
            assert browser.js("innerWidth") == width
            cells = browser.js("[...document.querySelectorAll('tbody td')].map(x => x.scrollWidth - x.clientWidth)")
            assert max(cells) <= 0
            if part == "captions":  # room for words
                assert browser.js("document.querySelector('td.caption').clientWidth") > 200
        red, green, blue = re.findall(r"\d+", browser.js("getComputedStyle(document.body).backgroundColor"))
        assert max(int(red), int(green), int(blue)) < 60
    finally:
        browser("Emulation.clearDeviceMetricsOverride")
        browser("Emulation.setEmulatedMedia", features=[])


def test_browser_makes_rows_as_the_reader_scrolls(browser, large):
    browser.open(large)
    assert len(browser.ids()) < 200
    browser.wait("(scrollTo(0, document.body.scrollHeight), document.querySelectorAll('article').length === 1000)", 60)
    assert len(set(browser.ids())) == 1000
    browser.choose("sort", "difference")
    assert len(browser.ids()) < 200 and browser.js("scrollY") == 0
