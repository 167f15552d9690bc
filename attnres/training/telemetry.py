"""What a run says about its own health: progress, pace, use of the hardware, and sudden rises of the loss."""

import resource
import statistics
import sys
import time
from collections import deque

import torch
from tqdm import tqdm


class ProgressLine:
    """One tqdm line on stderr: step, loss, lr, tokens/s, time left."""

    def __init__(self, name: str, step: int, max_steps: int, shown: bool) -> None:
        # Into a file, a line every ten seconds is enough.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._text = [""]
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            desc=name,
            disable=not shown,
            mininterval=interval,
            maxinterval=interval,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc}: step {n_fmt}/{total_fmt} |{bar}| {postfix[0]}",
            postfix=self._text,
        )

    def update(self, loss: float, lr: float, rate: float, eta: float) -> None:
        """One step further: loss in nats/token, rate in tokens/s, eta in seconds or NaN."""
        left = "--" if eta != eta else tqdm.format_interval(int(eta))
        self._text[0] = f"loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tok/s  ETA {left}"
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


class Clock:
    """Tokens per second, share of the time spent waiting for data, and time left.

    The rate counts the time of training steps and of waiting for data, not of validation or saving. The time left
    counts all of them.
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._steps = 0
        self._first_step = self._mark
        self._reset()

    def _reset(self) -> None:
        self._tokens = 0
        self._busy = self._wait = 0.0

    def batch_start(self) -> None:
        now = time.perf_counter()
        self._wait += now - self._mark
        self._mark = now

    def batch_end(self) -> None:
        now = time.perf_counter()
        self._busy += now - self._mark
        self._mark = now

    def step_end(self, tokens: int) -> None:
        self._tokens += tokens
        self._steps += 1

    def duties_end(self) -> None:
        """After validation, logging and saving, whose time does not count as waiting for data."""
        self._mark = time.perf_counter()
        if self._steps == 1:
            # The first step carries compilation and warm-up and would spoil the estimate.
            self._first_step = self._mark

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(self._busy + self._wait, 1e-9)

    def eta(self, steps_left: int) -> float:
        """Seconds for `steps_left` more steps at the pace so far; NaN during the first two."""
        if self._steps < 2:
            return float("nan")
        return steps_left * (time.perf_counter() - self._first_step) / (self._steps - 1)

    def read(self) -> dict[str, float]:
        """Rates since the last reading."""
        total = max(self._busy + self._wait, 1e-9)
        rates = {"tokens_per_second": self._tokens / total, "data_wait": self._wait / total}
        self._reset()
        return rates


class SpikeDetector:
    """Tells a sudden rise of the loss from its noise.

    A step is a spike when its loss exceeds the median of up to `WINDOW` losses before it by more than `SIGMAS` robust
    standard deviations (1.4826 times the median absolute deviation) and by more than `LEAST` nats/token. It is silent
    for the first `WARM_UP` steps after a start or resume, and for `WINDOW` steps after a spike.
    """

    WINDOW, WARM_UP, SIGMAS, LEAST = 64, 16, 6.0, 0.1

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        self._quiet = 0

    def rise(self, loss: float) -> float | None:
        """Takes the next step's loss; nats/token above the median if it is a spike, else None."""
        before = list(self._losses)
        self._losses.append(loss)
        self._quiet = max(0, self._quiet - 1)
        if len(before) < self.WARM_UP or self._quiet:
            return None
        median = statistics.median(before)
        spread = 1.4826 * statistics.median(abs(value - median) for value in before)
        if loss - median <= max(self.SIGMAS * spread, self.LEAST):
            return None
        self._quiet = self.WINDOW
        return loss - median


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
