"""PureKV on one model: plug in, run, restore.

The story of a prefill, top to bottom: the layout is found from the ids (`_before_model`), the
cache is made to forget and the mask is built (`_before_language_model`), each layer attends, to
everything or sparsely, and is then scored and compacted (`_attend`, `_evict`), and where the first
token must feel the eviction, the text behind the last visual token runs once more
(`_after_language_model`). Decoding needs only the cache.
"""

import contextlib
import inspect
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv import families
from purekv.allocation import make_allocation
from purekv.attention import NAME_PREFIX, Backend
from purekv.attention.kept import NEVER_SEEN, attend_to_kept
from purekv.attention.spatiotemporal import sparse_attention
from purekv.attention.vision import BatchedChunks
from purekv.budget import keep_counts
from purekv.cache import (
    EvictingLayer,
    cache_bytes,
    entries_per_head,
    entry_bytes,
    is_compressed,
    make_evicting,
    own_masks,
    physical_length,
)
from purekv.certificate import Measured, certify
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.fit import fit, refuse_whole_sequences
from purekv.layout import Layout
from purekv.parallel import HeadShards
from purekv.prefill import Prefill
from purekv.ragged import RaggedLayer, settle
from purekv.report import Report
from purekv.rotation import Rotation
from purekv.scope import prompt_layout
from purekv.scoring import Attended
from purekv.scoring.frame_difference import FrameDifference
from purekv.selection import RaggedSelection, Selection
from purekv.timing import PhaseTimer
from purekv.upstream import CACHE, cache_in, masks_like, no_masks


class PureKV:
    """Compress the KV cache of a transformers vision-language model while it runs.

    with PureKV(PureKVConfig(budget=0.2))(model) as run:
        output = model.generate(**inputs, max_new_tokens=64)
    print(run.report)
    """

    def __init__(self, config: PureKVConfig | None = None) -> None:
        self.config = config or PureKVConfig()

    def __call__(self, model: PreTrainedModel) -> "Run":
        """A context manager that changes `model` on entry and restores it on exit."""
        return Run(self.config, model)


