"""What a profile says of a device and of a host, on kernels and threads that are known."""

import argparse
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import profile_step
import timeline
from host_samples import HostSamples
from timeline import Kernel

KERNELS = [
    Kernel("nvjet_tst_192x192", 100.0, 300.0),
    Kernel("cudnn_generated_sdpa_flash_fprop", 250.0, 400.0),  # beside the first
    Kernel("triton_poi_fused_scaled_dot_product_flash", 450.0, 500.0),
    Kernel("nvjet_tst_192x192", 500.0, 550.0),
    Kernel("jsd_rows_kernel", 1550.0, 1600.0),
]


def test_a_device_is_busy_while_any_kernel_runs_and_gaps_say_what_they_lie_between():
    assert timeline.busy_seconds(KERNELS) == pytest.approx(450e-6)
    gaps = timeline.gaps_of(KERNELS)
    assert [(gap.start, gap.length) for gap in gaps] == [(300.0, 50.0), (450.0, 1000.0)]
    assert (gaps[1].before, gaps[1].after) == ("nvjet_tst_192x192", "jsd_rows_kernel")
    parts = timeline.idle_by_part(KERNELS, 5)  # of 300 us each
    assert parts == pytest.approx([0, 1.05, 0, 0, 0])
    assert timeline.gaps_of([]) == [] and timeline.busy_seconds([]) == 0
    assert timeline.idle_by_part([], 2) == [0, 0]


def test_kernels_are_counted_by_kind_and_by_name(capsys):
    by_kind = timeline.times_by(KERNELS, kind=True)
    assert by_kind == {
        "matrix products": (0.25, 2),
        "attention": (0.15, 1),
        "compiled": (0.05, 1),  # although it says what it is fused into
        "losses": (0.05, 1),
    }
    assert next(iter(timeline.times_by(KERNELS, kind=False))) == "nvjet_tst_192x192"
    timeline.describe(KERNELS, 900e-6)
    assert "0.000 s in 5 kernels (50%)" in capsys.readouterr().out


def test_samples_say_where_a_thread_is_and_leave_out_those_that_wait(capsys):
    stopped = threading.Event()
    waiting = threading.Thread(target=stopped.wait)
    waiting.start()
    try:
        with HostSamples() as samples:
            busy_here(0.05)
    finally:
        stopped.set()
        waiting.join()
    assert samples.count > 5
    here = [n for place, n in samples.functions.items() if place.endswith("busy_here")]
    assert here and here[0] > samples.count / 4
    assert not any("threading.py" in place for place in samples.lines)
    samples.describe(0.05)
    assert "busy_here" in capsys.readouterr().out


def busy_here(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        (None, [["off", "37", "jsd", "1"], ["trl", "37", "jsd", "1"]]),
        (["packed:8,9:uld:2", "off:5"], [["packed", "8,9", "uld", "2"], ["off", "5", "jsd", "1"]]),
    ],
)
def test_cases_have_what_they_do_not_say_from_the_other_options(cases, expected):
    options = argparse.Namespace(
        cases=cases, tokens=["37"], modes=["off", "trl"], loss="jsd", micro_batches=1
    )
    assert profile_step.cases_of(options) == expected


def test_modes_are_compared_with_compiled_layers_on_the_same_rows():
    def row(mode, tokens, seconds):
        case = {"mode": mode, "loss": "jsd", "completion_tokens": tokens, "micro_batches": 1}
        return case | ({} if seconds is None else {"seconds_median": seconds})

    rows = [row("trl", "37", 3.0), row("regional", "37", 2.0), row("off", "37", 2.5)]
    rows += [row("off", "9", 1.0), row("regional", "9", None)]
    assert profile_step.ratios(rows) == [
        "trl, jsd 37: 1.50 times regional's time",
        "off, jsd 37: 1.25 times regional's time",
    ]
