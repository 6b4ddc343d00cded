"""What each choice costs, measured on whole chats that are prefilled once, on the full cache.

Shapes: L layers, N budgets, H query heads, G KV heads, W queries, S positions, D head_dim.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from purekv.attach import Run
from purekv.config import PureKVConfig
from purekv.layout import Layout
from purekv.prefill import Prefill
from purekv.scoring import Attended
from purekv.upstream import CACHE, cache_of
from purekv.window import Window, window_attention

WHEN = ("now", "later")
"""Queries of the first question, which chose what stays; and all that follow it: its answer, later
questions and theirs."""


@dataclass(frozen=True)
class Transfer:
    """Output errors of one chat, float32 on the CPU. All are means over queries of what a layer's
    attention adds to the residual stream, as a share of the stream's own length."""

    pairs: Tensor
    """[2, L, L]: of `WHEN`, source and target. The target (not below the source) keeps `budget` of
    its entries, the best by the source's attention times its own value norm. 0 below the source."""
    curve: Tensor
    """[2, N, L]: where it is its own source, at every budget."""
    blind: Tensor
    """[2, L]: where the target keeps no visual entry at all."""


class Blinding(Run):
    """A run on the full cache, which it goes on from with a row of the batch for each of `layers`:
    there, the row sees no visual token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(PureKVConfig(budget=1.0), model)
        self.layers: Tensor = torch.empty(0, dtype=torch.long)
        self.is_visual: Tensor = torch.empty(0, dtype=torch.bool)
        """[S]"""

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not self._continuing:
            return super()._attend(module, query, key, value, mask, **kwargs)
        kv_len, q_len = key.shape[2], query.shape[2]
        visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        hidden = torch.zeros(kv_len, dtype=torch.bool)
        hidden[: len(self.is_visual)] = self.is_visual
        rows = (self.layers == module.layer_idx)[:, None, None] & hidden
        mask = (visible & ~rows)[:, None].to(query.device)
        groups = query.shape[1] // key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, 1),
            value.repeat_interleave(groups, 1),
            attn_mask=mask,
            scale=kwargs.get("scaling"),
        )
        return output.transpose(1, 2), None


@torch.inference_mode()
def measure_worth(
    model: PreTrainedModel, inputs: dict[str, Tensor], first_turn: int, rows: int = 10
) -> Tensor:
    """What the answers lose where one layer sees no visual token: KL(full || blind) of the next
    tokens, from the first answer on, mean in nats; float32 [L] on the CPU.

    Args:
        inputs, first_turn: as in `measure_transfer`.
        rows: layers that are tried together.
    """
    ids = inputs["input_ids"]
    text: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        text.update(kwargs)

    with Blinding(model) as run:
        language = run._language
        hook = language.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            output = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
            )
        finally:
            hook.remove()
        cache = cache_of(output)
        layout = run._family.layout(model.config, inputs)
        run.is_visual = layout.is_visual[0]
        start = int(layout.is_tail[0].nonzero()[0])
        cache.crop(start - ids.shape[1])
        embeds, position_ids = text["inputs_embeds"][:, start:], text.get("position_ids")
        places = slice(first_turn - 1 - start, None)
        head = model.get_output_embeddings()

        def next_tokens(layers: Tensor) -> Tensor:
            """Log-probabilities [rows, places, V] with each of these layers blind; -1: none."""
            run.layers = layers
            count = len(layers)
            filled = copy.deepcopy(cache)
            filled.batch_repeat_interleave(count)
            again = {"inputs_embeds": embeds.expand(count, -1, -1), CACHE: filled}
            if position_ids is not None:
                again["position_ids"] = position_ids[..., start:].expand(
                    *position_ids.shape[:-2], count, -1
                )
            hidden = language(**again, use_cache=True).last_hidden_state
            return head(hidden[:, places]).float().log_softmax(-1)

        full = next_tokens(torch.tensor([-1]))
        found = [
            (full.exp() * (full - next_tokens(part))).sum(-1).mean(-1)
            for part in torch.arange(len(language.layers)).split(rows)
        ]
    return torch.cat(found).clamp(min=0).cpu()


class Watching(Run):
    """A run that keeps the full cache and hands on what each layer attended to, and the residual
    stream [B, S, hidden] that it started from."""

    _looks_on = True

    def __init__(
        self, model: PreTrainedModel, see: Callable[[Layout, Attended, Tensor], None]
    ) -> None:
        super().__init__(PureKVConfig(budget=1.0), model)
        self._see = see
        self._stream: Tensor | None = None

    def __enter__(self) -> "Watching":
        super().__enter__()
        for layer in self._language.layers:
            self._handles.append(layer.register_forward_pre_hook(self._keep, with_kwargs=True))
        return self

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._stream = args[0] if args else kwargs["hidden_states"]

    def _evict(self, prefill: Prefill, attended: Attended) -> Any:
        selection = super()._evict(prefill, attended)
        assert self._stream is not None
        self._see(prefill.layout, attended, self._stream)
        return selection

    def output_projection(self, layer_idx: int) -> nn.Module:
        return self._family.output_projection(self._model, layer_idx)


@torch.inference_mode()
def measure_transfer(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    first_turn: int,
    budget: float,
    budgets: Sequence[float],
) -> Transfer:
    """Prefill one chat and compare every layer's output with what it would be.

    Args:
        inputs: a batch of one: pixels, and the ids of the whole chat, answers included.
        first_turn: ids of it up to the end of the first question's prompt.
        budget: share at which every source is tried.
        budgets: at which each layer's own is.
    """
    sources: list[Tensor] = []
    found: list[tuple[Tensor, Tensor]] = []  # of each target, [2, sources up to it], [2, N + 1]

    def see(layout: Layout, attended: Attended, stream: Tensor) -> None:
        device = attended.key.device
        visual = layout.is_visual[0].to(device)
        tail = layout.is_tail[0].nonzero().flatten().to(device)
        now = tail < first_turn
        window = Window(tail[now][None], torch.ones(1, int(now.sum()), dtype=torch.bool)).to(device)
        is_token = layout.is_token.to(device)
        rows = window_attention(attended.query, attended.key, attended.scaling, window, is_token)
        sources.append(rows[0].mean((0, 1)))
        norm = attended.value[0].norm(dim=-1, dtype=torch.float32)
        project = run.output_projection(attended.layer_idx)
        length = stream[0, tail].float().norm(dim=-1)
        score = torch.stack(sources)[:, None] * norm  # [sources, G, S]
        score = score.masked_fill(~visual, -torch.inf)
        order = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        most = int(visual.sum())
        keep = [order < max(1, int(budget * most + 1e-6))]
        keep += [order[-1:] < max(1, int(one * most + 1e-6)) for one in budgets]
        keep += [torch.zeros_like(order[-1:], dtype=torch.bool)]
        lost = output_errors(attended, tail, torch.cat(keep) | ~visual, project) / length
        lost = torch.stack([lost[:, part].mean(-1) for part in (now, ~now)]).cpu()
        found.append((lost[:, : len(order)], lost[:, len(order) :]))

    with Watching(model, see) as run:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    pairs = torch.zeros(2, len(found), len(found))
    for target, (by_source, _) in enumerate(found):
        pairs[:, : target + 1, target] = by_source
    own = torch.stack([alone for _, alone in found], dim=-1)
    return Transfer(pairs, own[:, :-1], own[:, -1])


def output_errors(attended: Attended, queries: Tensor, keep: Tensor, project: nn.Module) -> Tensor:
    """Lengths of what attention's output loses, after its projection, float32 [n, W].

    Args:
        attended: of a batch of one.
        queries: int64 [W], positions; all entries that are not kept are before them.
        keep: bool [n, G, S]; which entries stay, in each of n ways.
        project: the layer's output projection, [..., H * D] to [..., hidden].
    """
    groups = attended.query.shape[1] // attended.key.shape[1]
    query = attended.query[0, :, queries].float().unflatten(0, (-1, groups)).flatten(1, 2)
    key, value = attended.key[0].float(), attended.value[0].float()
    logits = query @ key.mT * attended.scaling  # [G, groups * W, S]
    future = torch.arange(key.shape[1], device=key.device) > queries[:, None]
    logits = logits.masked_fill(future.repeat(groups, 1), -torch.inf)
    weight = logits.softmax(-1)
    # Sums of weights and of weighted values over what stays: all ways are columns of one product.
    columns = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)  # [G, S, D + 1]
    some = keep.permute(1, 2, 0)[..., None] * columns[:, :, None]  # [G, S, n, D + 1]
    sums = (weight @ some.flatten(2)).unflatten(2, some.shape[2:])  # [G, groups * W, n, D + 1]
    kept = sums[..., :-1] / sums[..., -1:].clamp(min=1e-9)
    lost = kept - (weight @ value)[:, :, None]
    lost = lost.unflatten(1, (groups, -1)).flatten(0, 1)  # [H, W, n, D]
    lost = lost.permute(2, 1, 0, 3).flatten(2)
    if getattr(project, "bias", None) is not None:
        return (project(lost.to(attended.value.dtype)) - project.bias).float().norm(dim=-1)
    return project(lost.to(attended.value.dtype)).float().norm(dim=-1)
