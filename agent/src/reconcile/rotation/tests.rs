//! Two nodes that change their keys as they like, and hear of each other late: what one sends, the other takes.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use shroud_keyd::PublicKeys;
use shroud_model::PrivateKey;

use super::*;
use crate::config::Interval;
use crate::plan::LaneDevice;
use crate::plan::tests::World;

/// What happens next, to one of the two.
#[derive(Debug, Clone, Copy)]
enum Happening {
    /// It makes a key to come.
    Prepare(usize),
    /// It hears what the other says of itself.
    Hear(usize),
    /// Its agent makes a pass.
    Pass(usize),
    /// Its agent ends and is started anew.
    Restart(usize),
    /// Some seconds go by.
    Wait(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    let node = 0usize..2;
    prop_oneof![
        1 => node.clone().prop_map(Happening::Prepare),
        3 => node.clone().prop_map(Happening::Hear),
        6 => node.clone().prop_map(Happening::Pass),
        1 => node.prop_map(Happening::Restart),
        4 => (1u64..40).prop_map(Happening::Wait),
    ]
}

struct Node {
    world: World,
    rotation: Rotation,
    /// As the last pass left it in the kernel.
    plan: Plan,
    /// What it says of itself: the keys as the last pass had them.
    says: PublicKeys,
    /// What has come in so far, by tunnel.
    received: BTreeMap<(Lane, PublicKey), u64>,
}

/// Two nodes that know each other.
struct Two {
    nodes: [Node; 2],
    now: Instant,
    keys_made: u8,
}

fn key(number: u8, epoch: u64) -> NodeKey {
    NodeKey {
        private: Arc::new(PrivateKey::from_bytes([number; 32])),
        public: PublicKey::from_bytes([number; 32]).unwrap(),
        epoch,
        since: SystemTime::UNIX_EPOCH,
    }
}

impl Two {
    fn new(keepalive: u64) -> Self {
        let now = Instant::now();
        let node = |own: u8, peer: u8| {
            let mut world = World::new().peer("b", peer, &["172.18.0.2"], &["10.244.2.0/24"]);
            world.config.encryption.keepalive = Interval::from_secs(keepalive);
            world.keys.current = key(own, 1);
            Node {
                plan: world.plan(),
                says: world.keys.public(),
                rotation: Rotation::new(now),
                received: BTreeMap::new(),
                world,
            }
        };
        Self {
            nodes: [node(2, 3), node(3, 2)],
            now,
            keys_made: 3,
        }
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Prepare(node) => {
                let this = &mut self.nodes[node];
                let keys = &mut this.world.keys;
                if keys.next.is_none() && may_begin(keys, &this.plan, &this.world.surroundings) {
                    self.keys_made += 1;
                    keys.next = Some(key(self.keys_made, keys.current.epoch + 1));
                    this.rotation.begin(self.now);
                }
            }
            Happening::Hear(node) => {
                let PublicKeys { current, next } = self.nodes[1 - node].says;
                let peers = &mut self.nodes[node].world.snapshot.peers;
                let peer = Arc::make_mut(peers.values_mut().next().unwrap());
                (peer.public_key, peer.epoch, peer.next_key) = (current.public_key, current.epoch, next);
            }
            Happening::Pass(node) => self.pass(node),
            Happening::Restart(node) => self.nodes[node].rotation = Rotation::new(self.now),
            Happening::Wait(seconds) => {
                for _ in 0..seconds {
                    self.now += Duration::from_secs(1);
                    self.everybody_sends();
                }
            }
        }
    }

    fn everybody_sends(&mut self) {
        for sender in 0..2 {
            let (lane, own, _) = self.nodes[sender].sends();
            *self.nodes[1 - sender].received.entry((lane.there(), own)).or_default() += 1;
        }
    }

    fn pass(&mut self, node: usize) {
        let (one, other) = self.nodes.split_at_mut(1);
        let (this, other) = match node {
            0 => (&mut one[0], &other[0]),
            _ => (&mut other[0], &one[0]),
        };
        let tunnels: BTreeSet<(Lane, PublicKey)> = this.tunnels().collect();
        let surroundings = &mut this.world.surroundings;
        surroundings.lanes = (this.plan.tunnels.keys().zip(7..))
            .map(|(lane, index)| {
                (
                    *lane,
                    LaneDevice {
                        index,
                        has_our_key: true,
                    },
                )
            })
            .collect();
        // A handshake is not forgotten when the other end is gone.
        surroundings.met.retain(|tunnel| tunnels.contains(tunnel));
        let shaken = tunnels
            .iter()
            .filter(|(lane, peer)| other.takes(lane.there(), *peer, this.plan.tunnels[lane].public_key));
        surroundings.met.extend(shaken.copied());
        let heard = tunnels
            .iter()
            .map(|tunnel| (*tunnel, this.received.get(tunnel).copied().unwrap_or(0)));
        this.rotation.heard(heard.collect(), self.now);

        this.plan = this.world.plan();
        let keys = &this.world.keys;
        let progress = this
            .rotation
            .progress(&this.world.config, keys, &this.plan, &this.world.surroundings, self.now);
        if let Some(next) = keys.next.clone().filter(|_| progress.is_done()) {
            this.world.keys = NodeKeys {
                current: next,
                next: None,
            };
            this.rotation.end();
        }
        this.says = this.world.keys.public();
    }

