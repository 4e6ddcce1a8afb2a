"""One optimizer step: forward, losses of the global batch, backward, update.

Contrast and balance are functions of the whole global batch. With one micro-batch a rank, the counts are
summed and the embeddings gathered between forward and backward. With several, a first pass without
gradients collects them (as GradCache does, Gao et al. 2021, arXiv:2101.06983), and a second pass runs each
micro-batch again with the global values known: twice the forward work, exact gradients.

Shapes: B pairs of this rank, G rows of the gathered batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.config.schema import LossConfig
from pretrain.losses.contrastive import info_nce_share
from pretrain.losses.total import GlobalCounts, LossTerms, loss_terms
from pretrain.model.vision_language import ModelOutput
from pretrain.parallel.engine import TrainEngine


class StepResult(NamedTuple):
    """What one step of the whole world gave; numbers of the global batch."""

    losses: dict[str, float]
    """`total`, each term unweighted, and each term `weighted/...`."""
    grad_norm: float
    """Global gradient norm before clipping."""
    logit_scale: float
    pairs: int
    """Valid pairs of the global batch."""
    tokens: int
    """Valid tokens, patches and text."""
    choices_LME: Tensor
    """Token choices by MoE layer, modality and expert, float64 on CPU."""
    entropy_LM: Tensor
    """Mean router entropy (nats) by layer and modality, float64 on CPU."""


def train_step(
    engine: TrainEngine,
    batches: Sequence[Batch],
    loss: LossConfig,
    *,
    pairs_per_forward: int,
    learning_rate: float,
) -> StepResult:
    """Train on the micro-batches of one step of this rank.

    Args:
        engine: The rank's engine.
        batches: As many micro-batches on every rank; each holds at most `pairs_per_forward` pairs.
        loss: Weights of the terms.
        pairs_per_forward: Rows that each micro-batch takes in the gathered batch.
        learning_rate: Of this step.
    """
    rows = pairs_per_forward * len(batches)
    if len(batches) == 1:
        output = engine.forward(batches[0])
        counts, entropy = _global_counts(engine, [output])
        contrastive = _contrastive(engine, [output], batches, counts, loss, rows)
        terms = _terms(output, contrastive, counts)
        engine.backward(engine.world * terms.weighted_sum(loss), last=True)
        shares = _detached(terms)
        scale = output.logit_scale.detach()
    else:
        shares, counts, entropy, scale = _accumulate(engine, batches, loss, rows)
    losses = _losses(engine.total(shares).tolist(), loss)
    grad_norm = engine.step(learning_rate)
    return _result(losses, grad_norm, scale, counts, entropy)


def _accumulate(
    engine: TrainEngine, batches: Sequence[Batch], loss: LossConfig, rows: int
) -> tuple[Tensor, GlobalCounts, Tensor, Tensor]:
    """Both passes over several micro-batches; returns this rank's summed shares and the global counts."""
    with torch.no_grad():
        first = [engine.forward(batch) for batch in batches]
    counts, entropy = _global_counts(engine, first)
    leaves = [_leaf(output) for output in first]
    contrastive = _contrastive(engine, leaves, batches, counts, loss, rows)
    (engine.world * loss.contrastive_weight * contrastive).backward()
    shares = torch.zeros(len(LossTerms._fields), device=contrastive.device)
    shares[0] = contrastive.detach()
    for number, (batch, leaf) in enumerate(zip(batches, leaves, strict=True)):
        output = engine.forward(batch)
        terms = _terms(output, contrastive.new_zeros(()), counts)
        # The surrogate has the gradient of the global contrastive loss with respect to these embeddings.
        surrogate = _pull(output.image_embedding, leaf.image_embedding)
        surrogate = surrogate + _pull(output.text_embedding, leaf.text_embedding)
        # In equal parts: a parameter must take part in every backward pass, because with offload DeepSpeed
        # drops what was accumulated for one that the last pass leaves out.
        surrogate = surrogate + _pull(output.logit_scale, leaves[0].logit_scale) / len(batches)
        engine.backward(
            engine.world * terms.weighted_sum(loss) + surrogate, last=number == len(batches) - 1
        )
        shares += _detached(terms)
    return shares, counts, entropy, first[0].logit_scale


def _leaf(output: ModelOutput) -> ModelOutput:
    """The output with embeddings and scale as leaves that collect gradients."""
    image, text, scale = (
        t.detach().requires_grad_() for t in (output.image_embedding, output.text_embedding, output.logit_scale)
    )
    return output._replace(image_embedding=image, text_embedding=text, logit_scale=scale)


