"""What the chart refuses, each with the words that help."""

import unittest

import helm_python

import chart

# What is given besides the smallest values, and what the refusal must say. The first part is the chart's own (templates/_refusals.tpl),
# with what to do; the second is the schema's, with where.
REFUSED = [
    ({"image": {"repository": ""}}, "image.repository is empty: build deploy/image, push it"),
    ({"config": {"protected": []}}, "config.protected is empty, so nothing would be encrypted: name all pod ranges"),
    ({"config": {"protected": ["0.0.0.0/0"]}}, "config.protected has 0.0.0.0/0, which is every address there is"),
    ({"config": {"protected": ["10.244.0.0/16", "::/0"]}}, "config.protected has ::/0"),
    ({"config": {"encryption": {"listenPort": 4789}}}, "config.routing.vxlanPort is 4789, and so is config.encryption.listenPort: give each"),
    ({"config": {"routing": {"genevePort": 4789}}}, "config.routing.vxlanPort is 4789, and so is config.routing.genevePort: give each"),
    ({"podMonitor": {"enabled": True}}, "config.http.listen is 127.0.0.1:21320, where nobody outside the node can ask: set it to 0.0.0.0"),
    ({"image": {"tag": "1", "digest": "sha256:" + "0" * 64}}, "image.digest and image.tag are both set"),
    ({"cleanup": {"enabled": True}}, "Helm sees no nodes (a dry run asks no cluster): name them"),
    ({"konfig": {}}, "additional properties 'konfig' not allowed"),
    ({"config": {"node": "node-1"}}, "at '/config': additional properties 'node' not allowed"),
    ({"config": {"podPrefixes": []}}, "at '/config': additional properties 'podPrefixes' not allowed"),
    ({"config": {"directory": {}}}, "at '/config': additional properties 'directory' not allowed"),
    ({"config": {"gate": {"pinDir": "/x"}}}, "at '/config/gate': additional properties 'pinDir' not allowed"),
    # What YAML makes of an `off` without quotes.
    ({"config": {"gate": {"mode": False}}}, "at '/config/gate/mode': value must be one of 'enforce', 'audit', 'off'"),
    ({"config": {"routing": {"mode": "ipip"}}}, "at '/config/routing/mode': value must be one of"),
    ({"config": {"routing": {"vni": 16777216}}}, "at '/config/routing/vni': maximum"),
    ({"config": {"protected": ["10.244.0.0"]}}, "at '/config/protected/0': '10.244.0.0' does not match pattern"),
    ({"config": {"encryption": {"device": "wg0"}}}, "at '/config/encryption/device': 'wg0' does not match pattern"),
    ({"config": {"encryption": {"backend": "ipsec"}}}, "at '/config/encryption/backend': value must be one of"),
    ({"config": {"encryption": {"listenPort": 0}}}, "at '/config/encryption/listenPort': minimum"),
    ({"config": {"encryption": {"keepalive": 25}}}, "at '/config/encryption/keepalive': got number, want string"),
    ({"config": {"encrypt": {"openPorts": ["22"]}}}, "at '/config/encrypt/openPorts/0': '22' does not match pattern"),
    ({"config": {"encrypt": {"openPorts": [f"tcp/{port}" for port in range(1, 18)]}}}, "at '/config/encrypt/openPorts': maxItems"),
    ({"config": {"uplinks": []}}, "at '/config/uplinks': 'oneOf' failed"),
    ({"config": {"http": {"listen": None}}}, "at '/config/http': missing property 'listen'"),
    ({"config": {"http": {"listen": "10.0.0.1:21320"}}}, "at '/config/http/listen': '10.0.0.1:21320' does not match pattern"),
    ({"config": {"cni": {"name": "shroud.conf"}}}, "at '/config/cni/name': 'shroud.conf' does not match pattern"),
    ({"config": {"encrypt": {"scope": "zone"}}}, "at '/config/encrypt/scope': value must be one of 'all', 'cross-zone'"),
    ({"config": {"encrypt": {"optOut": "yes"}}}, "at '/config/encrypt/optOut': got string, want boolean"),
    ({"image": {"digest": "latest"}}, "at '/image/digest': 'latest' does not match pattern"),
    ({"denied": ["# nobody"]}, "at '/denied/0': '# nobody' does not match pattern"),
    ({"denied": ["node-7\nnode-8"]}, "at '/denied/0'"),
    ({"env": [{"name": "NODE_NAME", "value": "other"}]}, "at '/env/0/name'"),
    ({"updateStrategy": {"rollingUpdate": {"maxUnavailable": 0}}}, "at '/updateStrategy/rollingUpdate"),
    ({"updateStrategy": {"type": "Recreate"}}, "at '/updateStrategy/type': value must be one of"),
    ({"terminationGracePeriodSeconds": 0}, "at '/terminationGracePeriodSeconds': minimum"),
    ({"cleanup": {"enabled": True, "nodes": ["a b"]}}, "at '/cleanup/nodes/0': 'a b' does not match pattern"),
    ({"nameOverride": "Shroud"}, "at '/nameOverride': 'Shroud' does not match pattern"),
]


class Refusals(unittest.TestCase):
    def test_each_says_what_is_wrong(self):
        for more, words in REFUSED:
            with self.subTest(values=more):
                with self.assertRaises(helm_python.HelmError) as refused:
                    chart.render(more)
                self.assertIn(words, str(refused.exception))

    def test_the_defaults_alone_are_refused(self):
        with self.assertRaises(helm_python.HelmError) as refused:
            chart.render(base={})
        self.assertIn("image.repository is empty", str(refused.exception))
