"""The real agent, and the configuration that the chart gives it.

What is agreed and not yet in the agent is taken out of a configuration before the agent sees it, key by key, for as long as it says that it does
not know the key.
"""

import copy
import functools
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


# Agreed keys, and a value of each. One that the agent knows can go from here.
COMING = {"http": {}, "optOut": False, "encrypt.scope": "all"}


@functools.cache
def unknown():
    """Those of the agreed keys that this agent does not know yet."""
    keys = []
    for key, value in COMING.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        _, words = check({"protected": ["10.244.0.0/16"], "directory": {"kubernetes": {}}} | value)
        if f"unknown field `{key.split('.')[-1]}`" in words:
            keys.append(key)
    return keys


def known(config):
    """A configuration without the keys that the agent does not know yet."""
    config = copy.deepcopy(config)
    for key in unknown():
        *above, last = key.split(".")
        holder = config
        for part in above:
            holder = holder[part]
        del holder[last]
    return config


def with_file(config):
    """The same configuration with a folder as the directory, as on a plain host, and with what comes from the pod and its Node."""
    first = config["protected"][0].split("/")[0]
    prefixes = [f"{first}/64" if ":" in first else f"{first}/24"]
    more = {"node": "node-a", "podPrefixes": prefixes, "directory": {"file": {"path": "/var/lib/shroud/nodes"}}}
    return chart.merged({key: value for key, value in known(config).items() if key != "directory"}, more)
