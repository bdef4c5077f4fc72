"""What of the benchmark is arithmetic: its plan, its medians, its targets, and what it says has changed."""

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import compare
import flame
import report
from contestants import command_of
from medians import Medians
from plan import CONTESTANTS, ENDING, OURS, PEERS, PREPARING, SETTLING, STARTS, Plan, narrowed
from targets import acceptance

Row = dict[str, Any]


def load(contestant: str, rps: float, model: str = "resnet50", payload: str = "small", clients: int = 8) -> Row:
    about = {"model": model, "contestant": contestant, "payload": payload, "clients": clients}
    return about | {"round": 1, "rps": rps, "p50_ms": 100.0, "p99_ms": 150.0, "answers": 90, "errors": 0}


def run(*loads: Row, **changed: Any) -> Row:
    """Return a run in which decoding takes 10 ms of one of two cores, and the engine alone gives 40 images/s."""
    engine = {"images_per_s": 30.0, "side_by_side_per_s": 40.0, "one_ms": 40.0}
    limit = {"engine": {"float32": engine, "int8": engine | {"images_per_s": 100.0}}}
    limit |= {"decoding_ms": {"small": 10.0, "large": 50.0}, "plain_ms": {"small": 12.0, "large": 200.0}}
    return {
        "date": "2026-11-30",
        "complete": False,
        "minutes": 5.0,
        "rounds": 1,
        "seconds": 3,
        "machine": "a machine",
        "cores": 2,
        "others_busy": 0.02,
        "versions": {"keras": "3.15.1"},
        "skipped": {},
        "failed": {},
        "starts": [
            {key: row[key] for key in ("model", "contestant")} | {"seconds": 2.0, "memory_mb": 500.0, "label": "dog"}
            for row in loads
        ],
        "loads": list(loads),
        "limits": [{"model": "resnet50"} | limit],
    } | changed


def test_all_of_it_fits_in_forty_minutes() -> None:
    assert 30 < Plan().minutes() < 40
    assert f"**{Plan().minutes():.1f}**" in (ROOT / "benchmarks" / "README.md").read_text("utf-8")


def test_the_minutes_are_those_of_the_loads_and_of_what_is_around_them() -> None:
    one = Plan(contestants=("ours-float32",), models=("numbers",), rounds=1, seconds=4)
    assert [one.seconds_of("numbers", clients) for clients in (1, 16, 64)] == [4, 5, 9]
    around = STARTS["ours"] + ENDING + PREPARING + 3 * SETTLING + 2 + 2  # the last are those that warm up
    assert one.minutes() == pytest.approx((4 + 5 + 9 + around) / 60)
    more = replace(one, seconds=8)
    assert more.minutes() - one.minutes() == pytest.approx((7 + 9 + 18 - 4 - 5 - 9) / 60)
    assert Plan().complete
    assert not one.complete
    assert not Plan(clients=(8,)).complete


def test_everybody_is_measured_with_pictures_and_with_numbers() -> None:
    plan = Plan()
    for contestant in CONTESTANTS:
        assert ("small", 8) in plan.loads("resnet50", contestant)
        assert (("four", 16) in plan.loads("numbers", contestant)) == (contestant not in OURS[1:])
        assert (("large", 8) in plan.loads("resnet50", contestant)) == (contestant not in PEERS)
    assert ("small", 128) in plan.loads("bundled", "ours-float32")


def test_a_part_is_named_by_words_of_all_kinds() -> None:
    assert narrowed("ours,resnet50") == {"contestants": OURS, "models": ("resnet50",)}
    assert narrowed("large") == {"payloads": ("large",)}
    assert narrowed("ours-int8,tutorial") == {"contestants": ("tutorial", "ours-int8")}
    with pytest.raises(ValueError, match="outs: not among ours, tutorial"):
        narrowed("outs,resnet50")
    part = Plan(**narrowed("ours-int8,small,resnet50"), clients=(8,))
    assert part.loads("resnet50", "ours-int8") == [("small", 8)]
    assert part.loads("resnet50", "ours-float32") == part.loads("bundled", "ours-int8") == []