class Run:
    """PureKV attached to one model.

    Every prefill (a forward on an empty cache) is compressed on its own; a forward on a cache that
    a run compressed continues it. The state of a conversation is in its cache, not here.

    Raises:
        PureKVError: when made, if the model, its attention or the config's layers are not
            supported; in a forward, if the request is not.
    """

    _looks_on = False
    """Whether `_evict` runs at every layer even if nothing is evicted: for subclasses that see
    there what a layer attended to."""

    def __init__(self, config: PureKVConfig, model: PreTrainedModel) -> None:
        self.config = config
        self._model = model
        self._family = families.for_config(model.config)
        self._multimodal = self._family.multimodal_model(model)
        self._language = self._family.language_model(model)
        self._rotary = self._family.rotary_embedding(model)
        self._signature = inspect.signature(self._multimodal.forward)
        num_heads: int = self._language.config.num_key_value_heads
        self._shards = HeadShards.of(model, num_heads)
        self._num_heads = num_heads // self._shards.size
        self._backend = Backend(self._language)
        self._scorer, self._roles = fit(config, model, self._family, self._shards)
        self._num_layers, self._layers = self._roles.num_layers, self._roles.evicting
        self._slides = len(self._layers) < self._num_layers
        self._stock_masks = self._slides or self._family.stock_masks
        self._drops = config.evict == "drop" or config.prune is not None
        """Whether any layer gets fewer tokens than the prompt has."""
        self._pruner = self._scorer if isinstance(self._scorer, FrameDifference) else None
        if config.prune is not None:
            self._pruner = FrameDifference()
        self._allocation = make_allocation(config.allocation, config.layer_shares)
        tower = self._family.vision_tower(model) if self._family.packed_tower else None
        self._vision = contextlib.nullcontext() if tower is None else BatchedChunks(tower)
        self._timer = PhaseTimer(model)
        self._name = f"{NAME_PREFIX}{id(self):x}"
        self._handles: list[RemovableHandle] = []
        self._report: dict[str, Any] | None = None
        self._layout: Layout | None = None
        self._measured: list[Measured] | None = None
        self._forget()

    def _forget(self) -> None:
        self._prefill: Prefill | None = None
        self._cache: Cache | None = None
        self._continuing = False
        self._attention_mask: Tensor | None = None  # [B, tokens seen], as the model got it
        self._mask: Tensor | None = None  # of a forward on an empty cache
        self._plain = False  # whether no layer of this forward needs us
        self._masks: dict[Any, Any] = {}  # of one on a filled cache; layers that hold alike share
        self._new_tokens: Tensor | None = (
            None  # bool [B, n]; the newest entries, if some are padding
        )

    def __enter__(self) -> Self:
        if self._language.config._attn_implementation != self._backend.name:
            raise PureKVError("this model is inside another PureKV block; leave that one first")
        ALL_ATTENTION_FUNCTIONS[self._name] = self._attend
        if self._stock_masks:
            masks_like(self._backend.name, self._name)
        self._language.config._attn_implementation = self._name
        self._vision.__enter__()
        self._timer.__enter__()
        language = self._language
        self._handles = [
            self._multimodal.register_forward_pre_hook(self._before_model, with_kwargs=True),
            language.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            self._rotary.register_forward_hook(self._after_rotary, with_kwargs=True),
            language.register_forward_hook(self._after_language_model, with_kwargs=True),
        ]
        if self._drops:
            for module in dict.fromkeys((self._model, self._multimodal, language)):
                refuse = partial(refuse_whole_sequences, inspect.signature(module.forward))
                self._handles.append(module.register_forward_pre_hook(refuse, with_kwargs=True))
            for layer_idx, layer in enumerate(language.layers):
                hook = partial(self._before_layer, layer_idx)
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._timer.__exit__()
        self._vision.__exit__(None, None, None)
        self._language.config._attn_implementation = self._backend.name
        del ALL_ATTENTION_FUNCTIONS[self._name]
        if self._stock_masks:
            no_masks(self._name)
        self._forget()

    @property
    def report(self) -> Report:
        """What the last prefill kept, and the seconds since it began. Waits for the device.

        Raises:
            PureKVError: nothing was compressed yet.
        """
        if self._report is None or self._layout is None:
            raise PureKVError("nothing was compressed yet; run model.generate inside the block")
        certificate = None if self._measured is None else [certify(one) for one in self._measured]
        return Report(
            **self._report,
            visual_tokens=list(self._layout.visual_tokens),
            text_tokens=list(self._layout.text_tokens),
            seconds=self._timer.seconds,
            certificate=certificate,
        )

    # The hooks, in the order in which they run.

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Find the layout of a new prompt; refuse what cannot be served before any pixel runs."""
        self._forget()
        inputs = {**self._signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
        self._attention_mask = inputs.get("attention_mask")
        cache = cache_in(inputs)
        if cache is not None and cache.get_seq_length() > 0:
            self._check_continuation(cache, inputs)
            if self._stock_masks:
                own_masks(cache, True)
            return
        self._report = None
        if inputs.get("use_cache") is not False:
            if cache is not None:
                self._make_evicting(cache)
            media = layout = self._family.layout(self._model.config, inputs)
            if self.config.scope == "prompt":
                layout = prompt_layout(media, self.config.window)
            elif not any(layout.visual_tokens):
                raise PureKVError(
                    "the prompt has no visual tokens to evict; add an image or a video, use "
                    'scope="prompt" to compress text, or run the model outside PureKV'
                )
            if self._drops and not layout.is_token[:, -1].all():
                raise PureKVError(
                    "a row of the batch ends in padding, and what drops tokens (evict='drop', "
                    "prune) packs rows to the right; "
                    'pad on the left (processor.tokenizer.padding_side = "left")'
                )
            quota = keep_counts(self.config.budget, layout)
            self._prefill = Prefill(
                self.config, self._scorer, self._allocation, layout, quota, self._roles,
                self._num_heads, media,
            )  # fmt: skip
            if self._prefill.patterns and torch.is_grad_enabled():
                raise PureKVError(
                    'prefill="spatiotemporal" has no gradient; run the model under '
                    "torch.no_grad(), as generate does"
                )
            self._timer.reset()

    def _before_language_model(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Take the cache in hand, and own the mask."""
        cache = cache_in(kwargs)
        if cache is None and self._prefill is not None:
            cache = DynamicCache(config=self._language.config) if self._slides else DynamicCache()
            self._make_evicting(cache)
            kwargs[CACHE] = cache
        self._cache = cache
        self._continuing = cache is not None and cache.get_seq_length() > 0
        self._masks.clear()
        if kwargs.get("inputs_embeds") is None:  # a language model that is called on its own
            ids = kwargs.pop("input_ids")
            kwargs["inputs_embeds"] = module.get_input_embeddings()(ids)
        if cache is not None and self._continuing:
            for layer in cache.layers:
                if isinstance(layer, RaggedLayer):
                    layer.segmented = self._backend.takes_segments(layer.device)
        embeds, attention_mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if self._prefill is not None and self._pruner is not None:
            self._drop_before_layers(self._prefill, kwargs)
            embeds, attention_mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        elif self._prefill is not None and not self._prefill.layout.has_padding:
            attention_mask = None  # hides nothing; to see that there would wait for the device
        if self._stock_masks:  # the model makes its own masks, and a dict of them
            attention_mask = self._attention_mask
        elif not self._continuing and self._needs_mask():
            positions = _text_positions(kwargs.get("position_ids")) if cache is None else None
            self._mask = self._backend.prefill_mask(embeds, attention_mask, positions)
        if (
            self._continuing
            and cache is not None
            and self._new_tokens is None
            and attention_mask is not None
            and embeds.shape[1] > 1
        ):
            # A further turn says which tokens behind the prompt are padding: its own, and those
            # that `generate` fed to rows that had finished.
            layer = cache.layers[self._layers[0]]
            count = layer.physical_length - layer.prompt_entries + embeds.shape[1]
            new_tokens = attention_mask[:, -count:].bool()
            self._new_tokens = None if new_tokens.all() else new_tokens
        self._plain = self._is_plain()
        return args, kwargs

    def _is_plain(self) -> bool:
        """Whether a prefill is the unmodified model's in every layer, and nobody looks on."""
        prefill = self._prefill
        if prefill is None or self._evicts_or_looks(prefill):
            return False
        return self._mask is None and not self._stock_masks

    def _evicts_or_looks(self, prefill: Prefill) -> bool:
        """Whether `_evict` runs at its layers."""
        return prefill.changes or self._looks_on

    def _needs_mask(self) -> bool:
        """Whether any layer attends densely; what tokens are dropped later gets a mask then."""
        prefill = self._prefill
        layers = range(self._num_layers)
        return prefill is None or any(prefill.attention_of(idx) == "dense" for idx in layers)

    def _after_rotary(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep the angles of a prompt's positions for its scorers."""
        kind = kwargs.get("layer_type") or (args[2] if len(args) > 2 else None)
        prefill = self._prefill
        if prefill is None or not self._evicts_or_looks(prefill):
            return
        if kind in (None, "full_attention"):
            position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            cos, sin = output
            prefill.rotation = Rotation(cos, sin, position_ids, module, kind)

    def _drop_before_layers(self, prefill: Prefill, kwargs: dict[str, Any]) -> None:
        """Leave tokens out of the language model's arguments."""
        if not prefill.evicts:
            return
        embeds = kwargs["inputs_embeds"]
        assert self._pruner is not None
        scores = self._pruner.score_embeddings(embeds, prefill.layout)
        going_in = prefill.quota
        if self.config.prune is not None:
            shares = keep_counts(self.config.prune, prefill.layout)
            going_in = tuple(map(max, shares, prefill.quota))
        prefill.drop(scores, going_in)
        kept = prefill.kept
        assert kept is not None
        kwargs["inputs_embeds"] = kept.take(embeds, 1)
        kwargs["attention_mask"] = kept.is_token.long().to(embeds.device)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kept.take(kwargs["position_ids"], 0)
        prefill.kept = prefill.pending = None  # all that the first layer gets is computed

    def _before_layer(
        self, layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand a layer only the tokens that it has to compute."""
        prefill = self._prefill
        if prefill is None or prefill.kept is None or self._continuing:
            return None
        kept = prefill.kept
        hidden, *others = args or (kwargs["hidden_states"],)
        if prefill.pending is not None:  # dropped behind the layer below
            hidden, prefill.pending = prefill.pending.take(hidden, 1), None
            is_token = kept.is_token.to(hidden.device)
            self._mask = self._backend.prefill_mask(hidden, is_token.long(), None)
        # The model hands every layer the angles of all positions.
        angles, position_ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        kwargs = {**kwargs, "position_embeddings": tuple(kept.take(x, 1) for x in angles)}
        if position_ids is not None:
            kwargs["position_ids"] = kept.take(position_ids, 0)
        if args:
            return (hidden, *others), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The registered attention function: the model's own, with our mask, then eviction.

        Where the run says so, it is sparse instead, or eviction comes first.

        Shapes: query [B, num_attention_heads, q_len, D], key and value [B, num_key_value_heads,
        entries, D].
        """
        if self._plain:
            return self._backend.forward(module, query, key, value, None, **kwargs)
        if self._slides and module.layer_idx not in self._layers:
            return self._slide(module, query, key, value, mask, **kwargs)
        if self._continuing:
            assert self._cache is not None
            layer = self._cache.layers[module.layer_idx]
            if self._new_tokens is not None:
                layer.mark_padding(self._new_tokens)
            if isinstance(layer, RaggedLayer) and layer.lends_segments(query.shape[2]):
                return self._backend.decode_segments(query, layer.segments, **kwargs)
            place = layer.entries_key, query.device
            if place not in self._masks:  # the first of the layers that share it
                self._masks[place] = self._backend.continuation_mask(
                    query, key.shape[2], layer.is_entry
                )
            attend = self._backend.decode if layer.evicted else self._backend.forward
            return attend(module, query, key, value, self._masks[place], **kwargs)
        prefill = self._prefill
        kind = "dense" if prefill is None else prefill.attention_of(module.layer_idx)
        output: tuple[Tensor, Tensor | None]
        if kind == "dense":
            if not self._stock_masks:
                mask = None if self._mask is None else self._mask.to(query.device)
            output = self._backend.forward(module, query, key, value, mask, **kwargs)
            if prefill is None:
                return output
        assert prefill is not None
        prefill.attention.append(kind)
        prefill.computed.append(query.shape[2])
        if not self._evicts_or_looks(prefill):
            return output
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        attended = Attended(module.layer_idx, query, key, value, scaling, self._shards)
        if kind == "kept":
            return self._attend_to_kept(prefill, attended), None
        if kind == "spatiotemporal":
            patterns = prefill.patterns_of(module.layer_idx)
            output = sparse_attention(query, key, value, scaling, patterns), None
        self._evict(prefill, attended)
        return output

    def _slide(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """A layer that sees a window only: the model's own attention, mask and cache."""
        if self._prefill is not None:
            assert self._cache is not None
            layer = self._cache.layers[module.layer_idx]
            # A window of the prompt is a view, which would keep all of the prompt allocated.
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            self._prefill.kv_bytes_full += layer.keys.nbytes + layer.values.nbytes
            self._prefill.computed.append(query.shape[2])
            self._prefill.attention.append("sliding")
        return self._backend.forward(module, query, key, value, mask, **kwargs)

    def _attend_to_kept(self, prefill: Prefill, attended: Attended) -> Tensor:
        """Evict, then attend to what is left, [B, S, num_attention_heads, D]."""
        assert self._cache is not None
        selection = self._evict(prefill, attended)
        assert isinstance(selection, Selection)
        layer = self._cache.layers[attended.layer_idx]
        key, value, index, is_entry = layer.keys, layer.values, selection.index, selection.is_entry
        position = index if is_entry is None else index.masked_fill(~is_entry[:, None], NEVER_SEEN)
        if prefill.tail is not None:  # seen, but not kept, as it runs again
            tail = prefill.tail.to(key.device)
            count, seq_len = tail.shape[1], attended.key.shape[2]
            newest = torch.arange(seq_len - count, seq_len, device=key.device)
            newest = newest.masked_fill(~tail, NEVER_SEEN)[:, None]
            position = torch.cat([position, newest.expand(-1, position.shape[1], -1)], dim=-1)
            key = torch.cat([key, attended.key[:, :, -count:]], dim=2)
            value = torch.cat([value, attended.value[:, :, -count:]], dim=2)
        return attend_to_kept(attended.query, key, value, position, attended.scaling)

    def _evict(self, prefill: Prefill, attended: Attended) -> Selection | RaggedSelection | None:
        """Answers what stayed, if anything had to leave."""
        assert self._cache is not None
        layer, key, value = self._cache.layers[attended.layer_idx], attended.key, attended.value
        if not prefill.evicts:
            if prefill.layout.has_padding:
                layer.mark_padding(prefill.layout.is_token)
            return None
        seq_len = prefill.layout.is_token.shape[1]
        prefill.kv_bytes_full += (key.nbytes + value.nbytes) // key.shape[2] * seq_len
        selection = prefill.select(attended)
        layer.evict(key, value, selection, prefill.seen)
        return selection

    def _after_language_model(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        prefill, self._prefill = self._prefill, None
        cache, self._cache = self._cache, None
        self._mask = None
        self._masks.clear()
        if prefill is None:
            if self._stock_masks and cache is not None:
                own_masks(cache, False)
            return output
        assert cache is not None
        if self._plain:
            prefill.computed = [prefill.layout.is_token.shape[1]] * self._num_layers
            prefill.attention = ["dense"] * self._num_layers
        if len(prefill.computed) < self._num_layers:
            raise PureKVError(
                f"{self._num_layers - len(prefill.computed)} of {self._num_layers} layers do not "
                f"attend through transformers' attention interface, so {type(module).__name__} "
                "cannot be compressed; run it outside PureKV"
            )
        layers = [cache.layers[idx] for idx in self._layers] if prefill.evicts else []
        settle(layers)
        if prefill.tail is not None:
            self._rerun_tail(module, kwargs, prefill.tail, output)
        if self._stock_masks:
            own_masks(cache, False)
        kept_per_layer, longest_per_layer = list(prefill.computed), list(prefill.computed)
        if prefill.evicts:
            kv_bytes_kept, kv_bytes_full = cache_bytes(cache), prefill.kv_bytes_full
            for layer in layers:
                layer.prompt_entries = layer.physical_length
                layer.trailing_text = prefill.layout.trailing_text
        else:
            kv_bytes_kept = kv_bytes_full = entry_bytes(cache)
        if prefill.evicts or self._slides:
            kept_per_layer = [entries_per_head(layer) for layer in cache.layers]
            longest_per_layer = [physical_length(layer) for layer in cache.layers]
        self._report = {
            "scope": self.config.scope,
            "kept_visual_tokens": list(prefill.quota),
            "kept_per_layer": kept_per_layer,
            "longest_head_per_layer": longest_per_layer,
            "computed_per_layer": prefill.computed,
            "prefill_per_layer": prefill.attention,
            "source_layers": prefill.scoring.source_layers,
            "kv_bytes_full": kv_bytes_full * self._shards.size,
            "kv_bytes_kept": kv_bytes_kept * self._shards.size,
        }
        self._layout, self._measured = prefill.layout, prefill.measured
        return output

    def _rerun_tail(
        self, module: nn.Module, kwargs: dict[str, Any], tail: Tensor, output: Any
    ) -> None:
        """Compute the text behind the last visual token again, on the compressed cache.

        Args:
            kwargs: of the language model's forward that was just done.
            tail: bool [B, n]; which of the newest n positions run again.
            output: of that forward; its `last_hidden_state` [B, S, hidden] is replaced there.
        """
        length = tail.shape[1]
        again = self._run_again(module, kwargs, slice(-length, None), tail)
        hidden = output.last_hidden_state
        tail = tail.to(hidden.device)[..., None]
        newest = torch.where(tail, again.last_hidden_state, hidden[:, -length:])
        output.last_hidden_state = torch.cat([hidden[:, :-length], newest], dim=1)

    def _run_again(
        self, module: nn.Module, kwargs: dict[str, Any], part: slice, is_token: Tensor
    ) -> Any:
        """Run positions of the prompt on the cache in `kwargs`; False in `is_token` is padding."""
        embeds, position_ids = kwargs["inputs_embeds"], kwargs.get("position_ids")
        self._new_tokens = None if is_token.all() else is_token.to(embeds.device)
        again = module(
            **{
                **kwargs,
                "inputs_embeds": embeds[:, part],
                "position_ids": None if position_ids is None else position_ids[..., part],
                "attention_mask": None,
                **dict.fromkeys(set(self._family.full_length_arguments) & set(kwargs)),
            }
        )
        self._new_tokens = None
        return again

    def _make_evicting(self, cache: Cache) -> None:
        layer_class = RaggedLayer if self._allocation.ragged else EvictingLayer
        make_evicting(cache, self._num_layers, layer_class, self._layers)
        if self._stock_masks:
            own_masks(cache, True)

    def _check_continuation(self, cache: Cache, inputs: dict[str, Any]) -> None:
        if not is_compressed(cache):
            raise PureKVError(
                "this cache was not filled by PureKV; start from an empty one, or go on outside"
            )
        pixels = bool(inputs.get("mm_encoder_outputs")) or any(
            inputs.get(name) is not None for name in self._family.pixel_arguments
        )
        ids = inputs.get("input_ids")
        tokens = list(self._family.visual_token_ids(self._model.config).values())
        if not pixels and tokens and ids is not None and ids.shape[1] > 1:
            pixels = bool(torch.isin(ids, torch.tensor(tokens, device=ids.device)).any())
        if pixels:
            raise PureKVError(
                "images or videos were sent on a follow-up turn; the cache already holds the "
                "compressed ones, so pass only input_ids and attention_mask"
            )


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """The row of text positions that `generate` puts in front of the three of M-RoPE."""
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        return position_ids[0]
    return None
