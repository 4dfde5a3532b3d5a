# The front door. Each goal installs what it lacks and says so; a second run is quick.

.PHONY: help demo demo-k8s test test-faults test-vm support bench-peers bench-directory fuzz ebpf build

help:
	@echo "make demo          three nodes on this machine, every pod byte encrypted, proven on the wire"
	@echo "make demo KEEP=1   the same, left running, with hints for looking around"
	@echo "make demo-k8s      the same three nodes, which meet in a Kubernetes cluster (an API server for tests)"
	@echo "make test          everything that must hold before a change lands"
	@echo "make test-faults   all that can go wrong, around 200 connections: what leaks, what breaks, how long it takes (ROW=C3 SEED=7)"
	@echo "make test-vm       the kernel tests and scenarios on Linux 6.1 and 6.12, in an emulator (FULL=1: all of them)"
	@echo "make support       writes docs/support.md from the latest make test-vm FULL=1"
	@echo "make bench-peers   what 5,000 peers take: time and memory (docs/bench/peers.md); VM=1: in the emulator, with the kernel's WireGuard"
	@echo "make bench-directory  what a cluster of 5,000 nodes costs one agent: time, memory, requests (docs/bench/directory.md)"
	@echo "make fuzz          looks for inputs that break a promise, a minute for each kind (TARGET=announcement SECONDS=3600: one, for an hour)"
	@echo "make ebpf          rebuilds the gate's BPF object (nightly Rust, LLVM)"
	@echo "make build         target/release/shroud"

build:
	@scripts/setup.sh build
	cargo build --release --locked --package shroud

demo demo-k8s:
	@scripts/setup.sh demo
	@cargo build --release --locked --package shroud --package shroud-lab
	@target/release/demo --shroud target/release/shroud --result target/$@/result.json $(if $(KEEP),--keep) $(if $(filter demo-k8s,$@),--kubernetes)

test:
	@scripts/test.sh

test-faults:
	@scripts/setup.sh test
	@cargo test --release --locked --package shroud --test faults -- --all $(if $(ROW),--row $(ROW)) $(if $(SEED),--seed $(SEED))

test-vm:
	@FULL=$(FULL) scripts/test-vm.sh

support:
	@scripts/test-vm.sh --support

bench-peers:
ifdef VM
	@scripts/test-vm.sh --bench
else
	@scripts/setup.sh demo
	@cargo bench --locked --package shroud-tunnel --bench peers
endif

bench-directory:
	@scripts/setup.sh demo
	@cargo bench --locked --package shroud --bench directory

fuzz:
	@scripts/fuzz.sh "$(TARGET)" "$(SECONDS)"

ebpf:
	@scripts/setup.sh build
	@ebpf/build.sh