def _pull(value: Tensor, leaf: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `value` is the gradient that `leaf` collected."""
    assert leaf.grad is not None
    return (value * leaf.grad).sum()


def _terms(output: ModelOutput, contrastive: Tensor, counts: GlobalCounts) -> LossTerms:
    return loss_terms(
        contrastive=contrastive,
        caption_loss_sum=output.caption_loss_sum,
        prob_sum_LE=output.prob_sum_LE,
        z_sum_L=output.z_sum_L,
        counts=counts,
    )


def _contrastive(
    engine: TrainEngine,
    outputs: Sequence[ModelOutput],
    batches: Sequence[Batch],
    counts: GlobalCounts,
    loss: LossConfig,
    rows: int,
) -> Tensor:
    """This rank's share of InfoNCE over the pairs of all ranks and micro-batches."""
    image_BD = torch.cat([output.image_embedding for output in outputs])
    text_BD = torch.cat([output.text_embedding for output in outputs])
    hashes_B = torch.cat([batch.caption_hashes for batch in batches]).to(image_BD.device)
    pairs = image_BD.shape[0]
    # Ranks must send equally shaped tensors: a rank that met bad samples fills up with empty rows.
    both_RD = F.pad(torch.cat([image_BD, text_BD], dim=1), (0, 0, 0, rows - pairs))
    labels_R2 = hashes_B.new_zeros(rows, 2)
    labels_R2[:pairs, 0], labels_R2[:pairs, 1] = hashes_B, 1
    all_image_GD, all_text_GD = engine.gather(both_RD).chunk(2, dim=1)
    all_hashes_G, valid_G = engine.gather(labels_R2).unbind(1)
    return info_nce_share(
        image_BD,
        text_BD,
        all_image_GD,
        all_text_GD,
        hashes_B=hashes_B,
        all_hashes_G=all_hashes_G,
        valid_G=valid_G.bool(),
        first_row=engine.rank * rows,
        logit_scale=outputs[0].logit_scale,
        num_pairs=counts.pairs.to(image_BD.dtype),
        mask_equal_captions=loss.mask_equal_captions,
    )


def _global_counts(engine: TrainEngine, outputs: Sequence[ModelOutput]) -> tuple[GlobalCounts, Tensor]:
    """Sum the counts of all micro-batches and ranks in one message; also the summed router entropy."""
    choices_LME = torch.stack([output.choices_LME for output in outputs]).sum(dim=0)
    entropy_LM = torch.stack([output.entropy_sum_LM.detach() for output in outputs]).sum(dim=0)
    tokens_M = torch.stack([output.tokens_M for output in outputs]).sum(dim=0)
    caption = torch.stack([output.caption_tokens for output in outputs]).sum()
    pairs = caption.new_tensor(sum(output.image_embedding.shape[0] for output in outputs))
    parts = [pairs.view(1), caption.view(1), tokens_M, choices_LME.flatten(), entropy_LM.flatten()]
    packed = engine.total(torch.cat([part.double() for part in parts]))
    pairs, caption, tokens_M, choices, entropy = packed.split([part.numel() for part in parts])
    counts = GlobalCounts(pairs[0], caption[0], tokens_M, choices.view_as(choices_LME))
    return counts, entropy.view_as(entropy_LM) / tokens_M.clamp(min=1)


def _detached(terms: LossTerms) -> Tensor:
    return torch.stack([term.detach().float() for term in terms])


def _losses(unweighted: list[float], loss: LossConfig) -> dict[str, float]:
    """Each term before and after its weight, and their sum."""
    terms = dict(zip(LossTerms._fields, unweighted, strict=True))
    weights = {
        "contrastive": loss.contrastive_weight,
        "caption": loss.caption_weight,
        "balance": loss.balance_weight,
        "router_z": loss.router_z_weight,
    }
    weighted = {f"weighted/{name}": weights[name] * value for name, value in terms.items()}
    return {"total": sum(weighted.values())} | terms | weighted


def _result(
    losses: dict[str, float], grad_norm: float, scale: Tensor, counts: GlobalCounts, entropy_LM: Tensor
) -> StepResult:
    return StepResult(
        losses=losses,
        grad_norm=grad_norm,
        logit_scale=float(scale),
        pairs=int(counts.pairs),
        tokens=int(counts.tokens_M.sum()),
        choices_LME=counts.choices_LME.cpu(),
        entropy_LM=entropy_LM.cpu(),
    )
