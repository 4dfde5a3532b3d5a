"""Alerts and dashboard: valid, made of metrics that the agent has, and shipped as they are."""

import json
import re
import unittest

import promql_parser
import yaml

import chart

# Every metric of the agent, with its labels. The one list against which alerts and dashboard are held.
METRICS = {
    "shroud_build_info": {"version"},
    "shroud_peer_receive_bytes_total": {"peer"},
    "shroud_peer_transmit_bytes_total": {"peer"},
    "shroud_peer_last_handshake_timestamp_seconds": {"peer"},
    "shroud_peer_rtt_seconds": {"peer"},
    "shroud_peer_problems": {"peer", "check"},
    "shroud_peers": {"state"},
    "shroud_gate_packets_total": {"peer", "direction", "family", "verdict", "reason"},
    "shroud_gate_bytes_total": {"peer", "direction", "family", "verdict", "reason"},
    "shroud_gate_plaintext_bytes_total": set(),
    "shroud_gate_attached": {"device", "hook"},
    "shroud_directory_state": {"source", "state"},
    "shroud_directory_refused": {"reason"},
    "shroud_directory_lists_total": set(),
    "shroud_directory_watches_total": set(),
    "shroud_directory_errors_total": {"kind"},
    "shroud_reconcile_duration_seconds": "histogram",
    "shroud_reconcile_changes_total": {"driver"},
    "shroud_reconcile_failures_total": {"driver"},
    "shroud_convergence_seconds": "histogram",
    "shroud_key_age_seconds": set(),
    "shroud_problems": {"check"},
    "shroud_healthy": set(),
}
HISTOGRAMS = {"shroud_reconcile_duration_seconds": set(), "shroud_convergence_seconds": {"step"}}
# Given by the scrape (templates/monitoring.yaml), not by the agent.
SCRAPED = {"node"}

MONITORING = chart.DEPLOY / "monitoring"


def series():
    """Every series name with its labels."""
    for name, labels in METRICS.items():
        if labels == "histogram":
            yield f"{name}_bucket", HISTOGRAMS[name] | {"le"} | SCRAPED
            yield from ((f"{name}_{part}", HISTOGRAMS[name] | SCRAPED) for part in ("count", "sum"))
        else:
            yield name, labels | SCRAPED


SERIES = dict(series())


