"""Options that several verbs take: name, type, help and panel, declared once. Defaults are the
verbs' own; what only one verb takes is declared there."""

from typing import Annotated, Any

import typer

MEDIA, COMPRESSION, MODEL, OUTPUT = "Media", "Compression", "Model", "Output"
DATA, PROCESSES = "Data", "Processes"


def option(panel: str, help: str, *names: str) -> Any:
    """`names`: where the argument's own name is not the option's, and for flags without a --no."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


Videos = Annotated[
    list[str] | None,
    option(MEDIA, "Video files; 'sample' is the clip that ships with purekv, questions included."),
]
Images = Annotated[list[str] | None, option(MEDIA, "Image files.")]
Fps = Annotated[float | None, option(MEDIA, "Frames sampled per second. Default: the model's own.")]
MaxFrames = Annotated[
    int | None, option(MEDIA, "Most frames of a video. Default: the model's own.")
]
MaxPixels = Annotated[
    int | None, option(MEDIA, "Most pixels of a frame or image. Default: the model's own.")
]
Start = Annotated[float, option(MEDIA, "Second at which to start.")]
End = Annotated[float | None, option(MEDIA, "Second at which to end.")]

Budget = Annotated[
    str | None,
    option(
        COMPRESSION,
        "Visual tokens to keep: a share (0.2) or a count (200). Default: the plan's, or 0.2.",
    ),
]
Scorer = Annotated[str, option(COMPRESSION, "How importance is estimated.")]
Allocation = Annotated[
    str,
    option(COMPRESSION, "How the budget is spread over layers and heads: uniform, pyramid or ada."),
]
Methods = Annotated[str, option(COMPRESSION, "Comma-separated names.")]
Budgets = Annotated[
    str, option(COMPRESSION, "Comma-separated shares (0.2) or counts (200) of visual tokens.")
]
Prefills = Annotated[
    str, option(COMPRESSION, "Comma-separated attention patterns: dense, spatiotemporal.")
]
Prefill = Annotated[str, option(COMPRESSION, "Attention of the prefill: dense or spatiotemporal.")]
SpatioTemporal = Annotated[
    str,
    option(
        COMPRESSION,
        "Of that pattern: tile=2,anchor_frames=1,dense_layers=0,min_tokens=16384. Prompts of fewer "
        "visual tokens stay dense; dense_layers are the first N, or e.g. 0+4+14.",
    ),
]
Evicts = Annotated[str, option(COMPRESSION, "Comma-separated ways to evict: post, active, drop.")]
Evict = Annotated[str, option(COMPRESSION, "When entries leave: post, active or drop.")]
Prune = Annotated[
    float | None,
    option(
        COMPRESSION,
        "Share of the visual tokens that go in; what repeats the frame before is left out before "
        "the first layer.",
    ),
]
Scope = Annotated[
    str, option(COMPRESSION, "What may be forgotten: visual tokens, or the whole prompt's.")
]
FirstToken = Annotated[
    str,
    option(COMPRESSION, "exact, or compressed: let the first answer token feel the eviction too."),
]
SourceLayers = Annotated[
    str, option(COMPRESSION, "Layers whose attention is measured: auto, or e.g. 2,8,14.")
]
Window = Annotated[str, option(COMPRESSION, "Text that observes: question, or the last N tokens.")]
Plan = Annotated[
    str | None,
    option(
        COMPRESSION,
        "A calibrated plan's file (purekv calibrate); sets what is left at its default.",
    ),
]
Tolerance = Annotated[
    float | None,
    option(
        COMPRESSION,
        "Largest error of a layer's output, as a share: layers whose bound is above it choose by "
        "their own attention.",
    ),
]
Certificate = Annotated[
    bool,
    option(COMPRESSION, "Measure how large each layer's error can be (--json).", "--certificate"),
]

Model = Annotated[
    str | None, option(MODEL, "Hub id or directory. Default: the embedded reference model.")
]
Device = Annotated[str, option(MODEL, "auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, option(MODEL, "auto, float32, bfloat16 or float16.")]
MaxNewTokens = Annotated[int, option(MODEL, "Longest answer, in tokens.")]

Address = Annotated[
    str | None,
    option(PROCESSES, "Of a Ray cluster, or auto. Default: processes on this machine."),
]
GpusPerActor = Annotated[
    float | None,
    option(
        PROCESSES,
        "GPUs of each process; 0.5 lets two share one. Default: 1 on a machine with GPUs, else 0.",
        "--num-gpus-per-actor",
    ),
]

Json = Annotated[bool, option(OUTPUT, "Print one JSON object on stdout.", "--json")]
Debug = Annotated[bool, option(OUTPUT, "Show warnings and tracebacks.", "--debug")]
