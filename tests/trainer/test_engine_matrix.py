"""Every two of a head, a loss, a kind of rows, a kind of run and an engine meet in a run on two
processes, which gives the losses, norms, evaluation and weights of one process. `make matrix` runs
all of them.
"""

import itertools

import pytest

from support import engine_matrix, engine_page
from support.csv_rows import csv_rows
from support.engine_runs import assert_same_run, run_engine

CSV = engine_page.PAGE.parents[1] / "benchmarks" / "results" / "engine_matrix.csv"
CHOSEN = engine_matrix.chosen()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    names = dict.fromkeys(engine_matrix.reference_of(name) for _, name in CHOSEN)
    return run_engine(tmp_path_factory.mktemp("one") / "runs", "one", list(names))


@pytest.fixture(scope="module", params=engine_matrix.ENGINES)
def runs(request, tmp_path_factory):
    engine = request.param
    names = [name for of, name in CHOSEN if of == engine]
    return engine, run_engine(tmp_path_factory.mktemp(engine) / "runs", engine, names)


def test_runs_are_those_of_one_process(one, runs):
    _, results = runs
    for name, result in results.items():
        assert_same_run(
            result, one[engine_matrix.reference_of(name)], engine_matrix.RELATIVE, of=name
        )


def test_every_two_levels_that_can_meet_do():
    met = set()
    for engine, name in CHOSEN:
        levels = {"engine": engine, **engine_matrix.levels_of(name)}
        met |= set(itertools.combinations(levels.items(), 2))
    factors = {"engine": engine_matrix.ENGINES, **engine_matrix.FACTORS}
    apart = []
    for (one, levels), (other, others) in itertools.combinations(factors.items(), 2):
        pairs = itertools.product(levels, others)
        apart += [pair for pair in pairs if ((one, pair[0]), (other, pair[1])) not in met]
    others = [engine for engine in engine_matrix.ENGINES if engine != "fsdp2"]
    assert apart == [(engine, "resumed_parts") for engine in others]
    assert len(CHOSEN) < len(engine_matrix.names()) / 4


def test_the_table_is_what_was_measured():
    assert engine_page.section(csv_rows(CSV)) in engine_page.PAGE.read_text()


def test_everything_was_measured_and_nothing_but_refusals_failed():
    rows = csv_rows(CSV)
    expected = {
        (engine, *engine_matrix.levels_of(name).values())
        for engine in engine_matrix.ENGINES
        for name in (*engine_matrix.names(), *engine_matrix.ALONE)
        if engine_matrix.is_a_run_of(engine, name)
    }
    assert {tuple(row[k] for k in ("engine", *engine_matrix.FACTORS)) for row in rows} == expected
    refused = engine_page.refusals(rows)
    assert refused.keys() == engine_matrix.REFUSED.keys()
    for cell, sentence in refused.items():
        assert sentence.startswith(engine_matrix.REFUSED[cell])
    for row in rows:
        is_refused = any((row["engine"], row[f]) in refused for f in engine_matrix.FACTORS)
        assert row["outcome"] == ("refused" if is_refused else "yes"), row
