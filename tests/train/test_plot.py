import warnings

import pytest

from tilewright.train import plot


def test_without_matplotlib_plots_are_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"plots are left out.*pip install 'tilewright\[plot\]'"):
        assert not plot.can_plot()


def test_with_matplotlib_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot.can_plot()
