//! Who may make us do the expensive arithmetic of a handshake.
//!
//! ```text
//! handshake ─ mac1 right? ─no─> drop
//!                 │yes
//!     source and device below their rates? ─yes─> accept
//!                 │no
//!     carries our cookie (mac2)? ─no─> answer with a cookie
//!                 │yes: the address is proven
//!     proven address below its rate? ─no─> drop ─yes─> accept
//! ```
//!
//! A flood from one address thus costs that address alone, and a flood of forged addresses costs an honest peer one cookie
//! (WireGuard whitepaper §5.3), never its connection.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use boringtun::noise::TunnResult;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;

/// Length of a cookie reply, in bytes.
pub(crate) const COOKIE_REPLY: usize = 64;

/// Handshakes per second and at once, from one IPv4 address or one IPv6 /64. The kernel's numbers (drivers/net/wireguard/ratelimiter.c).
const PER_SOURCE: Rate = Rate {
    per_second: 20,
    burst: 5,
};
/// Handshakes per second on the whole device: about a fifth of one slow core.
const PER_DEVICE: Rate = Rate {
    per_second: 1000,
    burst: 1000,
};
/// Sources remembered at a time. The kernel's order of magnitude; about 5 MiB when full.
const SOURCES: usize = 1 << 16;

/// What to do with a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Work on it.
    Accept,
    /// Send back the cookie reply that was written into the buffer.
    Challenge,
    /// Forget it.
    Drop,
}

/// The state of the decision above, for one identity of the device.
pub(crate) struct HandshakeLimit {
    /// Never under load: checks mac1 and nothing else.
    mac1: RateLimiter,
    /// Always under load: accepts nothing without a cookie.
    cookie: RateLimiter,
    claimed: SourceLimiter,
    proven: SourceLimiter,
    device: Bucket,
}

impl HandshakeLimit {
    pub(crate) fn new(public: &x25519::PublicKey, now: Instant) -> Self {
        Self {
            mac1: RateLimiter::new(public, u64::MAX),
            cookie: RateLimiter::new(public, 0),
            claimed: SourceLimiter::new(PER_SOURCE, SOURCES),
            proven: SourceLimiter::new(PER_SOURCE, SOURCES),
            device: Bucket::full(PER_DEVICE, now),
        }
    }

    /// Decides over a handshake initiation or response that came from `source`.
    pub(crate) fn admit(
        &mut self,
        message: &[u8],
        source: IpAddr,
        now: Instant,
        reply: &mut [u8; COOKIE_REPLY],
    ) -> Admission {
        if self.mac1.verify_packet(Some(source), message, reply).is_err() {
            return Admission::Drop;
        }
        if self.claimed.allow(source, now) && self.device.take(PER_DEVICE, now) {
            return Admission::Accept;
        }
        match self.cookie.verify_packet(Some(source), message, reply) {
            Ok(_) if self.proven.allow(source, now) => Admission::Accept,
            Err(TunnResult::WriteToNetwork(_)) => Admission::Challenge,
            Ok(_) | Err(_) => Admission::Drop,
        }
    }

    /// Forgets sources that have been quiet; call it about once a second.
    pub(crate) fn sweep(&mut self, now: Instant) {
        self.claimed.sweep(now);
        self.proven.sweep(now);
    }
}

/// How fast a bucket fills, and how much it holds.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: u32,
    burst: u32,
}

impl Rate {
    /// The time in which one token grows.
    fn cost(self) -> Duration {
        Duration::from_secs(1) / self.per_second
    }

    /// The time in which an empty bucket fills.
    fn fill(self) -> Duration {
        self.cost() * self.burst
    }
}

/// A token bucket, as one moment: the time at which it was (or will be) empty. Its content is the time passed since.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    empty_at: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self {
            empty_at: now.checked_sub(rate.fill()).unwrap_or(now),
        }
    }

    /// Takes a token if there is one.
    fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let content = now.saturating_duration_since(self.empty_at).min(rate.fill());
        let Some(rest) = content.checked_sub(rate.cost()) else {
            return false;
        };
        self.empty_at = now.checked_sub(rest).unwrap_or(now);
        true
    }
}

/// A token bucket for each source, of which there are never more than a fixed number.
struct SourceLimiter {
    rate: Rate,
    capacity: usize,
    buckets: BTreeMap<Source, Bucket>,
}

/// What counts as one source: an IPv4 address, or an IPv6 /64, because that much anybody gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    V4(u32),
    V6(u64),
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => Self::V6((address.to_bits() >> 64) as u64),
        }
    }
}

impl SourceLimiter {
    fn new(rate: Rate, capacity: usize) -> Self {
        Self {
            rate,
            capacity,
            buckets: BTreeMap::new(),
        }
    }

