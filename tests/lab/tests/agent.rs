//! The lab drives real agents: they meet, they are killed and come back, and the wire stays free of plaintext throughout.
//!
//! Needs the `shroud` program (`cargo build -p shroud`). Without it each test says so and passes, except under `CI=true`.

#![expect(
    clippy::disallowed_methods,
    reason = "tests look at the kernel through iproute2 on purpose"
)]
#![expect(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::path::PathBuf;
use std::time::Duration;

use shroud_lab::frame::Allowed;
use shroud_lab::traffic::Pulse;
use shroud_lab::{Agent, AgentOptions, Capture, Family, Flow, Lab, Protocol, Topology, agent};

/// Time for a start on a busy machine, the gate's verification by the kernel included.
const START: Duration = Duration::from_secs(30);

#[test]
fn a_killed_agent_leaves_traffic_encrypted_and_undisturbed() {
    let Some(mut mesh) = Mesh::start("agent-dies") else {
        return;
    };

    mesh.agents[0].kill().unwrap();
    mesh.beat(100);
    assert_gap(&mesh, Duration::from_millis(500), "while the agent is dead");
    mesh.agents[0].restart().unwrap();
    mesh.settle();

    mesh.beat(50);
    assert_gap(&mesh, Duration::from_millis(1500), "while the agent restarts");
    mesh.end();
}

#[test]
fn traffic_returns_after_the_death_of_the_data_plane() {
    let Some(mesh) = Mesh::start("wire-dies") else { return };

    let dead = mesh.agents[0].kill_wire().unwrap();

    mesh.lab
        .eventually("another `shroud wire`", Duration::from_secs(10), || {
            match mesh.agents[0].wire() {
                Some(pid) if pid != dead => Ok(()),
                other => Err(format!("{other:?}, the dead one is {dead}")),
            }
        })
        .unwrap();
    mesh.beat(50);
    assert_gap(&mesh, Duration::from_secs(10), "after the death of `shroud wire`");
    mesh.end();
}

#[test]
fn traffic_returns_after_the_loss_of_the_encryption_device() {
    let Some(mesh) = Mesh::start("device-gone") else { return };
    let node = mesh.lab.node("a");

    node.host.netns.ip(&format!("link delete {}", node.device)).unwrap();

    mesh.beat(50);
    assert_gap(&mesh, Duration::from_secs(5), "after the loss of the device");
    mesh.end();
}

#[test]
fn an_agent_ends_on_sigterm_and_its_data_plane_stays() {
    let Some(mut mesh) = Mesh::start("sigterm") else { return };
    let wire = mesh.agents[0].wire();

    let status = mesh.agents[0].terminate(Duration::from_secs(5)).unwrap();

    assert!(status.success(), "{status}");
    assert!(wire.is_some());
    assert_eq!(mesh.agents[0].wire(), wire);
    mesh.beat(50);
    mesh.end();
}

#[test]
fn with_the_gate_off_the_same_capture_finds_the_markers() {
    let Some(shroud) = shroud() else { return };
    let lab = Topology::new("twin").nodes(2).pods(1).build().unwrap();
    let capture = Capture::start(&lab, Allowed::wireguard(agent::LISTEN_PORT, lab.protected())).unwrap();
    let _agents = Agent::start_all(&lab, &AgentOptions::new(shroud).gate("off")).unwrap();
    let flow = Flow::new(Protocol::Icmp, Family::V4, lab.pod("a0"), lab.pod("b0")).patience(Duration::from_millis(500));

    lab.eventually("an answer", START, || {
        let outcome = flow.run(&lab.markers);
        outcome.error.map_or(Ok(()), Err)
    })
    .unwrap();

    let evidence = capture.stop().unwrap();
    assert_eq!(evidence.complete(), Ok(()));
    assert!(evidence.plaintext_bytes() > 0, "{evidence}");
}

