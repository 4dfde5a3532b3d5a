"""The kustomize base is the chart: written from it, and held equal to it."""

import os
import re
import subprocess
import unittest

import yaml

import chart

KUSTOMIZE = chart.DEPLOY / "kustomize"

# What is Helm's alone.
LABELS = {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart"}
ANNOTATIONS = {"helm.sh/resource-policy", "checksum/config"}

# With which values the base and its parts are rendered. The placeholders are replaced by whoever uses them.
BASE = {"image": {"repository": "shroud"}}
CLEANUP = {"image": {"repository": "the-image"}, "cleanup": {"enabled": True, "nodes": ["the-node"]}}


def without_helm(text):
    """A rendered text without what is Helm's alone, its comments kept."""
    text = text.replace("  annotations:\n    helm.sh/resource-policy: keep\n", "")
    text = re.sub(r" +# [^\n]*\n +checksum/config: [^\n]*\n", "", text)
    keys = "|".join(re.escape(key) for key in LABELS)
    return re.sub(rf"^ +({keys}): [^\n]*\n", "", text, flags=re.M).strip()


def base_files():
    """The generated files of the base, by path below `kustomize/`."""
    texts = chart.render(BASE)
    (config,) = yaml.safe_load_all(texts.pop("config.yaml"))
    agent = yaml.safe_load(config["data"]["shroud.yaml"])
    del agent["protected"]
    manifests = [without_helm(text) for name, text in texts.items() if not name.startswith("tests/") and not name.endswith(".txt")]
    job = without_helm(chart.render(CLEANUP)["cleanup.yaml"]).removeprefix("---\n")
    job = re.sub(r"name: shroud-cleanup-[0-9a-f]+", "generateName: shroud-cleanup-", job)
    job = job.replace("the-image:0.1.0", "the-image").replace("shroud-config", "the-config")
    example = {"protected": chart.SMALLEST["config"]["protected"]} | agent
    return {
        "base/manifests.yaml": "\n---\n".join(text for text in manifests if text) + "\n",
        "base/config/shroud.yaml": yaml.safe_dump(agent),
        "example/shroud.yaml": yaml.safe_dump(example),
        "cleanup/job.yaml": job + "\n",
    }


def built(folder):
    """What `kubectl kustomize` makes of a folder, by kind and name; the hash behind the configuration's name is gone."""
    ran = subprocess.run(["kubectl", "kustomize", str(KUSTOMIZE / folder)], capture_output=True, text=True, check=True)
    plain = re.sub(r"shroud-config-[0-9a-z]{10}\b", "shroud-config", ran.stdout)
    hashes = set(re.findall(r"shroud-config-[0-9a-z]{10}\b", ran.stdout))
    assert len(hashes) == 1, f"one configuration, one hash: {hashes}"
    return chart.documents({"all.yaml": plain})


def comparable(documents):
    """Manifests without what is Helm's or kustomize's alone."""
    for document in documents.values():
        metadata = document["metadata"]
        for holder in (metadata, document.get("spec", {}).get("template", {}).get("metadata", {})):
            for key, ours in (("labels", LABELS), ("annotations", ANNOTATIONS)):
                left = {name: value for name, value in holder.get(key, {}).items() if name not in ours}
                holder.pop(key, None)
                if left:
                    holder[key] = left
        if document["kind"] == "ConfigMap" and metadata["name"] == "shroud-config":
            # Made by kustomize's generator, which has no labels to give.
            metadata.pop("labels", None)
            document["data"] = yaml.safe_load(document["data"]["shroud.yaml"])
    return documents


class Kustomize(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        if os.environ.get("UPDATE"):
            for name, text in base_files().items():
                (KUSTOMIZE / name).write_text(text)

    def test_the_files_are_what_the_chart_renders(self):
        for name, text in base_files().items():
            with self.subTest(file=name):
                self.assertMultiLineEqual(text, (KUSTOMIZE / name).read_text(), f"{name}: run UPDATE=1 deploy/test.sh")

    def test_the_example_is_the_chart_with_the_smallest_values(self):
        texts = {name: text for name, text in chart.case("default").items() if not name.startswith("tests/")}
        documents = built("example")
        self.assertEqual(documents.pop("Namespace/shroud-system")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged")
        self.assertEqual(comparable(documents), comparable(chart.documents(texts)))

    def test_the_base_alone_protects_nothing_by_mistake(self):
        documents = built("base")
        self.assertNotIn("protected", yaml.safe_load(documents["ConfigMap/shroud-config"]["data"]["shroud.yaml"]))
