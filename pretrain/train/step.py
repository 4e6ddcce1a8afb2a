"""One optimizer step: forward, losses of the global batch, backward, update, routing biases.

The contrastive loss and the auxiliary losses of the routers are functions of the whole global
batch. With one micro-batch per rank, statistics are summed over ranks and embeddings gathered
between forward and backward. With several, a first pass without gradients collects them (as in
GradCache, Gao et al. 2021, arXiv:2101.06983), and a second pass recomputes each micro-batch with
the global values known: twice the forward cost, exact gradients. Random routing is the same in both
passes.

Each rank computes its *local term* of every loss; the local terms of all ranks add up to the loss.

Shapes: B pairs of this rank, R rows that this rank contributes to the gathered batch, G rows of the
gathered batch, D embedding width, L MoE layers, M modalities, E experts.
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
from pretrain.losses.contrastive import GatheredPairs, local_info_nce
from pretrain.losses.objective import (
    GlobalSums,
    TaskLosses,
    loss_metrics,
    task_loss_weights,
    task_losses,
)
from pretrain.model.vision_language import ModelOutput
from pretrain.moe.auxiliary import LinearizedLosses, linearize
from pretrain.moe.bias import bias_rate
from pretrain.moe.noise import derive_step_seed
from pretrain.moe.statistics import RouterStats
from pretrain.parallel.engine import Engine
from pretrain.parallel.plain_engine import is_accepted
from pretrain.train.step_result import NO_LIMITS, StepLimits, StepResult


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    run: RunConfig,
    *,
    step: int,
    learning_rate: float,
    coactivation: bool = False,
    limits: StepLimits = NO_LIMITS,
) -> StepResult:
    """Train on this rank's micro-batches of one step. Collective.

    Nothing is updated if no rank has a valid pair, or if loss or gradient norm are not finite or
    above their limits: neither weights nor moments nor biases. The decision is the same on every
    rank.

    Args:
        engine: The engine of this rank.
        batches: The same number of micro-batches on every rank, each with at most
            `batch.micro_batch_size` pairs.
        run: Loss weights, rows per micro-batch in the gathered batch, seed.
        step: Index of this step, from 0. It seeds random routing and determines the bias rate.
        learning_rate: Learning rate of this step.
        coactivation: Also count which pairs of experts are selected by the same token.
        limits: Largest loss and gradient norm of an update; the same on every rank.
    """
    work = _Step(engine, batches, run, derive_step_seed(run.seed, step), coactivation)
    terms, auxiliary, sums, scale = work.backward() if len(batches) == 1 else work.accumulate()
    task_terms = engine.communicator.all_reduce_sum(
        torch.stack([term.detach().double() for term in terms])
    )
    # Before the copy to the host, and undone if the step is skipped: a second copy would be slower.
    previous_biases = engine.model.biases()
    engine.model.update_biases(
        sums.router.assignments_ME, bias_rate(run.balance, step, run.schedule.total_steps)
    )
    losses = torch.cat([task_terms, *(value.view(1) for value in auxiliary.values.values())])
    biases = engine.model.biases().to(engine.communicator.device)
    on_cpu = copy_to_cpu([losses, scale, sums.pairs, sums.tokens_M, biases, *sums.router])
    losses, scale, pairs, tokens_M, biases, *router = on_cpu
    names = (*TaskLosses._fields, *auxiliary.values)
    loss_values = dict(zip(names, losses.tolist(), strict=True))
    metrics = loss_metrics(loss_values, task_loss_weights(run.loss) | auxiliary.weights)

    grad_norm, is_updated = math.nan, False
    # The same on every rank. Without pairs, weight decay and momentum would still change weights.
    if int(pairs):
        norm_limit = limits.grad_norm if is_accepted(metrics["total"], limits.loss) else -1.0
        grad_norm = engine.step(learning_rate, norm_limit=norm_limit)
        is_updated = is_accepted(grad_norm, norm_limit)
    if not is_updated:
        engine.model.set_biases(previous_biases)
        biases = previous_biases.cpu()
    return StepResult(
        losses=metrics,
        grad_norm=grad_norm,
        is_updated=is_updated,
        logit_scale=float(scale),
        pairs=int(pairs),
        tokens_M=tokens_M,
        router=RouterStats(*router),
        biases=biases.float(),
    )


def copy_to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device as float64 on CPU, in a single copy, since each copy synchronizes."""
    packed = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    chunks = packed.split([tensor.numel() for tensor in tensors])
    return [chunk.view(tensor.shape) for chunk, tensor in zip(chunks, tensors, strict=True)]


