"""Properties of the model: no leakage between modalities, causal captions, padding, training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.evaluate.generation import generate_captions
from pretrain.model import VisionLanguageModel, build_model
from pretrain.model.vision_language import valid_positions
from pretrain.moe.layer import MoELayer

SMALL = RunConfig(
    model=ModelConfig(
        width=64,
        num_layers=4,
        num_heads=4,
        ffn_width=96,
        fusion_layer=2,
        image_size=16,
        patch_size=4,
        vocab_size=40,
        context_length=16,
        embed_dim=32,
    ),
    moe=MoEConfig(num_experts=4, top_k=2, expert_width=32),
)

MOE_SETTINGS = {
    "token router": {},
    "caption gate": {"router_input": "caption"},
    "expert choice": {"routing": "expert_choice", "router_input": "caption"},
    "pools": {"pools": "modality", "score_func": "sigmoid"},
}


@pytest.fixture(params=list(MOE_SETTINGS))
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return build_model(replace(SMALL, moe=replace(SMALL.moe, **MOE_SETTINGS[request.param])))


def make_batch(lengths: list[int], seed: int = 0, columns: int = 16) -> tuple[torch.Tensor, ...]:
    """Random images, token ids, lengths and positions of pairs with captions of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (len(lengths), 3, 16, 16), generator=generator, dtype=torch.uint8
    )
    ids = torch.randint(4, 40, (len(lengths), columns), generator=generator)
    text_lengths = torch.tensor(lengths)
    ids[torch.arange(columns) >= text_lengths.unsqueeze(1)] = 0
    return images, ids, text_lengths, valid_positions(text_lengths, columns)