def test_each_precision_is_started_as_such() -> None:
    for contestant in OURS:
        command = command_of(contestant, "resnet50", 5001, Path("python"))
        assert command[command.index("--precision") + 1] == contestant.removeprefix("ours-")
        assert ("--weights" in command) == (contestant != "ours-int8")  # which is served from an export


def test_what_is_possible_is_the_engine_and_decoding_on_the_same_cores() -> None:
    n = Medians(run(load("ours-float32", 30)))
    assert n.engine("resnet50", "float32") == 40  # the faster of the two ways
    assert n.engine("resnet50", "int8") == 100
    # 25 ms of both cores, and 10 ms of one of them
    assert n.possible("resnet50", "float32", "small") == pytest.approx(1000 / (25 + 10 / 2))
    with pytest.raises(KeyError):
        n.engine("bundled", "float32")


def test_medians_are_over_the_rounds() -> None:
    n = Medians(run(*(load("ours-float32", rps) for rps in (10, 30, 20)), load("ray", 7), load("bentoml", 9)))
    assert n.load("rps", "resnet50", "ours-float32", "small", 8) == 20
    assert n.best_peer("resnet50", "small", 8) == 9
    with pytest.raises(KeyError):
        n.best_peer("resnet50", "small", 1)


def test_targets_are_met_missed_or_not_measured() -> None:
    table = acceptance(Medians(run(load("ours-float32", 31), load("tutorial", 12), load("ours-int8", 76))))
    whole = {line.split(" | ")[0].removeprefix("| "): line.split(" | ", 1)[1] for line in table[2:]}
    begin = "ResNet50, 8 clients, float32: requests/s to"
    assert whole[f"{begin} engine plus decoding"] == "≥ 0.92 | 0.93 | yes |"
    assert whole[f"{begin} the tutorial's"] == "≥ 2.8 | 2.58 | **no** |"
    assert whole[f"{begin} the best peer's"] == "≥ 1.4 | not measured | |"
    assert whole["ResNet50, 8 clients, int8: requests/s to engine plus decoding"] == "≥ 0.85 | 1.14 | yes |"
    assert whole["ResNet50, 8 clients, float32: p99 to p50"] == "≤ 2 | 1.50 | yes |"
    assert whole["ResNet50, 8 clients, float32: errors"] == "≤ 0 | 0 | yes |"


def test_what_got_slower_stands_first() -> None:
    old = run(load("ours-float32", 100), load("tutorial", 10), load("ray", 10), load("bentoml", 50))
    new = run(load("ours-float32", 80), load("tutorial", 15), load("ray", 9.5), load("bentoml", 20))
    assert compare.changes(new, [old]) == [
        "Worse than the committed results by more than 10%: 2",
        "   0.40x  BentoML, ResNet50, small, clients: 8: requests/s: 50 -> 20",
        "   0.80x  this one, float32, ResNet50, small, clients: 8: requests/s: 100 -> 80",
        "Better by more than 10%: 1",
        "   1.50x  the tutorial's, ResNet50, small, clients: 8: requests/s: 10 -> 15",
        "As before: 9",  # Ray's, and the starts and memories of four
    ]


def test_more_memory_and_slower_starts_are_worse() -> None:
    old, new = run(load("ours-float32", 100)), run(load("ours-float32", 100))
    new["starts"][0] |= {"seconds": 1.0, "memory_mb": 1000.0}
    lines = compare.changes(new, [old])
    assert lines[1] == "   0.50x  this one, float32, ResNet50: memory, MB: 500 -> 1000"
    assert lines[3] == "   2.00x  this one, float32, ResNet50: seconds to the first answer: 2 -> 1"


def test_another_machine_is_compared_by_shares_of_the_engine() -> None:
    old = run(load("ours-float32", 30), load("ours-float32", 900, "numbers", "four"), machine="another")
    new = run(load("ours-float32", 15), load("ours-float32", 90, "numbers", "four"))
    lines = compare.changes(new, [old])
    assert lines[1] == "   0.50x  this one, float32, ResNet50, small, clients: 8: share of the engine: 0.75 -> 0.375"
    assert "another machine" in lines[-1]
    assert not any("Four numbers" in line and "memory" not in line for line in lines)