class _PassResult(NamedTuple):
    """What forward and backward return to `train_step`."""

    terms: TaskLosses
    """This rank's local terms."""
    auxiliary: LinearizedLosses
    """Auxiliary losses of the routers."""
    sums: GlobalSums
    scale: Tensor
    """Contrastive logit scale."""


class _Step(NamedTuple):
    """Forward and backward of one step."""

    engine: Engine
    batches: Sequence[Batch]
    run: RunConfig
    step_seed: int
    coactivation: bool

    def backward(self) -> _PassResult:
        """One micro-batch."""
        engine = self.engine
        output = self._forward(self.batches[0])
        sums = global_sums(engine, [output])
        auxiliary = self._auxiliary(sums)
        terms = task_losses(
            contrastive=self._contrastive([output], sums),
            caption_loss_sum=output.caption_loss_sum,
            sums=sums,
        )
        local_term = terms.weighted_sum(self.run.loss) + auxiliary.local_term(output.router)
        engine.backward(local_term, last=True)
        return _PassResult(terms, auxiliary, sums, output.logit_scale.detach())

    def accumulate(self) -> _PassResult:
        """Both passes over several micro-batches."""
        engine, loss = self.engine, self.run.loss
        with torch.no_grad():
            first_pass = [self._forward(batch) for batch in self.batches]
        sums = global_sums(engine, first_pass)
        auxiliary = self._auxiliary(sums)
        leaves = [_as_leaves(output) for output in first_pass]
        contrastive = self._contrastive(leaves, sums)
        zero = torch.zeros_like(contrastive.detach())
        # The weight of the contrastive loss is applied here, so the gradients of the leaves, and
        # hence the surrogates below, already contain it.
        TaskLosses(contrastive, zero).weighted_sum(loss).backward()

        caption = zero.clone()
        for index, (batch, leaf) in enumerate(zip(self.batches, leaves, strict=True)):
            output = self._forward(batch)
            terms = task_losses(
                contrastive=zero, caption_loss_sum=output.caption_loss_sum, sums=sums
            )
            # The surrogate has the gradient of the global contrastive loss with respect to these
            # embeddings.
            surrogate = _surrogate(output.image_embedding, leaf.image_embedding)
            surrogate = surrogate + _surrogate(output.text_embedding, leaf.text_embedding)
            # Split over the micro-batches: with offload, DeepSpeed drops the accumulated gradient
            # of a parameter that does not take part in the last backward pass.
            scale_term = _surrogate(output.logit_scale, leaves[0].logit_scale)
            surrogate = surrogate + scale_term / len(self.batches)
            local_term = terms.weighted_sum(loss) + auxiliary.local_term(output.router)
            engine.backward(local_term + surrogate, last=index == len(self.batches) - 1)
            caption += terms.caption.detach()
        terms = TaskLosses(contrastive.detach(), caption)
        return _PassResult(terms, auxiliary, sums, first_pass[0].logit_scale)

    def _forward(self, batch: Batch) -> ModelOutput:
        return self.engine.forward(batch, step_seed=self.step_seed, coactivation=self.coactivation)

    def _auxiliary(self, sums: GlobalSums) -> LinearizedLosses:
        """Auxiliary losses of the routers.

        The gradient of a weight penalty is computed in every micro-batch of every rank that holds
        the weight, hence the numbers of copies.
        """
        num_micro_batches = len(self.batches) * self.engine.communicator.world_size
        return linearize(
            sums.router,
            sums.tokens_M,
            self.run.moe,
            self.run.balance,
            expert_copies=num_micro_batches / self.engine.layout.expert_parallel_size,
            router_copies=num_micro_batches,
        )

    def _contrastive(self, outputs: Sequence[ModelOutput], sums: GlobalSums) -> Tensor:
        num_rows = self.run.batch.micro_batch_size * len(self.batches)
        return _contrastive(self.engine, outputs, self.batches, sums, self.run.loss, num_rows)


