"""One optimizer step: forward, losses of the global batch, backward, update, and the routers'
biases.

Contrast and the routers' terms are functions of the whole global batch. With one micro-batch a
rank, the statistics are summed and the embeddings gathered between forward and backward. With
several, a first pass without gradients collects them (as GradCache does, Gao et al. 2021,
arXiv:2101.06983), and a second pass runs each micro-batch again with the global values known: twice
the forward work, exact gradients. Whatever routing draws is drawn alike in both.

Shapes: B pairs of this rank, G rows of the gathered batch, D embedding width, L MoE layers, M
modalities, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.config.schema import LossConfig, RunConfig
from pretrain.losses.contrastive import info_nce_share
from pretrain.losses.total import GlobalSums, MainTerms, main_terms, main_weights, with_weights
from pretrain.model.vision_language import ModelOutput
from pretrain.moe.auxiliary import Linearized, linearize
from pretrain.moe.bias import bias_rate
from pretrain.moe.noise import step_draw
from pretrain.moe.statistics import RouterStats
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
    tokens_M: Tensor
    """Tokens by modality, float64 on CPU."""
    router: RouterStats
    """What the routers did, `[layers, ...]`, float64 on CPU."""
    biases: Tensor
    """Biases of the choice after the step, `[layers, M or 1, experts]` on CPU; no element where
    there are none."""

    @property
    def tokens(self) -> int:
        """Valid tokens, patches and text."""
        return int(self.tokens_M.sum())

    @property
    def choices_LME(self) -> Tensor:
        """Token choices by MoE layer, modality and expert."""
        return self.router.choices_ME


def train_step(
    engine: TrainEngine,
    batches: Sequence[Batch],
    run: RunConfig,
    *,
    step: int,
    learning_rate: float,
    coactivation: bool = False,
) -> StepResult:
    """Train on the micro-batches of one step of this rank; without a pair on any rank nothing is
    updated.

    Args:
        engine: The rank's engine.
        batches: As many micro-batches on every rank; each holds at most `batch.micro_batch_size`
            pairs.
        run: Weights of the terms, rows that each micro-batch takes in the gathered batch, seed.
        step: Number of this step, from 0: routing draws from it, and biases are frozen near the
            end.
        learning_rate: Of this step.
        coactivation: Also count which experts are chosen together.
    """
    work = _Step(engine, batches, run, step_draw(run.seed, step), coactivation)
    terms, auxiliary, sums, scale = work.backward() if len(batches) == 1 else work.accumulate()
    shares = engine.total(torch.stack([term.detach().double() for term in terms]))
    # Before the numbers are known on the host: a global batch without a pair has no choices, which
    # move no bias.
    engine.model.move_biases(
        sums.router.choices_ME, bias_rate(run.balance, step, run.schedule.total_steps)
    )
    losses = torch.cat([shares, *(value.view(1) for value in auxiliary.values.values())])
    biases = engine.model.biases().to(engine.device)
    told = on_host([losses, scale, sums.pairs, sums.tokens_M, biases, *sums.router])
    losses, scale, pairs, tokens_M, biases, *router = told
    found = dict(zip((*MainTerms._fields, *auxiliary.values), losses.tolist(), strict=True))
    grad_norm = math.nan
    if int(
        pairs
    ):  # known on every rank alike; without one, weight decay and old moments would still move the weights
        grad_norm = engine.step(learning_rate)
    return StepResult(
        losses=with_weights(found, main_weights(run.loss) | auxiliary.weights),
        grad_norm=grad_norm,
        logit_scale=float(scale),
        pairs=int(pairs),
        tokens_M=tokens_M,
        router=RouterStats(*router),
        biases=biases.float(),
    )


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device as float64 on CPU, in one copy: each copy lets the host wait for the
    device."""
    packed = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    pieces = packed.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


Passed = tuple[MainTerms, Linearized, GlobalSums, Tensor]
"""This rank's shares, the routers' terms, the global sums and the contrastive scale."""


