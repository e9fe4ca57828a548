"""Dashboard, alerts and documentation name metrics that exist, and none is left undocumented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import monitoring_expressions as files
from tests.exposed_metrics import exposed_metrics, metrics_table, series_names

METRICS = exposed_metrics()
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"


KNOWN = {name for metric in METRICS for name in series_names(metric)} | {"up"}
EXPRESSIONS = [*files.dashboard_expressions(), *files.alert_measures()]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_only_metrics_that_exist(expression: str) -> None:
    names = files.metric_names(expression)
    assert names, "no metric found"
    assert names <= KNOWN


def test_a_misspelt_metric_would_be_found() -> None:
    assert files.metric_names("sum by (slot) (rate(fusionroute_router_tokenz_total[5m]))") - KNOWN


def test_metrics_follow_the_conventions_of_prometheus() -> None:
    for metric in METRICS:
        if not metric.name.startswith("fusionroute_"):
            continue
        assert metric.documentation.endswith("."), metric.name
        assert metric.type in ("counter", "gauge", "histogram"), metric.name
        assert not metric.name.endswith(("_total", "_count", "_sum")), metric.name
        for sample in metric.samples:
            assert set(sample.labels) <= {
                "slot", "reason", "state", "part", "rule", "outcome", "policy", "source",
                "kind", "script", "rpc", "code", "le",
            }, sample  # fmt: skip


def test_panels_have_titles_of_their_own_queries_and_room() -> None:
    dashboard = files.dashboard()
    panels = dashboard["panels"]
    assert dashboard["uid"] == "fusionroute" and dashboard["schemaVersion"] >= 39
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"] and panel["targets"], panel
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    rules = files.alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "what_to_do"}


def test_the_table_of_metrics_is_what_the_modules_say() -> None:
    table = (
        DOCUMENT.read_text().partition("<!-- metrics: begin -->\n")[2].partition("<!-- metrics: end -->")[0]
    )
    assert table == metrics_table(), "replace it by the output of: python -m tests.exposed_metrics"


def test_every_alert_is_documented_and_no_other() -> None:
    alerts = DOCUMENT.read_text().partition("## Alerts")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", alerts, re.MULTILINE)) == {rule["alert"] for rule in files.alerts()}