def test_the_latest_committed_run_that_has_it_counts() -> None:
    older, latest = run(load("ours-float32", 10), load("ray", 5)), run(load("ours-float32", 100))
    lines = compare.changes(run(load("ours-float32", 50), load("ray", 10)), [latest, older])
    assert lines[1].endswith("requests/s: 100 -> 50")
    assert lines[3].endswith("requests/s: 5 -> 10")
    assert compare.changes(run(load("bentoml", 1)), [latest]) == ["Nothing of this is in the committed results."]


def test_a_part_leaves_what_it_did_not_measure() -> None:
    whole, part = run(load("ours-float32", 10), load("ray", 5)), run(load("ours-float32", 11))
    assert report.replaced([whole], part) == [part, whole]
    assert report.replaced([part, whole], whole) == [whole]


def test_rounds_are_added_only_to_those_of_the_same_kind() -> None:
    first = run(load("ours-float32", 10), others_busy=0.5)
    assert report.next_round(first) == 2
    (joined,) = report.extended([first], run(load("ours-float32", 30) | {"round": 2}))
    assert Medians(joined).load("rps", "resnet50", "ours-float32", "small", 8) == 20
    assert (joined["rounds"], joined["minutes"], joined["others_busy"]) == (2, 10, 0.5)
    (joined,) = report.extended([joined], run(load("ray", 30) | {"round": 3}))
    assert (joined["rounds"], report.next_round(joined)) == (2, 4)
    with pytest.raises(SystemExit, match="the machine differs"):
        report.extended([first], run(machine="another"))


def test_the_report_names_each_runs_day_and_what_it_left_out() -> None:
    old = run(load("ray", 5), load("ours-float32", 900, "numbers", "four"), date="2026-11-24", complete=True)
    text = report.render([run(load("ours-float32", 30), load("tutorial", 10), skipped={"ray": "it is ill"}), old])
    first, second = text.split("## 2026-11-24")
    assert "## 2026-11-30" in first
    assert "A part of what `make bench` measures." in first
    assert "- Not measured: Ray Serve: it is ill." in first
    assert "| 8 | this one, float32 | 30.0 | (30.0, 30.0) | 3.0 | 0.75 | 0.90 | 100 | 150 | 0 |" in first
    assert "A part of" not in second
    assert "| 8 | this one, float32 | 900.0 | (900.0, 900.0) |  |  |  | 100 | 150 | 0 |" in second


def test_the_committed_report_is_that_of_the_committed_numbers(tmp_path: Path) -> None:
    copy = tmp_path / "RESULTS.md"
    committed = ROOT / "benchmarks" / "RESULTS.md"
    copy.write_bytes(committed.read_bytes())
    report.write(report.read(ROOT / "benchmarks" / "results.json"), copy)
    assert copy.read_bytes() == committed.read_bytes()


def test_a_flame_graph_names_modules_and_no_folders() -> None:
    line = "thread (0x7F);predict (/home/someone/keras_server/api/app.py:12);resize (/x/PIL/Image.py:7) 30"
    stack, count = flame.frames(line)
    assert (stack, count) == (("thread (0x7F)", "api/app.predict", "PIL/Image.resize"), 30)
    assert flame.named("wait (threading.py:3)") == "threading.wait"


def test_a_flame_graph_has_a_box_as_wide_as_its_share() -> None:
    stacks = Counter({("a", "b"): 60, ("a", "<c>"): 39, ("a", "tiny"): 0, ("d",): 1})
    drawn = flame.draw(stacks, "title")
    boxes = re.findall(r'<title>(.+?): (.+?)%</title><rect x="(.+?)" y="(.+?)" width="(.+?)"', drawn)
    assert sorted(boxes) == [
        ("&lt;c&gt;", "39.0", "0.0", "42", "468.0"),
        ("a", "99.0", "0.0", "26", "1188.0"),
        ("b", "60.0", "468.0", "42", "720.0"),
        ("d", "1.0", "1188.0", "26", "12.0"),
    ]
