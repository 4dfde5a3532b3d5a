"""What the agents may do: to the cluster (RBAC, admission policy) and to a node (capabilities, folders). Nothing more than these tables."""

import copy
import unittest

from cel_expr_python import cel

import chart

# (namespace or None for the whole cluster, API group, resource, name or None for any, verb)
ALWAYS = {
    *((None, "", "nodes", None, verb) for verb in ("get", "list", "watch", "patch")),
    (None, "authorization.k8s.io", "selfsubjectaccessreviews", None, "create"),
    *(("shroud-system", "", "configmaps", "shroud-denied", verb) for verb in ("get", "list", "watch")),
    *(("default", "events.k8s.io", "events", None, verb) for verb in ("create", "patch")),
}
ONLY = {
    "network-provider": {(None, "", "nodes/status", None, "patch")},
    "plain-by-choice": {(None, "", resource, None, verb) for resource in ("pods", "namespaces") for verb in ("list", "watch")},
}

CAPABILITIES = ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]

# Folders of the node, by where the pod sees them.
FOLDERS = {
    "/var/lib/shroud": "/var/lib/shroud",
    "/run/shroud": "/run/shroud",
    "/host/sys/fs/bpf/shroud": "/sys/fs/bpf/shroud",
    "/host/proc/sys/net": "/proc/sys/net",
}
USERSPACE_FOLDERS = {"/dev/net": "/dev/net", "/run/wireguard": "/run/wireguard"}


class Rbac(unittest.TestCase):
    def granted(self, documents, subject):
        """What every binding together grants to the ServiceAccount. Bindings to anyone else are none of ours."""
        granted = set()
        for document in documents.values():
            if not document["kind"].endswith("RoleBinding"):
                continue
            self.assertEqual(document["subjects"], [subject])
            role = documents[f"{document['roleRef']['kind']}/{document['roleRef']['name']}"]
            self.assertEqual(role["metadata"].get("namespace"), document["metadata"].get("namespace"))
            for rule in role["rules"]:
                self.assertNotIn("*", rule["apiGroups"] + rule["resources"] + rule["verbs"])
                self.assertEqual(set(rule) - {"resourceNames"}, {"apiGroups", "resources", "verbs"})
                granted |= {
                    (role["metadata"].get("namespace"), group, resource, name, verb)
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                    for name in rule.get("resourceNames", [None])
                    for verb in rule["verbs"]
                }
        return granted

    def test_nothing_more_than_the_table(self):
        for name in chart.CASES:
            if name == "names":
                continue
            with self.subTest(case=name):
                subject = {"kind": "ServiceAccount", "name": "shroud", "namespace": "shroud-system"}
                self.assertEqual(self.granted(chart.documents(chart.case(name)), subject), ALWAYS | ONLY.get(name, set()))

    def test_other_names_are_used_throughout(self):
        documents = chart.documents(chart.case("names"))
        subject = {"kind": "ServiceAccount", "name": "veil-agent", "namespace": "veil"}

        rename = {"shroud-system": "veil", "shroud-denied": "veil-denied"}
        expected = {tuple(rename.get(word, word) for word in right) for right in ALWAYS}
        self.assertEqual(self.granted(documents, subject), expected)
        pod = documents["DaemonSet/veil"]["spec"]["template"]["spec"]
        self.assertEqual(pod["serviceAccountName"], "veil-agent")
        self.assertIn("ConfigMap/veil-denied", documents)
        condition = documents["ValidatingAdmissionPolicy/veil"]["spec"]["matchConditions"][0]["expression"]
        self.assertEqual(condition, "request.userInfo.username == 'system:serviceaccount:veil:veil-agent'")

    def test_only_the_agents_get_a_token(self):
        for name in chart.CASES:
            for key, document in chart.documents(chart.case(name)).items():
                template = document["spec"].get("template", document) if "spec" in document else document
                with self.subTest(case=name, document=key):
                    if document["kind"] == "ServiceAccount":
                        self.assertIs(document["automountServiceAccountToken"], False)
                    elif "containers" in template.get("spec", {}):
                        self.assertIs(template["spec"]["automountServiceAccountToken"], document["kind"] == "DaemonSet")


