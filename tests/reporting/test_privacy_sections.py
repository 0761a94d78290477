"""Who learns what, accuracy by epsilon, the epsilon meter: what the page says, what is drawn."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.reporting import write_report
from fedinfer_flower.reporting.contents import learning_groups, meter_reading
from fedinfer_flower.reporting.privacy_plots import (
    MAX_EPSILON_LINES,
    epsilon_lines,
    epsilon_plot,
    meter_line,
    meter_plot,
)
from fedinfer_flower.reporting.svg import render_svg

HOSTILE = '<script>alert("x")</script>'
NEW_KEYS = ["by_epsilon", "epsilon_reference", "epsilon_meter", "who_learns", "sealed"]


def page_of(results, tmp_path):
    return write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")


def section(page, name):
    """Return the text between the heading `name` and the next one."""
    return re.search(rf'<h2 id="{name}">.*?(?=<h2|</body>)', page, flags=re.DOTALL).group()


def bar(page):
    """Return the elements of the meter's bar."""
    svg = re.search(r'<div class="meter".*?(<svg.*?</svg>)', page, flags=re.DOTALL).group(1)
    return ET.fromstring(svg)  # noqa: S314 - made by this test


def line_named(figure, label):
    lines = figure.axes[0].get_lines()
    return next(line for line in lines if line.get_label() == label)


@pytest.mark.parametrize("key", NEW_KEYS)
def test_missing_key_is_named(results, tmp_path, key):
    del results[key]
    with pytest.raises(InvalidValueError, match=f"lack {key}"):
        page_of(results, tmp_path)


def test_who_learns_groups_lines_by_subject_in_order(results):
    groups = learning_groups(results)
    assert [about for about, _ in groups] == ["one site's answer", "the query", "the model"]
    assert [line["party"] for line in groups[0][1]] == ["coordinator alone", "querier alone"]


def test_who_learns_table_has_a_header_a_subject(page):
    shown = section(page, "who-learns")
    assert shown.count('scope="rowgroup"') == 3
    assert "About one site&#39;s answer" in shown
    assert '<th scope="row">querier alone</th><td class="long">the sum of the answers</td>' in shown


def test_by_epsilon_table_has_all_points_and_a_dash_for_none(page):
    rows = re.findall(r"<tr>.*?</tr>", section(page, "by-epsilon"))
    assert re.findall(r">([\d.]+)</th>", rows[0]) == ["0.5", "1", "2", "4", "8", "16", "32"]
    assert "secagg+dp" in rows[1]
    assert "56.0 %" in rows[1]
    assert "53.0 to 59.0 %" in rows[1]
    assert rows[2].endswith('<td class="n">-</td></tr>')
    assert "mean-probability without noise: 88.0 %" in section(page, "by-epsilon")


def test_epsilon_plot_draws_the_points_and_the_reference(results):
    figure = epsilon_plot(results)
    drawn = line_named(figure, "secagg+dp")
    assert list(drawn.get_xdata()) == [0.5, 1, 2, 4, 8, 16, 32]
    assert list(drawn.get_ydata()) == [p["accuracy"] for p in results["by_epsilon"][:7]]
    reference = line_named(figure, "mean-probability without noise")
    assert set(reference.get_ydata()) == {0.88}
    assert reference.get_linestyle() == "--"
    assert figure.axes[0].get_xscale() == "log"


def test_epsilon_plot_tells_lines_apart_without_colour(results):
    point = results["by_epsilon"][0]
    results["by_epsilon"] = [
        {**point, "protection": f"protection-{i}", "epsilon": epsilon}
        for i in range(MAX_EPSILON_LINES)
        for epsilon in (1.0, 2.0)
    ]
    lines = epsilon_plot(results).axes[0].get_lines()
    assert len(lines) == MAX_EPSILON_LINES + 1
    assert len({line.get_marker() for line in lines}) == len(lines)
    # One line is solid; the others and the reference each have dashes of their own.
    patterns = re.findall(r"stroke-dasharray: ([^;]*);", render_svg(epsilon_plot, results))
    assert len(set(patterns)) == MAX_EPSILON_LINES


