use proptest::prelude::*;

use super::*;

/// A path in virtual time.
#[derive(Clone, Copy)]
enum Path {
    Carries(u32),
    Dead,
}

/// The search, and every size it has told so far.
struct Walk {
    search: Search,
    now: Duration,
    told: Vec<u32>,
}

impl Walk {
    fn new(planned: u32, floor: u32) -> Self {
        let search = Search::new(mtu(planned), mtu(floor));
        Self {
            told: vec![search.mtu().bytes()],
            search,
            now: Duration::ZERO,
        }
    }

    /// Lets so much time go by: answers take a millisecond, a loss is noticed after a second.
    fn go(&mut self, path: Path, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let size = self.search.size();
            assert!(size >= self.search.floor && size <= self.search.planned, "{size}");
            let wait = match path {
                Path::Carries(largest) if size <= largest => {
                    self.now += Duration::from_millis(1);
                    self.search.answered(self.now)
                }
                Path::Carries(_) | Path::Dead => {
                    self.now += Duration::from_secs(1);
                    self.search.lost()
                }
            };
            self.now += wait;
            if self.told.last() != Some(&self.search.mtu().bytes()) {
                self.told.push(self.search.mtu().bytes());
            }
        }
    }
}

fn mtu(bytes: u32) -> Mtu {
    Mtu::new(bytes).unwrap()
}

const MINUTE: Duration = Duration::from_secs(60);

type Row = (&'static str, &'static [(Path, u32)], &'static [u32], PathState);

#[test]
fn what_a_path_does_and_what_is_told_of_it() {
    use Path::{Carries, Dead};
    use PathState::{Confirmed, Reduced, Silent};
    // What the path does for how many minutes, what is told of it, and the end.
    let rows: [Row; 8] = [
        ("as planned", &[(Carries(1500), 60)], &[1440], Confirmed),
        ("exactly as planned", &[(Carries(1440), 60)], &[1440], Confirmed),
        ("a byte less", &[(Carries(1439), 2)], &[1440, 1439], Reduced),
        ("a dead peer", &[(Dead, 60)], &[1440], Silent),
        (
            "dead, then as planned",
            &[(Dead, 60), (Carries(1440), 2)],
            &[1440],
            Confirmed,
        ),
        (
            "narrower for a while",
            &[(Carries(1300), 4), (Carries(1440), 12)],
            &[1440, 1300, 1440],
            Confirmed,
        ),
        (
            "narrower, then dead",
            &[(Carries(1300), 4), (Dead, 60)],
            &[1440, 1300],
            Silent,
        ),
        ("narrower than any", &[(Carries(500), 60)], &[1440], Silent),
    ];
    for (name, path, told, state) in rows {
        let mut walk = Walk::new(1440, 576);

        for (path, minutes) in path {
            walk.go(*path, MINUTE * *minutes);
        }

        assert_eq!((walk.told.as_slice(), walk.search.state()), (told, state), "{name}");
    }
}

#[test]
fn a_peer_that_dies_in_the_middle_of_a_search_shrinks_nothing() {
    for seconds in 0..60 {
        let mut walk = Walk::new(1440, 576);

        walk.go(Path::Carries(1300), Duration::from_secs(seconds));
        walk.go(Path::Dead, MINUTE * 10);
        let told = walk.told.clone();

        assert!(
            told == [1440] || told == [1440, 1300],
            "died after {seconds} s: {told:?}"
        );
    }
}

#[test]
fn an_outage_of_any_length_shrinks_nothing() {
    for outage in 0..60 {
        let mut walk = Walk::new(1440, 576);

        walk.go(Path::Carries(1440), MINUTE);
        walk.go(Path::Dead, Duration::from_secs(outage));
        walk.go(Path::Carries(1440), MINUTE * 5);

        assert_eq!(walk.told, [1440], "an outage of {outage} s");
    }
}

#[test]
fn another_plan_keeps_what_is_known_of_a_narrow_path() {
    let mut walk = Walk::new(1440, 576);
    walk.go(Path::Carries(1300), MINUTE * 2);

    walk.search.plan(mtu(1500), mtu(576));
    assert_eq!(walk.search.mtu().bytes(), 1300);
    walk.search.plan(mtu(1200), mtu(576));
    assert_eq!(walk.search.mtu().bytes(), 1200);
    walk.search.plan(mtu(1440), mtu(576));
    assert_eq!(
        walk.search.mtu().bytes(),
        1440,
        "a path that carried all of its plan is believed to carry the next"
    );
}

proptest! {
    /// Whatever the path carries: it is found to the byte within two minutes, with one change, and kept.
    #[test]
    fn every_path_is_found_to_the_byte(planned in 576_u32..=9000, largest in 576_u32..=9000) {
        let mut walk = Walk::new(planned, 576);

        walk.go(Path::Carries(largest), MINUTE * 2);
        let found = walk.search.mtu().bytes();
        walk.go(Path::Carries(largest), MINUTE * 120);

        prop_assert_eq!(found, largest.min(planned));
        prop_assert!(walk.told.len() <= 2, "{:?}", walk.told);
    }

    /// A path that grows again is found too, and never more than it carries is told on the way.
    #[test]
    fn a_path_that_grows_is_found_again(narrow in 576_u32..1440, wide in 576_u32..1500) {
        prop_assume!(wide > narrow);
        let mut walk = Walk::new(1440, 576);

        walk.go(Path::Carries(narrow), MINUTE * 2);
        walk.go(Path::Carries(wide), MINUTE * 10);

        prop_assert_eq!(walk.told, [1440, narrow, wide.min(1440)]);
    }

    /// One probe in twenty is lost, as they come: nothing changes on a path that carries all.
    #[test]
    fn losses_now_and_then_change_nothing(lost in proptest::collection::vec(0_u8..20, 500)) {
        let mut search = Search::new(mtu(1440), mtu(576));
        let mut now = Duration::ZERO;
        let mut in_a_row = 0;

        for die in lost {
            // Three in a row twice over are no longer now and then.
            in_a_row = if die == 0 && in_a_row < 5 { in_a_row + 1 } else { 0 };
            now += if in_a_row > 0 { search.lost() } else { search.answered(now) };

            prop_assert_eq!(search.mtu().bytes(), 1440);
        }
    }
}
