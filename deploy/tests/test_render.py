"""What the chart renders: the golden files, and what holds it to the rest of the project."""

import difflib
import os
import re
import textwrap
import unittest

import helm_python
import yaml

import chart

GOLDEN = chart.DEPLOY / "golden"


def whole(texts):
    """One text of all templates, as a person would review them."""
    parts = []
    for name, text in texts.items():
        # The checksum follows the configuration, which is shown itself.
        text = re.sub(r"checksum/config: [0-9a-f]{64}", "checksum/config: …", text)
        # Included as they are (test_monitoring.py), and reviewed where they are.
        for file, depth in (("alerts.yaml", 2), ("dashboard.json", 4)):
            included = textwrap.indent((chart.DEPLOY / "monitoring" / file).read_text(), " " * depth, lambda _: True)
            text = text.replace(included.rstrip(), f"{' ' * depth}(deploy/monitoring/{file})")
        if text.strip():
            parts.append(f"# ---- {name}\n{text.strip()}\n")
    return "\n".join(parts)


def difference(name, text, default):
    """What a case changes in the default."""
    lines = difflib.unified_diff(default.splitlines(), text.splitlines(), "default.yaml", name, n=2, lineterm="")
    # Without the line numbers, which change with every line above.
    return "".join("@@\n" if line.startswith("@@") else f"{line}\n" for line in lines)


class Golden(unittest.TestCase):
    """`golden/default.yaml` in full, every other case as its difference to it. UPDATE=1 writes them anew."""

    maxDiff = None

    def compare(self, file, text):
        if os.environ.get("UPDATE"):
            file.write_text(text)
        self.assertTrue(file.exists(), f"{file} is missing: run UPDATE=1 deploy/test.sh, and look at what it writes")
        self.assertMultiLineEqual(text, file.read_text(), f"{file.name}: if this is meant, run UPDATE=1 deploy/test.sh")

    def test_every_case_renders_as_reviewed(self):
        default = whole(chart.case("default"))
        self.compare(GOLDEN / "default.yaml", default)
        for name in chart.CASES:
            if name != "default":
                with self.subTest(case=name):
                    self.compare(GOLDEN / f"{name}.diff", difference(name, whole(chart.case(name)), default))

    def test_no_golden_file_is_left_over(self):
        expected = {"default.yaml"} | {f"{name}.diff" for name in chart.CASES if name != "default"}
        self.assertEqual({file.name for file in GOLDEN.iterdir()}, expected)


class Chart(unittest.TestCase):
    def test_helm_finds_nothing_to_complain_of(self):
        report = helm_python.lint(str(chart.CHART), chart.SMALLEST, strict=True)
        self.assertEqual([note["error"] for note in report["messages"]], ["icon is recommended"])
        self.assertEqual(report["errors"], [])

    def test_its_version_is_the_workspaces(self):
        metadata = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
        cargo = (chart.ROOT / "Cargo.toml").read_text()
        version = re.search(r'^\[workspace\.package\]\nversion = "(.*)"$', cargo, re.M).group(1)
        self.assertEqual((metadata["version"], metadata["appVersion"]), (version, version))

    def test_every_document_says_where_it_belongs(self):
        clusterwide = {"ClusterRole", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
        for name in chart.CASES:
            namespace = chart.NAMESPACES.get(name, "shroud-system")
            for key, document in chart.documents(chart.case(name)).items():
                with self.subTest(case=name, document=key):
                    expected = None if document["kind"] in clusterwide else namespace
                    if key.endswith("-events"):
                        expected = "default"
                    self.assertEqual(document["metadata"].get("namespace"), expected)
                    self.assertIn("app.kubernetes.io/name", document["metadata"]["labels"])

    def test_a_changed_configuration_starts_the_agents_anew_and_nothing_else_does(self):
        def annotations(more):
            daemonset = chart.documents(chart.render(more))["DaemonSet/shroud"]
            return daemonset["spec"]["template"]["metadata"]["annotations"]

        plain = annotations({})
        self.assertNotEqual(annotations({"config": {"resync": "5s"}}), plain)
        self.assertEqual(annotations({"denied": ["node-7 stolen"], "prometheusRule": {"enabled": True}}), plain)

    def test_kubectl_shroud_finds_the_agents_by_default(self):
        daemonset = chart.documents(chart.case("default"))["DaemonSet/shroud"]
        reference = (chart.ROOT / "docs" / "reference.md").read_text()

        def default(argument):
            return re.search(rf"^\| `kubectl shroud status --{argument}` \| `(.*?)` \|", reference, re.M).group(1)

        labels = daemonset["spec"]["template"]["metadata"]["labels"]
        wanted = dict(label.split("=") for label in default("selector").split(","))
        self.assertEqual({key: labels.get(key) for key in wanted}, wanted)
        self.assertEqual(default("namespace"), daemonset["metadata"]["namespace"])
        asked = (chart.ROOT / "keyd" / "src" / "kubernetes" / "agents.rs").read_text()
        containers = [container["name"] for container in daemonset["spec"]["template"]["spec"]["containers"]]
        self.assertEqual(containers, re.findall(r'^const CONTAINER: &str = "(.*)";$', asked, re.M))

    def test_the_deny_list_is_lines_as_the_agent_reads_them(self):
        document = chart.documents(chart.case("names"))["ConfigMap/veil-denied"]
        self.assertEqual(document["data"], {"chart": "node-7 stolen, 2026-11-25\nabc+/= of node-8\n"})
        self.assertNotIn("data", chart.documents(chart.case("default"))["ConfigMap/shroud-denied"])


class Configuration(unittest.TestCase):
    """values.yaml's `config` is docs/shroud.example.yaml: the same keys, the same defaults."""

    # Of one node, or fixed by the pod's mounts and the cluster.
    NOT_VALUES = {"node", "podPrefixes", "addresses", "stateDir", "runtimeDir", "gate.pinDir", "directory"}

    def leaves(self, tree, path=""):
        for key, value in tree.items():
            here = f"{path}{key}"
            if here in self.NOT_VALUES:
                continue
            if isinstance(value, dict):
                yield from self.leaves(value, f"{here}.")
            else:
                yield here, value

    def test_keys_and_defaults_are_the_agents(self):
        example = yaml.safe_load((chart.ROOT / "docs" / "shroud.example.yaml").read_text())
        agent = dict(self.leaves(example))
        values = dict(self.leaves(chart.defaults()["config"]))
        # The example shows a range; the chart has none to offer.
        self.assertEqual(values.pop("protected"), [])
        self.assertTrue(agent.pop("protected"))
        self.assertEqual(values, agent)

    def test_every_value_has_a_comment_that_says_what_it_is_for(self):
        lines = (chart.CHART / "values.yaml").read_text().splitlines()
        silent = [line for before, line in zip([""] + lines, lines) if re.match(r"^[a-zA-Z]+:", line) and not before.startswith("#")]
        self.assertEqual(silent, [])
