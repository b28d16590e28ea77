import pytest

from pyext.train import demo


def test_training_in_float64_is_the_same_with_and_without_the_kernels(monkeypatch):
    monkeypatch.setattr(demo, "IMAGE_SIZE", 8)
    plain, own = (demo.float64_losses(3, plain) for plain in (True, False))
    assert len(set(plain)) == 3
    assert own == pytest.approx(plain, rel=1e-12)
    assert demo.float64_difference(3) == max(abs(a - b) for a, b in zip(plain, own, strict=True))


def test_chart_draws_both_curves_and_marks_where_they_meet():
    rows = demo.chart([[2.0, 1.0, 0.0], [2.0, 2.0, 0.0]], marks="ox", width=3, height=3).splitlines()
    assert rows[:3] == ["  2.000 |*x", "        | o", "  0.000 |  *"]
    assert "*" in demo.chart([[1.0, 1.0], [1.0, 1.0]], marks="ox")


def test_smooth_is_a_trailing_mean():
    assert demo.smooth([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_demo_trains_both_and_reports(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(demo, "IMAGE_SIZE", 8)
    demo.run(tmp_path, epochs=1)
    out = capfd.readouterr().out
    for words in ("training with plain torch", "training with pyext", "time per step", "peak memory", "accuracy"):
        assert words in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in ("plain", "pyext"):
        assert len((tmp_path / name / "steps.csv").read_text().splitlines()) == 23
    assert '"backend": "reference"' in (tmp_path / "plain" / "summary.json").read_text()
