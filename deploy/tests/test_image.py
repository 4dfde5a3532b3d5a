"""The image's recipe: sound, of the same versions as the workspace, and with all that the build needs.

What it does not do is to build the image: that takes docker, and an hour. The compilation it stands for is checked against musl.
"""

import fnmatch
import re
import subprocess
import tomllib
import unittest

import chart

IMAGE = chart.DEPLOY / "image"
DOCKERFILE = (IMAGE / "Dockerfile").read_text()


def argument(name):
    """The default of a build argument."""
    return re.search(rf"^ARG {name}=\"?([^\"\n]*)", DOCKERFILE, re.M).group(1)


class Recipe(unittest.TestCase):
    def test_hadolint_finds_nothing(self):
        ran = subprocess.run(["hadolint", "--no-color", IMAGE / "Dockerfile"], capture_output=True, text=True)
        self.assertEqual((ran.returncode, ran.stdout), (0, ""))

    def test_versions_are_the_workspaces(self):
        cargo = tomllib.loads((chart.ROOT / "Cargo.toml").read_text())
        toolchain = tomllib.loads((chart.ROOT / "rust-toolchain.toml").read_text())
        self.assertEqual(argument("VERSION"), cargo["workspace"]["package"]["version"])
        self.assertEqual(argument("RUST"), toolchain["toolchain"]["channel"])

    def test_what_the_workspace_is_made_of_reaches_the_build(self):
        patterns = [line for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
        cargo = tomllib.loads((chart.ROOT / "Cargo.toml").read_text())
        needed = ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "ebpf/gate.o", "deploy/image/compile.sh"]
        needed += [f"{member}/Cargo.toml" for member in cargo["workspace"]["members"]]
        for path in needed:
            self.assertTrue((chart.ROOT / path).exists(), path)
            parts = path.split("/")
            above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
            hidden = [pattern for pattern in patterns for part in above if fnmatch.fnmatch(part, pattern.replace("**/", "*"))]
            with self.subTest(path=path):
                self.assertEqual(hidden, [])

    def test_the_program_is_where_everybody_looks_for_it(self):
        self.assertIn('ENTRYPOINT ["/usr/bin/shroud"]', DOCKERFILE)
        script = (IMAGE / "compile.sh").read_text()
        self.assertIn('release/shroud" "$image/usr/bin/shroud"', script)
        self.assertIn('ln -sf shroud "$image/usr/bin/kubectl-shroud"', script)
        notes = chart.case("default")["NOTES.txt"]
        self.assertIn("-- /usr/bin/shroud status", notes)

    def test_an_unknown_platform_is_refused(self):
        ran = subprocess.run([IMAGE / "compile.sh", "riscv64", "/nonexistent"], capture_output=True, text=True)
        self.assertEqual((ran.returncode, ran.stderr), (2, "compile: no such platform: riscv64; give amd64 or arm64\n"))

    def test_the_agent_compiles_against_musl(self):
        command = ["cargo", "check", "--quiet", "--locked", "--package", "shroud", "--target", "x86_64-unknown-linux-musl"]
        ran = subprocess.run(command, cwd=chart.ROOT, capture_output=True, text=True)
        self.assertEqual(ran.returncode, 0, ran.stderr)
