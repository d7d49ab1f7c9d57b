"""Identities of the fusions and of the split, on decoders of four families."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusion as fusions
from fusion import FusionError

GATED = ["additive", "cross_attention", "unfreeze", "data_only"]
SIZE = dict(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)


def language_model(family):
    from transformers import (AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig, PhiConfig, Qwen2Config,
                              Qwen3Config)
    config = {
        "llama": lambda: LlamaConfig(**SIZE, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**SIZE, num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
                                     max_window_layers=2),
        "qwen3": lambda: Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16),
        "gpt_neox": lambda: GPTNeoXConfig(**SIZE),
        "gemma2": lambda: Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=16, sliding_window=4),
        "phi": lambda: PhiConfig(**SIZE),
    }[family]()
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # a freshly initialised head gives near-ties, which no two code paths would break alike
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model.eval().requires_grad_(False)


def decoder_of(model):
    return next(m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))


FAMILIES = ["llama", "qwen2", "qwen3", "gpt_neox", "gemma2", "phi"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return language_model("llama")


def make(system, decoder, layers=(2, 4), seed=1, **kwargs):
    torch.manual_seed(seed)
    fusion = fusions.build(system, decoder, encoder_width=24, layers=list(layers), tokens=5, hidden=32, **kwargs)
    if system in ("cross_attention", "unfreeze"):
        fusion.set_gates(0.8)
    return fusion.eval()


def inputs(B=3, T=12, S=9):
    torch.manual_seed(2)
    slots = torch.arange(1, 6).expand(B, -1)
    return torch.randint(3, 60, (B, T)), torch.randn(B, S, 24), torch.ones(B, S, dtype=torch.bool), slots


# ---------------------------------------------------------------- closed, open, gone

@pytest.mark.parametrize("layers", [(0,), (2,), (5,), (2, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("system", GATED)
def test_closed_gates_are_the_backbone(model, system, layers):
    decoder, (ids, frames, mask, _) = decoder_of(model), inputs()
    fusion = make(system, decoder, layers)
    with torch.no_grad():
        before = model(ids).logits
        with fusion.attach(decoder, frames, mask):
            opened = model(ids).logits
        fusion.set_gates(0.0)
        with fusion.attach(decoder, frames, mask):
            closed = model(ids).logits
        after = model(ids).logits
    assert torch.equal(closed, before) and torch.equal(after, before)
    assert (opened - before).abs().max() > 1e-3
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_nothing_is_left_behind_after_an_exception(llama, system):
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    blocks, weights = list(decoder.layers), {k: v.clone() for k, v in llama.state_dict().items()}
    fusion = make(system, decoder)
    with pytest.raises(ZeroDivisionError), fusion.attach(decoder, frames, mask, slots):
        llama(ids)
        1 / 0
    assert all(a is b for a, b in zip(blocks, decoder.layers))
    assert not any(m._forward_pre_hooks for m in llama.modules())
    assert all(torch.equal(v, weights[k]) for k, v in llama.state_dict().items())


@pytest.mark.parametrize("system", GATED)
def test_a_null_slot(llama, system, tmp_path):
    """At the start it takes its share of the read-out; with a large logit nothing is read; closed gates stay exact."""
    decoder, (ids, frames, mask, _) = decoder_of(llama), inputs()
    plain, fusion = make(system, decoder), make(system, decoder, null_slot=True)
    fusion.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        before = llama(ids).logits
        with plain.attach(decoder, frames, mask):
            opened = llama(ids).logits
        with fusion.attach(decoder, frames, mask):
            assert (llama(ids).logits - opened).abs().max() > 1e-3      # a slot takes its share
        h = torch.rand(3, 12, 64) + 0.1
        block = getattr(fusion, "block", None)
        for layer, null in fusion.null.items():
            if block:  # a LayerNorm that lets a constant direction through
                block[layer]["norm"].bias.fill_(100)
                plain.block[layer]["norm"].bias.fill_(100)
                null.copy_(1000 * block[layer]["q"](block[layer]["norm"].bias))
            else:      # queries of positive states all point along ones
                null.fill_(1000)
            prepared = fusion.prepare(fusion.tokens(frames, mask))[int(layer)]
            torch.testing.assert_close(fusion.change(int(layer), h, prepared, None), h, atol=1e-6, rtol=0)
            null.neg_()  # and with a small one all is read
            torch.testing.assert_close(fusion.change(int(layer), h, prepared, None),
                                       plain.change(int(layer), h, prepared, None), atol=1e-4, rtol=1e-5)
        fusion.set_gates(0.0)
        with fusion.attach(decoder, frames, mask):
            assert torch.equal(llama(ids).logits, before)
    fusion.save(tmp_path)
    again = fusions.load(tmp_path, decoder)
    assert all(torch.equal(a, b) for a, b in zip(fusion.state_dict().values(), again.state_dict().values()))
    plain.save(tmp_path)                                                # as before there were null slots
    spec = json.loads((tmp_path / "fusion.json").read_text())
    del spec["null_slot"]
    (tmp_path / "fusion.json").write_text(json.dumps(spec))
    assert not fusions.load(tmp_path, decoder).null
    with pytest.raises(FusionError, match="--null-slot"):
        make("concat", decoder, null_slot=True)


def test_unfreeze_swaps_its_blocks_in_and_out(llama):
    decoder, (ids, *_) = decoder_of(llama), inputs()
    fusion = make("unfreeze", decoder)
    with torch.no_grad():
        next(iter(fusion.top.values())).mlp.down_proj.weight.mul_(1.5)
        before = llama(ids).logits
        with fusion.attach(decoder):
            assert not torch.equal(llama(ids).logits, before)
        assert torch.equal(llama(ids).logits, before)


# ---------------------------------------------------------------- generation

@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_greedy_with_cache_equals_teacher_forced_argmax(model, system):
    decoder, (ids, frames, mask, slots) = decoder_of(model), inputs()
    with torch.no_grad(), make(system, decoder).attach(decoder, frames, mask, slots):
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                              eos_token_id=None)
        best = model(rows).logits[:, ids.shape[1] - 1:-1].argmax(-1)
    assert torch.equal(rows[:, ids.shape[1]:], best)


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_beams_of_one_clip_equal_beams_of_the_batch(llama, system):
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    fusion, how = make(system, decoder), dict(max_new_tokens=6, num_beams=3, num_return_sequences=3, eos_token_id=None)
    with torch.no_grad():
        with fusion.attach(decoder, frames, mask, slots):
            batch = llama.generate(ids, **how)
        for b in range(3):
            with fusion.attach(decoder, frames[b:b + 1], mask[b:b + 1], slots[b:b + 1]):
                one = llama.generate(ids[b:b + 1], **how)
            assert torch.equal(one, batch[3 * b:3 * b + 3])


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_each_row_hears_the_clip_it_is_given(llama, system):
    """Clips with unequally many rows, and none of it left when the block ends."""
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    fusion, whose = make(system, decoder), torch.tensor([0, 2, 2, 2])
    with torch.no_grad():
        with fusion.attach(decoder, frames[whose], mask[whose], slots[whose]):
            wanted = decoder(ids[whose]).last_hidden_state
        with fusion.attach(decoder, frames, mask, slots):
            with fusion.rows(whose):
                assert torch.allclose(decoder(ids[whose]).last_hidden_state, wanted, atol=1e-5)
                with pytest.raises(FusionError, match="3 sequences for 3 clips"):
                    decoder(ids)
            own = decoder(ids).last_hidden_state                        # again a row for each clip, in order
            assert torch.allclose(own[[0, 2]], wanted[:2], atol=1e-5)
            with pytest.raises(ZeroDivisionError), fusion.rows(whose):
                1 / 0
            assert torch.equal(decoder(ids).last_hidden_state, own)


def test_left_padding_changes_nothing(llama):
    decoder, (ids, frames, mask, _) = decoder_of(llama), inputs()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
    attention = (torch.arange(16) >= 4).long().expand(3, -1)
    with torch.no_grad(), make("additive", decoder).attach(decoder, frames, mask):
        plain = llama.generate(ids, max_new_tokens=5, eos_token_id=None)[:, 12:]
        left = llama.generate(padded, attention_mask=attention, max_new_tokens=5, eos_token_id=None)[:, 16:]
    assert torch.equal(plain, left)


def test_padded_frames_change_nothing(llama):
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    longer = torch.cat([frames, torch.full((3, 7, 24), 9.0)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 7, dtype=torch.bool)], 1)
    for system in ("additive", "cross_attention", "concat"):
        fusion = make(system, decoder)
        with torch.no_grad():
            assert torch.allclose(fusion.tokens(frames, mask), fusion.tokens(longer, longer_mask), atol=1e-5)


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_bfloat16_backbone_under_autocast(system):
    """How a GPU trains: frozen bfloat16 weights, float32 adapters, autocast."""
    llama = language_model("llama").bfloat16()
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    fusion = make(system, decoder)
    assert all(p.dtype == torch.float32 for p in fusion.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        with fusion.attach(decoder, frames, mask, slots):
            trunk, head = fusions.split(decoder, 2)
            with torch.no_grad():
                states = trunk(ids, use_cache=False).last_hidden_state
            llama.lm_head(head(inputs_embeds=states, use_cache=False).last_hidden_state).float().square().mean().backward()
            rows = llama.generate(ids, max_new_tokens=3, num_beams=2, eos_token_id=None)
        assert rows.shape == (3, 15) and sum(p.grad is not None for p in fusion.parameters()) > 5
        if system in ("additive", "cross_attention"):
            before = llama(ids).logits
            fusion.set_gates(0.0)
            with fusion.attach(decoder, frames, mask):
                assert torch.equal(llama(ids).logits, before)


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_a_clip_changes_its_own_rows_and_with_data_only_nothing(llama, system):
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    fusion, other = make(system, decoder), frames.clone()
    other[1] = 0.5
    with torch.no_grad():
        with fusion.attach(decoder, frames, mask, slots):
            a = llama(ids).logits
        with fusion.attach(decoder, other, mask, slots):
            b = llama(ids).logits
    assert torch.allclose(a[[0, 2]], b[[0, 2]], atol=1e-5)
    assert torch.equal(a[1], b[1]) if system == "data_only" else not torch.allclose(a[1], b[1], atol=1e-3)


def test_pooling_matches_torch_on_full_clips():
    frames = torch.randn(2, 13, 7)
    pooled = fusions.masked_adaptive_pool(frames, torch.ones(2, 13, dtype=torch.bool), 5)
    wanted = torch.nn.functional.adaptive_avg_pool1d(frames.transpose(1, 2), 5).transpose(1, 2)
    assert torch.allclose(pooled, wanted, atol=1e-6)


def test_clip_shorter_than_the_tokens():
    frames = torch.arange(3.0)[None, :, None]
    pooled = fusions.masked_adaptive_pool(frames, torch.ones(1, 3, dtype=torch.bool), 8)[0, :, 0]
    assert pooled.isfinite().all() and (pooled.diff() >= 0).all() and pooled[0] == 0 and pooled[-1] == 2


# ---------------------------------------------------------------- split

@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_head_of_trunk_is_the_whole(model, k):
    decoder, (ids, *_) = decoder_of(model), inputs()
    trunk, head = fusions.split(decoder, k)
    with torch.no_grad():
        whole = decoder(ids, use_cache=False).last_hidden_state
        states = trunk(ids, use_cache=False).last_hidden_state
        parts = head(inputs_embeds=states, use_cache=False).last_hidden_state
    assert torch.equal(parts, whole)
    assert len(decoder.layers) == SIZE["num_hidden_layers"] == decoder.config.num_hidden_layers


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_gradients_through_the_head_equal_those_through_the_whole(model, system):
    decoder, (ids, frames, mask, slots) = decoder_of(model), inputs()
    fusion = make(system, decoder)
    with fusion.attach(decoder):
        trunk, head = fusions.split(decoder, 2)
    found = []
    for through_head in (False, True):
        fusion.zero_grad()
        with fusion.attach(decoder, frames, mask, slots):
            if through_head:
                with torch.no_grad():
                    states = trunk(ids, use_cache=False).last_hidden_state
                out = head(inputs_embeds=states, use_cache=False).last_hidden_state
            else:
                out = decoder(ids, use_cache=False).last_hidden_state
        out.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in fusion.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-6), name
    assert all(p.grad is None for p in decoder.parameters())


@pytest.mark.parametrize("system", ["additive", "cross_attention", "concat"])
def test_every_parameter_learns(llama, system):
    """No deadlock of a zero gate on a zero output: within two steps each tensor has had a gradient."""
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    torch.manual_seed(0)
    fusion = fusions.build(system, decoder, encoder_width=24, layers=[2, 4], tokens=5, hidden=32)
    optimizer, moved = torch.optim.SGD(fusion.parameters(), lr=0.1), set()
    for _ in range(3):
        with fusion.attach(decoder, frames, mask, slots):
            decoder(ids, use_cache=False).last_hidden_state.square().mean().backward()
        moved |= {n for n, p in fusion.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == {n for n, _ in fusion.named_parameters()}


# ---------------------------------------------------------------- budgets and files

def test_budgets_match_at_full_width():
    from transformers import LlamaConfig, LlamaModel
    with torch.device("meta"):
        decoder = LlamaModel(LlamaConfig()).requires_grad_(False)  # 32 layers, width 4096: LLaVA-1.5-7B's
        assert (len(decoder.layers), decoder.config.hidden_size) == (32, 4096)
        for layers in ([12], [12, 24]):
            count = {system: fusions.count_parameters(fusions.build(
                system, decoder, encoder_width=768, layers=layers, tokens=16, hidden=768)) for system in fusions.SYSTEMS}
            for system in ("cross_attention", "concat", "data_only"):
                assert 0.9 < count[system] / count["additive"] < 1.1, count
            assert count["unfreeze"] > 20 * count["additive"]


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_save_and_load(llama, system, tmp_path):
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    fusion = make(system, decoder)
    fusion.save(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # who may read the one may read the other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fusion.json", "fusion.safetensors"]
    saved = load_file(tmp_path / "fusion.safetensors")
    assert saved.keys() == {n for n, p in fusion.named_parameters()}  # trainable tensors only
    again = fusions.load(tmp_path, decoder)
    with torch.no_grad():
        with fusion.attach(decoder, frames, mask, slots):
            a = llama(ids).logits
        with again.attach(decoder, frames, mask, slots):
            assert torch.equal(llama(ids).logits, a)


def test_a_checkpoint_of_an_older_version_loads(llama, tmp_path):
    """It calls its system a kind."""
    fusion = make("cross_attention", decoder_of(llama))
    fusion.save(tmp_path)
    spec = json.loads((tmp_path / "fusion.json").read_text())
    spec["kind"] = spec.pop("system")
    (tmp_path / "fusion.json").write_text(json.dumps(spec))
    again = fusions.load(tmp_path, decoder_of(llama))
    assert type(again) is fusions.CrossAttention and again.spec == fusion.spec
    assert all(torch.equal(a, b) for a, b in zip(fusion.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("system", list(fusions.SYSTEMS))
def test_two_branches_of_one_modality_are_one_model_in_any_order(llama, system):
    """Their names decide who acts first where both act at a layer; a closed or absent one is as good as none."""
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    one, two, blocks = make("additive", decoder, (2, 4)), make(system, decoder, (2,), seed=5), list(decoder.layers)
    branches = [fusions.Branch(one, list(frames), "one"), fusions.Branch(two, list(frames.flip(0)), "two")]

    def states(*attached):
        with torch.no_grad(), fusions.attach_branches(decoder, attached, range(3), slots):
            return decoder(ids).last_hidden_state

    together = states(*branches)
    assert torch.equal(states(*reversed(branches)), together)
    assert not torch.equal(states(branches[0]), together) and not torch.equal(states(branches[1]), together)
    if system == "unfreeze":  # it acts first: what others do to blocks that it replaces would be lost with them
        with pytest.raises(FusionError, match="two unfreeze"):
            states(branches[1], fusions.Branch(make(system, decoder, (2,), seed=6), None, "three"))
        assert all(block is own for block, own in zip(decoder.layers, blocks))
        return
    swapped = [fusions.Branch(one, list(frames), "two"), fusions.Branch(two, list(frames.flip(0)), "one")]
    assert not torch.equal(states(*swapped), together)                  # the order is the names', not the list's
    assert torch.equal(states(branches[0], fusions.Branch(two, None, "two")), states(branches[0]))
    if two.has_gate:
        two.set_gates(0.0)
        assert torch.equal(states(*branches), states(branches[0]))


def test_wrong_backbone_is_named(llama, tmp_path):
    make("additive", decoder_of(llama)).save(tmp_path)
    with pytest.raises(FusionError, match="class is LlamaModel there, Qwen2Model here"):
        fusions.load(tmp_path, decoder_of(language_model("qwen2")))


def test_bad_checkpoints_are_refused(llama, tmp_path):
    decoder = decoder_of(llama)
    with pytest.raises(FusionError, match="no such file"):
        fusions.load(tmp_path, decoder)
    make("additive", decoder).save(tmp_path)
    good = (tmp_path / "fusion.safetensors").read_bytes()
    for bad in (b"", good[:100], b"\x80\x04pickle", b"\xff" * 8 + good[8:]):
        (tmp_path / "fusion.safetensors").write_bytes(bad)
        with pytest.raises(FusionError, match="not a fusion checkpoint"):
            fusions.load(tmp_path, decoder)
    (tmp_path / "fusion.safetensors").write_bytes(good)
    tensors = load_file(tmp_path / "fusion.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "fusion.safetensors")
    with pytest.raises(FusionError, match="not a fusion checkpoint.*Missing key"):
        fusions.load(tmp_path, decoder)
    for bad in ("", "[]", '{"system": "additive"}', json.dumps({"system": "nonsense"}), '{"kind": "additive"}'):
        (tmp_path / "fusion.json").write_text(bad)
        with pytest.raises(FusionError):
            fusions.load(tmp_path, decoder)


def test_what_does_not_fit_is_refused(llama):
    decoder, (ids, frames, mask, slots) = decoder_of(llama), inputs()
    for layers in ([6], [-1], []):
        with pytest.raises(FusionError, match="layers 0 to 5"):
            fusions.build("additive", decoder, encoder_width=24, layers=layers)
    with pytest.raises(FusionError, match="no system called"):
        fusions.build("magic", decoder, encoder_width=24, layers=[1])
    with pytest.raises(FusionError, match="`.layers`"):
        fusions.build("additive", llama.lm_head, encoder_width=24, layers=[1])
    fusion = make("additive", decoder)
    with pytest.raises(FusionError, match="another encoder"), fusion.attach(decoder, frames[..., :9]):
        pass
    with pytest.raises(FusionError, match="no multiple"), fusion.attach(decoder, frames[:2]):
        llama(ids)
    with pytest.raises(FusionError, match="concat needs slots"), make("concat", decoder).attach(decoder, frames):
        llama(ids)


@pytest.mark.parametrize("system", GATED)
def test_bfloat16_rounds_the_sum_once(llama, system):
    """A gate a little wider is a change a little larger, not the next step of bfloat16."""
    torch.manual_seed(0)
    h, tokens = torch.randn(2, 5, llama.config.hidden_size).bfloat16(), torch.randn(2, 8, llama.config.hidden_size)
    fusion, layer = make(system, decoder_of(llama)), 2
    changed = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prepared = fusion.prepare(tokens)[layer]
        for gate in (0.0500, 0.0501):
            fusion.set_gates(gate)
            changed.append(fusion.change(layer, h, prepared, None))
    assert changed[0].dtype == torch.float32                      # what the hook rounds
    deltas = [c - h.float() for c in changed]
    ratio = (deltas[1].norm() / deltas[0].norm()).item()
    assert ratio == pytest.approx(0.0501 / 0.0500, rel=1e-4)
