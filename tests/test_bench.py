"""tests/bench/bench.py: every section but that on the example gives its rows."""

import pytest

import bench

pytestmark = pytest.mark.long


def test_sections(device, monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    found = bench.main(["--steps=2", "--rows=4"])
    assert found["bare"][0]["bare ms"][0] > 0 and len(found["compile"]) == 4