class _Step(NamedTuple):
    """Forward and backward of one step."""

    engine: TrainEngine
    batches: Sequence[Batch]
    run: RunConfig
    draw: int
    coactivation: bool

    def backward(self) -> Passed:
        """One micro-batch."""
        engine = self.engine
        output = self._forward(self.batches[0])
        sums = global_sums(engine, [output])
        auxiliary = self._auxiliary(sums)
        terms = main_terms(
            contrastive=self._contrastive([output], sums),
            caption_loss_sum=output.caption_loss_sum,
            sums=sums,
        )
        share = terms.weighted_sum(self.run.loss) + auxiliary.share(output.router)
        engine.backward(engine.world_size * share, last=True)
        return terms, auxiliary, sums, output.logit_scale.detach()

    def accumulate(self) -> Passed:
        """Both passes over several micro-batches."""
        engine, loss = self.engine, self.run.loss
        with torch.no_grad():
            first = [self._forward(batch) for batch in self.batches]
        sums = global_sums(engine, first)
        auxiliary = self._auxiliary(sums)
        leaves = [_leaf(output) for output in first]
        contrastive = self._contrastive(leaves, sums)
        none = torch.zeros_like(contrastive.detach())
        # The weight is applied here alone: what the embeddings are pulled by has it already.
        (engine.world_size * MainTerms(contrastive, none).weighted_sum(loss)).backward()
        caption = none.clone()
        for number, (batch, leaf) in enumerate(zip(self.batches, leaves, strict=True)):
            output = self._forward(batch)
            terms = main_terms(
                contrastive=none, caption_loss_sum=output.caption_loss_sum, sums=sums
            )
            # The surrogate has the gradient of the global contrastive loss with respect to these
            # embeddings.
            surrogate = _pull(output.image_embedding, leaf.image_embedding)
            surrogate = surrogate + _pull(output.text_embedding, leaf.text_embedding)
            # In equal parts: a parameter must take part in every backward pass, because with
            # offload DeepSpeed drops what was accumulated for one that the last pass leaves out.
            surrogate = surrogate + _pull(output.logit_scale, leaves[0].logit_scale) / len(
                self.batches
            )
            share = terms.weighted_sum(loss) + auxiliary.share(output.router)
            engine.backward(
                engine.world_size * share + surrogate, last=number == len(self.batches) - 1
            )
            caption += terms.caption.detach()
        return MainTerms(contrastive.detach(), caption), auxiliary, sums, first[0].logit_scale

    def _forward(self, batch: Batch) -> ModelOutput:
        return self.engine.forward(batch, draw=self.draw, coactivation=self.coactivation)

    def _auxiliary(self, sums: GlobalSums) -> Linearized:
        """The routers' terms; weights are counted in every micro-batch of every rank that holds
        them."""
        times = len(self.batches) * self.engine.world_size
        return linearize(
            sums.router,
            sums.tokens_M,
            self.run.moe,
            self.run.balance,
            expert_copies=times / self.engine.layout.expert_parallel_size,
            router_copies=times,
        )

    def _contrastive(self, outputs: Sequence[ModelOutput], sums: GlobalSums) -> Tensor:
        rows = self.run.batch.micro_batch_size * len(self.batches)
        return _contrastive(self.engine, outputs, self.batches, sums, self.run.loss, rows)


def global_sums(engine: TrainEngine, outputs: Sequence[ModelOutput]) -> GlobalSums:
    """Sum the counts and statistics of all micro-batches and ranks, in one message."""
    device = outputs[0].tokens_M.device
    pairs = torch.full(
        (), sum(output.image_embedding.shape[0] for output in outputs), device=device
    )
    caption = torch.stack([output.caption_tokens for output in outputs]).sum()
    tokens_M = torch.stack([output.tokens_M for output in outputs]).sum(dim=0)
    stats = [
        torch.stack(fields).sum(dim=0)
        for fields in zip(*(output.router for output in outputs), strict=True)
    ]
    parts = [pairs, caption, tokens_M, *stats]
    packed = engine.total(torch.cat([part.detach().flatten().double() for part in parts]))
    pieces = packed.split([part.numel() for part in parts])
    pairs, caption, tokens_M, *stats = (
        p.view_as(part) for p, part in zip(pieces, parts, strict=True)
    )
    return GlobalSums(pairs, caption, tokens_M, RouterStats(*stats))


def _leaf(output: ModelOutput) -> ModelOutput:
    """The output with embeddings and scale as leaves that collect gradients."""
    image, text, scale = (
        t.detach().requires_grad_()
        for t in (output.image_embedding, output.text_embedding, output.logit_scale)
    )
    return output._replace(image_embedding=image, text_embedding=text, logit_scale=scale)


def _pull(value: Tensor, leaf: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `value` is the gradient that `leaf` collected."""
    assert leaf.grad is not None
    return (value * leaf.grad).sum()


def _contrastive(
    engine: TrainEngine,
    outputs: Sequence[ModelOutput],
    batches: Sequence[Batch],
    sums: GlobalSums,
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
        num_pairs=sums.pairs.to(image_BD.dtype),
        mask_equal_captions=loss.mask_equal_captions,
    )
