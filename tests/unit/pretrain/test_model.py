"""What the model promises: modalities do not leak, captions do not see the future, padding changes
nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.evaluate.generation import write_captions
from pretrain.model import VisionLanguageModel, build_model
from pretrain.model.vision_language import valid_positions

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


GATES = {
    "token gate": {},
    "caption gate": {"router_input": "caption"},
    "experts choose": {"routing": "expert_choice", "router_input": "caption"},
    "pools": {"pools": "modality", "score_func": "sigmoid"},
}


@pytest.fixture(params=list(GATES))
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return build_model(replace(SMALL, moe=replace(SMALL.moe, **GATES[request.param])))


def pairs(lengths: list[int], seed: int = 0, columns: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (len(lengths), 3, 16, 16), generator=generator, dtype=torch.uint8
    )
    ids = torch.randint(4, 40, (len(lengths), columns), generator=generator)
    size = torch.tensor(lengths)
    ids[torch.arange(columns) >= size.unsqueeze(1)] = 0
    return images, ids, size, valid_positions(size, columns)


def test_image_embedding_does_not_change_with_the_caption(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = pairs([5, 9, 3])
    _, other_ids, other_lengths, other_positions = pairs([7, 4, 12], seed=1)
    first = model(images, ids, lengths, positions).image_embedding
    second = model(images, other_ids, other_lengths, other_positions).image_embedding
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(first, model.encode_image(images), atol=1e-6, rtol=0)


def test_text_embedding_does_not_change_with_the_image(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = pairs([5, 9, 3])
    first = model(images, ids, lengths, positions).text_embedding
    second = model(255 - images, ids, lengths, positions).text_embedding
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(first, model.encode_text(ids, lengths, positions), atol=1e-6, rtol=0)


def test_captions_do_see_their_image_and_only_theirs(model: VisionLanguageModel) -> None:
    images, ids, _, positions = pairs([6, 6])
    before = model.caption_logits(images, ids, positions)
    changed = images.clone()
    changed[1] = 255 - changed[1]
    after = model.caption_logits(changed, ids, positions)
    torch.testing.assert_close(after[:6], before[:6], atol=1e-5, rtol=0)
    assert (after[6:] - before[6:]).abs().max() > 1e-3


def test_captions_cannot_see_the_future(model: VisionLanguageModel) -> None:
    images, ids, _, positions = pairs([10])
    before = model.caption_logits(images, ids, positions)
    for changed_at in range(1, 10):
        changed = ids.clone()
        changed[0, changed_at] = (changed[0, changed_at] + 1) % 36 + 4
        after = model.caption_logits(images, changed, positions)
        torch.testing.assert_close(after[:changed_at], before[:changed_at], atol=1e-5, rtol=0)
        assert (after[changed_at] - before[changed_at]).abs().max() > 1e-3


def test_the_caption_gate_reads_the_caption_in_fused_blocks_only() -> None:
    model = build_model(replace(SMALL, moe=replace(SMALL.moe, router_input="caption", top_k=4)))
    assert [layer.caption_gate is not None for layer in model.moe_layers()] == [False, True, True]
    batch = pairs([6, 9])
    before = model(*batch)
    with torch.no_grad():
        for layer in model.moe_layers()[1:]:
            assert layer.caption_gate is not None
            layer.caption_gate.value.mul_(50)
    after = model(*batch)
    assert torch.equal(after.image_embedding, before.image_embedding)
    assert torch.equal(after.text_embedding, before.text_embedding)
    assert torch.equal(after.router.prob_sum_ME[:, 0], before.router.prob_sum_ME[:, 0])
    changed = (after.router.prob_sum_ME[:, 1] - before.router.prob_sum_ME[:, 1]).abs().amax(1)
    assert changed[0] == 0 and (changed[1:] > 1e-2).all()


def test_judging_does_not_depend_on_the_batch_whatever_training_draws_and_drops() -> None:
    moe = replace(
        SMALL.moe,
        routing="sampled",
        capacity_factor=0.5,
        capacity_priority="random",
        router_input="caption",
    )
    model = build_model(replace(SMALL, moe=moe)).eval()
    images, ids, lengths, positions = pairs([5, 9, 3, 7])
    coactivation = model(images, ids, lengths, positions)
    for row in (0, 3):
        size = lengths[row : row + 1]
        alone = model(images[row : row + 1], ids[row : row + 1], size, valid_positions(size, 16))
        torch.testing.assert_close(
            alone.image_embedding[0], coactivation.image_embedding[row], atol=1e-5, rtol=0
        )
    assert torch.equal(coactivation.router.kept_ME, coactivation.router.choices_ME)


def test_padding_changes_nothing(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = pairs([5, 8, 3], columns=8)
    padded = torch.full((3, 16), 17)  # not even the pad id matters
    padded[:, :8] = torch.where(torch.arange(8) < lengths.unsqueeze(1), ids, 23)
    short = model(images, ids, lengths, positions)
    long = model(images, padded, lengths, valid_positions(lengths, 16))
    for name, expected, found in zip(short._fields, short, long, strict=True):
        torch.testing.assert_close(
            found, expected, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_pair_does_not_depend_on_its_batch(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = pairs([5, 9, 3, 7])
    coactivation = model(images, ids, lengths, positions)
    for row in range(4):
        size = lengths[row : row + 1]
        alone = model(images[row : row + 1], ids[row : row + 1], size, valid_positions(size, 16))
        torch.testing.assert_close(
            alone.image_embedding[0], coactivation.image_embedding[row], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            alone.text_embedding[0], coactivation.text_embedding[row], atol=1e-5, rtol=0
        )


def test_only_valid_tokens_reach_the_router(model: VisionLanguageModel) -> None:
    images, ids, lengths, positions = pairs([5, 9, 3])
    out = model(images, ids, lengths, positions)
    assert out.tokens_M.tolist() == [3 * 16, 17]
    assert out.router.choices_ME.sum(dim=2).tolist() == [[2 * 48, 2 * 17]] * 3
    torch.testing.assert_close(out.router.prob_sum_ME.sum(2), torch.tensor([[48.0, 17.0]] * 3))


def test_recomputation_gives_the_same_gradients_and_counts_once() -> None:
    batch = pairs([5, 9, 3])
    results = []
    for recompute in (False, True):
        model = build_model(
            replace(SMALL, model=replace(SMALL.model, activation_checkpointing=recompute))
        )
        out = model(*batch)
        (out.caption_loss_sum + out.image_embedding.sum() + out.router.z_sum_M.sum()).backward()
        results.append(
            (out.router.choices_ME, [p.grad for p in model.parameters() if p.grad is not None])
        )
    assert torch.equal(results[0][0], results[1][0])
    for kept, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_experts_start_different_from_one_another_and_equal_on_any_layout() -> None:
    whole = build_model(SMALL).blocks[1].ffn.experts.w1
    assert all(not torch.equal(a, b) for a, b in pairwise(whole))

    from pretrain.moe.layer import MoELayer

    def half(
        width: int, config: MoEConfig, balance: BalanceConfig, *, block: int, fused: bool
    ) -> MoELayer:
        return MoELayer(width, config, balance, block=block, fused=fused, num_local_experts=2)

    second_half = build_model(SMALL, make_moe_layer=half, first_expert=2).blocks[1].ffn.experts.w1
    assert torch.equal(second_half, whole[2:])


@pytest.mark.parametrize("parameter", [2.0, 4.6, 6.0, 9.0])
def test_contrastive_scale_stays_below_its_ceiling_and_never_freezes(parameter: float) -> None:
    model = build_model(SMALL)
    torch.testing.assert_close(model._scale(), torch.tensor(14.285714))
    with torch.no_grad():
        model.log_scale.fill_(parameter)
    scale = model._scale()
    scale.backward()
    assert scale < 100.0
    assert model.log_scale.grad is not None and model.log_scale.grad > 0.1


def test_eight_pairs_are_learned_by_heart() -> None:
    """Overfitting reproduces the captions exactly by greedy decoding."""
    torch.manual_seed(0)
    model = build_model(SMALL)
    images, ids, lengths, positions = pairs([6, 9, 4, 12, 7, 7, 16, 5])
    ids[:, 0] = 1
    ids[torch.arange(8), lengths - 1] = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        out = model(images, ids, lengths, positions)
        (out.caption_loss_sum / out.caption_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    written = write_captions(model, images, start_id=1, end_id=2, max_length=16)
    expected = [
        row[1 : length - 1].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)
    ]
    assert written == expected
    hits, tokens = model.caption_token_hits(images, ids, lengths, positions)
    assert (hits, tokens) == (int(lengths.sum()) - 8, int(lengths.sum()) - 8)