    /// What each sends reaches a device of the other that has the right key and knows the sender's.
    fn all_arrives(&self) -> Result<(), TestCaseError> {
        for sender in 0..2 {
            let (lane, own, peer) = self.nodes[sender].sends();
            prop_assert!(
                self.nodes[1 - sender].takes(lane.there(), peer, own),
                "node {} sends in {:?} with {} to {}",
                sender,
                lane,
                own,
                peer
            );
        }
        Ok(())
    }
}

impl Node {
    /// Lane, own key and peer's key of what is sent.
    fn sends(&self) -> (Lane, PublicKey, PublicKey) {
        let pair = self.plan.peers.values().next().unwrap().pair();
        (pair.lane, pair.own, pair.peer)
    }

    fn tunnels(&self) -> impl Iterator<Item = (Lane, PublicKey)> {
        let lanes = self.plan.tunnels.iter();
        lanes.flat_map(|(lane, tunnel)| tunnel.peers.keys().map(move |peer| (*lane, *peer)))
    }

    /// Whether a packet that was sent to this key of ours, by this key, comes through.
    fn takes(&self, lane: Lane, own: PublicKey, peer: PublicKey) -> bool {
        let tunnel = self.plan.tunnels.get(&lane).filter(|tunnel| tunnel.public_key == own);
        tunnel.is_some_and(|tunnel| tunnel.peers.contains_key(&peer))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whatever_two_nodes_do_with_their_keys_each_takes_what_the_other_sends(
        keepalive in prop_oneof![Just(0u64), Just(1), Just(25)],
        happenings in proptest::collection::vec(happening(), 0..200),
    ) {
        let mut nodes = Two::new(keepalive);
        for what in happenings {
            nodes.happen(what);
            nodes.all_arrives()?;
        }
    }

    #[test]
    fn a_change_of_key_ends_when_both_go_on(
        happenings in proptest::collection::vec(happening(), 0..60),
    ) {
        let mut nodes = Two::new(25);
        for what in happenings {
            nodes.happen(what);
        }
        for _ in 0..40 {
            for what in [Happening::Hear(0), Happening::Hear(1), Happening::Pass(0), Happening::Pass(1), Happening::Wait(5)] {
                nodes.happen(what);
            }
        }
        for node in &nodes.nodes {
            prop_assert!(node.world.keys.next.is_none());
        }
    }
}

#[test]
fn a_key_is_due_at_its_age_a_tenth_sooner_or_later() {
    let mut config = World::new().config;
    let age = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    assert!(!is_due(&config, &key(2, 1), age(u32::MAX.into())), "never is never");

    config.keys.rotate_every = Interval::from_secs(10_000);
    let mut sooner = 0;
    for number in 0..200 {
        config.node = format!("n{number}").parse().unwrap();
        let due = |seconds| is_due(&config, &key(2, 1), age(seconds));
        assert!(!due(8_999) && due(11_000), "{number}");
        sooner += u32::from(due(10_000));
    }
    assert!(
        (50..150).contains(&sooner),
        "{sooner} of 200 are due in the first half of the spread"
    );
}

#[test]
fn who_does_not_answer_is_not_waited_for_and_who_answers_with_the_old_key_is_up_to_a_bound() {
    let mut world = World::new().peer("b", 3, &["172.18.0.2"], &["10.244.2.0/24"]);
    world.keys.next = Some(key(4, 2));
    let begun = Instant::now();
    let rotation = Rotation::new(begun);
    let progress = |world: &World, seconds| {
        let now = begun + Duration::from_secs(seconds);
        rotation.progress(&world.config, &world.keys, &world.plan(), &world.surroundings, now)
    };
    let waits = |progress: &Progress| (progress.waiting.len(), progress.away, progress.is_done());

    assert_eq!(waits(&progress(&world, 59)), (1, 0, false));
    assert_eq!(waits(&progress(&world, 60)), (0, 1, true));

    let old = world.plan().peers.values().next().unwrap().pairs[1];
    world.surroundings.met.insert((old.lane, old.peer));
    assert_eq!(waits(&progress(&world, 60)), (1, 0, false));
    assert_eq!(waits(&progress(&world, 86_399)), (1, 0, false));
    assert_eq!(waits(&progress(&world, 86_400)), (1, 0, true));
}
