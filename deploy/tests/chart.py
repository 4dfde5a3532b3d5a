"""The chart, through Helm's own engine, and what it renders, as documents.

Owns where things are, the smallest values and the matrix of values that the tests render. Never talks to a cluster.
"""

import copy
import functools
import pathlib

import helm_python
import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent.parent
ROOT = DEPLOY.parent
CHART = DEPLOY / "helm" / "shroud"

helm_python.disable_logging()

# What must be given.
SMALLEST = {
    "image": {"repository": "registry.example.com/shroud"},
    "config": {"protected": ["10.244.0.0/16", "fd00:10:244::/48"]},
}

# The matrix: what is given besides. The first is what most people run.
CASES = {
    "default": {},
    "vxlan": {"config": {"routing": {"mode": "vxlan", "vxlanPort": 8472}}},
    "geneve": {"config": {"routing": {"mode": "geneve", "vni": 7}}},
    "kernel": {"config": {"encryption": {"backend": "kernel"}, "gate": {"attach": "tcx"}}},
    "userspace": {"config": {"encryption": {"backend": "userspace", "listenPort": 51821, "keepalive": "0"}}},
    "audit": {"config": {"gate": {"mode": "audit"}}, "log": {"format": "text", "filter": "shroud=debug"}},
    "network-provider": {"config": {"cni": {"install": True, "confDir": "/etc/cni/other.d", "plugin": "bridge"}}},
    "plain-by-choice": {"config": {"encrypt": {"scope": "cross-zone", "optOut": True}}},
    "monitoring": {
        "config": {"http": {"listen": "0.0.0.0:21320"}},
        "podMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
    },
    "ipv6": {
        "config": {"protected": ["fd00:10:244::/48"], "http": {"listen": "[::1]:9000"}, "uplinks": ["eth0", "bond0.100"]},
        "env": [{"name": "KUBERNETES_SERVICE_HOST", "value": "fd00::1"}],
    },
    "names": {
        "nameOverride": "veil",
        "image": {"digest": "sha256:" + "0123456789abcdef" * 4, "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccount": {"name": "veil-agent", "annotations": {"example.com/owner": "network"}},
        "admissionPolicy": {"enabled": True},
        "denied": ["node-7 stolen, 2026-11-25", "abc+/= of node-8"],
    },
    "placement": {
        "priorityClassName": "system-cluster-critical",
        "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}],
        "nodeSelector": {"kubernetes.io/os": "linux", "example.com/mesh": "yes"},
        "affinity": {"nodeAffinity": {}},
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}},
        "resources": {"limits": {"memory": "1Gi", "cpu": None}},
        "seccompProfile": {"type": "Localhost", "localhostProfile": "profiles/shroud.json"},
        "seLinuxOptions": {"type": "container_t"},
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"example.com/team": "network"},
    },
    "no-admission-policy": {"admissionPolicy": {"enabled": False}},
    "cleanup": {"cleanup": {"enabled": True, "nodes": ["node-1", "node-2.example.com"]}},
}

# Where a case goes, if not to the default namespace.
NAMESPACES = {"names": "veil"}


def merged(base, more):
    """`more` laid over `base`, maps inside maps."""
    result = copy.deepcopy(base)
    for key, value in more.items():
        inner = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inner else copy.deepcopy(value)
    return result


@functools.cache
def loaded():
    """The chart, read once. Helm says that it follows the links to deploy/monitoring."""
    return helm_python.Chart.load(str(CHART))


def render(more=None, namespace="shroud-system", base=SMALLEST):
    """The templates' texts, by file name."""
    texts = loaded().render(merged(base, more or {}), name="shroud", namespace=namespace)
    return {name.removeprefix("shroud/templates/"): text for name, text in sorted(texts.items())}


def case(name):
    """The texts of one case of the matrix."""
    return render(CASES[name], NAMESPACES.get(name, "shroud-system"))


def documents(texts):
    """The manifests in rendered texts, by kind and name."""
    found = {}
    for name, text in texts.items():
        if name.endswith(".txt"):
            continue
        for document in yaml.safe_load_all(text):
            if document:
                key = f"{document['kind']}/{document['metadata']['name']}"
                assert key not in found, f"{key} is rendered twice"
                found[key] = document
    return found


def defaults():
    """values.yaml."""
    return yaml.safe_load((CHART / "values.yaml").read_text())