def test_epsilon_plot_points_are_sorted_and_without_place_on_log_axis_left_out(results):
    point = results["by_epsilon"][0]
    results["by_epsilon"] = [{**point, "epsilon": e} for e in (4.0, 0.0, math.inf, 1.0)]
    assert [epsilon for epsilon, _ in epsilon_lines(results)["secagg+dp"]] == [1.0, 4.0]


def test_by_epsilon_only_infinite_epsilon_is_in_the_table_alone(results, tmp_path):
    results["by_epsilon"] = [{**results["by_epsilon"][0], "epsilon": math.inf}]
    shown = section(page_of(results, tmp_path), "by-epsilon")
    assert "∞" in shown
    assert "<figure>" not in shown


def test_by_epsilon_single_point_without_reference_is_drawn(results, tmp_path):
    results["by_epsilon"] = results["by_epsilon"][:1]
    results["epsilon_reference"] = None
    shown = section(page_of(results, tmp_path), "by-epsilon")
    assert "<figure>" in shown
    assert "Dashed" not in shown


def test_by_epsilon_many_protections_and_epsilons_draw_the_first(results, tmp_path):
    point = results["by_epsilon"][0]
    results["by_epsilon"] = [
        {**point, "protection": f"protection-{i:02d}", "epsilon": 0.1 * (j + 1)}
        for i in range(20)
        for j in range(40)
    ]
    shown = section(page_of(results, tmp_path), "by-epsilon")
    drawn = "".join(re.findall(r"<svg.*?</svg>", shown, flags=re.DOTALL))
    assert "protection-05" in drawn
    assert "protection-06" not in drawn
    assert "protection-19" in shown
    assert "The first 6 protections are drawn; the table has all." in shown


def test_meter_plot_draws_spending_and_cap(results):
    figure = meter_plot(results)
    drawn = line_named(figure, "spent by one site")
    points = results["epsilon_meter"]["points"]
    assert list(drawn.get_xdata()) == [point["queries"] for point in points]
    assert list(drawn.get_ydata()) == [point["epsilon"] for point in points]
    cap = line_named(figure, "cap: 20")
    assert set(cap.get_ydata()) == {20.0}
    assert drawn.get_marker() != cap.get_marker()


def test_meter_plot_ticks_do_not_run_into_each_other(results):
    results["epsilon_meter"]["points"].append({"queries": 540, "epsilon": 17.3})
    labels = meter_plot(results).axes[0].get_xticklabels()
    assert " ".join(label.get_text() for label in labels) == "1 2 5 10 20 50 100 200 500 1000"


def test_meter_plot_shows_a_cap_far_above_what_is_spent(results):
    results["epsilon_meter"]["cap"] = 500.0
    low, high = meter_plot(results).axes[0].get_ylim()
    assert low == 0
    assert high > 500


def test_meter_plot_cap_far_below_what_is_spent_is_off_the_floor(results):
    results["epsilon_meter"]["cap"] = 1.0
    axis = meter_plot(results).axes[0]
    assert axis.get_yscale() == "log"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "10"]
    assert "mathdefault" not in render_svg(meter_plot, results)


def test_meter_plot_without_cap_has_one_line(results):
    results["epsilon_meter"]["cap"] = None
    assert len(meter_plot(results).axes[0].get_lines()) == 1


def test_meter_line_is_sorted_and_drops_what_has_no_place(results):
    results["epsilon_meter"]["points"] = [
        {"queries": 10, "epsilon": 2.0},
        {"queries": 0, "epsilon": 0.0},
        {"queries": 1, "epsilon": 1.0},
        {"queries": 99, "epsilon": math.inf},
    ]
    assert meter_line(results) == [(1.0, 1.0), (10.0, 2.0)]


@pytest.mark.parametrize(
    ("n_queries", "read_at"), [(1, 1), (540, 500), (500, 500), (10_000, 1000), (0, 1)]
)
def test_meter_reading_is_at_the_queries_of_the_run(results, n_queries, read_at):
    results["n_queries"] = n_queries
    results["epsilon_meter"]["points"].reverse()
    assert meter_reading(results).queries == read_at


