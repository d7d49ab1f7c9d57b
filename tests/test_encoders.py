"""The contract of data.Encoder, kept by a small random checkpoint of every type in data.ENCODERS, saved and loaded."""
import json
import shutil

import data  # first: it makes torchaudio importable, which transformers needs
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_data import clap_folder, timesformer_folder  # noqa: F401  fixtures
from test_data import clotho  # noqa: F401
from test_train import run

import evaluate
import fusion as fusions

AUDIO = [name for name, encoder in data.ENCODERS.items() if encoder.modality == "audio"]
VIDEO = [name for name, encoder in data.ENCODERS.items() if encoder.modality == "video"]


def whisper():
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3)
    return hf.WhisperModel(config), hf.WhisperFeatureExtractor()


def ast():
    config = hf.ASTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                          num_mel_bins=64, max_length=256)
    return hf.ASTModel(config), hf.ASTFeatureExtractor(num_mel_bins=64, max_length=256)


def pe_audio():
    # of the released shape, which has 48,000 samples a second and 1920 of them a frame
    audio = dict(dac_config=dict(encoder_hidden_size=4, codebook_dim=8, hidden_size=64), hidden_size=32, head_dim=16,
                 intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return hf.PeAudioModel(hf.PeAudioConfig(audio_config=audio, text_config=text)), hf.PeAudioFeatureExtractor()


def videomae():
    config = hf.VideoMAEConfig(image_size=32, patch_size=8, num_frames=8, hidden_size=32, num_hidden_layers=2,
                               num_attention_heads=2, intermediate_size=64, use_mean_pooling=False)
    size = {"height": 32, "width": 32}
    return hf.VideoMAEModel(config), hf.VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)


def vjepa2():
    config = hf.VJEPA2Config(
        crop_size=32, patch_size=8, frames_per_clip=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        mlp_ratio=2, pred_hidden_size=16, pred_num_hidden_layers=1, pred_num_attention_heads=2)
    return hf.VJEPA2Model(config), None


# as in facebook/vjepa2-vitl-fpc64-256
VJEPA2_PROCESSOR = {
    "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 36}, "do_center_crop": True, "do_resize": True,
    "do_normalize": True, "do_rescale": True, "image_mean": [.485, .456, .406], "image_std": [.229, .224, .225],
    "resample": 2, "rescale_factor": 1 / 255, "video_processor_type": "VJEPA2VideoProcessor"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, clap_folder, timesformer_folder):  # noqa: F811
    made = {"clap": clap_folder, "timesformer": timesformer_folder}
    for name, make in {"whisper": whisper, "audio-spectrogram-transformer": ast, "pe_audio": pe_audio,
                       "videomae": videomae, "vjepa2": vjepa2}.items():
        torch.manual_seed(0)
        model, processor = make()
        made[name] = tmp_path_factory.mktemp(name)
        # as many checkpoints are released
        model.to(torch.bfloat16 if name == "whisper" else torch.float32).save_pretrained(made[name])
        if processor is None:
            (made[name] / "video_preprocessor_config.json").write_text(json.dumps(VJEPA2_PROCESSOR))
        else:
            processor.save_pretrained(made[name])
    return made


@pytest.fixture
def encoder(request, folders):
    encoder_class = data.ENCODERS[request.param]
    return data.load_encoder(str(folders[request.param]), encoder_class.modality, "cpu")


of_every_type = pytest.mark.parametrize("encoder", data.ENCODERS, indirect=True)
of_sound = pytest.mark.parametrize("encoder", AUDIO, indirect=True)
of_video = pytest.mark.parametrize("encoder", VIDEO, indirect=True)


def noise(encoder, seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * encoder.rate))).astype(np.float32)


def window(encoder):
    return encoder.size / encoder.rate


