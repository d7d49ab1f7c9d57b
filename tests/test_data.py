"""data.py: what goes through decoding, encoders and the cache unchanged; then one bad input of each kind."""
import errno
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import data  # first: it makes torchaudio importable beside a CPU-only torch
import av
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT, python
from data import InputError, decode_audio, decode_video, load_features, read_qa, read_split
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor,
                          PreTrainedTokenizerFast, TimesformerConfig, TimesformerModel)

RATE, WINDOW = 16000, 64000  # of the tiny CLAP: 16 kHz, 4 s
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared, with recordings, is absent")


def tone(seconds, hertz=440.0, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def write_audio(path, wave, codec, rate, layout="mono", format=None):
    """Encode (channels, samples) float32 with PyAV."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(np.atleast_2d(wave)), "fltp", layout)
        frame.sample_rate = rate
        packer = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size)
        for packed in packer.resample(frame):
            out.mux(stream.encode(packed))
        out.mux(stream.encode(None))
    return path


def write_video(path, pictures, sound=None, codec="mpeg4", rate=8):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if sound is not None:
            audio = out.add_stream("aac", rate=RATE, layout="mono")
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
            frame.sample_rate = RATE
            for part in av.AudioResampler("fltp", "mono", RATE, 1024).resample(frame):
                out.mux(audio.encode(part))
            out.mux(audio.encode(None))
    return path


@pytest.fixture(scope="session")
def clap_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["a dog barks"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<pad>",
                                        eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    ClapModel(ClapConfig(
        audio_config=dict(spec_size=128, num_mel_bins=64, patch_size=8, patch_stride=[8, 8], num_classes=4,
                          patch_embeds_hidden_size=32, hidden_size=64, depths=[1, 1], projection_dim=32,
                          num_attention_heads=[2, 4], window_size=4),
        text_config=dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, projection_dim=32,
                         num_attention_heads=2, intermediate_size=128, max_position_embeddings=80,
                         pad_token_id=1, bos_token_id=0, eos_token_id=2),
        projection_dim=32)).save_pretrained(folder)
    extractor = ClapFeatureExtractor(feature_size=64, sampling_rate=RATE, hop_length=256, max_length_s=4,
                                     fft_window_size=1024, frequency_min=50, frequency_max=8000,
                                     truncation="rand_trunc", padding="repeatpad")
    ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clap(clap_folder):
    return data.ClapEncoder(clap_folder)


@pytest.fixture(scope="session")
def judge(clap_folder):
    return data.load_clap(str(clap_folder), "cpu")


@pytest.fixture(scope="session")
def timesformer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timesformer")
    torch.manual_seed(0)
    model = TimesformerModel(TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128))
    torch.nn.init.normal_(model.embeddings.time_embeddings)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "VideoMAEImageProcessor", "size": {"shortest_edge": 32},
         "crop_size": {"height": 32, "width": 32}}))
    return folder


@pytest.fixture
def clotho(tmp_path):
    """Six clips of 1 to 6 s in Clotho's layout."""
    folder = tmp_path / "clotho" / "evaluation"
    folder.mkdir(parents=True)
    rows = ["file_name," + ",".join(f"caption_{i}" for i in range(1, 6))]
    for i in range(6):
        wavfile.write(folder / f"{i}.wav", RATE, noise(i + 1, i))
        rows.append(f"{i}.wav," + ",".join(f"noise {i} of kind {k}" for k in range(5)))
    (folder.parent / "clotho_captions_evaluation.csv").write_text("\n".join(rows) + "\n")
    return folder.parent


# ------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name, codec, tolerance", [
    ("a.wav", "pcm_s16le", 1e-4), ("a.wav", "pcm_u8", 1e-2), ("a.wav", "pcm_f32le", 1e-6),
    ("a.wav", "pcm_f64le", 1e-6), ("a.wav", "pcm_s24le", 1e-6), ("a.flac", "flac", 1e-4),
    ("a.ogg", "libopus", 0.1), ("a.mp3", "libmp3lame", 0.1), ("a.m4a", "aac", 0.1),
    ("a.mkv", "pcm_s16le", 1e-4)])
def test_every_format_gives_the_same_wave(tmp_path, name, codec, tolerance):
    wave, rate = tone(1.0), 48000 if codec == "libopus" else RATE  # Opus knows few rates
    got = decode_audio(write_audio(tmp_path / name, tone(1.0, rate=rate), codec, rate), RATE)
    assert got.dtype == np.float32 and got.ndim == 1 and abs(len(got) - RATE) <= 4096
    n = min(len(got), RATE) - 4096  # coders with a delay shift the wave: compare the best alignment
    error = min(np.abs(got[s:s + n] - wave[:n]).max() for s in range(0, 2400)) if tolerance == 0.1 else \
        np.abs(got - wave).max()
    assert error < tolerance


def test_channels_are_averaged_and_rates_converted(tmp_path):
    waves = np.stack([tone(1.0, 200, 44100) * k / 8 for k in range(8)], 1)
    wavfile.write(tmp_path / "a.wav", 44100, waves)
    got = decode_audio(tmp_path / "a.wav", RATE)
    assert len(got) == RATE
    assert np.abs(got - 3.5 / 8 * tone(1.0, 200))[200:-200].max() < 5e-3
    with av.open(str(tmp_path / "a.wav")) as source, av.open(str(tmp_path / "a.m4a"), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="7.1")  # its decoder keeps the 8 channels apart
        packer = av.AudioResampler("fltp", "7.1", 44100, 1024)
        for frame in itertools.chain(source.decode(audio=0), [None]):
            for packed in packer.resample(frame):
                out.mux(stream.encode(packed))
        out.mux(stream.encode(None))
    assert decode_audio(tmp_path / "a.m4a", RATE)[2000:14000].max() == pytest.approx(3.5 / 16, rel=0.2)
    wavfile.write(tmp_path / "b.wav", 44101, tone(1.0, 200, 44101))  # no small ratio to 16 kHz
    assert np.abs(decode_audio(tmp_path / "b.wav", RATE)[:15000] - tone(1.0, 200)[:15000])[200:].max() < 5e-3


def test_sound_of_a_video_and_pictures_evenly_spaced(tmp_path):
    pictures = [np.full((32, 48, 3), 30 * i, np.uint8) for i in range(8)]
    path = write_video(tmp_path / "a b é.mp4", pictures, tone(1.0))
    assert 0.9 * RATE < len(decode_audio(path, RATE)) < 1.2 * RATE
    video = decode_video(path, 4)
    assert video.shape == (4, 32, 48, 3) and video.dtype == np.uint8
    assert np.abs(video.mean((1, 2, 3)) - 30 * np.array([0, 2, 5, 7])).max() < 6
    one = decode_video(write_video(tmp_path / "one.mp4", pictures[3:4]), 4)
    assert one.shape[0] == 4 and (one == one[0]).all()


def test_a_header_does_not_decide_how_much_is_held(tmp_path, capsys):
    """A clip is cut at the limit, with a note."""
    path = tmp_path / "a.wav"
    wavfile.write(path, RATE, (tone(3.0) * 32767).astype(np.int16))
    raw = bytearray(path.read_bytes())
    raw[4:8] = raw[40:44] = (2 ** 31).to_bytes(4, "little")  # claims 18 hours
    path.write_bytes(raw)
    assert len(decode_audio(path, RATE, max_seconds=3)) == 3 * RATE and not capsys.readouterr().out
    assert len(decode_audio(path, RATE, max_seconds=1)) == RATE
    assert "a.wav: is longer than 1 seconds" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [
    (b"", "cannot be decoded"), (b"not audio at all\n" * 50, "cannot be decoded"),
    (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "a.wav")])
