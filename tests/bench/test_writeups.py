import pytest

from tilewright.bench.writeups import PAGE, judge, main, render, toy_losses


def test_the_committed_page_is_current(tmp_path):
    assert PAGE.read_text() == render(), "run: python -m tilewright.bench.writeups"
    main(tmp_path / "new" / "page.md")
    assert (tmp_path / "new" / "page.md").read_text() == PAGE.read_text()


@pytest.mark.parametrize(
    ("ours", "theirs", "unit", "verdict"),
    [
        (90_596_966_400, "90,596,486,400", 1, "wrong"),
        (90_596_966_400, "90,596,966,400", 1, "right"),
        (4_513_336_524_800, "4.51", 1e12, "right"),
        (349_630_365_696, "0.32", 1e12, "wrong"),
        (349_630_365_696, "0.35", 1e12, "right"),
        (8_508_230_400, "8", 1e9, "right, but truncated, not rounded"),
        (8_508_230_400, "9", 1e9, "right"),
        (96.351, "96.3", 1, "right, but truncated, not rounded"),
        (96.351, "96.4", 1, "right"),
        (5.84, "5.2", 1, "wrong"),
        (33.13, "33.2", 1, "wrong"),
    ],
)
def test_numbers_are_compared_to_their_own_digits(ours, theirs, unit, verdict):
    assert judge(ours, theirs, unit) == verdict


def test_verdicts_on_the_writeups():
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in render().splitlines() if line.startswith("| ")}
    for question, verdict in (
        ("gpt2-small, one forward pass", "A is wrong; B is right"),
        ("gpt2-large, one forward pass", "A is wrong; B is right"),
        ("gpt2-xl, total", "A is wrong; 23,040,000 too few"),
        ("times the FLOPs at 1,024", "A is wrong"),
        ("gpt2-xl, all parameters", "A is right; B is right"),
        ("lr 100: the 10th loss, from about 25", "A is wrong; B is right"),
        ("the Pile at 2.459 MB/s", "B is wrong"),
    ):
        assert verdict in rows[question]
    assert "B's 5.2 wrong" in rows["gpt2-large, projections / attention / feed-forward / head"]


def test_the_learning_rate_toy():
    slow, fast, broken = (toy_losses(lr) for lr in (1e1, 1e2, 1e3))
    assert (round(slow.min().item(), 2), round(slow.median().item(), 2), round(slow.max().item(), 2)) == (2.31, 3.39, 4.75)
    assert fast.max() < 1e-21
    assert broken.median().item() == pytest.approx(2e18, rel=0.2)
