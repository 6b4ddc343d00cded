"""What BEATs hears: Kaldi's log mel filter banks, of thirty seconds at 16 kHz."""

import warnings
from functools import cache

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from purekv.families.videollama2.config import MEL_BINS

RATE = 16000
SECONDS = 30
CLIPS, CLIP_SECONDS = 8, 2
"""Of a video's sound."""


def fbank(wave: np.ndarray) -> np.ndarray:
    """Float32 [rows, 128] of a wave [samples] in -1 to 1: 25 ms windows every 10 ms (Kaldi's
    defaults without dither); 2,998 rows for thirty seconds."""
    bank = spectrogram(
        wave.astype(np.float64) * 2**15,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=_mel_filters(),
        mel_floor=float(np.finfo(np.float32).eps),
        log_mel="log",
    )
    return bank.T.astype(np.float32)


@cache
def _mel_filters() -> np.ndarray:
    """[257, 128]; the lowest are narrower than a bin of the spectrum, and some of them empty."""
    with warnings.catch_warnings(action="ignore"):
        return mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=MEL_BINS,
            min_frequency=20,
            max_frequency=RATE // 2,
            sampling_rate=RATE,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )


def thirty_seconds(wave: np.ndarray) -> np.ndarray:
    """Cut off, or filled up with silence. Upstream cuts at a random place, we at the start."""
    wave = wave[: SECONDS * RATE]
    return np.pad(wave, (0, SECONDS * RATE - len(wave)))


def video_clips(wave: np.ndarray) -> np.ndarray:
    """Eight clips of two seconds, spread over a video's sound, one behind the other. They overlap
    where it is shorter than sixteen seconds, and repeat it where it is shorter than two."""
    last = max(len(wave) / RATE - CLIP_SECONDS, 0)
    starts = [int(number * last / CLIPS * RATE) for number in range(CLIPS)]
    return np.concatenate([wave[start : start + CLIP_SECONDS * RATE] for start in starts])
