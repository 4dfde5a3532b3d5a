//! The search for the largest packet that gets to one peer, after the ideas of RFC 8899. Pure: no socket, and time is an argument.
//!
//! ```text
//!             answered                      lost 3 times, small ones answered, twice
//!  ┌─────────────────────────┐   ┌─────────────────────────────────────────────────┐
//!  └─> Confirm (every 10 s) ─┘   └──> Search (halving) ──> Confirm the size found ──┘
//!          │  lost 3 times, small ones too: silent, nothing changes
//!          └─ every 5 minutes, when less than planned: one byte more? then Search above
//! ```

use std::time::Duration;

use shroud_model::Mtu;

use super::PathState;

/// How often a size that works is confirmed.
pub(super) const CONFIRM: Duration = Duration::from_secs(10);

/// How long after a reduction a larger size is tried.
pub(super) const RAISE: Duration = Duration::from_secs(300);

/// How many probes of one size must be lost in a row before it counts as lost (`MAX_PROBES`, RFC 8899 §5.1.2).
const ATTEMPTS: u8 = 3;

/// How often a size that worked must be found too large, small ones being answered in between, before it is believed. An outage that ends
/// just between the large and the small probe looks the same once.
const DOUBTS: u8 = 2;

/// What is known about the path to one peer, and what is tried next. One probe is under way at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Search {
    planned: u32,
    floor: u32,
    /// The largest packet that counts as good.
    mtu: u32,
    goal: Goal,
    /// Whether it is the small size's turn, to tell "too large" from "nobody there".
    asks_small: bool,
    /// Probes of the present size lost in a row.
    misses: u8,
    raise_at: Duration,
    state: PathState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    /// That `mtu` still works.
    Confirm { doubts: u8 },
    /// The border between what works and what does not.
    Between { works: u32, too_large: u32 },
    /// Whether one byte more than `mtu` works by now.
    Raise,
}

impl Search {
    /// Begins by taking the planned size for good. `floor` is what every path carries; no smaller size is ever tried.
    pub(super) fn new(planned: Mtu, floor: Mtu) -> Self {
        Self {
            planned: planned.bytes(),
            floor: floor.min(planned).bytes(),
            mtu: planned.bytes(),
            goal: Goal::Confirm { doubts: 0 },
            asks_small: false,
            misses: 0,
            raise_at: Duration::ZERO,
            state: PathState::Unknown,
        }
    }

    /// Plans for another size from now on, and answers whether it is another. What was found out about a path that carries less stays.
    pub(super) fn plan(&mut self, planned: Mtu, floor: Mtu) -> bool {
        if planned.bytes() == self.planned {
            return false;
        }
        let mtu = if self.mtu < self.planned {
            self.mtu
        } else {
            planned.bytes()
        };
        *self = Self {
            mtu: mtu.min(planned.bytes()),
            state: self.state,
            ..Self::new(planned, floor)
        };
        true
    }

    /// The largest packet that counts as good.
    pub(super) fn mtu(&self) -> Mtu {
        // Never below the floor, which is one, nor above the plan, which is one.
        Mtu::new(self.mtu).unwrap_or(Mtu::MINIMUM)
    }

    pub(super) const fn state(&self) -> PathState {
        self.state
    }

    /// The size of the next probe: the whole packet with its IP header, in bytes.
    pub(super) const fn size(&self) -> u32 {
        if self.asks_small { self.small() } else { self.large() }
    }

    const fn large(&self) -> u32 {
        match self.goal {
            Goal::Confirm { .. } => self.mtu,
            Goal::Between { works, too_large } => works.midpoint(too_large),
            Goal::Raise => self.mtu + 1,
        }
    }

    /// A size that should work if the peer is there.
    const fn small(&self) -> u32 {
        match self.goal {
            Goal::Confirm { .. } => self.floor,
            Goal::Between { works, .. } => works,
            Goal::Raise => self.mtu,
        }
    }

    /// The probe was answered. Returns how long to wait before the next one.
    pub(super) fn answered(&mut self, now: Duration) -> Duration {
        self.misses = 0;
        if self.asks_small {
            self.asks_small = false;
            return self.too_large(now);
        }
        match self.goal {
            Goal::Confirm { .. } => self.confirmed(self.mtu, now),
            Goal::Between { too_large, works } => self.between(works.midpoint(too_large), too_large, now),
            Goal::Raise => self.between(self.mtu + 1, self.planned + 1, now),
        }
    }

    /// The probe was lost. Returns how long to wait before the next one.
    pub(super) fn lost(&mut self) -> Duration {
        self.misses += 1;
        if self.misses < ATTEMPTS {
            return Duration::ZERO;
        }
        self.misses = 0;
        if !self.asks_small && self.small() < self.large() {
            self.asks_small = true;
            return Duration::ZERO;
        }
        // Nobody answers at all: that says nothing about sizes.
        self.asks_small = false;
        self.goal = Goal::Confirm { doubts: 0 };
        self.state = PathState::Silent;
        CONFIRM
    }

    /// The large size is lost while a small one is answered.
    fn too_large(&mut self, now: Duration) -> Duration {
        match self.goal {
            Goal::Confirm { doubts } if doubts + 1 < DOUBTS => {
                self.goal = Goal::Confirm { doubts: doubts + 1 };
                Duration::ZERO
            }
            Goal::Confirm { .. } => self.between(self.floor, self.mtu, now),
            Goal::Between { works, too_large } => self.between(works, works.midpoint(too_large), now),
            Goal::Raise => self.confirmed(self.mtu, now),
        }
    }

    /// Narrows the search, or ends it.
    fn between(&mut self, works: u32, too_large: u32, now: Duration) -> Duration {
        if too_large - works <= 1 {
            return self.confirmed(works, now);
        }
        self.goal = Goal::Between { works, too_large };
        self.state = PathState::Searching;
        Duration::ZERO
    }

    fn confirmed(&mut self, mtu: u32, now: Duration) -> Duration {
        let searched = !matches!(self.goal, Goal::Confirm { .. });
        if mtu != self.mtu || searched {
            self.raise_at = now + RAISE;
        }
        self.mtu = mtu;
        self.goal = if mtu < self.planned && now >= self.raise_at {
            Goal::Raise
        } else {
            Goal::Confirm { doubts: 0 }
        };
        self.state = if mtu < self.planned {
            PathState::Reduced
        } else {
            PathState::Confirmed
        };
        CONFIRM
    }
}

#[cfg(test)]
mod tests;