class OnTheNode(unittest.TestCase):
    def pods(self, name):
        for key, document in chart.documents(chart.case(name)).items():
            if document["kind"] in ("DaemonSet", "Job"):
                yield key, document["spec"]["template"]["spec"]

    def test_capabilities_are_those_and_nothing_is_privileged(self):
        for name in chart.CASES:
            for key, pod in self.pods(name):
                with self.subTest(case=name, document=key):
                    (container,) = pod["containers"]
                    self.assertNotIn("initContainers", pod)
                    self.assertFalse({"hostPID", "hostIPC", "shareProcessNamespace", "securityContext"} & set(pod))
                    context = dict(container["securityContext"])
                    given = chart.CASES[name]
                    self.assertEqual(context.pop("seccompProfile"), given.get("seccompProfile", {"type": "RuntimeDefault"}))
                    self.assertEqual(context.pop("seLinuxOptions"), given.get("seLinuxOptions", {"type": "spc_t"}))
                    self.assertEqual(
                        context,
                        {
                            "runAsUser": 0,
                            "runAsGroup": 0,
                            "privileged": False,
                            "allowPrivilegeEscalation": False,
                            "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"], "add": CAPABILITIES},
                        },
                    )

    def test_folders_are_those(self):
        more = {
            "default": USERSPACE_FOLDERS,
            "kernel": {},
            "network-provider": USERSPACE_FOLDERS | {"/etc/cni/other.d": "/etc/cni/other.d"},
            "cleanup": USERSPACE_FOLDERS,
        }
        for name, folders in more.items():
            for key, pod in self.pods(name):
                with self.subTest(case=name, document=key):
                    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
                    mounts = pod["containers"][0]["volumeMounts"]
                    seen = {mount["mountPath"]: paths[mount["name"]] for mount in mounts if mount["name"] in paths}
                    self.assertEqual(seen, FOLDERS | folders)
                    others = [volume for volume in pod["volumes"] if "hostPath" not in volume]
                    self.assertEqual(others, [{"name": "config", "configMap": {"name": "shroud-config"}}])

    def test_the_test_pod_may_only_ask(self):
        pod = chart.documents(chart.case("default"))["Pod/shroud-healthy"]["spec"]
        self.assertNotIn("hostNetwork", pod)
        context = pod["containers"][0]["securityContext"]
        self.assertEqual(context["capabilities"], {"drop": ["ALL"]})
        self.assertEqual(pod["volumes"], [{"name": "run", "hostPath": {"path": "/run/shroud", "type": "Directory"}}])
        self.assertTrue(pod["containers"][0]["volumeMounts"][0]["readOnly"])