/// Two nodes whose agents have met, and connections that talk, under capture from the first moment on.
struct Mesh {
    agents: Vec<Agent>,
    capture: Capture,
    tcp: Pulse,
    udp: Pulse,
    lab: Lab,
}

impl Mesh {
    fn start(name: &str) -> Option<Mesh> {
        let shroud = shroud()?;
        let lab = Topology::new(name).nodes(2).pods(1).build().unwrap();
        let capture = Capture::start(&lab, Allowed::wireguard(agent::LISTEN_PORT, lab.protected())).unwrap();
        let agents = Agent::start_all(&lab, &AgentOptions::new(shroud)).unwrap();
        lab.eventually("handshakes", START, || {
            let greeting = Flow::new(Protocol::Icmp, Family::V4, lab.pod("a0"), lab.pod("b0")).sizes(&[64]);
            greeting.patience(Duration::from_millis(250)).run(&lab.markers);
            agents
                .iter()
                .try_for_each(|agent| agent.status().map_err(|e| format!("{e:#}"))?.met_all(2))
        })
        .unwrap();
        let pulse = |protocol, family| {
            Pulse::start(protocol, family, lab.pod("a0"), lab.pod("b0"), 5, &lab.markers)
                .unwrap_or_else(|error| panic!("{error:#}{}", lab.dump()))
        };
        let (tcp, udp) = (pulse(Protocol::Tcp, Family::V4), pulse(Protocol::Udp, Family::V6));
        let mesh = Mesh {
            agents,
            capture,
            tcp,
            udp,
            lab,
        };
        mesh.settle();
        mesh.beat(20);
        mesh.tcp.forget();
        mesh.udp.forget();
        Some(mesh)
    }

    /// Waits for a healthy agent whose latest pass had nothing to do.
    fn settle(&self) {
        self.lab
            .eventually("a healthy agent with nothing to do", START, || {
                let status = self.agents[0].status().map_err(|error| format!("{error:#}"))?;
                let calm = status.verdict == "healthy" && status.pass.changes == 0;
                if calm {
                    Ok(())
                } else {
                    Err(format!("{}, {:?}", status.summary, status.pass))
                }
            })
            .unwrap();
    }

    /// Waits until every connection has had that many more answers.
    fn beat(&self, count: u64) {
        let echoes = || {
            self.tcp
                .beats()
                .into_iter()
                .chain(self.udp.beats())
                .map(|beat| beat.echoes)
        };
        let goals: Vec<u64> = echoes().map(|echoes| echoes + count).collect();
        self.lab
            .eventually("answers on every connection", Duration::from_secs(30), || {
                let all = echoes().zip(&goals).all(|(echoes, goal)| echoes >= *goal);
                if all {
                    Ok(())
                } else {
                    Err(format!("{:?} {:?}", self.tcp.beats(), self.udp.beats()))
                }
            })
            .unwrap();
    }

    /// Nothing was lost, and nothing was seen.
    fn end(self) {
        assert_eq!((self.tcp.worst().1, self.udp.worst().1), (None, None));
        let evidence = self.capture.stop().unwrap();
        assert!(evidence.clean().is_ok(), "{evidence}{}", self.lab.dump());
        assert!(evidence.frames() > 100, "{evidence}");
    }
}

fn assert_gap(mesh: &Mesh, most: Duration, when: &str) {
    // Only UDP shows the outage itself; TCP adds its backoff.
    let (gap, _) = mesh.udp.worst();
    println!("longest gap {when}: UDP {gap:?}, TCP {:?}", mesh.tcp.worst().0);
    assert!(gap < most, "{gap:?} {when}{}", mesh.lab.dump());
}

fn shroud() -> Option<PathBuf> {
    match agent::program() {
        Ok(path) => Some(path),
        Err(error) if std::env::var_os("CI").is_none() => {
            eprintln!("SKIPPED: {error:#}");
            None
        }
        Err(error) => panic!("{error:#}"),
    }
}