    /// Whether `source` has a token left; takes it. A new source is turned away while the table is full.
    fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        let source = Source::from(source);
        if let Some(bucket) = self.buckets.get_mut(&source) {
            return bucket.take(self.rate, now);
        }
        if self.buckets.len() >= self.capacity {
            return false;
        }
        let mut bucket = Bucket::full(self.rate, now);
        let allowed = bucket.take(self.rate, now);
        self.buckets.insert(source, bucket);
        allowed
    }

    /// Drops the buckets that are full again: they say nothing a new one would not.
    fn sweep(&mut self, now: Instant) {
        let fill = self.rate.fill();
        self.buckets
            .retain(|_, bucket| now.saturating_duration_since(bucket.empty_at) < fill);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: Rate = Rate {
        per_second: 20,
        burst: 5,
    };

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A start that is far from the clock's own beginning, so that times before it exist.
    fn start() -> Instant {
        Instant::now() + Duration::from_secs(1000)
    }

    #[test]
    fn a_burst_of_five_then_twenty_a_second() {
        let mut limiter = SourceLimiter::new(RATE, 10);
        let start = start();
        let source = address("192.0.2.1");

        let at_once = (0..100).filter(|_| limiter.allow(source, start)).count();
        let next_second = (1..=1000)
            .filter(|&ms| limiter.allow(source, start + Duration::from_millis(ms)))
            .count();

        let after_an_hour = (0..100)
            .filter(|_| limiter.allow(source, start + Duration::from_secs(3600)))
            .count();

        assert_eq!((at_once, next_second, after_an_hour), (5, 20, 5));
    }

    #[test]
    fn one_source_does_not_spend_another_ones_tokens() {
        let mut limiter = SourceLimiter::new(RATE, 10);
        let now = start();
        while limiter.allow(address("192.0.2.1"), now) {}

        assert!(limiter.allow(address("192.0.2.2"), now));
        assert!(!limiter.allow(address("::ffff:192.0.2.1"), now));
    }

    #[test]
    fn an_ipv6_source_is_a_64() {
        let mut limiter = SourceLimiter::new(RATE, 10);
        let now = start();
        while limiter.allow(address("2001:db8::1"), now) {}

        assert!(!limiter.allow(address("2001:db8::ffff"), now));
        assert!(limiter.allow(address("2001:db8:0:1::1"), now));
    }

    #[test]
    fn a_full_table_turns_new_sources_away_until_it_is_swept() {
        let mut limiter = SourceLimiter::new(RATE, 2);
        let now = start();
        assert!(limiter.allow(address("192.0.2.1"), now));
        assert!(limiter.allow(address("192.0.2.2"), now));
        assert!(!limiter.allow(address("192.0.2.3"), now));

        limiter.sweep(now + Duration::from_secs(1));

        assert!(limiter.allow(address("192.0.2.3"), now + Duration::from_secs(1)));
        assert_eq!(limiter.buckets.len(), 1);
    }

    #[test]
    fn a_source_over_its_rate_gets_through_with_a_cookie_at_its_rate() {
        let secret = x25519::StaticSecret::from([1; 32]);
        let public = x25519::PublicKey::from(&secret);
        let now = start();
        let source = address("192.0.2.1");
        let mut limit = HandshakeLimit::new(&public, now);
        let mut initiator = boringtun::noise::Tunn::new([2; 32].into(), public, None, None, 7, None);
        let mut initiation = || {
            let mut buffer = [0; 148];
            assert!(matches!(
                initiator.format_handshake_initiation(&mut buffer, true),
                TunnResult::WriteToNetwork(_)
            ));
            buffer
        };
        let mut reply = [0; COOKIE_REPLY];
        let mut forged = initiation();
        forged[120] ^= 1;
        assert_eq!(limit.admit(&forged, source, now, &mut reply), Admission::Drop);

        for _ in 0..5 {
            assert_eq!(limit.admit(&initiation(), source, now, &mut reply), Admission::Accept);
        }
        assert_eq!(
            limit.admit(&initiation(), source, now, &mut reply),
            Admission::Challenge
        );

        assert!(matches!(
            initiator.decapsulate(None, &reply, &mut [0; 256]),
            TunnResult::Done
        ));
        let mut initiation = || {
            let mut buffer = [0; 148];
            assert!(matches!(
                initiator.format_handshake_initiation(&mut buffer, true),
                TunnResult::WriteToNetwork(_)
            ));
            buffer
        };
        assert_eq!(
            limit.admit(&initiation(), address("192.0.2.1"), now, &mut reply),
            Admission::Accept
        );
        let accepted = (0..100)
            .filter(|_| limit.admit(&initiation(), source, now, &mut reply) == Admission::Accept)
            .count();
        assert_eq!(accepted, 4);
        while limit.claimed.allow(address("192.0.2.2"), now) {}
        assert_eq!(
            limit.admit(&initiation(), address("192.0.2.2"), now, &mut reply),
            Admission::Challenge
        );
    }

    proptest! {
        /// In any window that begins at the first packet, a source gets its burst plus what grew since, never a packet more.
        #[test]
        fn a_source_never_gets_more_than_its_rate(gaps in prop::collection::vec(0u64..200, 1..200), sweep_every in 1usize..10) {
            let mut limiter = SourceLimiter::new(RATE, 4);
            let start = start();
            let mut now = start;
            let mut allowed = 0;

            for (count, gap) in gaps.into_iter().enumerate() {
                now += Duration::from_millis(gap);
                allowed += u128::from(limiter.allow(address("192.0.2.1"), now));
                if count % sweep_every == 0 {
                    limiter.sweep(now);
                }
                let grown = (now - start).as_millis() * 20 / 1000;
                prop_assert!(allowed <= 5 + grown, "{allowed} allowed after {:?}", now - start);
            }
        }
    }
}