def selectors(node):
    """The series that a syntax tree selects, and the labels by which."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name for matcher in node.matchers.matchers}
    for below in ("expr", "param", "lhs", "rhs", "vector_selector"):
        if isinstance(child := getattr(node, below, None), promql_parser.Expr):
            yield from selectors(child)
    for child in getattr(node, "args", None) or []:
        yield from selectors(child)


def flaws(expression):
    """What an expression names that the agent does not have: series, and labels that it selects or groups by."""
    # Grafana's own variables stand for a duration.
    tree = promql_parser.parse(re.sub(r"\$__(rate_interval|range)", "5m", expression))
    found = []
    allowed = set()
    for name, labels in selectors(tree):
        if name not in SERIES:
            found.append(f"no series {name}")
            continue
        allowed |= SERIES[name]
        found += [f"{name} has no label {label}" for label in sorted(labels - SERIES[name])]
    for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", tree.prettify()):
        labels = {label.strip() for label in group.split(",")}
        found += [f"nothing here has a label {label}" for label in sorted(labels - allowed)]
    return found


class Flaws(unittest.TestCase):
    """The oracle of the tests below finds what it is for."""

    def test_unknown_names_are_found(self):
        for expression, flaw in {
            "rate(shroud_gate_paket_total[5m])": "no series shroud_gate_paket_total",
            "shroud_reconcile_duration_seconds": "no series shroud_reconcile_duration_seconds",
            "up{job=\"x\"}": "no series up",
            'shroud_gate_packets_total{color="red"}': "shroud_gate_packets_total has no label color",
            "topk(3, -max_over_time((nothing offset 5m)[5m:1m]))": "no series nothing",
            "sum by (peer) (shroud_healthy)": "nothing here has a label peer",
            "shroud_healthy unless on (pod) shroud_build_info": "nothing here has a label pod",
        }.items():
            with self.subTest(expression=expression):
                self.assertEqual(flaws(expression), [flaw])
        self.assertEqual(flaws('sum by (node) (rate(shroud_gate_packets_total{verdict="drop"}[$__rate_interval]))'), [])

    def test_what_is_no_promql_is_refused(self):
        with self.assertRaises(ValueError):
            flaws("sum by (node (shroud_healthy)")


class Alerts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        (cls.group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]

    def test_each_is_complete_and_names_only_what_there_is(self):
        names = [rule["alert"] for rule in self.group["rules"]]
        self.assertEqual(len(names), len(set(names)))
        for rule in self.group["rules"]:
            with self.subTest(alert=rule["alert"]):
                self.assertEqual(flaws(rule["expr"]), [])
                self.assertRegex(rule["alert"], "^Shroud[A-Z]")
                self.assertIn(rule["labels"]["severity"], ("critical", "warning", "info"))
                self.assertEqual(set(rule["annotations"]), {"summary", "description"})

    def test_its_words_use_only_labels_that_the_expression_keeps(self):
        for rule in self.group["rules"]:
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
            used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
            with self.subTest(alert=rule["alert"]):
                self.assertLessEqual(used, kept)

    def test_reasons_and_verdicts_are_those_of_the_gate(self):
        status = (chart.ROOT / "docs" / "status.md").read_text()
        for rule in self.group["rules"]:
            for label, value in re.findall(r'(reason|verdict)[!=~]+"([^"]*)"', rule["expr"]):
                for word in value.split("|"):
                    with self.subTest(alert=rule["alert"], word=word):
                        self.assertIn(f"`{word}", status)

    def test_the_chart_ships_them_as_they_are(self):
        rule = chart.documents(chart.case("monitoring"))["PrometheusRule/shroud"]
        self.assertEqual(rule["spec"], {"groups": [self.group]})
        self.assertEqual(rule["metadata"]["labels"]["release"], "prometheus")


class Dashboard(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dashboard = json.loads((MONITORING / "dashboard.json").read_text())

    def test_each_query_names_only_what_there_is(self):
        queries = [(panel["title"], target) for panel in self.dashboard["panels"] for target in panel.get("targets", [])]
        self.assertTrue(queries)
        for title, target in queries:
            with self.subTest(panel=title):
                self.assertEqual(flaws(target["expr"]), [])
                kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
                used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                if kept:
                    self.assertLessEqual(used, kept)

    def test_every_metric_is_on_it(self):
        shown = json.dumps(self.dashboard)
        missing = [name for name in METRICS if name not in shown]
        self.assertEqual(missing, [])

    def test_no_panel_lies_on_another(self):
        taken = {}
        for panel in self.dashboard["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    self.assertNotIn((x, y), taken, panel["title"])
                    taken[x, y] = panel["title"]
                    self.assertLess(x, 24)
        identities = [panel["id"] for panel in self.dashboard["panels"]]
        self.assertEqual(len(identities), len(set(identities)))

    def test_the_chart_ships_it_as_it_is(self):
        shipped = chart.documents(chart.case("monitoring"))["ConfigMap/shroud-dashboard"]
        self.assertEqual(json.loads(shipped["data"]["shroud.json"]), self.dashboard)
        self.assertEqual(shipped["metadata"]["labels"]["grafana_dashboard"], "1")

    def test_the_pod_monitor_gives_the_label_that_everything_groups_by(self):
        monitor = chart.documents(chart.case("monitoring"))["PodMonitor/shroud"]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        self.assertEqual({relabeling["targetLabel"] for relabeling in endpoint["relabelings"]}, SCRAPED)
        ports = chart.documents(chart.case("monitoring"))["DaemonSet/shroud"]["spec"]["template"]["spec"]["containers"][0]["ports"]
        self.assertIn(endpoint["port"], [port["name"] for port in ports])
