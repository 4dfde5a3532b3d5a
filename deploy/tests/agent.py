"""The real agent, and the configuration that the chart gives it."""

import os
import pathlib
import subprocess
import tempfile

import yaml

import chart

BINARY = pathlib.Path(os.environ.get("SHROUD_BINARY", chart.ROOT / "target" / "debug" / "shroud"))


def configuration(documents):
    """What the rendered ConfigMap holds."""
    (config,) = [document for key, document in documents.items() if key.startswith("ConfigMap/") and key.endswith("-config")]
    return yaml.safe_load(config["data"]["shroud.yaml"])


def check(config):
    """The exit code and the words of `shroud config check`."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        ran = subprocess.run([BINARY, "config", "check", file.name], capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def with_file(config):
    """The same configuration with a folder as the directory, as on a plain host, and with what comes from the pod and its Node."""
    first = config["protected"][0].split("/")[0]
    prefixes = [f"{first}/64" if ":" in first else f"{first}/24"]
    more = {"node": "node-a", "podPrefixes": prefixes, "directory": {"file": {"path": "/var/lib/shroud/nodes"}}}
    return chart.merged({key: value for key, value in config.items() if key != "directory"}, more)