def test_image_embedding_does_not_depend_on_the_caption(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = make_batch([5, 9, 3])
    _, other_ids, other_lengths, other_positions = make_batch([7, 4, 12], seed=1)
    first = model(images, ids, lengths, model.token_batch(ids, positions)).image_embedding
    second = model(
        images, other_ids, other_lengths, model.token_batch(other_ids, other_positions)
    ).image_embedding
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(first, model.encode_image(images), atol=1e-6, rtol=0)


def test_text_embedding_does_not_depend_on_the_image(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = make_batch([5, 9, 3])
    first = model(images, ids, lengths, model.token_batch(ids, positions)).text_embedding
    second = model(255 - images, ids, lengths, model.token_batch(ids, positions)).text_embedding
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(first, model.encode_text(ids, lengths, positions), atol=1e-6, rtol=0)


def test_captions_attend_to_their_image_only(model: VisionLanguageModel) -> None:
    images, ids, _, positions = make_batch([6, 6])
    before = model.caption_logits(images, ids, positions)
    changed = images.clone()
    changed[1] = 255 - changed[1]
    after = model.caption_logits(changed, ids, positions)
    torch.testing.assert_close(after[:6], before[:6], atol=1e-5, rtol=0)
    assert (after[6:] - before[6:]).abs().max() > 1e-3


def test_captions_are_causal(model: VisionLanguageModel) -> None:
    images, ids, _, positions = make_batch([10])
    before = model.caption_logits(images, ids, positions)
    for position in range(1, 10):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 36 + 4
        after = model.caption_logits(images, changed, positions)
        torch.testing.assert_close(after[:position], before[:position], atol=1e-5, rtol=0)
        assert (after[position] - before[position]).abs().max() > 1e-3


def test_caption_gate_affects_text_in_fused_blocks_only() -> None:
    model = build_model(replace(SMALL, moe=replace(SMALL.moe, router_input="caption", top_k=4)))
    assert [layer.caption_gate is not None for layer in model.moe_layers()] == [False, True, True]
    batch = make_batch([6, 9])
    before = model(*batch[:3], model.token_batch(batch[1], batch[3]))
    with torch.no_grad():
        for layer in model.moe_layers()[1:]:
            assert layer.caption_gate is not None
            layer.caption_gate.value.mul_(50)
    after = model(*batch[:3], model.token_batch(batch[1], batch[3]))

    assert torch.equal(after.image_embedding, before.image_embedding)
    assert torch.equal(after.text_embedding, before.text_embedding)
    difference_LME = (after.router.prob_sum_ME - before.router.prob_sum_ME).abs()
    assert not difference_LME[:, 0].any()
    text_difference_L = difference_LME[:, 1].amax(1)
    assert text_difference_L[0] == 0 and (text_difference_L[1:] > 1e-2).all()


def test_padding_has_no_effect(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = make_batch([5, 8, 3], columns=8)
    # The padding tokens are not the pad id.
    padded = torch.full((3, 16), 17)
    padded[:, :8] = torch.where(torch.arange(8) < lengths.unsqueeze(1), ids, 23)
    short = model(images, ids, lengths, model.token_batch(ids, positions))
    long = model(images, padded, lengths, model.token_batch(padded, valid_positions(lengths, 16)))
    for name, expected, actual in zip(short._fields, short, long, strict=True):
        torch.testing.assert_close(
            actual, expected, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_pairs_are_independent_of_the_batch(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = make_batch([5, 9, 3, 7])
    batch = model(images, ids, lengths, model.token_batch(ids, positions))
    for row in range(4):
        length = lengths[row : row + 1]
        single = model(
            images[row : row + 1],
            ids[row : row + 1],
            length,
            model.token_batch(ids[row : row + 1], valid_positions(length, 16)),
        )
        torch.testing.assert_close(
            single.image_embedding[0], batch.image_embedding[row], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            single.text_embedding[0], batch.text_embedding[row], atol=1e-5, rtol=0
        )


def test_evaluation_is_independent_of_the_batch_with_random_routing_and_capacity() -> None:
    moe = replace(
        SMALL.moe,
        routing="sampled",
        capacity_factor=0.5,
        capacity_priority="random",
        router_input="caption",
    )
    model = build_model(replace(SMALL, moe=moe)).eval()
    images, ids, lengths, positions = make_batch([5, 9, 3, 7])
    batch = model(images, ids, lengths, model.token_batch(ids, positions))
    for row in (0, 3):
        length = lengths[row : row + 1]
        single = model(
            images[row : row + 1],
            ids[row : row + 1],
            length,
            model.token_batch(ids[row : row + 1], valid_positions(length, 16)),
        )
        torch.testing.assert_close(
            single.image_embedding[0], batch.image_embedding[row], atol=1e-5, rtol=0
        )
    assert torch.equal(batch.router.kept_ME, batch.router.assignments_ME)


def test_only_valid_tokens_are_routed(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = make_batch([5, 9, 3])
    out = model(images, ids, lengths, model.token_batch(ids, positions))
    assert out.tokens_M.tolist() == [3 * 16, 17]
    assert out.router.assignments_ME.sum(dim=2).tolist() == [[2 * 48, 2 * 17]] * 3
    torch.testing.assert_close(out.router.prob_sum_ME.sum(2), torch.tensor([[48.0, 17.0]] * 3))


def test_activation_checkpointing_gives_the_same_gradients_and_counts() -> None:
    batch = make_batch([5, 9, 3])
    assignments, gradients = [], []
    for enabled in (False, True):
        model = build_model(
            replace(SMALL, model=replace(SMALL.model, activation_checkpointing=enabled))
        )
        out = model(*batch[:3], model.token_batch(batch[1], batch[3]))
        (out.caption_loss_sum + out.image_embedding.sum() + out.router.z_sum_M.sum()).backward()
        assignments.append(out.router.assignments_ME)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*assignments)
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored)


def test_experts_are_initialized_differently_and_independently_of_the_layout() -> None:
    all_experts = build_model(SMALL).blocks[1].ffn.experts.w1
    assert all(not torch.equal(a, b) for a, b in pairwise(all_experts))

    def make_half(
        width: int, config: MoEConfig, balance: BalanceConfig, *, block_index: int, fused: bool
    ) -> MoELayer:
        return MoELayer(
            width, config, balance, block_index=block_index, fused=fused, num_local_experts=2
        )

    second_half = build_model(SMALL, make_moe_layer=make_half, first_expert=2)
    assert torch.equal(second_half.blocks[1].ffn.experts.w1, all_experts[2:])


@pytest.mark.parametrize("parameter", [2.0, 4.6, 6.0, 9.0])
def test_contrastive_scale_is_bounded_and_keeps_a_gradient(parameter: float) -> None:
    model = build_model(SMALL)
    torch.testing.assert_close(model._scale(), torch.tensor(14.285714))
    with torch.no_grad():
        model.log_scale.fill_(parameter)
    scale = model._scale()
    scale.backward()
    assert scale < 100.0
    assert model.log_scale.grad is not None and model.log_scale.grad > 0.1


def test_overfitting_eight_pairs() -> None:
    """After overfitting, greedy decoding reproduces the captions exactly."""
    torch.manual_seed(0)
    model = build_model(SMALL)
    images, ids, lengths, positions = make_batch([6, 9, 4, 12, 7, 7, 16, 5])
    ids[:, 0] = 1
    ids[torch.arange(8), lengths - 1] = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        out = model(images, ids, lengths, model.token_batch(ids, positions))
        (out.caption_loss_sum / out.caption_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    generated = generate_captions(model, images, start_id=1, end_id=2, max_length=16)
    expected = [
        row[1 : length - 1].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)
    ]
    assert generated == expected
    num_caption_tokens = int(lengths.sum()) - 8
    correct, predicted = model.count_correct_tokens(images, ids, lengths, positions)
    assert (correct, predicted) == (num_caption_tokens, num_caption_tokens)