# A Node as an API server answers it, in short.
NODE = {
    "kind": "Node",
    "apiVersion": "v1",
    "metadata": {
        "name": "node-a",
        "uid": "bac05e7d-ea99-4071-90b4-5247b3a282ff",
        "resourceVersion": "542",
        "creationTimestamp": "2026-11-23T04:24:50Z",
        "labels": {"kubernetes.io/hostname": "node-a"},
        "annotations": {"node.alpha.kubernetes.io/ttl": "0", "shroud.dev/node": "{old}"},
        "managedFields": [{"manager": "kubelet", "operation": "Update"}],
    },
    "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
    "status": {
        "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
        "conditions": [
            {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"},
            {"type": "Ready", "status": "True", "reason": "KubeletReady"},
        ],
        "nodeInfo": {"kernelVersion": "6.12"},
    },
}


class AdmissionPolicy(unittest.TestCase):
    """The policy's expressions, evaluated. How a real API server answers a policy of this make is in the transcripts of tests/."""

    @classmethod
    def setUpClass(cls):
        cls.spec = chart.documents(chart.case("network-provider"))["ValidatingAdmissionPolicy/shroud"]["spec"]
        names = ("object", "oldObject", "request", "variables")
        environment = cel.NewEnv(variables={name: cel.Type.DYN for name in names})
        compiled = lambda entries: [(entry, environment.compile(entry["expression"])) for entry in entries]
        cls.conditions = compiled(cls.spec["matchConditions"])
        cls.variables = compiled(cls.spec["variables"])
        cls.validations = compiled(cls.spec["validations"])

    def judge(self, new, old=NODE, node="node-a", user="system:serviceaccount:shroud-system:shroud"):
        """The messages of the validations that deny; None when the policy is not about this request."""
        extra = {"authentication.kubernetes.io/credential-id": ["JTI=1"]}
        if node:
            extra["authentication.kubernetes.io/node-name"] = [node]
        data = {"object": new, "oldObject": old, "request": {"userInfo": {"username": user, "extra": extra}}}
        if not all(expression.eval(data=data).value() for _, expression in self.conditions):
            return None
        data["variables"] = {entry["name"]: expression.eval(data=data).plain_value() for entry, expression in self.variables}
        # What cannot be evaluated denies as well: failurePolicy is Fail.
        denied = [entry["message"] for entry, expression in self.validations if expression.eval(data=data).value() is not True]
        return [message.removeprefix("an agent may ") for message in denied]

    def changed(self, change, old=NODE):
        new = copy.deepcopy(old)
        change(new)
        return self.judge(new, old)

    def test_an_agent_may_announce_its_own_node(self):
        bare = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node-a", "resourceVersion": "1"}}
        first = copy.deepcopy(bare)
        first["metadata"].update(annotations={"shroud.dev/node": "{}"}, managedFields=[{"manager": "shroud-agent"}])
        self.assertEqual(self.judge(first, bare), [])
        self.assertEqual(self.judge(bare, first), [])
        self.assertEqual(self.judge(NODE), [])
        self.assertEqual(self.changed(lambda node: node["metadata"]["annotations"].update({"shroud.dev/node": "{new}"})), [])
        self.assertEqual(self.changed(lambda node: node["metadata"].update(resourceVersion="543", managedFields=[])), [])

    def test_and_the_condition_of_its_network(self):
        self.assertEqual(self.changed(lambda node: node["status"]["conditions"][0].update(status="False")), [])
        self.assertEqual(self.changed(lambda node: node["status"]["conditions"].pop(0)), [])
        without = copy.deepcopy(NODE)
        without["status"]["conditions"].pop(0)
        self.assertEqual(self.judge(NODE, without), [])

    def test_and_nothing_else(self):
        annotation = "change no annotation but shroud.dev/node"
        metadata = "change nothing in metadata but an annotation"
        spec = "an agent may not change the spec of a Node"
        status = "change nothing in the status of a Node but the condition NetworkUnavailable"
        cases = [
            (annotation, lambda node: node["metadata"]["annotations"].update(other="x")),
            (annotation, lambda node: node["metadata"]["annotations"].update({"node.alpha.kubernetes.io/ttl": "1"})),
            (annotation, lambda node: node["metadata"]["annotations"].pop("node.alpha.kubernetes.io/ttl")),
            (annotation, lambda node: node["metadata"].pop("annotations")),
            (metadata, lambda node: node["metadata"]["labels"].update({"topology.kubernetes.io/zone": "b"})),
            (metadata, lambda node: node["metadata"].pop("labels")),
            (metadata, lambda node: node["metadata"].update(finalizers=["example.com/stay"])),
            (metadata, lambda node: node["metadata"].update(ownerReferences=[{"name": "x"}])),
            (metadata, lambda node: node["metadata"].update(invented="x")),
            (spec, lambda node: node["spec"].update(unschedulable=True)),
            (spec, lambda node: node["spec"].update(podCIDRs=["10.244.0.0/16"])),
            (spec, lambda node: node.pop("spec")),
            (spec, lambda node: node.update(invented="x")),
            (status, lambda node: node["status"]["addresses"].append({"type": "InternalIP", "address": "192.0.2.2"})),
            (status, lambda node: node["status"].update(invented="x")),
            (status, lambda node: node["status"].pop("nodeInfo")),
            (status, lambda node: node["status"]["conditions"][1].update(status="False")),
            (status, lambda node: node["status"]["conditions"].pop(1)),
            (status, lambda node: node["status"]["conditions"].append({"type": "DiskPressure", "status": "True"})),
            (status, lambda node: node.pop("status")),
        ]
        for number, (message, change) in enumerate(cases):
            with self.subTest(case=number, denied_by=message):
                self.assertEqual(self.changed(change), [message.removeprefix("an agent may ")])

    def test_another_node_is_denied_even_when_nothing_changes(self):
        self.assertEqual(self.judge(NODE, node="node-b"), ["change only its own Node"])

    def test_a_token_without_a_node_is_denied(self):
        self.assertEqual(self.judge(NODE, node=None), ["the token is not bound to a pod on a node", "change only its own Node"])

    def test_nobody_else_is_judged(self):
        for user in ("kubernetes-admin", "system:node:node-a", "system:serviceaccount:default:shroud"):
            self.assertIsNone(self.judge({}, user=user))

    def test_it_is_asked_about_every_way_to_change_a_node_and_fails_closed(self):
        self.assertEqual(self.spec["failurePolicy"], "Fail")
        (rule,) = self.spec["matchConstraints"]["resourceRules"]
        self.assertEqual(
            rule,
            {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["nodes", "nodes/status"]},
        )
        for name in chart.CASES:
            documents = chart.documents(chart.case(name))
            bindings = [document["spec"] for document in documents.values() if document["kind"].endswith("PolicyBinding")]
            namely = chart.CASES[name].get("nameOverride", "shroud")
            expected = [] if name == "no-admission-policy" else [{"policyName": namely, "validationActions": ["Deny"]}]
            with self.subTest(case=name):
                self.assertEqual(bindings, expected)
