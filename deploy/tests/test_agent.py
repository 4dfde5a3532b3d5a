"""The real agent accepts what the chart writes for it, and can do its work with nothing but what the pod may do."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import unittest

import yaml

import agent
import chart

NETWORK = f"shroud-deploy-{os.getpid()}"
PATIENCE = 20


class Configuration(unittest.TestCase):
    def test_the_agent_accepts_every_configuration_of_the_matrix(self):
        for name in chart.CASES:
            config = agent.configuration(chart.documents(chart.case(name)))
            with self.subTest(case=name):
                code, words = agent.check(config)
                self.assertEqual(code, 0, words)

    def test_a_key_that_the_agent_does_not_know_would_be_found(self):
        config = agent.configuration(chart.documents(chart.case("default")))
        config["gate"]["colour"] = "red"
        code, words = agent.check(config)
        self.assertEqual(code, 2)
        self.assertIn("unknown field `colour`", words)

    def test_without_the_ranges_to_protect_the_agent_does_not_start(self):
        config = agent.configuration(chart.documents(chart.case("default")))
        del config["protected"]
        code, words = agent.check(config)
        self.assertEqual(code, 2)
        self.assertIn("protected", words)


# A container, in short: a root that cannot be written, the program, the mounts of the pod, and a /proc/sys to be read only.
# What a runtime would take from an image comes from this machine (/usr, for the C library of a development build).
CONTAINER = r"""
set -eu
root=$1; shift
mount -t tmpfs tmpfs "$root"
mkdir -p "$root"/usr "$root"/proc "$root"/sys "$root"/dev "$root"/etc/shroud
for link in bin lib lib64; do ln -s "usr/$link" "$root/$link"; done
mount --bind /usr "$root/usr"; mount -o remount,bind,ro "$root/usr"
mount --rbind /sys "$root/sys"; mount -o remount,bind,ro "$root/sys"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"; mount -o remount,bind,ro "$root/proc/sys"
for device in null urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
touch "$root/shroud"; mount --bind "$1" "$root/shroud"; shift
while [ "$1" != -- ]; do mkdir -p "$root$2"; mount --bind "$1" "$root$2"; shift 2; done; shift
mount -o remount,ro "$root"
capabilities=$1; shift
exec chroot "$root" setpriv --no-new-privs --inh-caps="$capabilities" --bounding-set="$capabilities" /shroud "$@"
"""


@unittest.skipUnless(os.geteuid() == 0 or os.environ.get("CI"), "SKIP: needs root, for namespaces")
class InItsPod(unittest.TestCase):
    """An agent in a network of its own, with the DaemonSet's capabilities and folders.

    What it does not show: seccomp, AppArmor and SELinux, which a container runtime brings, and kernels with WireGuard of their own.
    """

    @classmethod
    def setUpClass(cls):
        cls.documents = chart.documents(chart.case("default"))
        cls.pod = cls.documents["DaemonSet/shroud"]["spec"]["template"]["spec"]

    def setUp(self):
        self.node = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory(prefix="shroud-deploy-")))
        for command in (
            f"netns add {NETWORK}",
            f"-n {NETWORK} link set lo up",
            f"-n {NETWORK} link add eth0 type veth peer name other",
            f"-n {NETWORK} link set eth0 up",
            f"-n {NETWORK} link set other up",
            f"-n {NETWORK} address add 192.0.2.1/24 dev eth0",
            f"-n {NETWORK} route add default via 192.0.2.2",
        ):
            subprocess.run(["ip", *command.split()], check=True)
            if command.startswith("netns add"):
                self.addCleanup(subprocess.run, ["ip", "netns", "delete", NETWORK], check=True)
        # A node on which the agent has something to set.
        inside = ["ip", "netns", "exec", NETWORK, "sysctl", "-qw"]
        subprocess.run([*inside, "net.ipv4.conf.default.rp_filter=1", "net.ipv4.ip_forward=0"], check=True)
        pins = self.node / "sys/fs/bpf"
        pins.mkdir(parents=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", pins], check=True)
        self.addCleanup(subprocess.run, ["umount", pins], check=True)
        self.folders = self.mounts()
        (self.node / "var/lib/shroud/nodes").mkdir()
        config = agent.with_file(agent.configuration(self.documents))
        (self.node / "etc" / "shroud.yaml").write_text(yaml.safe_dump(config))

    def mounts(self):
        """The node's folder for each path in the pod. All but the kernel's are made for this test."""
        paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in self.pod["volumes"]}
        folders = {}
        for mount in self.pod["containers"][0]["volumeMounts"]:
            path = paths[mount["name"]] or "/etc"
            if path in ("/proc/sys/net", "/dev/net"):
                folders[mount["mountPath"]] = path
            else:
                folders[mount["mountPath"]] = str(self.node) + path
                pathlib.Path(folders[mount["mountPath"]]).mkdir(parents=True)
        return folders

    def start(self, capabilities, *arguments):
        """Starts a program in the pod; it ends with the test."""
        root = self.node / "root"
        root.mkdir(exist_ok=True)
        words = ",".join(["-all", *(f"+{capability.lower()}" for capability in capabilities)])
        folders = [word for inside, outside in self.folders.items() for word in (outside, inside)]
        command = ["ip", "netns", "exec", NETWORK, "unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        command += ["bash", "-c", CONTAINER, "container", str(root), str(agent.BINARY), *folders, "--", words, *arguments]
        with (self.node / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.wait()

    def log(self):
        """What the last program in the pod has said."""
        return (self.node / "log").read_text()

    def status(self):
        """What the agent says of itself, or None while it does not."""
        socket = self.node / "run" / "shroud" / "shroud.sock"
        ran = subprocess.run([agent.BINARY, "status", "--socket", socket, "--output", "json"], capture_output=True, text=True)
        return json.loads(ran.stdout) if ran.returncode in (0, 1) and ran.stdout else None

    def is_at_work(self, status):
        return (
            status is not None
            and status["gate"]["mode"] == "enforce"
            and [uplink["device"] if isinstance(uplink, dict) else uplink for uplink in status["gate"]["uplinks"]] == ["eth0"]
            and status["pass"]["failures"] == []
            and status["pass"]["changes"] == 0
            and status["pass"]["number"] > 1
            and status["problems"] == []
        )

    def eventually_at_work(self, process, patience=PATIENCE):
        until = time.monotonic() + patience
        while time.monotonic() < until and process.poll() is None:
            if self.is_at_work(status := self.status()):
                return status
            time.sleep(0.2)
        return None

    def work(self):
        """Runs the agent until it is at work, and ends it. Answers what it said last."""
        process = self.start(self.capabilities, *self.pod["containers"][0]["args"])
        status = self.eventually_at_work(process)
        if status is None:
            self.fail(f"the agent is not at work; it last said {self.status()}, and logged:\n{self.log()}")
        self.end(process)
        return status

    @property
    def capabilities(self):
        return self.pod["containers"][0]["securityContext"]["capabilities"]["add"]

    def setting(self, name):
        ran = subprocess.run(["ip", "netns", "exec", NETWORK, "sysctl", "-n", name], capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    def test_the_agent_does_its_work_and_cleans_up(self):
        self.work()
        self.assertEqual((self.setting("net.ipv4.ip_forward"), self.setting("net.ipv4.conf.shroud0.rp_filter")), ("1", "2"))

        # A second one finds all of it as the first has left it, apart from the userspace data plane, which ends with its pod.
        again = self.work()
        self.assertEqual([change for change in again["pass"]["latestChanges"] if "eth0" in change or "sysctl" in change], [])
        self.assertNotIn("loaded the gate's program", self.log())

        documents = chart.documents(chart.case("cleanup"))
        jobs = [document["spec"]["template"]["spec"] for document in documents.values() if document["kind"] == "Job"]
        context = jobs[0]["containers"][0]["securityContext"]
        cleaning = self.start(context["capabilities"]["add"], *jobs[0]["containers"][0]["args"])
        self.assertEqual(cleaning.wait(PATIENCE), 0, self.log())
        self.assertIn("removed link on eth0 egress", self.log())
        self.assertEqual(list((self.node / "sys/fs/bpf/shroud").iterdir()), [])
        links = subprocess.run(["ip", "-n", NETWORK, "link"], capture_output=True, text=True, check=True).stdout
        self.assertNotIn("shroud", links)

    def test_every_capability_is_needed(self):
        complaints = {
            "NET_ADMIN": "load program shroud_egress: Operation not permitted",
            "NET_RAW": "CAP_NET_RAW",
            "BPF": "failed to create map",
            "PERFMON": "prohibited for !root",
        }
        self.assertEqual(list(complaints), self.capabilities)
        for without, complaint in complaints.items():
            with self.subTest(without=without):
                # On a node where nothing has been loaded yet.
                for pins in (self.node / "sys/fs/bpf/shroud").iterdir():
                    shutil.rmtree(pins)
                left = [capability for capability in self.capabilities if capability != without]
                process = self.start(left, *self.pod["containers"][0]["args"])
                self.assertNotEqual(process.wait(PATIENCE), 0)
                self.assertIn(complaint, self.log())

    def test_the_folder_for_settings_is_needed(self):
        del self.folders["/host/proc/sys/net"]
        process = self.start(self.capabilities, *self.pod["containers"][0]["args"])
        self.assertIsNone(self.eventually_at_work(process, 5))
        self.assertIn("Read-only file system", json.dumps(self.status()))
