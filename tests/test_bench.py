"""tests/bench/bench.py: every section gives its rows, and figures are of what they are called after."""

import pytest

import bench

pytestmark = pytest.mark.long

# A stand-in for diffusers' example, with steps of 4 samples in 0.1 s.
EXAMPLE = """
import sys, time, tqdm.auto
bar = tqdm.auto.tqdm(desc="Steps")
for _ in range(int(sys.argv[sys.argv.index("--max_train_steps") + 1])):
    time.sleep(0.1)
    bar.update(1)
"""


def test_sections(device, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    (tmp_path / "example.py").write_text(EXAMPLE)
    found = bench.main(["--steps=2", "--repeats=1", "--rows=4", f"--reference={tmp_path}/example.py"])
    assert found["bare"][0]["bare ms"][0] > 0 and len(found["compile"]) == 4
    assert [row["visits a row"] for row in found["reference"][::3]] == [1, 3, 10]
    for rows in zip(*[iter(found["reference"])] * 3):
        example, *ours = (row["samples/s"][0] for row in rows)
        assert 0 < example < 4 / 0.1 and 0 < ours[0] < ours[1]  # with encoding, and steps alone