@of_every_type
def test_the_contract(encoder, folders):
    clips = encoder.noise(np.random.default_rng(0), 3)
    again = encoder.noise(np.random.default_rng(0), 3)
    assert len(clips) == 3 and all((a == b).all() for a, b in zip(clips, again)) and (clips[0] != clips[1]).any()
    assert encoder.silence().shape == clips[0].shape and not encoder.silence().any()
    assert (encoder.rate is None) == (encoder.modality == "video") == (encoder.frames is not None)
    for frames in encoder.encode([encoder.silence(), *clips]):
        assert frames.shape[1] == encoder.width and frames.dtype == torch.float32 and frames.isfinite().all()
        if encoder.rate:
            assert 1.5 < len(frames) / window(encoder) < 10.5  # frames a second
    assert encoder.encode([]) == []
    # another folder with the same in it is the same encoder
    kind = type(encoder)
    assert kind(folders[next(n for n, k in data.ENCODERS.items() if k is kind)]).hash == encoder.hash
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training


@of_every_type
def test_one_is_batched(encoder):
    clips = encoder.noise(np.random.default_rng(0), 5)
    if encoder.rate:
        clips = [noise(encoder, seconds * window(encoder), i) for i, seconds in enumerate((.05, 1, 2.4, 1.5, .3))]
    together = encoder.encode(clips)
    for clip, frames in zip(clips, together):
        torch.testing.assert_close(encoder.encode([clip])[0], frames, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(encoder.encode(clips, batch_size=2), together, rtol=1e-3, atol=1e-4)


@of_sound
def test_windows_follow_each_other(encoder):
    """Two windows and a half are two whole ones and the end of a third; a tail of less than a second is dropped."""
    size = encoder.size
    wave = noise(encoder, 2.5 * window(encoder))
    parts = encoder.encode([wave[:size], wave[size:2 * size], wave[-size:]])
    S = len(parts[0])
    frames, = encoder.encode([wave])
    assert len(frames) == 2 * S + (S + 1) // 2
    torch.testing.assert_close(frames, torch.cat([*parts[:2], parts[2][-((S + 1) // 2):]]), rtol=1e-3, atol=1e-4)
    whole, = encoder.encode([wave[:size + encoder.rate - 1]])
    torch.testing.assert_close(whole, parts[0], rtol=1e-3, atol=1e-4)


@of_sound
def test_only_frames_with_sound_are_kept(encoder):
    """Of what fills a short clip's window there are no frames; CLAP fills it with the clip itself."""
    S = len(encoder.encode([encoder.silence()])[0])
    for share in (.02, .25, .5, 1):
        frames, = encoder.encode([noise(encoder, share * window(encoder))])
        assert len(frames) == (S if isinstance(encoder, data.ClapEncoder) else np.ceil(share * S))
    if isinstance(encoder, data.WhisperEncoder):
        # it was trained with silence behind a clip's sound
        wave = noise(encoder, window(encoder))
        wave[encoder.size // 2:] = 0
        short, = encoder.encode([wave[:encoder.size // 2]])
        torch.testing.assert_close(short, encoder.encode([wave])[0][:len(short)])


@of_sound
def test_frames_of_sound_are_in_time_order(encoder):
    quiet = noise(encoder, window(encoder)) * 1e-3
    centre, before = [], encoder.encode([quiet])[0]
    for share in (1 / 8, 7 / 8):
        wave = quiet.copy()
        first = int(share * encoder.size)
        wave[first:first + encoder.rate // 20] += 0.9
        changed = (encoder.encode([wave])[0] - before).norm(dim=1)
        centre.append(float(changed @ torch.linspace(0, 1, len(changed)) / changed.sum()))
        assert (changed.argmax() < len(changed) / 2) == (share < 1 / 2)
    assert centre[0] < centre[1]


@of_video
def test_frames_of_video_are_in_time_order(encoder):
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (encoder.frames, 40, 48, 3), np.uint8)
    before, = encoder.encode([video])
    assert len(before) in (encoder.frames, encoder.frames // 2)
    for picture in (0, encoder.frames - 1):
        other = video.copy()
        other[picture] = 255 - other[picture]
        changed = (encoder.encode([other])[0] - before).norm(dim=1)
        assert changed.argmax() == picture * len(before) // encoder.frames


def test_whisper_is_the_library_call_with_its_first_positions(folders):
    """A window's frames are means of eight of the library's, whose encoder is given as many positions."""
    encoder = data.load_encoder(str(folders["whisper"]), "audio", "cpu")
    wave = noise(encoder, 10)
    frames, = encoder.encode([wave])
    extractor = hf.WhisperFeatureExtractor.from_pretrained(folders["whisper"])
    mels = extractor(wave, sampling_rate=16000, return_tensors="pt")["input_features"][..., :1000]
    model = hf.WhisperModel.from_pretrained(folders["whisper"], dtype=torch.float32).encoder
    positions = model.embed_positions.weight[:500]
    model.config.max_source_positions = model.embed_positions.num_embeddings = 500
    model.embed_positions.weight = torch.nn.Parameter(positions)
    with torch.no_grad():
        want, = model(mels).last_hidden_state
    assert frames.shape == (63, 32)
    # the library's last column looks into the silence behind the window
    torch.testing.assert_close(frames[:60], want[:480].reshape(60, 8, 32).mean(1), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(frames[62], want[496:].mean(0), rtol=5e-2, atol=5e-2)


def test_the_hash_follows_pooling_and_weights(folders, tmp_path, monkeypatch):
    before = data.WhisperEncoder(folders["whisper"]).hash
    monkeypatch.setattr(data.WhisperEncoder, "POOL", 10)
    assert data.WhisperEncoder(folders["whisper"]).hash != before
    monkeypatch.undo()
    model = hf.WhisperModel.from_pretrained(folders["whisper"], dtype=torch.float32)
    with torch.no_grad():
        model.encoder.conv1.bias[0] += 1
    model.save_pretrained(tmp_path)
    hf.WhisperFeatureExtractor().save_pretrained(tmp_path)
    assert data.WhisperEncoder(tmp_path).hash != before


def test_vjepa2s_pictures_are_prepared_as_its_own_processor_does(folders):
    """Its processor needs torchvision; the released settings are: shorter side to 256/224 of the crop, centre, ImageNet."""
    encoder = data.load_encoder(str(folders["vjepa2"]), "video", "cpu")
    grey = np.full((encoder.frames, 40, 60, 3), 128, np.uint8)
    grey[:, :, 30:] = 255  # right of the middle
    pixels = encoder.prepare(grey).float()
    assert pixels.shape == (encoder.frames, 3, 32, 32)
    for channel, (mean, std) in enumerate(zip(VJEPA2_PROCESSOR["image_mean"], VJEPA2_PROCESSOR["image_std"])):
        torch.testing.assert_close(pixels[0, channel, 5, 5], torch.tensor((128 / 255 - mean) / std), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(pixels[0, channel, 5, 28], torch.tensor((1 - mean) / std), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("modality, other", [("audio", "timesformer"), ("video", "whisper"), ("audio", None)])
def test_an_unknown_type_or_modality_is_one_line(modality, other, folders, tmp_path):
    folder = folders[other] if other else tmp_path
    if not other:
        (folder / "config.json").write_text('{"model_type": "beats"}')
    with pytest.raises(data.InputError, match=f"says {other or 'beats'}; encoders of {modality} are ") as error:
        data.load_encoder(str(folder), modality, "cpu")
    known = AUDIO if modality == "audio" else VIDEO
    assert str(error.value).endswith(", ".join(known)) and "\n" not in str(error.value)
    with pytest.raises(data.InputError, match="cannot be loaded"):
        data.load_encoder(str(tmp_path / "nothing here"), modality, "cpu")


class Wav2Vec2Encoder(data.AudioEncoder):
    """An encoder that is not in the table."""
    unused = ("masked_spec_embed",)  # for training; checkpoints are released with it and without

    def __init__(self, path, device="cpu"):
        model, self.extractor, settings = data._pretrained(
            path, hf.Wav2Vec2Model, hf.Wav2Vec2FeatureExtractor, unused=self.unused)
        hash = data._hash_model(f"{settings} 10 8", model)
        super().__init__(path, device, model, model.config.hidden_size, hash)
        self.rate = self.extractor.sampling_rate
        self.size = 10 * self.rate

    def inputs(self, windows):
        return self.extractor(windows, sampling_rate=self.rate, padding="max_length", max_length=self.size,
                              return_tensors="pt")["input_values"]

    def hear(self, inputs):
        return data._mean_of(self.model(inputs).last_hidden_state, 8)


def save_wav2vec2(folder):
    config = hf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    torch.manual_seed(0)
    hf.Wav2Vec2Model(config).save_pretrained(folder)
    hf.Wav2Vec2FeatureExtractor().save_pretrained(folder)


def without(folder, beginning, out):
    """A copy of a checkpoint that lacks the weights whose names begin so."""
    shutil.copytree(folder, out)
    weights, kept = load_file(out / "model.safetensors"), {}
    for name, tensor in weights.items():
        if not name.startswith(beginning):
            kept[name] = tensor
    assert len(kept) < len(weights)
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


def test_only_weights_that_no_frame_depends_on_may_lack(folders, tmp_path):
    save_wav2vec2(tmp_path / "whole")
    for kind, folder, unused, used in (
            (Wav2Vec2Encoder, tmp_path / "whole", "masked_spec_embed", "encoder.layer_norm"),
            (data.WhisperEncoder, folders["whisper"], "decoder.", "encoder.layer_norm"),
            (data.PEAudioEncoder, folders["pe_audio"], "text_", "audio_encoder.norm"),
            (data.VJEPA2Encoder, folders["vjepa2"], "predictor.", "encoder.layernorm")):
        name = kind.__name__
        whole, part = kind(folder), kind(without(folder, unused, tmp_path / f"{name} part"))
        clips = whole.noise(np.random.default_rng(0), 1)
        assert torch.equal(part.encode(clips)[0], whole.encode(clips)[0])
        assert kind(tmp_path / f"{name} part").hash == part.hash  # nothing in it is random
        with pytest.raises(data.InputError, match=f"[12] weights lack: {used}") as error:
            kind(without(folder, used, tmp_path / f"{name} broken"))
        assert "\n" not in str(error.value)


def test_another_encoder_in_a_few_lines(clotho, tmp_path, monkeypatch):  # noqa: F811
    """With a line in the table it loads by its model_type, goes through the cache and keeps its order."""
    save_wav2vec2(tmp_path / "model")
    monkeypatch.setitem(data.ENCODERS, "wav2vec2", Wav2Vec2Encoder)
    encoder = data.load_encoder(str(tmp_path / "model"), "audio", "cpu")
    split = data.read_split("clotho", clotho, "test")
    features = data.load_features(split, encoder, tmp_path / "cache")
    for i, clip in enumerate(split.clips):
        wave = data.decode_audio(clip.path, encoder.rate)
        frames, = encoder.encode([wave])
        assert frames.shape == (np.ceil(len(wave) / encoder.size * 63), 32)
        torch.testing.assert_close(features[i], frames, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- the space that sound and text share


def test_the_judge_is_the_encoder_where_that_is_a_clap(folders):
    clap, whisper = str(folders["clap"]), str(folders["whisper"])
    assert data.clap_path({"encoder": clap}) == clap and data.clap_path({"encoder": whisper}) is None
    assert data.clap_path({"encoder": whisper, "clap": clap}) == clap
    assert data.clap_of({"encoder": clap, "clap": None}, "cpu", "x").model is data.load_encoder(clap, "audio", "cpu").model
    with pytest.raises(data.InputError, match="is no CLAP, and --contrastive needs one beside it: --clap") as error:
        data.clap_of({"encoder": whisper, "clap": None}, "cpu", "--contrastive")
    assert "\n" not in str(error.value)
    with pytest.raises(data.InputError, match="ClapModel"):
        data.clap_of({"encoder": clap, "clap": whisper}, "cpu", "--rerank")


def test_ears_and_judge_have_a_cache_each(folders, clotho, tmp_path, monkeypatch):  # noqa: F811
    split = data.read_split("clotho", clotho, "test")
    ears, judge = data.load_encoder(str(folders["whisper"]), "audio", "cpu"), data.load_clap(str(folders["clap"]), "cpu")
    features = data.load_features(split, ears, tmp_path)
    embeds = data.load_embeddings(split, judge, tmp_path)
    assert sorted(path.name.split("_")[0] for path in tmp_path.glob("*.safetensors")) == ["audio", "clap"]
    waves = [data.decode_audio(clip.path, judge.rate) for clip in split.clips]
    torch.testing.assert_close(embeds, judge.embed_sounds(waves), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(split.clips)))
    assert features.frames.shape[1] == 32 and not hasattr(features, "embeds")
    monkeypatch.setattr(judge, "prepare", lambda *_: pytest.fail("listened again"))
    assert torch.equal(data.load_embeddings(split, judge, tmp_path), embeds)
    (clotho / "evaluation" / "2.wav").write_bytes(b"broken")
    monkeypatch.undo()
    with pytest.raises(data.InputError, match="2.wav.*CLAP cannot judge it"):
        data.load_embeddings(split, judge, tmp_path)


@of_every_type
def test_silence_and_noise(encoder):
    (silence,), noises = evaluate.silence_and_noise(encoder, seed=0, clips=2)
    assert len(noises) == 2 and silence.shape == noises[0].shape and not torch.equal(silence, noises[0])


# ---------------------------------------------------------------- through the command lines


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_one_listens_and_another_judges(world, folders, tmp_path):
    """Whisper's frames, CLAP's contrastive term and choice; nothing of CLAP reaches the fusion's input."""
    ears, clap, out = folders["whisper"], world / "models/clap", tmp_path / "run"
    short = ["--encoder", ears, "--cache", tmp_path / "cache", "--steps", 2, "--eval-every", 1, "--limit-clips", 16]
    deaf = run(world, out, *short, check=False)
    assert deaf.returncode == 2 and deaf.stderr.count("\n") == 1 and not out.exists()
    assert "whisper" in deaf.stderr and "--contrastive needs one beside it: --clap" in deaf.stderr
    run(world, out, *short, "--clap", clap)
    evaluate.main(["caption", str(out), "--rerank", "--samples", "2", "--beams", "2"])
    card = read(out / "run_card.json")
    assert card["clap"] == {"listens": None, "trains": str(clap), "reranks": None, "scores": None}
    assert read(out / "rerank/run_card.json")["clap"] == {**card["clap"], "reranks": str(clap)}
    assert card["encoder"]["path"] == str(ears) and "clap_cosine" not in read(out / "result.json")
    assert fusions.load(out, data.load_backbone(str(world / "models/llava"), "cpu").decoder).spec.encoder_width == 32
    evaluate.main(["robustness", str(out), "--snr", "0", "--noise", "white"])
    evaluate.main(["retention", str(out), "--qa", str(world / "data/qa/test.json"), "--limit-questions", "20"])
    kept = read(out / "retention.json")
    assert {"silence", "noise"} <= kept["conditions"].keys() and all(kept["exact"].values())


def test_a_judge_that_took_no_part_scores(world, folders, tmp_path):
    """Without --clap a run has no reranker; with it, named only now, a mean cosine that the run card vouches for."""
    ears, clap, out = folders["audio-spectrogram-transformer"], str(world / "models/clap"), tmp_path / "run"
    run(world, out, "--encoder", ears, "--cache", tmp_path / "cache", "--steps", 2, "--eval-every", 1, "--limit-clips", 16,
        "--contrastive", 0)
    with pytest.raises(data.InputError, match="is no CLAP, and the reranker needs one"):
        evaluate.main(["caption", str(out), "--rerank"])
    evaluate.main(["caption", str(out), "--beams", "1", "--clap", clap])
    card, result = read(out / "run_card.json"), read(out / "result.json")
    assert card["clap"] == {"listens": None, "trains": None, "reranks": None, "scores": clap}
    judge, items = data.load_clap(clap, "cpu"), read(out / "predictions.json")
    split = data.read_split("audiocaps", world / "data/audiocaps", "test")
    sounds = judge.embed_sounds([data.decode_audio(clip.path, judge.rate) for clip in split.clips])
    texts = judge.embed_text([item["prediction"] for item in items])
    assert result["clap_cosine"] == pytest.approx(float((sounds * texts).sum(1).mean()), abs=1e-4)
