"""benchmarks.pretokenize_speed: how it judges codes that differ, chooses recordings and sums up its runs."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.pretokenize_speed import choose_recordings, count_differences, mark_silence, summarize_runs


def test_a_difference_that_is_no_near_tie_is_found():
    random = np.random.RandomState(0)
    projections = [random.randn(4, 8) for _ in range(2)]
    tables = [[random.randn(16, 4)], [random.randn(16, 4) for _ in range(3)]]
    tables[1][1][5] = tables[1][1][7] + 1e-9  # twins
    hidden = random.randn(6, 8)

    def nearest(wanted=None):
        codes = []
        for projection, levels in zip(projections, tables, strict=True):
            left = hidden @ projection.T
            for table in levels:
                found = np.linalg.norm(left[:, None] - table, axis=2).argmin(1)
                if wanted is not None and len(codes) == 2:
                    found[2] = wanted
                left = left - table[found]
                codes.append(found)
        return np.stack(codes, axis=1)

    def judge(codes, reference):
        return count_differences([reference], [codes], lambda clip: hidden, list(zip(projections, tables, strict=True)))

    same = judge(nearest(), nearest())
    assert same == {"codes": 24, "differ": 0, "share": 0.0, "first": 0, "near_ties": 0, "worst": 0.0}
    twin = judge(nearest(5), nearest(7))
    assert twin["differ"] >= 1 and twin["first"] == twin["near_ties"] == 1 and twin["worst"] < 1e-6
    far = nearest()
    far[2, 2] = (far[2, 2] + 1) % 16
    wrong = judge(far, nearest())
    assert wrong["differ"] == wrong["first"] == 1 and wrong["near_ties"] == 0
    assert judge(nearest()[:5], nearest())["share"] == 1.0
    assert mark_silence(np.array([[0, 0], [0, 3]], np.int16)).tolist() == [[0, 1], [0, 3]]


def test_recordings_are_chosen_evenly_over_their_lengths(tmp_path):
    import soundfile

    lengths = [5, 1, 4, 2, 3, 6]
    for i, seconds in enumerate(lengths):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(seconds * 8000, np.float32), 8000)
    (tmp_path / "m.json").write_text(json.dumps([{"text": "a", "path": f"{i}.wav"} for i in range(6)]))
    rows, seconds = choose_recordings(tmp_path / "m.json", 0.5)
    assert [row["path"] for row in rows] == [str(tmp_path / f"{i}.wav") for i in (2, 3, 5)] and seconds == 12
    assert len(choose_recordings(tmp_path / "m.json", 1.0)[0]) == 6
    assert summarize_runs([{"process_s": p, "total_s": p - 1, "imports_s": 1.0} for p in (4.0, 9.0, 5.0)], 30.0) == {
        "process_s": 5.0,
        "total_s": 4.0,
        "imports_s": 1.0,
        "process_range_s": [4.0, 9.0],
        "work_s": 3.0,
        "audio_s_per_s": 6.0,
        "audio_s_per_s_without_imports": 10.0,
    }
