"""What one run kept, what it cost in bytes and where the seconds went."""

from dataclasses import asdict, dataclass
from typing import Any

from purekv.certificate import LayerCertificate
from purekv.timing import PhaseTimer

__all__ = ["PhaseTimer", "Report"]


@dataclass(frozen=True)
class Report:
    """The last prefill of a run, and the decoding since."""

    scope: str
    """What may be evicted: "visual" tokens, or those of the "prompt"."""
    visual_tokens: list[int]
    """Visual tokens of each row of the batch; with scope="prompt", all that may be evicted."""
    kept_visual_tokens: list[int]
    """Those that each (layer, KV head) keeps, per row; their mean where an allocation spreads
    them unevenly."""
    text_tokens: list[int]
    """Other tokens of each row; all are kept."""
    kept_per_layer: list[int]
    """Entries stored per KV head in each layer at the end of prefill: the longest row's, on
    average over its heads."""
    longest_head_per_layer: list[int]
    """Entries that attention meets in each layer: above `kept_per_layer` where heads keep
    different counts, as all are padded to the longest while the layer runs."""
    computed_per_layer: list[int]
    """Positions that each layer computed in the prefill, padding included."""
    prefill_per_layer: list[str]
    """What each layer's attention was: "dense"; "spatiotemporal", in at least one row; "kept", over
    what the layer keeps; "sliding", within the layer's window, whose cache is the model's own."""
    source_layers: list[int]
    """Layers that computed attention scores."""
    kv_bytes_full: int
    """Bytes the uncompressed cache of this prefill would hold."""
    kv_bytes_kept: int
    """Bytes that the cache's tensors held allocated at the end of prefill, padding included where
    it is stored."""
    seconds: dict[str, float]
    """Seconds in the vision tower, prefill (scoring and eviction included) and decode."""
    certificate: list[LayerCertificate] | None = None
    """How large the error of each layer can be, on the observing queries; None unless asked for.
    Layers in which nothing is left to choose behind a drop have none."""

    @property
    def compression(self) -> float:
        """`kv_bytes_full / kv_bytes_kept`."""
        return self.kv_bytes_full / self.kv_bytes_kept

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "compression": self.compression}

    def __str__(self) -> str:
        mib = 2**20
        kept = sum(self.kept_visual_tokens)
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items())
        return (
            f"PureKV kept {kept} of {sum(self.visual_tokens)} {self.scope} tokens and all "
            f"{sum(self.text_tokens)} others in each of {len(self.kept_per_layer)} layers: "
            f"{self.kv_bytes_full / mib:.1f} -> {self.kv_bytes_kept / mib:.1f} MiB "
            f"({self.compression:.2f}x); {seconds}"
        )