@pytest.mark.parametrize(
    ("epsilon", "cap", "filled", "cap_at", "is_over"),
    [
        (5.0, 20.0, 0.25, 1.0, False),
        (20.0, 20.0, 1.0, 1.0, False),
        (20.0, 5.0, 1.0, 0.25, True),
        (0.0, 0.0, 0.0, 0.0, False),
        (1.0, 0.0, 1.0, 0.0, True),
        (math.inf, 5.0, 1.0, 0.0, True),
        (5.0, math.inf, 0.0, 1.0, False),
    ],
)
def test_meter_reading_parts_of_the_bar(results, epsilon, cap, filled, cap_at, is_over):
    results["epsilon_meter"] |= {"cap": cap, "points": [{"queries": 5, "epsilon": epsilon}]}
    reading = meter_reading(results)
    assert (reading.filled, reading.cap_at, reading.is_over) == (filled, cap_at, is_over)


def test_meter_section_says_numbers_and_conditions(page):
    shown = section(page, "epsilon-meter")
    assert "That is 16.5 of a cap of 20 (82.3 %)." in shown
    assert 'aria-label="Epsilon 16.5 spent, cap 20"' in shown
    assert "costs nothing where the site remembers its answers; each new row adds" in shown
    assert "only if the site has a budget" in shown
    assert '<td class="n">1000</td>' in shown
    assert "Hatched" not in shown


def test_meter_bar_is_filled_up_to_what_is_spent(page):
    filled = [e for e in bar(page).iter("rect") if e.get("fill") == "#0072b2"]
    # 16.46 of 20 on a bar of 99 units, two decimals.
    assert [float(e.get("width")) for e in filled] == [81.48]


def test_meter_bar_over_the_cap_is_hatched_beyond_it(results, tmp_path):
    results["epsilon_meter"]["cap"] = 8.23  # half of what is spent
    page = page_of(results, tmp_path)
    rects = {e.get("fill"): e for e in bar(page).iter("rect")}
    hatched = rects["url(#over-cap)"]
    assert float(rects["#0072b2"].get("width")) == 49.5
    assert (float(hatched.get("x")), float(hatched.get("width"))) == (50.0, 49.5)
    assert "over the cap of 8.23" in page
    assert "Hatched: over the cap." in page


@pytest.mark.parametrize("cap", [0.0, math.inf])
def test_meter_odd_cap_is_drawn(results, tmp_path, cap):
    results["epsilon_meter"]["cap"] = cap
    shown = section(page_of(results, tmp_path), "epsilon-meter")
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", shown)


def test_meter_without_cap_has_no_bar(results, tmp_path):
    results["epsilon_meter"]["cap"] = None
    shown = section(page_of(results, tmp_path), "epsilon-meter")
    assert 'class="meter"' not in shown
    assert "There is no cap" in shown


@pytest.mark.parametrize("points", [[], [{"queries": 3, "epsilon": math.nan}]])
def test_meter_without_points_says_so(results, tmp_path, points):
    results["epsilon_meter"]["points"] = points
    assert "No epsilon was measured." in section(page_of(results, tmp_path), "epsilon-meter")


def test_empty_forms_say_so(empty, tmp_path):
    page = page_of(empty, tmp_path)
    assert "Nothing is written down" in section(page, "who-learns")
    assert "not measured at several epsilons" in section(page, "by-epsilon")
    assert "No epsilon was measured." in section(page, "epsilon-meter")


def test_sealed_is_said_in_the_answer_box(results, tmp_path):
    results["sealed"] = True
    page = page_of(results, tmp_path)
    box = re.search(r'<p class="answer">(.*?)</p>', page).group(1)
    assert "The queries travelled sealed to the sites" in box
    assert "travel in clear" not in box


def test_hostile_names_are_text_in_every_new_section(results, tmp_path):
    results["epsilon_meter"]["protection"] = HOSTILE
    results["epsilon_reference"]["label"] = HOSTILE
    for entry in results["by_epsilon"]:
        entry["protection"] = HOSTILE
    results["who_learns"] = [dict.fromkeys(("about", "party", "learns"), HOSTILE)]
    page = page_of(results, tmp_path)
    assert "<script" not in page
    for name in ("who-learns", "by-epsilon", "epsilon-meter"):
        assert "&lt;script&gt;" in section(page, name)
    drawn = "".join(re.findall(r"<svg.*?</svg>", section(page, "by-epsilon"), flags=re.DOTALL))
    assert "&lt;script&gt;" in drawn