def test_what_is_no_sound_is_named(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        decode_audio(tmp_path / "a.wav", RATE)
    assert "a.wav" in str(error.value) and "\n" not in str(error.value)


def test_bad_waves(tmp_path):
    path = tmp_path / "a.wav"
    wavfile.write(path, RATE, tone(1.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:60])  # the header alone and less than a sample
    with pytest.raises(InputError, match="a.wav"):
        decode_audio(path, RATE)
    path.write_bytes(whole[:len(whole) // 2])  # what is there is used
    assert len(decode_audio(path, RATE)) == pytest.approx(RATE / 2, abs=50)
    wave = tone(1.0)
    wave[500] = np.nan
    wavfile.write(path, RATE, wave)
    with pytest.raises(InputError, match="not finite"):
        decode_audio(path, RATE)
    wavfile.write(path, RATE, np.zeros(RATE, np.int16))
    assert not decode_audio(path, RATE).any()
    with pytest.raises(InputError, match="no video stream"):
        decode_video(path, 4)
    with pytest.raises(InputError, match="No such file"):
        decode_audio(tmp_path / "none.wav", RATE)


def test_damaged_media_is_decoded_or_named(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in range(6)]
    sources = [write_audio(tmp_path / "a.ogg", tone(0.5), "libopus", 48000),
               write_audio(tmp_path / "a.mp3", tone(0.5), "libmp3lame", RATE),
               write_audio(tmp_path / "a.flac", tone(0.5), "flac", RATE),
               write_video(tmp_path / "a.mp4", pictures, tone(0.5))]
    for source in sources:
        whole = source.read_bytes()
        for case in range(25):
            raw = bytearray(whole[:int(rng.integers(1, len(whole) + 1))] if case % 2 else whole)
            for _ in range(case):
                raw[rng.integers(len(raw))] = rng.integers(256)
            source.write_bytes(raw)
            for decode in (lambda: decode_audio(source, RATE, 60), lambda: decode_video(source, 2)):
                try:
                    got = decode()
                    assert len(got) and np.isfinite(got).all() and len(got) <= 60 * RATE
                except InputError as error:
                    assert source.name in str(error)


def test_noise_has_the_ratio_asked_for():
    wave, generator = tone(2.0), torch.Generator().manual_seed(0)
    for recorded in (None, noise(0.3, 1)):
        for snr in (20, 0, -5):
            added = data.noisy(wave, snr, generator, recorded) - wave
            assert 10 * np.log10((wave ** 2).sum() / (added ** 2).sum()) == pytest.approx(snr, abs=0.01)
    a, b = (data.noisy(wave, 5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert (a == b).all()
    with pytest.raises(InputError, match="silent"):
        data.noisy(wave, 5, generator, np.zeros(10, np.float32))
    silent = np.zeros(100, np.float32)
    assert (data.noisy(silent, 5, generator) == silent).all()


# ------------------------------------------------------------------------------------------- encoders


def direct(clap, wave):
    """Frames and embedding of one window, by the library alone."""
    mels = data.load_clap(clap.path, "cpu").extractor(wave, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        out = clap.model.get_audio_features(mels["input_features"].float())
    return out.last_hidden_state[0].mean(1).T, out.pooler_output[0]


def test_one_window_is_the_library_call(clap, judge):
    for seconds in (1.3, 4.0, 4.9):  # padded by repetition, exact, with a tail too short to keep
        wave = noise(seconds)
        (frames,), embed = clap.encode([wave]), judge.embed_sounds([wave])
        want, want_embed = direct(clap, wave[:WINDOW])
        assert frames.shape == (len(want), clap.width)
        torch.testing.assert_close(frames, want)
        torch.testing.assert_close(embed[0], want_embed)


def test_windows_follow_each_other_in_time(clap, judge):
    wave = noise(10.0)
    (frames,), embed = clap.encode([wave]), judge.embed_sounds([wave])
    parts = [direct(clap, w) for w in (wave[:WINDOW], wave[WINDOW:2 * WINDOW], wave[-WINDOW:])]
    S = len(parts[0][0])
    assert len(frames) == 2.5 * S
    torch.testing.assert_close(frames, torch.cat([parts[0][0], parts[1][0], parts[2][0][S // 2:]]))
    torch.testing.assert_close(embed[0], torch.nn.functional.normalize(sum(e for _, e in parts), dim=0))


def test_frames_are_in_time_order(clap):
    quiet = noise(4.0) * 1e-3
    changed = []
    for second in (0.5, 3.5):
        wave = quiet.copy()
        wave[int(second * RATE):int(second * RATE) + 800] += 0.9
        difference = (clap.encode([wave])[0] - clap.encode([quiet])[0]).norm(dim=1)
        changed.append(float(difference @ torch.arange(len(difference)).float() / difference.sum()))
    assert changed[0] < changed[1]


def test_batched_is_one_by_one_and_never_random(clap, judge):
    waves = [noise(s, i) for i, s in enumerate((0.2, 4.0, 9.7, 6.0, 1.0))]
    together, embeds = clap.encode(waves), judge.embed_sounds(waves)
    torch.testing.assert_close(clap.encode(waves, batch_size=3), together, rtol=1e-4, atol=1e-5)
    for wave, frames, embed in zip(waves, together, embeds):
        alone, alone_embed = clap.encode([wave]), judge.embed_sounds([wave])
        torch.testing.assert_close(alone[0], frames, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone_embed[0], embed, rtol=1e-4, atol=1e-5)
    assert torch.equal(judge.embed_sounds(waves), embeds)
    assert clap.encode([]) == [] and judge.embed_sounds([]).shape == (0, judge.embed_dim)


def test_text_embeddings(judge):
    texts = ["a dog barks", "é 狗 " * 200, "", "rain"]
    embeds = judge.embed_text(texts)
    assert embeds.shape == (4, judge.embed_dim)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(judge.embed_text(texts[:1])[0], embeds[0], rtol=1e-4, atol=1e-5)
    assert judge.embed_text([]).shape == (0, judge.embed_dim)


def test_hash_follows_weights_and_settings(judge, clap_folder, tmp_path):
    assert data.Clap(clap_folder).hash == judge.hash
    judge.model.save_pretrained(tmp_path)
    ClapProcessor(judge.extractor, judge.tokenizer).save_pretrained(tmp_path)
    assert data.Clap(tmp_path).hash == judge.hash  # another folder, the same encoder
    settings = tmp_path / "processor_config.json"
    settings.write_text(settings.read_text().replace("repeatpad", "pad"))
    assert data.Clap(tmp_path).hash != judge.hash


def test_timesformer_frames_belong_to_their_pictures(timesformer_folder):
    encoder = data.TimesformerEncoder(timesformer_folder)
    video = np.random.default_rng(0).integers(0, 255, (4, 40, 48, 3), np.uint8)
    frames, = encoder.encode([video])
    assert frames.shape == (4, 64)
    for layer in encoder.model.encoder.layer:  # nothing passes between moments
        layer.temporal_dense.weight.data.zero_()
        layer.temporal_dense.bias.data.zero_()
    before, = encoder.encode([video])
    for f in range(4):
        other = video.copy()
        other[f] = 255 - other[f]
        after, = encoder.encode([other])
        moved = (after - before).abs().amax(1)
        assert moved.argmax() == f
        assert moved[f] > 5 * moved[torch.arange(4) != f].max()  # the class token carries a little across
    frames = data.TimesformerEncoder(timesformer_folder).encode([video, video[::-1]], batch_size=1)
    torch.testing.assert_close(frames, data.TimesformerEncoder(timesformer_folder).encode([video, video[::-1]]))


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "cannot be loaded"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "processor_config.json").unlink(), "cannot be loaded")])
def test_a_spoilt_encoder_is_one_line(clap, clap_folder, tmp_path, spoil, message):
    for file in clap_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        data.load_encoder(str(tmp_path), "audio", "cpu")
    assert "\n" not in str(error.value)


def test_another_model_or_none_is_refused(timesformer_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="ClapModel"):
        data.Clap(timesformer_folder)
    with pytest.raises(InputError, match="cannot be loaded"):
        data.Clap(tmp_path / "nothing here")


# ---------------------------------------------------------------------------------------------- cache


def test_cache_gives_the_same_without_encoding(clotho, clap, judge, tmp_path, monkeypatch):
    split = read_split("clotho", clotho, "test")
    features = load_features(split, clap, tmp_path / "cache")
    assert features.ids == [c.id for c in split.clips] and len(features) == 6
    frames = clap.encode([decode_audio(c.path, RATE) for c in split.clips])
    for i, f in enumerate(frames):
        assert features[i].dtype == torch.float32
        torch.testing.assert_close(features[i], f, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(clap, "prepare", lambda *_: pytest.fail("encoded again"))
    again = load_features(read_split("clotho", clotho, "test"), clap, tmp_path / "cache")
    assert torch.equal(again.frames, features.frames)
    assert torch.equal(again[-1], features[5]) and again.index["3.wav"] == 3
    with pytest.raises(IndexError):
        again[6]
    assert not [p for p in (tmp_path / "cache").iterdir() if "tmp" in p.name or "lock" in p.name]


def test_a_limit_encodes_the_first_clips_alone_and_leaves_the_whole_cache_as_it_is(
        clotho, clap, judge, tmp_path, monkeypatch):
    """In either order of the two calls, and for the judge's embeddings too."""
    encoder = data.load_encoder(clap.path, "audio", "cpu")
    prepared, prepare = [], encoder.prepare

    def counted(wave):
        prepared.append(len(wave))
        return prepare(wave)

    monkeypatch.setattr(encoder, "prepare", counted)
    whole = {}
    for name, limits in (("limited first", (2, 0, 2)), ("whole first", (0, 2, 0))):
        config = {"encoder": clap.path, "modality": "audio", "dataset": "clotho", "data": str(clotho),
                  "cache": str(tmp_path / name), "prompt": "What?"}
        for n, limit in enumerate(limits):
            prepared.clear()
            inputs = data.load_inputs([config], "test", "cpu", limit_clips=limit)
            count = limit or 6
            assert sorted(prepared) == [RATE * (i + 1) for i in range(count)] * (n < 2)
            frames, (embeds, _) = inputs.frames[0], data.judge_of(config, inputs.split, "cpu")
            assert frames.ids == [clip.id for clip in inputs.split.clips] == [f"{i}.wav" for i in range(count)]
            assert inputs.prompts == ["What?"] * count and embeds.shape == (count, judge.embed_dim)
            # whatever the other call has left in the cache
            earlier = whole.setdefault(limit, (inputs.split.hash, list(frames), embeds))
            assert inputs.split.hash == earlier[0]
            torch.testing.assert_close(list(frames), earlier[1])
            torch.testing.assert_close(embeds, earlier[2])
    assert whole[0][0] != whole[2][0]
    torch.testing.assert_close(whole[2][1], whole[0][1][:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole[2][2], whole[0][2][:2], rtol=1e-4, atol=1e-5)


def test_cache_follows_size_and_time_of_the_files(clotho, clap, tmp_path):
    load = lambda: load_features(read_split("clotho", clotho, "test"), clap, tmp_path / "cache")
    before, file = load(), clotho / "evaluation" / "0.wav"
    clotho.rename(tmp_path / "moved")  # where they lie does not matter
    (tmp_path / "moved").rename(clotho)
    load()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    wavfile.write(file, RATE, noise(1.0, 99))  # of the same size
    after = load()
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    os.utime(file, ns=(0, 0))
    assert torch.equal(load()[0], after[0]) and len(list((tmp_path / "cache").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("spoil", [lambda raw: raw[:len(raw) // 2], lambda raw: b"",
                                   lambda raw: b"\xff" * len(raw),
                                   lambda raw: raw.replace(b"0.wav", b"9.wav")])
def test_a_damaged_cache_is_built_again(clotho, clap, tmp_path, spoil, capsys):
    split = read_split("clotho", clotho, "test")
    want = load_features(split, clap, tmp_path).frames.clone()
    path, = tmp_path.glob("*.safetensors")
    raw = path.read_bytes()
    path.unlink()  # a mapped file must not shrink under its readers
    path.write_bytes(spoil(raw))
    assert torch.equal(load_features(split, clap, tmp_path).frames, want)
    assert "damaged" in capsys.readouterr().out


def test_clips_that_cannot_be_decoded_are_dropped_and_listed(clotho, clap, tmp_path):
    (clotho / "evaluation" / "2.wav").write_bytes(b"broken")
    wavfile.write(clotho / "evaluation" / "4.wav", RATE, np.full(RATE, np.nan, np.float32))
    (clotho / "evaluation" / "5.wav").unlink()
    hashes = []
    for _ in range(2):  # cold, then warm
        split = read_split("clotho", clotho, "test")
        features = load_features(split, clap, tmp_path / "cache")
        assert split.missing == ["5.wav"] and split.bad == ["2.wav", "4.wav"]
        assert [c.id for c in split.clips] == features.ids == ["0.wav", "1.wav", "3.wav"]
        hashes.append(split.hash)
    assert hashes[0] == hashes[1] != read_split("clotho", clotho, "test").hash
    for i in (0, 1, 3):
        (clotho / "evaluation" / f"{i}.wav").write_bytes(b"broken")
    with pytest.raises(InputError, match="none of 5 clips"):
        load_features(read_split("clotho", clotho, "test"), clap, tmp_path / "cache")


class Slow:
    """An encoder that counts its calls and takes its time."""
    hash, modality, rate, calls = "slow", "audio", RATE, 0

    def __init__(self, seconds):
        self.seconds = seconds

    def prepare(self, wave):
        return wave

    def encode_prepared(self, waves):
        self.calls += 1
        time.sleep(self.seconds)
        return [torch.full((2, 3), len(wave) / RATE) for wave in waves]


def test_two_jobs_build_once_and_a_killed_build_leaves_nothing(clotho, tmp_path):
    cache, deadline, fork = tmp_path / "cache", time.time() + 120, multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def build(seconds):
        slow = Slow(seconds)
        features = load_features(read_split("clotho", clotho, "test"), slow, cache)
        results.put((slow.calls, [float(f.sum()) for f in features]))

    killed, *jobs = (fork.Process(target=build, args=(seconds,)) for seconds in (60, 2, 2))
    killed.start()
    while not list(cache.glob("*.lock")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    killed.kill()
    killed.join()
    lock, = cache.glob("*.lock")
    assert not list(cache.glob("*.safetensors*"))
    lock.with_suffix(".safetensors.tmp.1").touch()  # as if it had been writing
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(300)
    assert [job.exitcode for job in jobs] == [0, 0]
    (calls, sums), (other_calls, other_sums) = results.get(), results.get()
    assert sorted((calls, other_calls)) == [0, 1]
    assert sums == other_sums == [6.0 * (i + 1) for i in range(6)]
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def split_of(path, n):
    wavfile.write(path, RATE, tone(0.01))
    return data.Split("test", [data.Clip(str(i), path, ["a tone"]) for i in range(n)], [])


def test_threads_prepare_ahead_of_the_model_but_not_far(tmp_path):
    class Counting:
        hash, modality, rate, prepared, encoded, lead = "counting", "audio", RATE, 0, 0, []

        def prepare(self, wave):
            self.prepared += 1

        def encode_prepared(self, clips):
            deadline = time.time() + 10
            while self.prepared < min(self.encoded + 3 * len(clips), 400) and time.time() < deadline:
                time.sleep(0.001)  # the model is slow; the threads go on
            self.lead.append(self.prepared - self.encoded - len(clips))
            self.encoded += len(clips)
            return [torch.ones(2, 3)] * len(clips)

    encoder = Counting()
    assert len(load_features(split_of(tmp_path / "a.wav", 400), encoder, tmp_path / "cache")) == 400
    assert encoder.prepared == encoder.encoded == 400
    assert min(encoder.lead[:20]) >= 2 * data.CHUNK and max(encoder.lead) <= 4 * data.CHUNK


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_split(tmp_path, monkeypatch):
    held = []  # MB that are this process's own, at each of the model's passes and at the end

    def note():
        status = Path("/proc/self/status").read_text()
        held.append(int(status.split("RssAnon:")[1].split()[0]) / 1024)

    class Large:
        hash, modality, rate = "large", "audio", RATE

        def prepare(self, wave):
            pass

        def encode_prepared(self, clips):
            note()
            return [torch.full((512, 1024), i) for i in range(len(clips))]

    split = split_of(tmp_path / "a.wav", 16 * data.CHUNK)
    monkeypatch.setattr(data, "save_file", lambda *args: (save_file(*args), note()))
    features = load_features(split, Large(), tmp_path / "cache")
    note()
    assert features.frames.numel() * 2 == 256 * 2 ** 20  # bytes of all frames
    # the second half's passes bring 128 MB of frames; the allocator gives memory back when it likes
    assert len(held) == 18 and max(held[9:]) - max(held[:9]) < 32
    assert all((features[i] == i % data.CHUNK).all() for i in range(len(features)))


def test_a_cache_that_cannot_be_written_is_one_line(clotho, clap, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="cache"):
        load_features(read_split("clotho", clotho, "test"), clap, tmp_path / "cache")


def test_clips_that_one_of_two_encoders_cannot_take(tmp_path, timesformer_folder, clap, capsys):
    """Each bad video is named and counted once; those that are merely odd are kept."""
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 255, (6, 32, 32, 3), np.uint8))
    whole = write_video(folder / "whole.mp4", pictures, tone(1.0)).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    write_video(folder / "deaf.mp4", pictures)
    write_audio(folder / "blind.mp4", tone(1.0), "aac", RATE)
    write_video(folder / "one_picture.mp4", pictures[:1], tone(1.0))
    odd = list(rng.integers(0, 255, (5, 37, 51, 3), np.uint8))
    write_video(folder / "odd.mkv", odd, tone(0.7), rate=Fraction(30000, 1001))
    names = [*(f"{name}.mp4" for name in ("whole", "truncated", "empty", "deaf", "blind", "one_picture", "gone")), "odd.mkv"]
    (tmp_path / "test.csv").write_text("file_name,caption_1\n" + "".join(f"{name},something\n" for name in names))
    split = read_split("av", tmp_path, "test")
    video = load_features(split, data.TimesformerEncoder(timesformer_folder), cache)
    sound = load_features(split, clap, cache)
    assert split.missing == ["gone.mp4"] and split.bad == ["truncated.mp4", "empty.mp4", "blind.mp4", "deaf.mp4"]
    assert [c.id for c in split.clips] == sound.ids == ["whole.mp4", "one_picture.mp4", "odd.mkv"]
    assert video[0].shape == (4, 64)
    assert set(sound.ids) < set(video.ids) == {*sound.ids, "deaf.mp4"}
    out = capsys.readouterr().out
    assert "blind.mp4: has no video stream" in out and "deaf.mp4: has no audio stream" in out
    assert "3 of 7 clips are left out" in out and "1 of 4 clips are left out" in out


# --------------------------------------------------------------------------------------------- tables

AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n"


def audiocaps(folder, rows, files=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.csv").write_text(AUDIOCAPS + rows, encoding="utf-8")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", [
    "ab_-c.wav", "Yab_-c.OGG", "ab_-c_30.flac", "audio/Yab_-c_30.mp4", "x/y/77.wav", "ab_-c_30000.mp3",
    "Yab_-c_30.000_40.000.wav", "ab_-c_30_40.wav", "ab_-c_000030.wav"])
def test_audiocaps_file_names(tmp_path, name):
    root = audiocaps(tmp_path, '77,ab_-c,30,a dog\n78,zz,0,"a cat, too"\n79,ab_-c,30,barking\n', [name])
    split = read_split("audiocaps", root, "test")
    clip, = split.clips
    assert (clip.id, clip.path, clip.references) == ("ab_-c_30", root / name, ["a dog", "barking"])
    assert split.missing == ["zz_0"] and split.bad == []


def test_audiocaps_ambiguity(tmp_path):
    root = audiocaps(tmp_path / "a", "1,v,10,one\n2,v,20,two\n", ["v.wav", "v_20.wav"])
    assert [c.id for c in read_split("audiocaps", root, "test").clips] == ["v_20"]
    root = audiocaps(tmp_path / "b", "1,v,10,one\n", ["a/v.wav", "test/v.wav", "train/v.wav"])
    assert read_split("audiocaps", root, "test").clips[0].path == root / "test" / "v.wav"
    (root / "test" / "loop").symlink_to(root)
    assert len(read_split("audiocaps", root, "test").clips) == 1


def test_hash_is_of_the_contents(tmp_path):
    files = ["a.wav", "b.wav"]
    one = read_split("audiocaps", audiocaps(tmp_path / "1", "1,a,0,x\n2,b,0,y\n", files), "test").hash
    two = read_split("audiocaps", audiocaps(tmp_path / "2", "2,b,0,y\n1,a,0,x\n", files), "test").hash
    other = read_split("audiocaps", audiocaps(tmp_path / "3", "1,a,0,x\n2,b,0,z\n", files), "test").hash
    assert one == two != other


def test_texts_are_folded_and_neutralised(tmp_path):
    rows = '1,a,0,"a  dog\nbarks\t\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07caf\u00e9\u202e"\n2,a,0,second\n'
    root = audiocaps(tmp_path, rows, ["a.wav"])
    (root / "test.csv").write_bytes(b"\xef\xbb\xbf" + (root / "test.csv").read_bytes())  # as Excel saves it
    assert read_split("audiocaps", root, "test").clips[0].references == ["a dog barks red café", "second"]


@pytest.mark.parametrize("text, message", [
    ("", "columns audiocap_id"), (AUDIOCAPS, "no rows"),
    ("audiocap_id,youtube_id,caption\n1,a,x\n", "found .'audiocap_id"),
    (AUDIOCAPS + "1,a,0,x\n1,b,0,y\n", "csv:3: audiocap_id '1' appears a second"),
    (AUDIOCAPS + "1,a,zero,x\n", "csv:2: start_time"), (AUDIOCAPS + "1,a,0,x, y\n", "csv:2: has 5 fields"),
    (AUDIOCAPS + "1,a,0,\n", "csv:2: clip a has no caption"),
    (AUDIOCAPS + "1,a,0,\"x\n2,b,0,y\n", "csv:2: is not CSV"),
    (AUDIOCAPS + "1,a,0," + "x" * 3000 + "\n", "csv:2: has a text of 3,000"),
    (AUDIOCAPS + "1,a,0,ok\n2,a,0," + "x" * 10 ** 7 + "\n", "csv:3: is not CSV"),
    (AUDIOCAPS + "1,../a,0,x\n", "csv:2: .*leads out"),
    (AUDIOCAPS + "1,a\x1b[2J,0,x\n", "csv:2: .*not a file name")])
def test_bad_audiocaps_tables(tmp_path, text, message):
    audiocaps(tmp_path, "", ["a.wav"])
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_split("audiocaps", tmp_path, "test")
    assert str(error.value).isprintable()


def test_missing_folders_tables_and_bytes(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_split("audiocaps", tmp_path / "none", "test")
    with pytest.raises(InputError, match="test.csv: cannot be read"):
        read_split("audiocaps", tmp_path, "test")
    with pytest.raises(InputError, match="none of its 1 clips, such as a_0, has a file in .* below"):
        read_split("audiocaps", audiocaps(tmp_path, "1,a,0,x\n"), "test")
    (tmp_path / "test.csv").write_bytes(AUDIOCAPS.encode() + b"1,a,0,x\n2,b,0,caf\xe9\n")
    with pytest.raises(InputError, match="test.csv:3: is not UTF-8"):
        read_split("audiocaps", tmp_path, "test")
    with pytest.raises(InputError, match="esc test: choose audiocaps, clotho or av"):
        read_split("esc", tmp_path, "test")


@pytest.mark.parametrize("rows, message", [
    ("0.wav,x\n0.wav,y\n", "csv:3: file_name '0.wav' appears a second time"), ("../0.wav,x\n", "leads out"),
    ("/etc/0.wav,x\n", "leads out"), ("..\\0.wav,x\n", "leads out"),
    ("0.wav,\n", "csv:2: clip 0.wav has no caption"), (",x\n", "not a file name"),
    ("a" * 500 + ".wav,x\n", "none of its 1 clips")])
def test_bad_clotho_tables(clotho, rows, message):
    (clotho / "clotho_captions_evaluation.csv").write_text("file_name,caption_1\n" + rows)
    with pytest.raises(InputError, match=message):
        read_split("clotho", clotho, "test")


@pytest.mark.parametrize("row, reason", [
    ("7,g,0,x, y", "csv:8: has 5 fields"), ("7,g", "csv:8: has 2 fields"), ("7,g,zero,x", "csv:8: start_time 'zero'"),
    ("7,g,0,", "csv:8: clip g has no caption"), ("7,../g,0,x", "csv:8: .*leads out"),
    ("7,g,0," + "x" * 3000, "csv:8: has a text of 3,000"), ('7,g,0,"x', "csv:8: is not CSV")])
def test_a_row_that_cannot_be_read_is_left_out_with_a_note(tmp_path, row, reason, capsys):
    rows = [f"{i},{name},0,clip {name}" for i, name in enumerate("abcdef", 1)]
    root = audiocaps(tmp_path, "\n".join([*rows, row]) + "\n", [f"{name}.wav" for name in "abcdefg"])
    split = read_split("audiocaps", root, "test")
    assert [clip.id for clip in split.clips] == [f"{name}_0" for name in "abcdef"] and split.missing == []
    out = capsys.readouterr().out
    assert re.search(reason, out) and "1 of 7 rows cannot be read and are left out" in out


def test_a_row_of_clotho_that_cannot_be_read(clotho, capsys):
    table = clotho / "clotho_captions_evaluation.csv"
    table.write_text(table.read_text().replace("noise 3 of kind 0,", "noise 3, of kind 0,"))
    assert [clip.id for clip in read_split("clotho", clotho, "test").clips] == [f"{i}.wav" for i in (0, 1, 2, 4, 5)]
    assert "csv:5: has 7 fields and the header 6" in capsys.readouterr().out


@pytest.mark.parametrize("n, bad, fits", [
    (8, 3, True), (8, 4, False), (6, 3, False), (2, 1, False), (3, 1, True), (5000, 5, True), (4999, 6, False)])
def test_too_many_rows_that_cannot_be_read_refuse_the_table(tmp_path, n, bad, fits, capsys):
    rows = [f"{i},v{i},0,x" + ", y" * (n // 2 <= i < n // 2 + bad) for i in range(n)]
    root = audiocaps(tmp_path, "\n".join(rows), [f"v{i}.wav" for i in (0, n - 1)])
    if fits:
        split = read_split("audiocaps", root, "test")
        assert len(split.clips) == 2 and len(split.missing) == n - bad - 2
        assert f"{bad} of {n} rows cannot be read and are left out" in capsys.readouterr().out
    else:
        with pytest.raises(InputError, match=f"csv:{n // 2 + 2}: has 5 fields.*; {bad} of {n} rows cannot be read$"):
            read_split("audiocaps", root, "test")


def test_a_quote_that_nothing_closes_counts_the_lines_that_it_takes(tmp_path):
    rows = [f'{i},v{i},0,{chr(34) * (i == 5)}x' for i in range(20)]
    with pytest.raises(InputError, match="csv:7: is not CSV .*; 15 of 20 rows"):
        read_split("audiocaps", audiocaps(tmp_path, "\n".join(rows), ["v0.wav"]), "test")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_lone_carriage_return_is_white_space_of_a_caption(tmp_path, end):
    """As in the released table of AudioCaps 2.0; in a table of such lines alone it ends them."""
    audiocaps(tmp_path, "", ["a.wav", "b.wav"])
    text = AUDIOCAPS + "1,a,0,muffled\rspeech\n2,b,0,\"quoted\rspeech, too\"\n"
    (tmp_path / "test.csv").write_bytes(text.replace("\n", end).encode())
    clips = read_split("audiocaps", tmp_path, "test").clips
    assert [clip.references for clip in clips] == [["muffled speech"], ["quoted speech, too"]]


def test_audio_visual_questions(tmp_path):
    (tmp_path / "a.mp4").touch()
    rows = "a.mp4,What?,A dog\na.mp4,Who?,A cat\nb.mp4,Why?,so\n"
    (tmp_path / "val.csv").write_text("file_name,question,answer\n" + rows)
    split = read_split("av", tmp_path, "val")
    assert [(c.id, c.question, c.references) for c in split.clips] == [
        ("a.mp4", "What?", ["A dog"]), ("a.mp4#2", "Who?", ["A cat"])]
    assert split.missing == ["b.mp4"]


@needs_shared
def test_released_tables(tmp_path):
    for split, n in (("train", 49838), ("val", 495), ("test", 975)):
        with pytest.raises(InputError, match=f"none of its {n} clips"):
            read_split("audiocaps", SHARED / "audiocaps", split)
    split = read_split("clotho", SHARED / "esc10", "train")
    assert len(split.clips) == 160 and all(len(c.references) == 5 for c in split.clips)
    assert len(decode_audio(split.clips[0].path, RATE)) > RATE
    with pytest.raises(InputError, match="the probe needs both"):
        read_qa(SHARED / "llava" / "qa90_questions.jsonl")


# ------------------------------------------------------------------------------------------ questions


def test_question_files(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").touch()
    rows = [{"image": f"{i}.png", "question": f"What is {i}?\nOne word.", "answer": f"{i}", "kind": "what"}
            for i in range(20)]
    lines = tmp_path / "qa.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    all_of_them, _ = read_qa(lines)
    assert len(all_of_them) == 20 and {q.kind for q in all_of_them} == {"what"}
    assert "What is 3?\nOne word." in {q.question for q in all_of_them}
    some, digest = read_qa(lines, limit_questions=5)
    assert len(some) == 5 and read_qa(lines, limit_questions=5) == (some, digest)
    assert read_qa(lines, limit_questions=5, seed=1)[1] != digest
    talks = [{"id": "same", "image": "1.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A box."},
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": "More."}]}] * 2
    talks.append({"id": "without a picture", "conversations": []})
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    read, _ = read_qa(tmp_path / "talks.json", images=tmp_path / "images")
    assert [(q.question, q.answer) for q in read] == [("What is it?", "A box.")] * 2
    assert sorted(q.id for q in read) == ["same", "same#2"] and read[0].image == tmp_path / "images" / "1.png"


def talk(*turns, keys=("from", "value")):
    return [dict(zip(keys, turn)) for turn in turns]


@pytest.mark.parametrize("record", [
    {"image": "a.png", "question": "<image>\nWhat is it?", "answer": "A box."},
    {"image": "a.png", "question": "What is it?\n<image>", "answer": "A box."},
    {"image": "a.png", "conversations": talk(("system", "Be brief."), ("human", "<image>\nWhat is it?"),
                                             ("gpt", "A box."), ("human", "And?"), ("gpt", "More."))},
    {"image": "a.png", "conversations": talk(("user", "<image>What is it?"), ("assistant", "A box."),
                                             keys=("role", "content"))}])
def test_talks_and_image_tokens_as_people_write_them(tmp_path, record):
    (tmp_path / "a.png").touch()
    (tmp_path / "qa.jsonl").write_text(json.dumps(record))
    (question,), _ = read_qa(tmp_path / "qa.jsonl")
    assert (question.question, question.answer, question.image) == ("What is it?", "A box.", tmp_path / "a.png")


def test_questions_to_keep_need_neither_image_nor_answer(tmp_path):
    (tmp_path / "a.png").touch()
    rows = [{"image": "a.png", "text": "What is it?"}, {"question": "Why?"}, {"image": None, "question": "Who?"},
            {"conversations": talk(("human", "How?"))}, {"question": "Where?", "answer": "Here."}]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = {q.question: (q.image, q.answer) for q in data.read_kept(tmp_path / "qa.jsonl")}
    assert kept == {"What is it?": (tmp_path / "a.png", ""), "Why?": (None, ""), "Who?": (None, ""), "How?": (None, ""),
                    "Where?": (None, "Here.")}


@pytest.mark.parametrize("text, message", [
    ('{"image": "a.png", "question": "What?", "answer": "a <image>"}', "qa:1: has <image> in its answer"),
    ('{"image": ["a.png", "b.png"], "question": "What?", "answer": "x"}', "qa:1: .*not a file name"),
    ('{"image": "a.png", "messages": [{"role": "user", "content": "What?"}]}', "qa:1: lacks a question"),
    ('{"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}', "qa:1: lacks"),
    ('{"image": "a.png", "conversations": "What?"}', "qa:1: lacks a question"),
    ('{"image": "a.png", "conversations": [{"role": "user", "content": [{"text": "What?"}]}, {"role": "assistant", "content": '
     '"x"}]}', "qa:1: lacks a question"),
    ("not json", "qa:1: is not JSON"), ('{"image": "a.png"', "qa:1: is not JSON"),
    ("[\n{]", "qa:2: is not JSON"), ("{}\n{", "qa:2: is not JSON"), ("[" * 10 ** 5, "is not JSON"),
    ("", "no questions"), ("[]", "no questions"), ("3", "qa:1: lacks a question"),
    ('{"image": "a.png", "text": "What?"}', "the probe needs both"),
    ('{"image": "a.png", "question": "What?", "answer": null}', "the probe needs both"),
    ('{"image": "../a.png", "question": "What?", "answer": "x"}', "leads out"),
    ('{"question": "What?", "answer": "x"}', "not a file name"),
    ('{"image": "b.png", "question": "What?", "answer": "x"}', "1 of 1 chosen images"),
    ('{"image": "a.png", "question": "", "answer": "x"}', "empty question"),
    ('\n{"image": "a.png", "conversations": [{"from": "gpt"}]}', "qa:2: lacks a question")])
def test_bad_question_files(tmp_path, text, message):
    (tmp_path / "a.png").touch()
    (tmp_path / "qa").write_text(text)
    with pytest.raises(InputError, match=message):
        read_qa(tmp_path / "qa")


def test_a_question_to_keep_about_an_image_that_is_not_there(tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"question": "Hi"}\n{"question": "<image>What?"}')
    with pytest.raises(InputError, match="qa.jsonl:2: has <image> in its answer, or in a question without an image"):
        data.read_kept(tmp_path / "qa.jsonl")


def test_json_is_read_as_utf_8_and_lines_end_at_newlines_alone(tmp_path):
    rows = [{"path": "caf\u00e9/\u72d7"}, {"text": "one\u2028two"}]
    (tmp_path / "a.jsonl").write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    assert data.read_json(tmp_path / "a.jsonl") == rows
    data.write_json(tmp_path / "a.json", rows)
    assert data.read_json(str(tmp_path / "a.json")) == rows
    for content in (b"{", b"\xff", b"[" * 10 ** 5):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match="a.json: cannot be read as JSON .*; make it again$"):
            data.read_json(tmp_path / "a.json", "; make it again")
    with pytest.raises(InputError, match="none.json: cannot be read as JSON"):
        data.read_json(tmp_path / "none.json")


ASCII = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
SCRIPT = """
import data, sys
def main():
    {}
data.guarded(main, KeyError)
"""


@pytest.mark.parametrize("code, status, error", [
    ("print('\u72d7 caf\u00e9 \udce9')", 0, ""), ("data.print_once('\u72d7 \udce9')", 0, ""),
    ("raise data.InputError('\u72d7.wav: is missing')", 2, "error: \\u72d7.wav: is missing"),
    ("raise KeyError('mine')", 2, "error: 'mine'"), ("raise KeyboardInterrupt", 130, ""),
    ("raise OSError(28, 'No space left on device')", 2, "start the same command again"),
    ("raise ZeroDivisionError", 1, "Traceback")])
def test_a_guarded_script_on_a_console_that_shows_ascii(tmp_path, code, status, error):
    (tmp_path / "script.py").write_text("# coding: utf-8" + SCRIPT.format(code.encode(errors='backslashreplace').decode()), encoding="utf-8")
    done = python(tmp_path / "script.py", check=False, env=ASCII)
    assert done.returncode == status and error in done.stderr
    assert status == 1 or "Traceback" not in done.stderr + done.stdout
    assert status or "\\u72d7" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format("print('x' * 10 ** 6)"))
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, tmp_path / "script.py"], env=ASCII, stdout=full, stderr=subprocess.PIPE,
                              text=True)
    lines = done.stderr.strip().split("\n")
    assert done.returncode == 2 and len(lines) == 1 and "No space left on device" in lines[0]


def test_names_of_another_alphabet_on_a_console_that_shows_ascii(tmp_path):
    clotho_table(tmp_path / "clotho_captions_evaluation.csv", "\u72d7.wav", "b.wav", "c.wav")
    put(tmp_path / "evaluation", "b.wav", "\u732b.wav")
    code = f"import data; print(len(data.read_split('clotho', {str(tmp_path)!r}, 'test').clips))"
    done = python("-c", code, env=ASCII)
    assert "such as \\u72d7.wav" in done.stdout and "\\u732b.wav" in done.stdout and done.stdout.endswith("\n1\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
def test_a_file_system_without_locks_is_said_once(clotho, clap, tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    data.print_once.cache_clear()
    monkeypatch.setattr(data.fcntl, "flock", refuse)
    for name in ("one", "two"):
        assert len(load_features(read_split("clotho", clotho, "test"), clap, tmp_path / name)) == 6
    assert data.cached_json(tmp_path / "one", "answers", [1], lambda: ["x"]) == ["x"]
    out = capsys.readouterr().out
    assert out.count(f"this file system has no locks ({os.strerror(number)})") == 1 and out.count("\n") == 1


def test_files_are_replaced_whole(tmp_path):
    data.write_json(tmp_path / "a.json", {"é": 1.5})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "é": 1.5\n}\n'
    with pytest.raises(ValueError):
        data.write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(InputError, match="cannot be written"):
        data.write_text(tmp_path / "none" / "a.txt", "x")
    assert os.listdir(tmp_path) == ["a.json"]


# --------------------------------------------------------------------- folders and names as people have them

CASES = SHARED / "cases"


def put(root, *names):
    """Files, each with its own name as content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name.encode(errors="surrogateescape").decode(errors="replace"))


def clotho_table(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("file_name,caption_1\n" + "".join(f'"{name.replace(chr(34), 2 * chr(34))}",x\n' for name in names), encoding="utf-8")


@pytest.mark.parametrize("top", ["", "AUDIOCAPS", "linked"])
def test_audiocaps_as_aac_datasets_lays_it_out(tmp_path, top):
    root = tmp_path / "AUDIOCAPS"
    audiocaps(root / "csv_files_v1", "1,-abc_def-gh,30,x\n2,zz_zz_zz_20,0,y\n3,gone,0,z\n")
    put(root, "audio_32000Hz/test/-abc_def-gh_30.flac", "audio_32000Hz/test/zz_zz_zz_20_0.flac",
        "audio_32000Hz/train/gone.flac", "train_fixed.csv", "class_labels_indices.csv")
    (tmp_path / "linked").symlink_to(root)
    split = read_split("audiocaps", tmp_path / top, "test")
    assert [clip.path.name for clip in split.clips] == ["-abc_def-gh_30.flac", "zz_zz_zz_20_0.flac"]
    assert split.missing == ["gone_0"]  # the file in train/ may be another piece of that video


def test_audiocaps_as_audiocaps_download_lays_it_out(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(AUDIOCAPS + "7,abc,30,x\n8,abd,0,y\n")
    put(tmp_path, "train/7.ogg", "train/8.ogg", "test/7.ogg", "val/8.ogg")
    split = read_split("audiocaps", tmp_path, "test")
    assert [clip.path for clip in split.clips] == [tmp_path / "test/7.ogg"] and split.missing == ["abd_0"]
    (tmp_path / "test").rename(tmp_path / "audio of evaluation")
    (tmp_path / "test.csv").rename(tmp_path / "Test.CSV")
    assert len(read_split("audiocaps", tmp_path, "test").clips) == 1


@pytest.mark.parametrize("table, audio", [
    ("CLOTHO_v2.1/clotho_csv_files/", "CLOTHO_v2.1/clotho_audio_files/evaluation/"),  # aac-datasets
    ("", "clotho_audio_evaluation/evaluation/"), ("", "clotho_audio_evaluation/"), ("", "audio/evaluation/"),
    ("", "evaluation/evaluation/"), ("csv/", ""), ("Clotho/", "Clotho/evaluation/")])
def test_clotho_as_people_unpack_it(tmp_path, table, audio):
    clotho_table(tmp_path / table / "clotho_captions_evaluation.csv", " a.wav", "b.wav", "gone.wav")
    others = ["test", "clotho_audio_files/test", "clotho_audio_development/development", "__MACOSX/evaluation"]
    put(tmp_path, audio + " a.wav", audio + "b.wav", audio + "._gone.wav", *(f"{o}/gone.wav" for o in others))
    split = read_split("clotho", tmp_path, "test")
    assert [(clip.id, clip.path.name) for clip in split.clips] == [("a.wav", " a.wav"), ("b.wav", "b.wav")]
    assert split.clips[0].path == tmp_path / audio / " a.wav" and split.missing == ["gone.wav"]


def test_two_tables_or_two_files_are_named_both(tmp_path):
    audiocaps(tmp_path / "csv_files_v1", "1,a,0,x\n")
    audiocaps(tmp_path / "csv_files_v2", "1,a,0,x\n", ["a.wav"])
    assert len(read_split("audiocaps", tmp_path, "test").clips) == 1  # the same bytes
    audiocaps(tmp_path / "csv_files_v2", "1,a,0,y\n")
    with pytest.raises(InputError, match="two tables, .*csv_files_v1/test.csv and .*csv_files_v2/test.csv.*sounds beside"):
        read_split("audiocaps", tmp_path, "test")
    clotho_table(tmp_path / "c/clotho_captions_evaluation.csv", "a.wav")
    put(tmp_path / "c", "a.mp3", "a.flac")
    with pytest.raises(InputError, match="a.wav could be .*a.flac or .*a.mp3"):
        read_split("clotho", tmp_path / "c", "test")
    root = audiocaps(tmp_path / "d", "1,v,30,x\n", ["audio/v_30.wav", "videos/v_30.mp4", "copy/v_30.wav"])
    assert read_split("audiocaps", root, "test").clips[0].path == root / "audio/v_30.wav"  # equal copies
    put(root, "copy/v_30.wav")
    with pytest.raises(InputError, match="v_30 could be .*audio/v_30.wav or .*copy/v_30.wav"):
        read_split("audiocaps", root, "test")
    put(tmp_path / "c", "evaluation/a.ogg")  # its folder decides
    assert read_split("clotho", tmp_path / "c", "test").clips[0].path.name == "a.ogg"


@pytest.mark.parametrize("dot", [False, True])
def test_a_folder_of_tables_alone_has_its_sounds_beside_it(tmp_path, monkeypatch, dot):
    for version, caption in (("v1", "x"), ("v2", "y")):
        audiocaps(tmp_path / f"AUDIOCAPS/csv_files_{version}", f"1,a,0,{caption}\n2,b,10,z\n")
    put(tmp_path / "AUDIOCAPS", "audio_32000Hz/test/a_0.flac", "audio_32000Hz/test/b_10.flac")
    root = tmp_path / "AUDIOCAPS/csv_files_v2"
    if dot:
        monkeypatch.chdir(root)
        root = "."
    split = read_split("audiocaps", root, "test")
    assert [clip.references for clip in split.clips] == [["y"], ["z"]]
    assert split.clips[0].path == tmp_path / "AUDIOCAPS/audio_32000Hz/test/a_0.flac"
    clotho_table(tmp_path / "CLOTHO_v2.1/clotho_csv_files/clotho_captions_evaluation.csv", "a.wav")
    put(tmp_path / "CLOTHO_v2.1/clotho_audio_files", "evaluation/a.wav", "development/a.wav")
    split = read_split("clotho", tmp_path / "CLOTHO_v2.1/clotho_csv_files", "test")
    assert split.clips[0].path.parent.name == "evaluation"
    audiocaps(tmp_path / "datasets/audiocaps", "1,a,0,x\n")  # another data set beside it is not searched
    put(tmp_path / "datasets/FSD50K", "1.wav")
    with pytest.raises(InputError, match="none of its 1 clips"):
        read_split("audiocaps", tmp_path / "datasets/audiocaps", "test")


def test_links_are_followed_and_loops_are_not(tmp_path):
    disk = tmp_path / "disk"
    put(disk, "deep/er/a.wav", "b/b.wav")
    root = audiocaps(tmp_path / "root", "1,a,0,x\n2,b,0,y\n3,c,0,z\n")
    (root / "x/y").mkdir(parents=True)
    (root / "x/y/audio").symlink_to(disk / "deep")
    (disk / "deep/er/b").symlink_to(disk / "b")
    (disk / "b/loop").symlink_to(disk)
    (root / "x/self").symlink_to(root / "x/self")
    (root / "c.wav").symlink_to(tmp_path / "no such file")
    split = read_split("audiocaps", root, "test")
    assert [clip.id for clip in split.clips] == ["a_0", "b_0"] and split.missing == ["c_0"]


@pytest.mark.parametrize("table, disk", [
    ("a.wav", " a.wav"), ("a.wav", "a .wav"), ("a.wav", "a.wav "), (" a.wav ", "a.wav"), ("a.wav", "a.WAV"),
    ("a.wav", "a.flac"), ("a.wav", "a.MP4"), ("a", "a.wav"), ("caf\u00e9.wav", "cafe\u0301.wav"),
    ("cafe\u0301.wav", "caf\u00e9.wav"), ("rain: roof?.wav", "rain_ roof_.wav"), ("rain: roof.wav", "rain_roof.wav"),
    ("rain: roof.wav", "rain- roof.wav"), ("rain: roof.wav", "rain roof.wav"), ('a"b"*.wav', "a_b__.wav"),
    ("a:b.wav", "a\uf022b.wav"), ("a:b.wav", "a\uff1ab.wav"), ("a b.wav", "a%20b.wav"), ("a%20b.wav", "a b.wav"),
    ("a b.wav", "a_b.wav"), ("a  b.wav", "a b.wav"), ("a.wav.", "a.wav"), ("a.wav", "A.wav"),
    ("x/a.wav", "a.wav"), ("x\\a.wav", "x/a.wav"), ("x/a.wav", "y/x/a.flac")])
def test_a_name_means_the_file_that_a_person_would_say(tmp_path, table, disk):
    clotho_table(tmp_path / "clotho_captions_evaluation.csv", table, "b.wav")
    put(tmp_path / "evaluation", disk, "b.wav", "c.wav")
    split = read_split("clotho", tmp_path, "test")
    assert split.missing == [] and split.clips[0].path == tmp_path / "evaluation" / disk


@pytest.mark.parametrize("names, disk, want", [
    (["a-1.wav"], ["a_1.wav"], {}),  # nothing turns - into _
    (["a:1.wav", "a_1.wav"], ["a_1.wav"], {"a_1.wav": "a_1.wav"}),  # the other one is not there
    (["a:1.wav", "a?1.wav"], ["a_1.wav"], {}), (["a.wav", "a.mp3"], ["a.flac"], {}),
    (["a.wav", "A.wav"], ["a.wav", "A.wav"], {"a.wav": "a.wav", "A.wav": "A.wav"}),
    (["a.wav"], ["a.wav", " a.wav"], {"a.wav": "a.wav"}), (["a.wav"], ["a.txt"], {}), (["a.b.wav"], ["a.wav"], {}),
    (["a.wav", "x/a.wav"], ["a.wav", "x/a.wav"], {"a.wav": "a.wav", "x/a.wav": "x/a.wav"}),
    (["x/a.wav", "y/a.wav"], ["y/a.flac"], {"y/a.wav": "y/a.flac"}), (["1.wav"], ["01.wav", "1.0.wav"], {})])
def test_a_name_never_means_another_clip(tmp_path, names, disk, want):
    clotho_table(tmp_path / "clotho_captions_evaluation.csv", *names, "b.wav")
    put(tmp_path / "evaluation", *disk, "b.wav")
    split = read_split("clotho", tmp_path, "test")
    paths = {clip.id: str(clip.path.relative_to(tmp_path / "evaluation")) for clip in split.clips}
    assert paths == {"b.wav": "b.wav", **want}


@pytest.mark.parametrize("rows, files, want", [
    ("1,v,1,x\n2,v,1000,y\n", ["v_1000.wav"], {"v_1000": "v_1000.wav"}),  # 1000 s, and not 1 s in milliseconds
    ("1,ab,30,x\n2,Yab,30,y\n", ["Yab_30.wav"], {"Yab_30": "Yab_30.wav"}),
    ("1,ab_30,0,x\n2,ab,30,y\n", ["ab_30.wav"], {"ab_30": "ab_30.wav"}),
    ("1,v,30,x\n", ["v_40.wav", "w_30.wav", "v_30_300.wav", "v_300.wav"], {}),
    ("9.0,v,30.0,x\n", ["test/9.mp3"], {"v_30": "test/9.mp3"}), ("1,v,30,x\n", ["v_30.txt"], {}),
    ("1,v,0.5,x\n", ["v_500.wav"], {"v_0.5": "v_500.wav"}), ("1,v,30,x\n", ["V_30.wav"], {})])
def test_audiocaps_names_never_mean_another_clip(tmp_path, rows, files, want):
    root = audiocaps(tmp_path, rows + "99,other,0,z\n", [*files, "other.wav"])
    clips = read_split("audiocaps", root, "test").clips
    assert {c.id: str(c.path.relative_to(root)) for c in clips} == {**want, "other_0": "other.wav"}


def test_many_missing_clips_are_shown_beside_what_is_there(tmp_path, capsys):
    clotho_table(tmp_path / "clotho_captions_evaluation.csv", *(f"rain {i}.wav" for i in range(20)))
    put(tmp_path / "evaluation", *(f"rain {i}.wav" for i in range(18)))
    assert len(read_split("clotho", tmp_path, "test").missing) == 2 and not capsys.readouterr().out  # a tenth
    (tmp_path / "evaluation/rain 3.wav").rename(tmp_path / "evaluation/rain three\x1b[2J.wav")
    assert read_split("clotho", tmp_path, "test").missing == ["rain 3.wav", "rain 18.wav", "rain 19.wav"]
    out = capsys.readouterr().out
    assert "3 of 20 clips, such as rain 3.wav, have no file; looked for" in out
    assert "'rain 3.wav', 'rain_3.*'; there: 'rain three" in out
    assert out.strip().isprintable()


def test_a_file_of_any_bytes_in_its_name_is_decoded(tmp_path, clap):
    clotho_table(tmp_path / "clotho_captions_evaluation.csv", "caf\u00e9.wav", "b\u00e9.wav")
    folder = tmp_path / "\udce9/evaluation"
    folder.mkdir(parents=True)
    wavfile.write(folder / "caf\u00e9.wav", RATE, noise(1.0))
    (folder / "b\u00e9.wav").write_bytes(b"broken")
    split = read_split("clotho", tmp_path, "test")
    assert len(decode_audio(split.clips[0].path, RATE, max_seconds=0.5)) == RATE / 2  # and its name is printed
    assert len(load_features(split, clap, tmp_path / "cache")) == 1 and split.bad == ["b\u00e9.wav"]


@pytest.mark.parametrize("encode, message", [
    (lambda text: text.encode("utf-16"), "is UTF-16 or no text; save the file as UTF-8"),
    (lambda text: text.encode("utf-16-le"), "is UTF-16"), (lambda text: text.encode("utf-16-be"), "is UTF-16")])
def test_tables_in_another_encoding_are_one_line(tmp_path, encode, message):
    audiocaps(tmp_path, "", ["a.wav"])
    (tmp_path / "test.csv").write_bytes(encode(AUDIOCAPS + "1,a,0,x\n"))
    with pytest.raises(InputError, match=message):
        read_split("audiocaps", tmp_path, "test")


@pytest.mark.parametrize("text", [
    AUDIOCAPS.replace(",", ";") + "1;a;0;x, y\n", AUDIOCAPS.replace(",", "\t") + "1\ta\t0\tx, y\n",
    AUDIOCAPS.replace("\n", "\r") + '1,a,0,"x, y"\r', AUDIOCAPS + '1,a,0,"x, y"\n,,,\n\n',
    AUDIOCAPS.title() + '1,a,0,"x, y"\n'])
def test_tables_as_spreadsheets_save_them(tmp_path, text):
    audiocaps(tmp_path, "", ["a.wav"])
    (tmp_path / "test.csv").write_bytes(text.encode())
    assert read_split("audiocaps", tmp_path, "test").clips[0].references == ["x, y"]


# ------------------------------------------------------------------------------------------- media, again


def test_sound_that_changes_its_rate_midway(tmp_path):
    parts = [write_audio(tmp_path / f"{rate}{layout}.mp3", [tone(2.0, 300, rate)] * (1 + (layout == "stereo")),
                         "libmp3lame", rate, layout).read_bytes() for rate, layout in ((44100, "mono"), (48000, "stereo"))]
    for order in (parts, parts[::-1]):
        (tmp_path / "joined.mp3").write_bytes(b"".join(order))
        wave = decode_audio(tmp_path / "joined.mp3", RATE)
        assert 3.8 * RATE < len(wave) < 4.3 * RATE
        for half in (wave[8000:24000], wave[40000:56000]):  # the same tone on both sides of the seam
            assert np.abs(np.fft.rfft(half)).argmax() == 300 and np.abs(half).max() == pytest.approx(0.5, abs=0.05)


@needs_shared
@pytest.mark.parametrize("name", ["ab.mp3", "ab2.mp3", "ms.aac"])
def test_joined_streams_are_decoded_whole(name):
    assert len(decode_audio(CASES / name, RATE)) == pytest.approx(4.07 * RATE, rel=0.01)


@needs_shared
def test_covers_and_rotation():
    film, turned = decode_video(CASES / "cover_first.mp4", 2), decode_video(CASES / "rotated_90.mp4", 2)
    assert film[0, :, :, 0].mean() > 100 and film[0, :, :, 1].mean() < 50  # not the green cover
    straight = decode_video(CASES / "not_rotated.mp4", 2)
    assert turned.shape == (2, 64, 32, 3) and (turned == np.rot90(straight, -1, (1, 2))).all()


def test_display_matrices():
    picture = np.arange(6).reshape(2, 3, 1)
    one = 1 << 16
    for (a, b, c, d), want in (((one, 0, 0, one), picture), ((0, one, -one, 0), np.rot90(picture, -1)),
                               ((-one, 0, 0, -one), np.rot90(picture, 2)), ((0, -one, one, 0), np.rot90(picture)),
                               ((-one, 0, 0, one), picture[:, ::-1]), ((0, one, one, 0), picture.swapaxes(0, 1))):
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], np.int32).tobytes()
        frame = SimpleNamespace(side_data={av.sidedata.sidedata.Type.DISPLAYMATRIX: matrix})
        assert (data._upright(picture, frame) == want).all()


def test_a_cover_alone_is_no_film(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        sound, cover = out.add_stream("aac", rate=RATE, layout="mono"), out.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(tone(1.0)[None, :1024], "fltp", "mono")
        frame.sample_rate = RATE
        out.mux(sound.encode(frame) + sound.encode(None))
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
    with pytest.raises(InputError, match="a.mp4: has no video stream"):
        decode_video(tmp_path / "a.mp4", 2)
    assert len(decode_audio(tmp_path / "a.mp4", RATE))


def test_an_older_cache_with_bad_clips_is_built_again(clotho, clap, tmp_path):
    (clotho / "evaluation" / "2.wav").write_bytes(b"broken")
    load_features(read_split("clotho", clotho, "test"), clap, tmp_path / "cache")
    path, = (tmp_path / "cache").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        tensors, notes = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    assert "2.wav" in json.loads(notes["bad"])["2.wav"]
    save_file({k: v + 1 for k, v in tensors.items()}, path, {**notes, "bad": '["2.wav"]'})
    again = load_features(read_split("clotho", clotho, "test"), clap, tmp_path / "cache")
    assert torch.equal(again.frames, tensors["frames"])


def test_images(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (np.asarray(data.open_image(tmp_path / "a.png")) == pixels).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show it
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert (np.asarray(data.open_image(tmp_path / "turned.png")) == np.rot90(pixels, -1)).all()
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    assert data.open_image(tmp_path / "grey.png").mode == "RGB"
    whole = (tmp_path / "a.png").read_bytes()
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    for name, content in (("cut.png", whole[:len(whole) // 2]), ("empty.png", b""), ("text.png", b"no image"),
                          ("crc.png", whole[:40] + b"\xff" * 9 + whole[49:])):
        (tmp_path / name).write_bytes(content)
    for name in ("cut", "empty", "text", "crc", "huge", "large", "none"):
        with pytest.raises(InputError, match=f"{name}.png: ") as error:
            data.open_image(tmp_path / f"{name}.png")
        assert "\n" not in str(error.value)


def test_others_may_read_what_is_written(tmp_path):
    """As the umask says, also where safetensors writes: a laboratory shares its features and checkpoints."""
    before = os.umask(0o022)
    try:
        with data._replacing(tmp_path / "features.safetensors") as tmp:
            data.save_file({"x": torch.zeros(1)}, tmp)
        data.write_text(tmp_path / "text", "x")
        os.umask(0o027)
        data.write_text(tmp_path / "private", "x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"features.safetensors": 0o644, "text": 0o644, "private": 0o640}