def global_sums(engine: Engine, outputs: Sequence[ModelOutput]) -> GlobalSums:
    """Sum counts and statistics over all micro-batches and ranks, in one all-reduce."""
    device = outputs[0].tokens_M.device
    num_pairs = sum(output.image_embedding.shape[0] for output in outputs)
    pairs = torch.full((), num_pairs, device=device)
    caption = torch.stack([output.caption_tokens for output in outputs]).sum()
    tokens_M = torch.stack([output.tokens_M for output in outputs]).sum(dim=0)
    stats = [
        torch.stack(fields).sum(dim=0)
        for fields in zip(*(output.router for output in outputs), strict=True)
    ]

    local_sums = [pairs, caption, tokens_M, *stats]
    packed = engine.communicator.all_reduce_sum(
        torch.cat([tensor.detach().flatten().double() for tensor in local_sums])
    )
    chunks = packed.split([tensor.numel() for tensor in local_sums])
    pairs, caption, tokens_M, *stats = (
        chunk.view_as(tensor) for chunk, tensor in zip(chunks, local_sums, strict=True)
    )
    return GlobalSums(pairs, caption, tokens_M, RouterStats(*stats))


def _as_leaves(output: ModelOutput) -> ModelOutput:
    """The output with embeddings and scale detached, as leaves that accumulate gradients."""
    image, text, scale = (
        t.detach().requires_grad_()
        for t in (output.image_embedding, output.text_embedding, output.logit_scale)
    )
    return output._replace(image_embedding=image, text_embedding=text, logit_scale=scale)


def _surrogate(value: Tensor, leaf: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `value` is the accumulated gradient of `leaf`."""
    assert leaf.grad is not None
    return (value * leaf.grad).sum()


def _contrastive(
    engine: Engine,
    outputs: Sequence[ModelOutput],
    batches: Sequence[Batch],
    sums: GlobalSums,
    loss: LossConfig,
    num_rows: int,
) -> Tensor:
    """This rank's local term of InfoNCE over the pairs of all ranks and micro-batches."""
    image_BD = torch.cat([output.image_embedding for output in outputs])
    text_BD = torch.cat([output.text_embedding for output in outputs])
    hashes_B = torch.cat([batch.caption_hashes for batch in batches]).to(image_BD.device)
    pairs = image_BD.shape[0]
    # All-gather needs equal shapes: a rank with skipped samples adds rows that are not valid.
    both_RD = F.pad(torch.cat([image_BD, text_BD], dim=1), (0, 0, 0, num_rows - pairs))
    labels_R2 = hashes_B.new_zeros(num_rows, 2)
    labels_R2[:pairs, 0], labels_R2[:pairs, 1] = hashes_B, 1
    image_GD, text_GD = engine.communicator.all_gather(both_RD).chunk(2, dim=1)
    hashes_G, valid_G = engine.communicator.all_gather(labels_R2).unbind(1)
    gathered = GatheredPairs(
        image_GD=image_GD,
        text_GD=text_GD,
        hashes_G=hashes_G,
        valid_G=valid_G.bool(),
        first_row=engine.communicator.rank * num_rows,
    )
    return local_info_nce(
        image_BD,
        text_BD,
        hashes_B=hashes_B,
        gathered=gathered,
        logit_scale=outputs[0].logit_scale,
        num_pairs=sums.pairs.to(image_BD.dtype),
        mask_equal_captions=loss.mask_equal_captions,
    )
